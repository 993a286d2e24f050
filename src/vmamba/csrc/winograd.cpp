// Winograd's 3×3 convolution, F(4×4, 3×3), for one instruction set: compiled once for each, as scan.cpp is, and under the
// same rules (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016).
//
// A tile of 4×4 results comes from 6×6 pixels. Both these and the filters are transformed into 36 numbers a channel, which
// are multiplied number by number, summed over the channels, and transformed back: a quarter of the multiplications. The
// sums are 36 products of matrices; those of a few tiles and a panel of filters stay in the cache until they have been
// transformed back.
//
// The transforms evaluate polynomials at 0, ±P, ±Q and infinity. What a value comes to does not depend on how the work was
// split into tasks.

#include <cstdint>
#include <cstring>

#include "convolution.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"
#include "panel.h"

constexpr int RESULTS = SIDE_OF_TILE, FILTER = 3, PIXELS = RESULTS + FILTER - 1, NUMBERS = PIXELS * PIXELS;
static_assert(NUMBERS == NUMBERS_OF_TILE, "what convolution.cpp makes room for");
constexpr float P = 0.625f, Q = 1.5f, P2 = P * P, Q2 = Q * Q;  // the sums' errors are smallest near these
constexpr int64_t TILES_OF_TASK = 48;
constexpr int64_t CHANNELS_OF_SUM = 128;  // are added up on their own, for the sake of rounding

// --- transforms of a row or column -----------------------------------------------------------------------------------

inline void transform_pixels(Floats* d, int step) {
    auto at = [&](int i) { return d[i * step]; };
    Floats first = P2 * Q2 * at(0) - (P2 + Q2) * at(2) + at(4), last = P2 * Q2 * at(1) - (P2 + Q2) * at(3) + at(5);
    Floats even_p = at(4) - Q2 * at(2), odd_p = P * (at(3) - Q2 * at(1));
    Floats even_q = at(4) - P2 * at(2), odd_q = Q * (at(3) - P2 * at(1));
    d[0] = first;
    d[step] = even_p + odd_p;
    d[2 * step] = even_p - odd_p;
    d[3 * step] = even_q + odd_q;
    d[4 * step] = even_q - odd_q;
    d[5 * step] = last;
}

inline void transform_filter(const Floats* g, int step, Floats* u, int to_step) {
    constexpr float AT_0 = 1 / (P2 * Q2), AT_P = 1 / (2 * P2 * (P2 - Q2)), AT_Q = 1 / (2 * Q2 * (Q2 - P2));
    Floats even_p = AT_P * (g[0] + P2 * g[2 * step]), odd_p = AT_P * P * g[step];
    Floats even_q = AT_Q * (g[0] + Q2 * g[2 * step]), odd_q = AT_Q * Q * g[step];
    u[0] = AT_0 * g[0];
    u[to_step] = even_p + odd_p;
    u[2 * to_step] = even_p - odd_p;
    u[3 * to_step] = even_q + odd_q;
    u[4 * to_step] = even_q - odd_q;
    u[5 * to_step] = g[2 * step];
}

inline void transform_sums(const Floats* m, int step, Floats* y, int to_step) {
    auto at = [&](int i) { return m[i * step]; };
    Floats even_p = at(1) + at(2), odd_p = at(1) - at(2), even_q = at(3) + at(4), odd_q = at(3) - at(4);
    y[0] = at(0) + even_p + even_q;
    y[to_step] = P * odd_p + Q * odd_q;
    y[2 * to_step] = P2 * even_p + Q2 * even_q;
    y[3 * to_step] = P * P2 * odd_p + Q * Q2 * odd_q + at(5);
}

// --- tasks -----------------------------------------------------------------------------------------------------------

// Numbers of the filters as panels (outputs / PANEL, NUMBERS, channels, PANEL).
int64_t weight_floats(const Convolution& p) { return divide_up(p.outputs, PANEL) * NUMBERS * p.channels * PANEL; }

