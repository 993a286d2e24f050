// LayerNorm, depthwise 3×3 convolution with SiLU, GELU and gate, each in one pass over memory, for one instruction set:
// compiled once for each, as scan.cpp is, and under the same rules.
//
// What a value comes to depends on its place in the image alone, not on how the work was split into tasks.

#include <cstdint>
#include <cstring>

#include "layers.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"

// The first of a task's units of work; the next task's first is its end.
inline int64_t first_of(const Layer& p, int64_t units, int64_t task) { return units * task / p.tasks; }

// --- LayerNorm -------------------------------------------------------------------------------------------------------
//
// Rows are taken together, as many as stay in the first-level cache: one addition of neighbouring lanes then serves several
// of them, and none waits for another's.

constexpr int64_t VALUES_TOGETHER = 4096;

// The sum over a row of `of(x)`, still spread over the lanes; those past its end are left out.
template <class T, class Of>
inline Floats sum_row(const T* x, int64_t channels, Of of) {
    Floats sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= channels; i += 4 * LANES) {
        for (int j = 0; j < 4; j++) sum[j] += of(load(x + i + j * LANES));
    }
    for (; i + LANES <= channels; i += LANES) sum[0] += of(load(x + i));
    if (i < channels) {
        float kept[LANES] = {};
        for (int64_t lane = 0; lane < channels - i; lane++) kept[lane] = 1;
        sum[1] += of(load_part<false>(x + i, channels - i)) * load(kept);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T, class Y>
void layer_norm_rows(const Layer& p, int64_t task) {
    int64_t channels = p.channels, end = first_of(p, p.width, task + 1), together = VALUES_TOGETHER / channels;
    if (together > LANES) together = LANES;
    if (together < 1) together = 1;
    const float *weight = p.weight, *bias = p.bias;
    float share = 1.0f / float(channels), mean[LANES], scale[LANES];
    for (int64_t first = first_of(p, p.width, task); first < end; first += together) {
        int64_t count = smaller(together, end - first);
        const T* x = static_cast<const T*>(p.x) + first * channels;
        Y* y = static_cast<Y*>(p.y) + first * channels;
        Floats sums[LANES] = {};
        for (int64_t r = 0; r < count; r++) sums[r] = sum_row(x + r * channels, channels, [](Floats v) { return v; });
        store(mean, Folded<LANES / 2>::of(sums) * share);
        for (int64_t r = 0; r < count; r++) {
            sums[r] = sum_row(x + r * channels, channels, [&](Floats v) { return (v - mean[r]) * (v - mean[r]); });
        }
        store(scale, Folded<LANES / 2>::of(sums) * share + p.eps);
        for (int r = 0; r < LANES; r++) scale[r] = 1.0f / __builtin_sqrtf(scale[r]);
        for (int64_t r = 0; r < count; r++, x += channels, y += channels) {
            each_vector(channels, [&](int64_t i, int64_t valid, auto kind) {
                Floats v = (load_part<kind.FULL>(x + i, valid) - mean[r]) * scale[r];
                if (weight) v = v * load_part<kind.FULL>(weight + i, valid);
                if (bias) v = v + load_part<kind.FULL>(bias + i, valid);
                store_part<kind.FULL>(y + i, v, valid);
            });
        }
    }
}

// --- depthwise 3×3 convolution and SiLU ------------------------------------------------------------------------------
//
// A unit of work is a band of rows of one image, one vector of channels wide: a vector of pixels of a row is a sequence of
// addresses, the nine weights stay in registers, and the rows above and below stay in the cache.

// e^-x
inline Floats exp_minus(Floats x) { return exp2(x * -LOG2_E); }

struct Unit {
    int64_t image, band, first_row, end_row, first;  // channels [first, first + valid)
    int64_t valid;
};

inline int64_t vectors(const Layer& p) { return (p.channels + LANES - 1) / LANES; }
inline int64_t units(const Layer& p) { return p.batch * p.bands * vectors(p); }

inline Unit locate(const Layer& p, int64_t unit) {
    int64_t first = unit % vectors(p) * LANES, band = unit / vectors(p) % p.bands, image = unit / vectors(p) / p.bands;
    int64_t first_row = p.height * band / p.bands, end_row = p.height * (band + 1) / p.bands;
    return {image, band, first_row, end_row, first, smaller(LANES, p.channels - first)};
}

// A unit's weights, tap by tap, and its bias; 0 in the other lanes.
struct Filter {
    Floats tap[TAPS], bias;

    Filter(const Layer& p, const Unit& at) {
        float lanes[TAPS][LANES] = {};
        for (int lane = 0; lane < at.valid; lane++) {
            for (int k = 0; k < TAPS; k++) lanes[k][lane] = p.weight[(at.first + lane) * TAPS + k];
        }
        for (int k = 0; k < TAPS; k++) tap[k] = load(lanes[k]);
        bias = p.bias ? load_part<false>(p.bias + at.first, at.valid) : Floats{};
    }
};

// Walks along a row: the address of the next pixel's vector, or of a vector of zeros outside of the grid.
template <class T>
struct Walk {
    const T* at;
    int64_t step;

    Walk(const T* rows, int64_t row, int64_t height, int64_t width, int64_t pixel_stride) {
        static const T zeros[LANES] = {};
        bool inside = row >= 0 && row < height;
        at = inside ? rows + row * width * pixel_stride : zeros;
        step = inside ? pixel_stride : 0;
    }
};

// Rows [row, row + ROWS) of the convolution of an image: calls finish(row, column, value). The window moves over the input's
// columns, each of which is added to the three columns of the output that it reaches, so that it is loaded once.
template <int ROWS, bool FULL, class T, class Finish>
inline void convolve(const Layer& p, const Unit& at, const Filter& filter, const T* x, int64_t row, Finish finish) {
    const T* from[ROWS + 2];
    int64_t step[ROWS + 2];
    for (int a = 0; a < ROWS + 2; a++) {
        Walk<T> walk(x, row - 1 + a, p.height, p.width, p.channels);
        from[a] = walk.at, step[a] = walk.step;
    }
    Floats before[ROWS], here[ROWS], after[ROWS];
    for (int r = 0; r < ROWS; r++) before[r] = here[r] = filter.bias;
    for (int64_t column = 0; column < p.width; column++) {
        Floats pixel[ROWS + 2];
        for (int a = 0; a < ROWS + 2; a++) pixel[a] = load_part<FULL>(from[a], at.valid), from[a] += step[a];
        for (int r = 0; r < ROWS; r++) after[r] = filter.bias;
        for (int a = 0; a < 3; a++) {
            for (int r = 0; r < ROWS; r++) {
                after[r] += filter.tap[3 * a] * pixel[r + a];
                here[r] += filter.tap[3 * a + 1] * pixel[r + a];
                before[r] += filter.tap[3 * a + 2] * pixel[r + a];
            }
        }
        for (int r = 0; r < ROWS; r++) {
            if (column) finish(row + r, column - 1, before[r]);
            before[r] = here[r], here[r] = after[r];
        }
    }
    for (int r = 0; r < ROWS; r++) finish(row + r, p.width - 1, before[r]);
}

template <bool FULL, class T>
void depthwise_silu_unit(const Layer& p, const Unit& at) {
    Filter filter(p, at);
    int64_t offset = at.image * p.height * p.width * p.channels + at.first, row = at.first_row;
    const T* x = static_cast<const T*>(p.x) + offset;
    T* y = static_cast<T*>(p.y) + offset;
    auto finish = [&](int64_t r, int64_t column, Floats z) {
        store_part<FULL>(y + (r * p.width + column) * p.channels, z / (1.0f + exp_minus(z)), at.valid);
    };
    for (; row + 2 <= at.end_row; row += 2) convolve<2, FULL>(p, at, filter, x, row, finish);
    if (row < at.end_row) convolve<1, FULL>(p, at, filter, x, row, finish);
}

template <class T>
void depthwise_silu_units(const Layer& p, int64_t task) {
    for (int64_t unit = first_of(p, units(p), task); unit < first_of(p, units(p), task + 1); unit++) {
        Unit at = locate(p, unit);
        at.valid == LANES ? depthwise_silu_unit<true, T>(p, at) : depthwise_silu_unit<false, T>(p, at);
    }
}

// Three rows of the gradient of the convolution's result, one vector of channels wide.
constexpr int KEPT_ROWS = 3;

size_t depthwise_silu_backward_scratch(const Layer& p) { return KEPT_ROWS * p.width * LANES * sizeof(float); }

// Adds what one row of x and the gradients `kept` of the three rows around it give: the row of grad_x, which is the
// convolution of the gradients with the filter turned by 180°, and the gradients of the turned filter and of the bias.
template <bool FULL, class T>
inline void row_gradients(
    const Layer& p, const Unit& at, const Filter& turned, const float* kept, int64_t row, const T* x, T* grad_x,
    Floats* grad_tap, Floats& grad_bias
) {
    const float* from[3];
    int64_t step[3];
    for (int a = 0; a < 3; a++) {
        int64_t r = row - 1 + a;
        bool inside = r >= 0 && r < p.height;
        Walk<float> walk(kept, inside ? r % KEPT_ROWS : -1, KEPT_ROWS, p.width, LANES);
        from[a] = walk.at, step[a] = walk.step;
    }
    Floats sum[TAPS] = {}, sum_bias{}, before{}, here{};
    Floats x_before{}, x_here = load_part<FULL>(x, at.valid);
    for (int64_t column = 0; column < p.width; column++) {
        Floats after{}, x_after{};
        if (column + 1 < p.width) x_after = load_part<FULL>(x + (column + 1) * p.channels, at.valid);
        for (int a = 0; a < 3; a++) {
            Floats g = load(from[a]);
            from[a] += step[a];
            after += turned.tap[3 * a] * g, sum[3 * a] += x_after * g;
            here += turned.tap[3 * a + 1] * g, sum[3 * a + 1] += x_here * g;
            before += turned.tap[3 * a + 2] * g, sum[3 * a + 2] += x_before * g;
            if (a == 1) sum_bias += g;
        }
        if (column) store_part<FULL>(grad_x + (column - 1) * p.channels, before, at.valid);
        before = here, here = after;
        x_before = x_here, x_here = x_after;
    }
    store_part<FULL>(grad_x + (p.width - 1) * p.channels, before, at.valid);
    for (int k = 0; k < TAPS; k++) grad_tap[k] += sum[k];
    grad_bias += sum_bias;
}

// The convolution's result is computed again, a row ahead of the gradients that need it.
template <bool FULL, class T>
void depthwise_silu_backward_unit(const Layer& p, const Unit& at, float* kept) {
    Filter filter(p, at), turned = filter;
    for (int k = 0; k < TAPS; k++) turned.tap[k] = filter.tap[TAPS - 1 - k];
    int64_t offset = at.image * p.height * p.width * p.channels + at.first, row_stride = p.width * p.channels;
    const T *x = static_cast<const T*>(p.x) + offset, *grad = static_cast<const T*>(p.grad) + offset;
    T* grad_x = static_cast<T*>(p.grad_x) + offset;
    auto finish = [&](int64_t r, int64_t column, Floats z) {
        Floats s = 1.0f / (1.0f + exp_minus(z)), g = load_part<FULL>(grad + r * row_stride + column * p.channels, at.valid);
        store(kept + (r % KEPT_ROWS * p.width + column) * LANES, g * s * (1.0f + z * (1.0f - s)));
    };
    Floats grad_tap[TAPS] = {}, grad_bias{};
    if (at.first_row > 0) convolve<1, FULL>(p, at, filter, x, at.first_row - 1, finish);
    convolve<1, FULL>(p, at, filter, x, at.first_row, finish);
    for (int64_t row = at.first_row; row < at.end_row; row++) {
        if (row + 1 < p.height) convolve<1, FULL>(p, at, filter, x, row + 1, finish);
        row_gradients<FULL>(
            p, at, turned, kept, row, x + row * row_stride, grad_x + row * row_stride, grad_tap, grad_bias
        );
    }
    float* to_weight = p.grad_weights + (at.image * p.bands + at.band) * p.channels * (TAPS + 1);
    float* to_bias = to_weight + p.channels * TAPS;
    for (int lane = 0; lane < at.valid; lane++) {
        for (int k = 0; k < TAPS; k++) to_weight[(at.first + lane) * TAPS + k] = grad_tap[TAPS - 1 - k][lane];
        to_bias[at.first + lane] = grad_bias[lane];
    }
}

template <class T>
void depthwise_silu_backward_units(const Layer& p, int64_t task, float* kept) {
    for (int64_t unit = first_of(p, units(p), task); unit < first_of(p, units(p), task + 1); unit++) {
        Unit at = locate(p, unit);
        at.valid == LANES ? depthwise_silu_backward_unit<true, T>(p, at, kept)
                          : depthwise_silu_backward_unit<false, T>(p, at, kept);
    }
}

// --- GELU ------------------------------------------------------------------------------------------------------------

template <bool FULL, class T>
inline void gelu_part(const T* x, T* y, int64_t valid) {
    Floats v = load_part<FULL>(x, valid);
    store_part<FULL>(y, v * normal(v).below, valid);
}

// `grad_x` may be `grad`.
template <bool FULL, class T>
inline void gelu_backward_part(const T* x, const T* grad, T* y, T* grad_x, int64_t valid) {
    Floats v = load_part<FULL>(x, valid), g = load_part<FULL>(grad, valid);
    Normal n = normal(v);
    store_part<FULL>(y, v * n.below, valid);
    store_part<FULL>(grad_x, g * (n.below + v * n.density), valid);
}

// A task's values: [begin, end) in whole vectors, and what is left over where it has the last ones.
struct Values {
    int64_t begin, end, rest;

    Values(const Layer& p, int64_t task) {
        begin = first_of(p, vectors(p), task) * LANES;
        int64_t next = first_of(p, vectors(p), task + 1) * LANES;
        rest = next > p.channels ? p.channels % LANES : 0;
        end = rest ? next - LANES : next;
    }
};

template <class T>
void gelu_values(const Layer& p, int64_t task) {
    Values values(p, task);
    const T* x = static_cast<const T*>(p.x);
    T* y = static_cast<T*>(p.y);
    for (int64_t i = values.begin; i < values.end; i += LANES) gelu_part<true>(x + i, y + i, LANES);
    if (values.rest) gelu_part<false>(x + values.end, y + values.end, values.rest);
}

template <class T>
void gelu_backward_values(const Layer& p, int64_t task) {
    Values values(p, task);
    const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
    T *y = static_cast<T*>(p.y), *grad_x = static_cast<T*>(p.grad_x);
    for (int64_t i = values.begin; i < values.end; i += LANES) {
        gelu_backward_part<true>(x + i, grad + i, y + i, grad_x + i, LANES);
    }
    int64_t end = values.end;
    if (values.rest) gelu_backward_part<false>(x + end, grad + end, y + end, grad_x + end, values.rest);
}

template <class T>
void gate_values(const Layer& p, int64_t task) {
    Values values(p, task);
    const T* x = static_cast<const T*>(p.x);
    T* y = static_cast<T*>(p.y);
    auto multiply = [&](int64_t i, int64_t valid, auto kind) {
        Floats v = load_part<kind.FULL>(x + i, valid);
        store_part<kind.FULL>(y + i, load_part<kind.FULL>(y + i, valid) * v / (1.0f + exp_minus(v)), valid);
    };
    for (int64_t i = values.begin; i < values.end; i += LANES) multiply(i, LANES, Whole());
    if (values.rest) multiply(values.end, values.rest, Part());
}

void layer_norm(const Layer& p, int64_t task, float*) {
    auto rows = p.bfloat16 ? (p.y_bfloat16 ? layer_norm_rows<uint16_t, uint16_t> : layer_norm_rows<uint16_t, float>)
                           : (p.y_bfloat16 ? layer_norm_rows<float, uint16_t> : layer_norm_rows<float, float>);
    rows(p, task);
}
void depthwise_silu(const Layer& p, int64_t task, float*) {
    p.bfloat16 ? depthwise_silu_units<uint16_t>(p, task) : depthwise_silu_units<float>(p, task);
}
void depthwise_silu_backward(const Layer& p, int64_t task, float* scratch) {
    p.bfloat16 ? depthwise_silu_backward_units<uint16_t>(p, task, scratch)
               : depthwise_silu_backward_units<float>(p, task, scratch);
}
void gelu(const Layer& p, int64_t task, float*) {
    p.bfloat16 ? gelu_values<uint16_t>(p, task) : gelu_values<float>(p, task);
}
void gelu_backward(const Layer& p, int64_t task, float*) {
    p.bfloat16 ? gelu_backward_values<uint16_t>(p, task) : gelu_backward_values<float>(p, task);
}
void gate(const Layer& p, int64_t task, float*) {
    p.bfloat16 ? gate_values<uint16_t>(p, task) : gate_values<float>(p, task);
}
void widen(const Layer& p, int64_t task, float*) {
    Values values(p, task);
    const uint16_t* x = static_cast<const uint16_t*>(p.x);
    float* y = static_cast<float*>(p.y);
    for (int64_t i = values.begin; i < values.end; i += LANES) store(y + i, load(x + i));
    if (values.rest) store_part<false>(y + values.end, load_part<false>(x + values.end, values.rest), values.rest);
}

}  // namespace

extern const LayerKernels layers;
const LayerKernels layers = {
    layer_norm, depthwise_silu, depthwise_silu_backward_scratch, depthwise_silu_backward, gelu, gelu_backward,
    gate, widen,
};

}  // namespace VMAMBA_ISA
