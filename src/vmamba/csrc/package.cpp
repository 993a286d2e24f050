// The operators of a package of AOTInductor, which has neither Python nor this library: deploy/aoti.py compiles this file
// and the kernels for the processor at hand, as inductor does its own loops, and links them into the package.
//
// What inductor writes for torch.ops.vmamba.NAME is a call of aoti_torch_cpu_NAME. Tensors are handles of torch's stable C
// interface (torch/csrc/inductor/aoti_torch/c/shim.h), of which these functions are needed; one that may be missing is the
// address of a handle, or null. A result other than 0 is an error.

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "block.h"
#include "convolution.h"
#include "layers.h"
#include "memory.h"
#include "products.h"
#include "scan.h"
#include "stem.h"

struct AtenTensorOpaque;
using Handle = AtenTensorOpaque*;

extern "C" {
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_dim(Handle, int64_t*);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_is_contiguous(Handle, bool*);
int32_t aoti_torch_get_dtype(Handle, int32_t*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);

void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
void vmamba_initialise();
int32_t vmamba_choose(const char*);
void vmamba_use_openmp(void*);
int32_t vmamba_depthwise_silu(Layer*);
int32_t vmamba_linear(Product*);
int32_t vmamba_scan(Scan*);
}

namespace {

// As in ops/backends/native/.
constexpr int64_t STEPS_FOR_THREADS = 512, VALUES_FOR_THREADS = 16384, PRODUCTS_FOR_THREADS = 1 << 20;
constexpr int64_t BAND_ROWS = 16, LANES_OF_SCAN = 16, STRETCH = 1 << 21;

__attribute__((constructor)) void initialise() {
    vmamba_initialise();
    vmamba_choose("");
    vmamba_use_openmp(reinterpret_cast<void*>(GOMP_parallel));
}

// A dense float32 tensor, which the graph makes sure of; null where it is none.
struct Dense {
    const float* data = nullptr;
    int64_t* sizes = nullptr;

    Dense(Handle tensor) {
        bool contiguous = false;
        int32_t dtype = 0;
        void* address = nullptr;
        if (aoti_torch_is_contiguous(tensor, &contiguous) || aoti_torch_get_dtype(tensor, &dtype)) return;
        if (!contiguous || dtype != aoti_torch_dtype_float32() || aoti_torch_get_data_ptr(tensor, &address)) return;
        if (!aoti_torch_get_sizes(tensor, &sizes)) data = static_cast<const float*>(address);
    }
    int64_t size(int64_t rank) const {
        int64_t size = 1;
        for (int64_t i = 0; i < rank; i++) size *= sizes[i];
        return size;
    }
};

// The numbers of a tensor that may be missing.
const float* numbers(Handle* tensor) { return tensor ? Dense(*tensor).data : nullptr; }

// A dense float32 tensor of these sizes, to be filled; null where there is no memory.
float* made(int64_t rank, const int64_t* sizes, Handle* result) {
    int64_t strides[4], step = 1;
    for (int64_t i = rank - 1; i >= 0; step *= sizes[i--]) strides[i] = step;
    void* data = nullptr;
    int32_t dtype = aoti_torch_dtype_float32(), device = aoti_torch_device_type_cpu();
    if (aoti_torch_empty_strided(rank, sizes, strides, dtype, device, 0, result)) return nullptr;
    return aoti_torch_get_data_ptr(*result, &data) ? nullptr : static_cast<float*>(data);
}

int32_t threads(int64_t work, int64_t least) { return work > least ? omp_get_max_threads() : 1; }

int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

// Four routes of a pattern, 1 by columns, 2 backwards; null of one that is not known.
const int32_t* routes(const char* pattern) {
    static const struct {
        const char* name;
        int32_t bits[4];
    } PATTERNS[] = {VMAMBA_PATTERNS};
    for (const auto& known : PATTERNS) {
        if (!strcmp(pattern, known.name)) return known.bits;
    }
    return nullptr;
}

}  // namespace

// y (..., N) = x (..., K) · weight (N, K)ᵀ + bias (N).
extern "C" int32_t aoti_torch_cpu_linear(Handle x, Handle weight, Handle* bias, Handle* result) {
    Dense given(x), factor(weight);
    int64_t rank = 0;
    if (!given.data || !factor.data || aoti_torch_get_dim(x, &rank) || rank > 4) return 1;
    int64_t sizes[4], rows = given.size(rank - 1);
    memcpy(sizes, given.sizes, rank * sizeof *sizes);
    sizes[rank - 1] = factor.sizes[0];
    Product p = {};
    p.rows = rows, p.inputs = factor.sizes[1], p.outputs = factor.sizes[0];
    p.x = given.data, p.weight = factor.data, p.bias = numbers(bias), p.y = made(rank, sizes, result);
    if (!p.rows) return 0;
    p.threads = threads(p.rows * p.inputs * p.outputs, PRODUCTS_FOR_THREADS);
    return !p.y || vmamba_linear(&p);
}