int64_t weight_tasks(const Convolution& p) { return divide_up(p.outputs, LANES); }

// Of as many filters as a vector has lanes; those past the end are the last.
void transform_weight(const Tiles& t, int64_t task, float*) {
    const Convolution& p = t.p;
    int64_t channels = p.channels, output = task * LANES;
    float* to = t.weight + (output / PANEL * NUMBERS * channels) * PANEL + output % PANEL;
    const float* filters[LANES];
    for (int i = 0; i < LANES; i++) {
        int64_t filter = smaller(output + i, p.outputs - 1);
        filters[i] = static_cast<const float*>(p.weight) + filter * FILTER * FILTER * channels;
    }
    each_vector(channels, [&](int64_t c, int64_t valid, auto kind) {
        Floats g[LANES][FILTER * FILTER];
        for (int tap = 0; tap < FILTER * FILTER; tap++) {
            Floats v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = load_part<kind.FULL>(filters[i] + tap * channels + c, valid);
            transpose<LANES>(v);
            for (int i = 0; i < LANES; i++) g[i][tap] = v[i];
        }
        for (int64_t i = 0; i < valid; i++) {
            Floats columns[PIXELS * FILTER], u[NUMBERS];
            for (int x = 0; x < FILTER; x++) transform_filter(g[i] + x, FILTER, columns + x, FILTER);
            for (int y = 0; y < PIXELS; y++) transform_filter(columns + y * FILTER, 1, u + y * PIXELS, 1);
            for (int n = 0; n < NUMBERS; n++) store(to + (n * channels + c + i) * PANEL, u[n]);
        }
    });
}

struct Place {
    int64_t image, top, left;  // of a tile's results
};

inline Place place(const Convolution& p, int64_t tile) {
    int64_t across = divide_up(p.width, RESULTS), down = divide_up(p.height, RESULTS);
    return {tile / across / down, tile / across % down * RESULTS, tile % across * RESULTS};
}

// One of the numbers of some neighbouring channels of the tiles' pixels, (count, channels). A stretch has NUMBERS times as
// many of these as it takes to hold all channels.
struct Share {
    float* values;
    int64_t channels;
};

inline Share share_of(const Tiles& t, int64_t number, int64_t c) {
    int64_t first = c / CHANNELS_OF_SUM * CHANNELS_OF_SUM;
    return {t.values + (number * t.p.channels + first) * t.count, smaller(CHANNELS_OF_SUM, t.p.channels - first)};
}

void transform_values(const Tiles& t, int64_t task, float*) {
    const Convolution& p = t.p;
    Place at = place(p, t.first + task);
    const float* image = static_cast<const float*>(p.x) + at.image * p.height * p.width * p.channels;
    each_vector(p.channels, [&](int64_t c, int64_t valid, auto kind) {
        Floats d[NUMBERS];
        for (int i = 0; i < NUMBERS; i++) {
            int64_t y = at.top - 1 + i / PIXELS, x = at.left - 1 + i % PIXELS;
            bool is_inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            d[i] = is_inside ? load_part<kind.FULL>(image + (y * p.width + x) * p.channels + c, valid) : Floats{};
        }
        for (int x = 0; x < PIXELS; x++) transform_pixels(d + x, PIXELS);
        for (int y = 0; y < PIXELS; y++) transform_pixels(d + y * PIXELS, 1);
        Share share = share_of(t, 0, c);
        float* to = share.values + task * share.channels + c % CHANNELS_OF_SUM;
        for (int i = 0; i < NUMBERS; i++) store_part<kind.FULL>(to + i * t.count * p.channels, d[i], valid);
    });
}

int64_t parts(const Tiles& t) { return divide_up(t.count, TILES_OF_TASK); }

int64_t tasks(const Tiles& t) { return divide_up(t.p.outputs, PANEL) * parts(t); }

