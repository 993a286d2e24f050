// The operators of a package of AOTInductor, which has neither Python nor this library: deploy/aoti.py compiles this file
// and the kernels for the processor at hand, as inductor does its own loops, and links them into the package.
//
// What inductor writes for torch.ops.vmamba.NAME is a call of aoti_torch_cpu_NAME. Tensors are handles of torch's stable C
// interface (torch/csrc/inductor/aoti_torch/c/shim.h), of which these functions are needed; one that may be missing is the
// address of a handle, or null. Shapes are checked, since nothing else does; a result other than 0 is an error.

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>

#include "block.h"
#include "convolution.h"
#include "interface.h"
#include "memory.h"
#include "stem.h"

struct AtenTensorOpaque;
using Handle = AtenTensorOpaque*;

extern "C" {
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_dim(Handle, int64_t*);
int32_t aoti_torch_get_numel(Handle, int64_t*);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_get_strides(Handle, int64_t**);
int32_t aoti_torch_get_device_type(Handle, int32_t*);
int32_t aoti_torch_is_contiguous(Handle, bool*);
int32_t aoti_torch_get_dtype(Handle, int32_t*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);

void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
}

namespace {

constexpr int64_t MOST_SIZES = 8;  // of a tensor
constexpr int64_t ROUTES = 4;      // of a pattern

__attribute__((constructor)) void initialise() {
    vmamba_initialise();
    vmamba_choose("");
    vmamba_use_openmp(reinterpret_cast<void*>(GOMP_parallel));
}

// A dense float32 tensor of the wanted rank, as the graph makes sure of; where it is none, `count` is -1.
struct Dense {
    const float* data = nullptr;
    int64_t count = -1, rank = 0;
    int64_t sizes[MOST_SIZES] = {};

    Dense(Handle tensor, int64_t wanted = -1) {
        bool contiguous = false;
        int32_t dtype = 0;
        int64_t *given = nullptr, numbers = 0;
        void* address = nullptr;
        if (aoti_torch_is_contiguous(tensor, &contiguous) || aoti_torch_get_dtype(tensor, &dtype)) return;
        if (aoti_torch_get_dim(tensor, &rank) || aoti_torch_get_sizes(tensor, &given)) return;
        if (aoti_torch_get_numel(tensor, &numbers) || aoti_torch_get_data_ptr(tensor, &address)) return;
        if (!contiguous || dtype != aoti_torch_dtype_float32() || rank > MOST_SIZES) return;
        if (wanted >= 0 && rank != wanted) return;
        for (int64_t i = 0; i < rank; i++) sizes[i] = given[i];
        data = static_cast<const float*>(address), count = numbers;
    }
};

// The parameters of a call, and whether all of them have as many numbers as they should.
struct Parameters {
    bool fit = true;

    const float* of(Handle tensor, int64_t count) {
        Dense dense(tensor);
        fit = fit && dense.count == count;
        return dense.data;
    }
    // Of one that may be missing.
    const float* of(Handle* tensor, int64_t count) { return tensor ? of(*tensor, count) : nullptr; }
};

// A dense tensor of these sizes, to be filled; null where there is no memory.
void* made(int64_t rank, const int64_t* sizes, int32_t dtype, Handle* result) {
    int64_t strides[MOST_SIZES], step = 1;
    for (int64_t i = rank - 1; i >= 0; step *= sizes[i--]) strides[i] = step;
    void* data = nullptr;
    if (aoti_torch_empty_strided(rank, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, result)) return nullptr;
    return aoti_torch_get_data_ptr(*result, &data) ? nullptr : data;
}

float* made(int64_t rank, const int64_t* sizes, Handle* result) {
    return static_cast<float*>(made(rank, sizes, aoti_torch_dtype_float32(), result));
}

// Four routes of a pattern, 1 by columns, 2 backwards; null of one that is not known.
const int32_t* routes(const char* pattern) {
    static const struct {
        const char* name;
        int32_t bits[ROUTES];
    } PATTERNS[] = {VMAMBA_PATTERNS};
    for (const auto& known : PATTERNS) {
        if (!strcmp(pattern, known.name)) return known.bits;
    }
    return nullptr;
}

// A tensor's sizes in words; one below 0 stands for any.
struct Sizes {
    char text[24 * MOST_SIZES] = "()";

