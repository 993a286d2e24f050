// Adds the 3×3 convolution of an enlarged map, whose products with the weight were taken before it was enlarged, for one
// instruction set: compiled once for each, as scan.cpp is, and under the same rules.
//
// A task is a row of y. Down first: the coarse rows around each of the three taps' rows become one line for each of the three
// horizontal taps. Then across: a pixel takes from each line the two coarse pixels around that tap's column.

#include <cstdint>
#include <cstring>

#include "enlarging.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"

constexpr int SIDE = 3;  // of the convolution

// Between which coarse pixels a tap lies, and how much it takes of each; in the padding it takes nothing.
struct Tap {
    int64_t low, high;
    float of_low, of_high;

    Tap(int64_t place, int64_t size, int64_t coarse_size) : low(0), high(0), of_low(0), of_high(0) {
        if (place < 0 || place >= size) return;
        float at = (float(place) + 0.5f) * (float(coarse_size) / float(size)) - 0.5f;
        if (at < 0) at = 0;
        low = smaller(int64_t(at), coarse_size - 1);
        high = smaller(low + 1, coarse_size - 1);
        of_high = at - float(low);
        of_low = 1.0f - of_high;
    }
};

size_t scratch(const Enlarging& p) { return SIDE * p.columns * p.count * sizeof(float); }

void add(const Enlarging& p, int64_t task, float* lines) {
    int64_t image = task / p.height, row = task % p.height, row_size = p.columns * SIDE * SIDE * p.count;
    const float* z = p.z + image * p.rows * row_size;
    Tap down[SIDE] = {{row - 1, p.height, p.rows}, {row, p.height, p.rows}, {row + 1, p.height, p.rows}};
    for (int64_t i = 0; i < p.columns * SIDE; i++) {  // pixels, and horizontal taps of each
        int64_t column = i / SIDE, tap = i % SIDE;
        float* line = lines + (tap * p.columns + column) * p.count;
        const float* from = z + (column * SIDE * SIDE + tap) * p.count;
        each_vector(p.count, [&](int64_t j, int64_t valid, auto kind) {
            Floats sum = {};
            for (int k = 0; k < SIDE; k++) {
                const float* at = from + k * SIDE * p.count + j;
                sum += load_part<kind.FULL>(at + down[k].low * row_size, valid) * down[k].of_low;
                sum += load_part<kind.FULL>(at + down[k].high * row_size, valid) * down[k].of_high;
            }
            store_part<kind.FULL>(line + j, sum, valid);
        });
    }
    for (int64_t column = 0; column < p.width; column++) {
        float* y = p.y + (task * p.width + column) * p.channels + p.first;
        Tap across[SIDE] = {{column - 1, p.width, p.columns}, {column, p.width, p.columns}, {column + 1, p.width, p.columns}};
        each_vector(p.count, [&](int64_t j, int64_t valid, auto kind) {
            Floats sum = load_part<kind.FULL>(y + j, valid);
            for (int k = 0; k < SIDE; k++) {
                const float* line = lines + k * p.columns * p.count + j;
                sum += load_part<kind.FULL>(line + across[k].low * p.count, valid) * across[k].of_low;
                sum += load_part<kind.FULL>(line + across[k].high * p.count, valid) * across[k].of_high;
            }
            store_part<kind.FULL>(y + j, sum, valid);
        });
    }
}

}  // namespace

extern const EnlargingKernels enlarging;
const EnlargingKernels enlarging = {scratch, add};

}  // namespace VMAMBA_ISA