// SiLU of the depthwise convolution of x (B, H, W, C) with weight (C, 1, 3, 3).
extern "C" int32_t aoti_torch_cpu_depthwise_silu(Handle x, Handle weight, Handle* bias, Handle* result) {
    Dense image(x);
    Layer p = {};
    p.x = image.data, p.weight = Dense(weight).data, p.bias = numbers(bias);
    if (!p.x || !p.weight) return 1;
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.bands = divide_up(p.height, BAND_ROWS), p.threads = threads(image.size(4), VALUES_FOR_THREADS);
    p.y = made(4, image.sizes, result);
    return image.size(4) && (!p.y || vmamba_depthwise_silu(&p));
}

// Of x (B, H, W, C) with weight (N, C, 3, 3) and padding 1, of a stride above 1: aoti.py leaves all others to inductor.
extern "C" int32_t aoti_torch_cpu_grid_convolution(
    Handle x, Handle weight, const int64_t* stride, int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int64_t,
    Handle* result
) {
    Dense image(x), filters(weight);
    if (!image.data || !filters.data) return 1;
    Convolution p = {};
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.outputs = filters.sizes[0], p.stride = *stride, p.x = image.data, p.weight = filters.data;
    p.threads = omp_get_max_threads();
    int64_t sizes[] = {p.batch, divide_up(p.height, p.stride), divide_up(p.width, p.stride), p.outputs};
    p.y = made(4, sizes, result);
    return image.size(4) && (!p.y || run_convolution(p));
}

// See torch.ops.vmamba.conv_stem in ops/fused.py.
extern "C" int32_t aoti_torch_cpu_conv_stem(
    Handle x, Handle weight1, Handle* bias1, Handle* norm1_weight, Handle* norm1_bias, Handle weight2, Handle* bias2,
    Handle* norm2_weight, Handle* norm2_bias, int64_t stride1, int64_t stride2, double norm1_eps, double norm2_eps,
    Handle* result
) {
    Dense image(x), first(weight1), second(weight2);
    if (!image.data || !first.data || !second.data) return 1;
    Stem p = {};
    p.batch = image.sizes[0], p.channels = image.sizes[1], p.height = image.sizes[2], p.width = image.sizes[3];
    p.middle = first.sizes[0], p.outputs = second.sizes[0], p.stride1 = stride1, p.stride2 = stride2;
    p.x = image.data, p.weight1 = first.data, p.weight2 = second.data, p.bias1 = numbers(bias1), p.bias2 = numbers(bias2);
    p.norm1_weight = numbers(norm1_weight), p.norm1_bias = numbers(norm1_bias), p.norm1_eps = norm1_eps;
    p.norm2_weight = numbers(norm2_weight), p.norm2_bias = numbers(norm2_bias), p.norm2_eps = norm2_eps;
    p.threads = omp_get_max_threads();
    auto smaller = [&](int64_t side) { return divide_up(divide_up(side, stride1), stride2); };
    int64_t sizes[] = {p.batch, smaller(p.height), smaller(p.width), p.outputs};
    p.y = made(4, sizes, result);
    return image.size(4) && (!p.y || run_stem(p));
}