    Sizes(int64_t rank, const int64_t* sizes) {
        if (rank > MOST_SIZES) rank = MOST_SIZES;
        for (int64_t i = 0, end = 0; i < rank; i++) {
            const char *before = i ? ", " : "(", *after = i + 1 == rank ? ")" : "";
            end += sizes[i] < 0 ? snprintf(text + end, sizeof text - end, "%sany%s", before, after)
                                : snprintf(text + end, sizeof text - end, "%s%lld%s", before, (long long)sizes[i], after);
        }
    }
};

// Copies values that lie `strides` apart, so that they lie one behind the other.
template <class T>
void copy(const T* from, const int64_t* sizes, const int64_t* strides, int64_t rank, T*& to) {
    if (rank == 0) {
        *to++ = *from;
        return;
    }
    if (rank == 1 && *strides == 1) {
        memcpy(to, from, *sizes * sizeof *from), to += *sizes;
        return;
    }
    for (int64_t i = 0; i < *sizes; i++) copy(from + i * *strides, sizes + 1, strides + 1, rank - 1, to);
}

}  // namespace

// The images that a package is given, dense: inductor believes what it was told of their sizes and their dtype when the
// package was made, and would read past the end of smaller ones. `expected` sizes below 0 stand for any. What is thrown is
// caught where the package was called, and its words are passed on.
extern "C" int32_t aoti_torch_cpu_package_input(
    Handle x, const int64_t* expected, int64_t rank, int32_t is_uint8, Handle* result
) {
    int64_t given_rank = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = 0, device = 0, expected_dtype = is_uint8 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_float32();
    void* data = nullptr;
    if (aoti_torch_get_dim(x, &given_rank) || aoti_torch_get_sizes(x, &sizes) || aoti_torch_get_strides(x, &strides)) return 1;
    if (aoti_torch_get_dtype(x, &dtype) || aoti_torch_get_device_type(x, &device)) return 1;
    bool fits = given_rank == rank && rank <= MOST_SIZES;
    for (int64_t i = 0; fits && i < rank; i++) fits = expected[i] < 0 || expected[i] == sizes[i];
    bool is_dtype = dtype == expected_dtype, is_here = device == aoti_torch_device_type_cpu();
    if (!fits || !is_dtype || !is_here) {
        char message[1024];
        snprintf(
            message, sizeof message, "images of shape %s%s%s; this package takes %s in %s on the CPU",
            Sizes(given_rank, sizes).text, is_dtype ? "" : " in another dtype", is_here ? "" : " on another device",
            Sizes(rank, expected).text, is_uint8 ? "uint8" : "float32"
        );
        throw std::runtime_error(message);
    }
    void* dense = made(rank, sizes, dtype, result);
    int64_t count = 1;
    for (int64_t i = 0; i < rank; i++) count *= sizes[i];
    if (!count) return 0;
    if (!dense || aoti_torch_get_data_ptr(x, &data)) return 1;
    if (is_uint8) {
        auto* to = static_cast<uint8_t*>(dense);
        copy(static_cast<const uint8_t*>(data), sizes, strides, rank, to);
    } else {
        auto* to = static_cast<float*>(dense);
        copy(static_cast<const float*>(data), sizes, strides, rank, to);
    }
    return 0;
}

// y (..., N) = x (..., K) · weight (N, K)ᵀ + bias (N).
extern "C" int32_t aoti_torch_cpu_linear(Handle x, Handle weight, Handle* bias, Handle* result) {
    Dense given(x), factor(weight, 2);
    if (given.count < 0 || factor.count < 0 || !given.rank) return 1;
    int64_t& last = given.sizes[given.rank - 1];
    Parameters parameters;
    Product p = {};
    p.inputs = factor.sizes[1], p.outputs = factor.sizes[0], p.x = given.data, p.weight = factor.data;
    p.bias = parameters.of(bias, p.outputs);
    if (!parameters.fit || last != p.inputs || !p.inputs) return 1;
    p.rows = given.count / p.inputs, last = p.outputs;
    p.y = made(given.rank, given.sizes, result);
    if (!p.rows || !p.outputs) return 0;
    p.threads = omp_get_max_threads();
    return !p.y || vmamba_linear(&p);
}

// SiLU of the depthwise convolution of x (B, H, W, C) with weight (C, 1, 3, 3).
extern "C" int32_t aoti_torch_cpu_depthwise_silu(Handle x, Handle weight, Handle* bias, Handle* result) {
    Dense image(x, 4);
    Parameters parameters;
    Layer p = {};
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.x = image.data, p.weight = parameters.of(weight, p.channels * TAPS), p.bias = parameters.of(bias, p.channels);
    if (image.count < 0 || !parameters.fit) return 1;
    p.threads = omp_get_max_threads(), p.y = made(4, image.sizes, result);
    return image.count && (!p.y || vmamba_depthwise_silu(&p));
}