size_t scratch(const Tiles& t) {
    int64_t tiles = divide_up(divide_up(t.count, parts(t)), STRIP) * STRIP;
    return tiles * NUMBERS * PANEL * sizeof(float);
}

template <int V>
void multiply_tiles(const Tiles& t, int64_t begin, int64_t end, const float* weight, float* sums) {
    constexpr int BYTES = 16 * STRIP * sizeof(float);
    int64_t channels = t.p.channels, strips = divide_up(end - begin, STRIP);
    for (int n = 0; n < NUMBERS; n++, sums += strips * STRIP * PANEL) {
        for (int64_t c = 0; c < channels; c += CHANNELS_OF_SUM) {
            Share share = share_of(t, n, c);
            const float* panel = weight + (n * channels + c) * PANEL;
            for (int64_t s = 0; s < strips; s++) {
                const float* strip[STRIP];
                for (int r = 0; r < STRIP; r++) {
                    strip[r] = share.values + smaller(begin + s * STRIP + r, end - 1) * share.channels;
                }
                Sums part;
                const char* next = reinterpret_cast<const char*>(strip[STRIP - 1] + share.channels);
                multiply_panel<Single, V, BYTES>(strip, panel, share.channels, next, part);
                for (int r = 0; r < STRIP; r++) {
                    for (int v = 0; v < V; v++) {
                        float* sum = sums + (s * STRIP + r) * PANEL + v * LANES;
                        store(sum, c ? load(sum) + part[r][v] : part[r][v]);
                    }
                }
            }
        }
    }
}

// A panel of results of some of the tiles.
void multiply(const Tiles& t, int64_t task, float* sums) {
    const Convolution& p = t.p;
    int64_t panel = task / parts(t), part = task % parts(t), output = panel * PANEL;
    int64_t begin = t.count * part / parts(t), end = t.count * (part + 1) / parts(t);
    int64_t width = smaller(PANEL, p.outputs - output), number = divide_up(end - begin, STRIP) * STRIP * PANEL;
    const float* weight = t.weight + panel * NUMBERS * p.channels * PANEL;
    if (width > 2 * LANES) multiply_tiles<3>(t, begin, end, weight, sums);
    else if (width > LANES) multiply_tiles<2>(t, begin, end, weight, sums);
    else multiply_tiles<1>(t, begin, end, weight, sums);
    for (int64_t tile = begin; tile < end; tile++) {
        Place at = place(p, t.first + tile);
        int64_t rows = smaller(RESULTS, p.height - at.top), columns = smaller(RESULTS, p.width - at.left);
        float* corner = static_cast<float*>(p.y) + ((at.image * p.height + at.top) * p.width + at.left) * p.outputs + output;
        each_vector(width, [&](int64_t lane, int64_t valid, auto kind) {
            const float* from = sums + (tile - begin) * PANEL + lane;
            Floats m[NUMBERS], half[RESULTS * PIXELS], y[RESULTS * RESULTS];
            for (int i = 0; i < NUMBERS; i++) m[i] = load(from + i * number);
            for (int x = 0; x < PIXELS; x++) transform_sums(m + x, PIXELS, half + x, PIXELS);
            for (int i = 0; i < RESULTS; i++) transform_sums(half + i * PIXELS, 1, y + i * RESULTS, 1);
            Floats bias = p.bias ? load_part<kind.FULL>(p.bias + output + lane, valid) : Floats{};
            for (int64_t row = 0; row < rows; row++) {
                for (int64_t column = 0; column < columns; column++) {
                    float* to = corner + (row * p.width + column) * p.outputs + lane;
                    store_part<kind.FULL>(to, y[row * RESULTS + column] + bias, valid);
                }
            }
        });
    }
}

}  // namespace

extern const WinogradKernels winograd;
const WinogradKernels winograd = {
    TILES_OF_TASK, weight_floats, weight_tasks, transform_weight, transform_values, tasks, scratch, multiply,
};

}  // namespace VMAMBA_ISA