// See torch.ops.vmamba.vss_block in ops/fused.py.
extern "C" int32_t aoti_torch_cpu_vss_block(
    Handle x, Handle x_weight, Handle dt_weight, Handle dt_bias, Handle A, Handle D, Handle* norm1_weight,
    Handle* norm1_bias, Handle* in_weight, Handle* in_bias, Handle* conv_weight, Handle* conv_bias, Handle* norm_weight,
    Handle* norm_bias, Handle* out_weight, Handle* out_bias, Handle* norm2_weight, Handle* norm2_bias, Handle* fc1_weight,
    Handle* fc1_bias, Handle* fc2_weight, Handle* fc2_bias, const char* pattern, int32_t gated, int32_t is_low,
    double norm1_eps, double norm_eps, double norm2_eps, Handle* result
) {
    Dense image(x), steps(dt_weight), decay(A);
    Block p = {};
    p.route_bits = routes(pattern), p.x = image.data, p.dt_weight = steps.data, p.A = decay.data;
    p.x_weight = Dense(x_weight).data, p.dt_bias = Dense(dt_bias).data, p.D = Dense(D).data;
    p.norm1_weight = numbers(norm1_weight), p.norm1_bias = numbers(norm1_bias), p.norm1_eps = norm1_eps;
    p.in_weight = numbers(in_weight), p.in_bias = numbers(in_bias);
    p.conv_weight = numbers(conv_weight), p.conv_bias = numbers(conv_bias);
    p.norm_weight = numbers(norm_weight), p.norm_bias = numbers(norm_bias), p.norm_eps = norm_eps;
    p.out_weight = numbers(out_weight), p.out_bias = numbers(out_bias);
    p.norm2_weight = numbers(norm2_weight), p.norm2_bias = numbers(norm2_bias), p.norm2_eps = norm2_eps;
    p.fc1_weight = numbers(fc1_weight), p.fc1_bias = numbers(fc1_bias);
    p.fc2_weight = numbers(fc2_weight), p.fc2_bias = numbers(fc2_bias);
    if (is_low || !p.route_bits || !p.x || !p.x_weight || !p.dt_weight || !p.dt_bias || !p.A || !p.D) return 1;
    if (!p.in_weight || !p.conv_weight || !p.out_weight) return 1;
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.routes = steps.sizes[0], p.inner = steps.sizes[1], p.rank = steps.sizes[2], p.states = decay.sizes[2];
    p.hidden = p.fc1_weight ? Dense(*fc1_weight).sizes[0] : 0, p.gated = gated, p.threads = omp_get_max_threads();
    int64_t wide = (gated ? 2 : 1) * p.inner, widest = wide > p.hidden ? wide : p.hidden;
    p.stretch = widest < STRETCH ? STRETCH / widest : 1;
    p.y = made(4, image.sizes, result);
    return image.size(4) && (!p.y || run_block(p));
}

// ss2d_scan(u (B, H, W, D), projected (B, H, W, K, R + 2N), dt_proj_weight (K, D, R), dt_proj_bias (K, D), A (K, D, N),
// D (K, D), pattern, backend) -> y (B, H, W, D).
extern "C" int32_t aoti_torch_cpu_ss2d_scan(
    Handle u, Handle projected, Handle dt_weight, Handle dt_bias, Handle A, Handle D, const char* pattern, const char*,
    Handle* result
) {
    Dense image(u), steps(dt_weight), decay(A);
    Scan p = {};
    p.u = image.data, p.dt_low = Dense(projected).data, p.dt_weight = steps.data, p.dt_bias = Dense(dt_bias).data;
    p.A = decay.data, p.D = Dense(D).data, p.route_bits = routes(pattern);
    if (!p.route_bits || !p.u || !p.dt_low || !p.dt_weight || !p.dt_bias || !p.A || !p.D) return 1;
    p.batch = image.sizes[0], p.height = image.sizes[1], p.width = image.sizes[2], p.channels = image.sizes[3];
    p.routes = steps.sizes[0], p.rank = steps.sizes[2], p.states = decay.sizes[2], p.groups = p.softplus = 1;
    p.route_stride = p.rank + 2 * p.states, p.pixel_stride = p.routes * p.route_stride;
    p.B = p.dt_low + p.rank, p.C = p.B + p.states;
    p.y = made(4, image.sizes, result);
    int64_t size = image.size(4), blocks = divide_up(p.channels, LANES_OF_SCAN);
    if (!size) return 0;
    if (!p.y) return 1;
    p.threads = threads(p.batch * p.height * p.width * p.routes * blocks * p.states, STEPS_FOR_THREADS);
    Memory memory;
    if (p.threads > 2 && p.batch * blocks < 2 * p.threads) {
        int64_t apart = memory.piece(p.routes * size * sizeof(float));
        char* base = memory.obtain();
        if (!base) return 1;
        p.route_y = reinterpret_cast<float*>(base + apart);
    }
    int64_t shares = p.threads / greatest_common_divisor(p.batch * (p.route_y ? p.routes : 1), p.threads);
    p.slots = blocks < shares ? blocks : shares;
    return vmamba_scan(&p);
}

// recurrence(a (batch, L, F), b (batch, L, F), backwards) -> h of the shape of b: h_t = a_t·h_{t-1} + b_t from 0.
extern "C" int32_t aoti_torch_cpu_recurrence(Handle a, Handle b, int32_t backwards, Handle* result) {
    Dense factors(a), summands(b);
    if (!factors.data || !summands.data) return 1;
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