// Of x (B, H, W, C) with weight (N, C, 3, 3) and padding 1, of a stride above 1: all others are left to inductor.
extern "C" int32_t aoti_torch_cpu_grid_convolution(
    Handle x, Handle weight, const int64_t* stride, int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int64_t,
    Handle* result
) {
    Dense image(x, 4), filters(weight, 4);
    Convolution p = {};
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.outputs = filters.sizes[0], p.stride = *stride, p.x = image.data, p.weight = filters.data;
    if (image.count < 0 || filters.count != p.outputs * p.channels * TAPS) return 1;
    p.threads = omp_get_max_threads();
    int64_t sizes[] = {p.batch, divide_up(p.height, p.stride), divide_up(p.width, p.stride), p.outputs};
    p.y = made(4, sizes, result);
    return image.count && (!p.y || run_convolution(p));
}

// See torch.ops.vmamba.conv_stem in ops/fused.py.
extern "C" int32_t aoti_torch_cpu_conv_stem(
    Handle x, Handle weight1, Handle* bias1, Handle* norm1_weight, Handle* norm1_bias, Handle weight2, Handle* bias2,
    Handle* norm2_weight, Handle* norm2_bias, int64_t stride1, int64_t stride2, double norm1_eps, double norm2_eps,
    Handle* result
) {
    Dense image(x, 4), first(weight1, 4), second(weight2, 4);
    Parameters parameters;
    Stem p = {};
    p.batch = image.sizes[0], p.channels = image.sizes[1], p.height = image.sizes[2], p.width = image.sizes[3];
    p.middle = first.sizes[0], p.outputs = second.sizes[0], p.stride1 = stride1, p.stride2 = stride2, p.x = image.data;
    p.weight1 = parameters.of(weight1, p.middle * p.channels * TAPS), p.bias1 = parameters.of(bias1, p.middle);
    p.weight2 = parameters.of(weight2, p.outputs * p.middle * TAPS), p.bias2 = parameters.of(bias2, p.outputs);
    p.norm1_weight = parameters.of(norm1_weight, p.middle), p.norm1_bias = parameters.of(norm1_bias, p.middle);
    p.norm2_weight = parameters.of(norm2_weight, p.outputs), p.norm2_bias = parameters.of(norm2_bias, p.outputs);
    p.norm1_eps = norm1_eps, p.norm2_eps = norm2_eps, p.threads = omp_get_max_threads();
    if (image.count < 0 || !parameters.fit) return 1;
    auto smaller = [&](int64_t side) { return divide_up(divide_up(side, stride1), stride2); };
    int64_t sizes[] = {p.batch, smaller(p.height), smaller(p.width), p.outputs};
    p.y = made(4, sizes, result);
    return image.count && (!p.y || run_stem(p));
}

