// The stem, a band of rows of its result at a time. What lies between the convolutions is the largest image of the network by
// far; of it a band needs a few rows, which never leave the cache.

#include "stem.h"

#include <atomic>

#include "interface.h"
#include "memory.h"
#include "patches.h"
#include "threads.h"

namespace {

// Of the patches that the second convolution multiplies, per band.
constexpr int64_t BAND_BYTES = 1 << 20;
// Fewer would leave threads idle. It does not depend on their number: how many pixels are multiplied together shows in the
// last bit.
constexpr int64_t LEAST_BANDS = 8;

// One stem and the sizes that follow from it.
struct Call {
    const Stem& p;
    int64_t threads;
    const float* weight2;  // (outputs, 3, 3, middle)
    std::atomic<bool>* failed;
    int64_t middle_height, middle_width, rows, columns, band, bands;

    Call(const Stem& p, std::atomic<bool>* failed) : p(p), threads(p.threads), weight2(nullptr), failed(failed) {
        middle_height = divide_up(p.height, p.stride1), middle_width = divide_up(p.width, p.stride1);
        rows = divide_up(middle_height, p.stride2), columns = divide_up(middle_width, p.stride2);
        band = BAND_BYTES / (columns * TAPS_OF_PATCH * p.middle * int64_t(sizeof(float)));
        int64_t most = divide_up(rows * p.batch, LEAST_BANDS);
        if (band > most) band = most;
        if (band < 1) band = 1;
        bands = divide_up(rows, band);
    }

    int64_t middle_rows() const { return (band - 1) * p.stride2 + SIDE; }
    int64_t small_patches() const { return middle_rows() * middle_width * TAPS_OF_PATCH * p.channels; }
    int64_t middle_values() const { return middle_rows() * middle_width * p.middle; }
    int64_t large_patches() const { return band * columns * TAPS_OF_PATCH * p.middle; }
    size_t scratch() const { return (small_patches() + middle_values() + large_patches()) * sizeof(float); }
};

bool multiply(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t in, int64_t out) {
    Product call{};
    call.rows = rows, call.inputs = in, call.outputs = out, call.x = x, call.weight = weight, call.bias = bias;
    call.y = y, call.threads = 1;
    return !vmamba_linear(&call);
}

bool normalise(float* y, const float* weight, const float* bias, float eps, int64_t rows, int64_t channels) {
    Layer call{};
    call.x = y, call.y = y, call.width = rows, call.channels = channels, call.weight = weight, call.bias = bias;
    call.eps = eps, call.threads = 1;
    return !vmamba_layer_norm(&call);
}

bool activate(float* y, int64_t values) {
    Layer call{};
    call.x = y, call.y = y, call.channels = values, call.threads = 1;
    return !vmamba_gelu(&call);
}

// Patches (columns, channels, 3, 3) of one row of the first convolution's result.
void gather_planes(const Call& c, const float* image, int64_t row, float* patches) {
    const Stem& p = c.p;
    for (int64_t channel = 0; channel < p.channels; channel++) {
        for (int64_t a = 0; a < SIDE; a++) {
            int64_t from = row * p.stride1 - 1 + a;
            const float* line = image + (channel * p.height + from) * p.width;
            float* to = patches + channel * TAPS_OF_PATCH + a * SIDE;
            bool inside = from >= 0 && from < p.height;
            int64_t step = p.channels * TAPS_OF_PATCH, last = c.middle_width - 1;
            auto take = [&](int64_t j) {
                for (int64_t b = 0; b < SIDE; b++) {
                    int64_t column = j * p.stride1 - 1 + b;
                    to[j * step + b] = inside && column >= 0 && column < p.width ? line[column] : 0;
                }
            };
            take(0), take(last);
            for (int64_t j = 1; inside && j < last; j++) {
                for (int64_t b = 0; b < SIDE; b++) to[j * step + b] = line[j * p.stride1 - 1 + b];
            }
            for (int64_t j = 1; !inside && j < last; j++) {
                for (int64_t b = 0; b < SIDE; b++) to[j * step + b] = 0;
            }
        }
    }
}

void run_band(const Call& c, int64_t task, float* memory) {
    const Stem& p = c.p;
    int64_t image = task / c.bands, first = task % c.bands * c.band;
    int64_t end = first + c.band < c.rows ? first + c.band : c.rows;
    int64_t from = first * p.stride2 - 1, to = (end - 1) * p.stride2 + 2;  // rows in between
    if (from < 0) from = 0;
    if (to > c.middle_height) to = c.middle_height;
    float *small = memory, *middle = small + c.small_patches(), *large = middle + c.middle_values();

    const float* x = p.x + image * p.channels * p.height * p.width;
    int64_t small_size = p.channels * TAPS_OF_PATCH, large_size = p.middle * TAPS_OF_PATCH;
    for (int64_t row = from; row < to; row++) gather_planes(c, x, row, small + (row - from) * c.middle_width * small_size);
    int64_t pixels = (to - from) * c.middle_width;
    bool done = multiply(small, p.weight1, p.bias1, middle, pixels, small_size, p.middle) &&
                normalise(middle, p.norm1_weight, p.norm1_bias, p.norm1_eps, pixels, p.middle) &&
                activate(middle, pixels * p.middle);

    for (int64_t row = first; row < end; row++) {
        for (int64_t column = 0; column < c.columns; column++) {
            float* patch = large + ((row - first) * c.columns + column) * large_size;
            int64_t top = row * p.stride2 - 1, left = column * p.stride2 - 1;
            gather_patch(middle, from, c.middle_height, c.middle_width, p.middle, top, left, patch);
        }
    }
    pixels = (end - first) * c.columns;
    float* y = p.y + (image * c.rows + first) * c.columns * p.outputs;
    done = done && multiply(large, c.weight2, p.bias2, y, pixels, large_size, p.outputs) &&
           normalise(y, p.norm2_weight, p.norm2_bias, p.norm2_eps, pixels, p.outputs);
    if (!done) *c.failed = true;
}

}  // namespace

int32_t run_stem(const Stem& p) {
    std::atomic<bool> failed{false};
    Call call(p, &failed);
    Memory memory;
    int64_t size = p.middle * TAPS_OF_PATCH, place = memory.piece(p.outputs * size * int64_t(sizeof(float)));
    char* base = memory.obtain();
    if (!base) return 1;
    float* weight = reinterpret_cast<float*>(base + place);
    for (int64_t i = 0; i < p.outputs; i++) as_patch(p.weight2 + i * size, p.middle, weight + i * size);
    call.weight2 = weight;
    return !share<Call>(call, p.batch * call.bands, call.scratch(), run_band) || failed;
}