// See torch.ops.vmamba.vss_block in ops/fused.py.
extern "C" int32_t aoti_torch_cpu_vss_block(
    Handle x, Handle x_weight, Handle dt_weight, Handle dt_bias, Handle A, Handle D, Handle* norm1_weight,
    Handle* norm1_bias, Handle* in_weight, Handle* in_bias, Handle* conv_weight, Handle* conv_bias, Handle* norm_weight,
    Handle* norm_bias, Handle* out_weight, Handle* out_bias, Handle* norm2_weight, Handle* norm2_bias, Handle* fc1_weight,
    Handle* fc1_bias, Handle* fc2_weight, Handle* fc2_bias, const char* pattern, int32_t gated, int32_t is_low,
    double norm1_eps, double norm_eps, double norm2_eps, Handle* result
) {
    Dense image(x, 4), steps(dt_weight, 3), decay(A, 3);
    Parameters parameters;
    Block p = {};
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.routes = steps.sizes[0], p.inner = steps.sizes[1], p.rank = steps.sizes[2], p.states = decay.sizes[2];
    p.hidden = fc1_weight ? Dense(*fc1_weight, 2).sizes[0] : 0, p.gated = gated, p.threads = omp_get_max_threads();
    p.route_bits = routes(pattern), p.x = image.data, p.dt_weight = steps.data;
    int64_t pixel = p.channels, inner = p.inner, hidden = p.hidden, wide = (gated ? 2 : 1) * inner;
    p.x_weight = parameters.of(x_weight, p.routes * (p.rank + 2 * p.states) * inner);
    p.dt_bias = parameters.of(dt_bias, p.routes * inner), p.D = parameters.of(D, p.routes * inner);
    p.A = parameters.of(A, p.routes * inner * p.states);
    p.norm1_weight = parameters.of(norm1_weight, pixel), p.norm1_bias = parameters.of(norm1_bias, pixel);
    p.in_weight = parameters.of(in_weight, wide * pixel), p.in_bias = parameters.of(in_bias, wide);
    p.conv_weight = parameters.of(conv_weight, inner * TAPS), p.conv_bias = parameters.of(conv_bias, inner);
    p.norm_weight = parameters.of(norm_weight, inner), p.norm_bias = parameters.of(norm_bias, inner);
    p.out_weight = parameters.of(out_weight, pixel * inner), p.out_bias = parameters.of(out_bias, pixel);
    p.norm2_weight = parameters.of(norm2_weight, pixel), p.norm2_bias = parameters.of(norm2_bias, pixel);
    p.fc1_weight = parameters.of(fc1_weight, hidden * pixel), p.fc1_bias = parameters.of(fc1_bias, hidden);
    p.fc2_weight = parameters.of(fc2_weight, pixel * hidden), p.fc2_bias = parameters.of(fc2_bias, pixel);
    p.norm1_eps = norm1_eps, p.norm_eps = norm_eps, p.norm2_eps = norm2_eps;
    bool is_whole = in_weight && conv_weight && out_weight && !fc1_weight == !fc2_weight;
    bool are_steps = decay.count >= 0 && steps.count >= 0 && p.routes == ROUTES;
    if (is_low || !p.route_bits || image.count < 0 || !are_steps || !parameters.fit || !is_whole) return 1;
    p.y = made(4, image.sizes, result);
    return image.count && (!p.y || run_block(p));
}

// ss2d_scan(u (B, H, W, D), projected (B, H, W, K, R + 2N), dt_proj_weight (K, D, R), dt_proj_bias (K, D), A (K, D, N),
// D (K, D), pattern, backend) -> y (B, H, W, D).
extern "C" int32_t aoti_torch_cpu_ss2d_scan(
    Handle u, Handle projected, Handle dt_weight, Handle dt_bias, Handle A, Handle D, const char* pattern, const char*,
    Handle* result
) {
    Dense image(u, 4), steps(dt_weight, 3), decay(A, 3);
    Parameters parameters;
    Scan p = {};
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.routes = steps.sizes[0], p.rank = steps.sizes[2], p.states = decay.sizes[2], p.groups = p.softplus = 1;
    p.route_stride = p.rank + 2 * p.states, p.pixel_stride = p.routes * p.route_stride;
    int64_t pixels = p.batch * p.height * p.width;
    p.u = image.data, p.dt_weight = steps.data, p.A = decay.data, p.route_bits = routes(pattern);
    p.dt_low = parameters.of(projected, pixels * p.pixel_stride), p.dt_bias = parameters.of(dt_bias, p.routes * p.channels);
    p.D = parameters.of(D, p.routes * p.channels);
    bool are_steps = steps.count == p.routes * p.channels * p.rank && decay.count == p.routes * p.channels * p.states;
    if (!p.route_bits || image.count < 0 || !are_steps || p.routes != ROUTES || !parameters.fit) return 1;
    p.B = p.dt_low + p.rank, p.C = p.B + p.states;
    p.y = made(4, image.sizes, result);
    p.threads = omp_get_max_threads();
    return image.count && (!p.y || vmamba_scan(&p));
}

// recurrence(a (batch, L, F), b (batch, L, F), backwards) -> h of the shape of b: h_t = a_t·h_{t-1} + b_t from 0.
extern "C" int32_t aoti_torch_cpu_recurrence(Handle a, Handle b, int32_t backwards, Handle* result) {
    Dense factors(a, 3), summands(b, 3);
    if (factors.count < 0 || summands.count != factors.count) return 1;
    int64_t batch = summands.sizes[0], length = summands.sizes[1], features = summands.sizes[2];
    float* states = made(3, summands.sizes, result);
    if (!states) return batch * length * features != 0;
    int64_t step = backwards ? -features : features;
    for (int64_t i = 0; i < batch; i++) {
        int64_t at = (i * length + (backwards ? length - 1 : 0)) * features;
        for (int64_t t = 0; t < length; t++, at += step) {
            for (int64_t f = 0; f < features; f++) {
                states[at + f] = (t ? factors.data[at + f] * states[at - step + f] : 0) + summands.data[at + f];
            }
        }
    }
    return 0;
}
