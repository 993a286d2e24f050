// The scans for a package of AOTInductor, which has neither Python nor this library: deploy/aoti.py compiles this file, for
// the processor at hand as inductor does its own loops, and links it into the package.
//
// What inductor writes for torch.ops.vmamba.ss2d_scan is a call of aoti_torch_cpu_ss2d_scan, and so for recurrence. Tensors
// are handles of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), of which these functions are needed.

#include <omp.h>
#include <stdlib.h>

#define VMAMBA_ISA package
#include "scan.cpp"

struct AtenTensorOpaque;
using Handle = AtenTensorOpaque*;

extern "C" {
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_is_contiguous(Handle, bool*);
int32_t aoti_torch_get_dtype(Handle, int32_t*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
}

namespace {

constexpr int64_t STEPS_FOR_THREADS = 512;  // as in ops/backends/native/scan.py

// Null: no dense float32 tensor, which the graph makes sure of.
const float* dense(Handle tensor) {
    bool contiguous = false;
    int32_t dtype = 0;
    void* data = nullptr;
    if (aoti_torch_is_contiguous(tensor, &contiguous) || aoti_torch_get_dtype(tensor, &dtype)) return nullptr;
    if (!contiguous || dtype != aoti_torch_dtype_float32() || aoti_torch_get_data_ptr(tensor, &data)) return nullptr;
    return static_cast<const float*>(data);
}

// A dense float32 tensor of these sizes, to be filled; null where there is no memory.
float* made(int64_t rank, const int64_t* sizes, Handle* result) {
    int64_t strides[4], step = 1;
    for (int64_t i = rank - 1; i >= 0; step *= sizes[i--]) strides[i] = step;
    void* data = nullptr;
    int32_t dtype = aoti_torch_dtype_float32(), device = aoti_torch_device_type_cpu();
    if (aoti_torch_empty_strided(rank, sizes, strides, dtype, device, 0, result)) return nullptr;
    return aoti_torch_get_data_ptr(*result, &data) ? nullptr : static_cast<float*>(data);
}

bool scan_forward(const Scan& p) {
    int64_t tasks = package::forward_tasks(p);
    size_t bytes = package::forward_scratch(p);
    bool out_of_memory = false;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
        void* scratch = nullptr;
        if (bytes && posix_memalign(&scratch, 64, bytes)) {
#pragma omp atomic write
            out_of_memory = true;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            if (scratch || !bytes) package::forward(p, task, static_cast<float*>(scratch));
        }
        free(scratch);
    }
    return !out_of_memory;
}

int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

}  // namespace

// ss2d_scan(u (B, H, W, D), projected (B, H, W, K, R + 2N), dt_proj_weight (K, D, R), dt_proj_bias (K, D), A (K, D, N),
// D (K, D), pattern, backend) -> y (B, H, W, D). Not 0: an error.
extern "C" int32_t aoti_torch_cpu_ss2d_scan(
    Handle u, Handle projected, Handle dt_weight, Handle dt_bias, Handle A, Handle D, const char* pattern, const char*,
    Handle* result) {
    static const struct {
        const char* name;
        int32_t bits[4];
    } PATTERNS[] = {VMAMBA_PATTERNS};  // 1 by columns, 2 backwards
    const int32_t* bits = nullptr;
    for (const auto& known : PATTERNS) {
        if (!strcmp(pattern, known.name)) bits = known.bits;
    }
    int64_t *image, *weight, *decay;
    if (!bits || aoti_torch_get_sizes(u, &image) || aoti_torch_get_sizes(dt_weight, &weight) ||
        aoti_torch_get_sizes(A, &decay)) {
        return 1;
    }
    Scan p = {};
    p.batch = image[0], p.height = image[1], p.width = image[2], p.channels = image[3];
    p.routes = weight[0], p.rank = weight[2], p.states = decay[2];
    p.groups = p.softplus = 1;
    p.route_stride = p.rank + 2 * p.states, p.pixel_stride = p.routes * p.route_stride;
    p.route_bits = bits;
    p.u = dense(u), p.dt_low = dense(projected), p.dt_weight = dense(dt_weight), p.dt_bias = dense(dt_bias);
    p.A = dense(A), p.D = dense(D);
    if (!p.u || !p.dt_low || !p.dt_weight || !p.dt_bias || !p.A || !p.D) return 1;
    p.B = p.dt_low + p.rank, p.C = p.B + p.states;

    p.y = made(4, image, result);
    int64_t size = image[0] * image[1] * image[2] * image[3], blocks = package::blocks(p);
    if (!size) return 0;
    if (!p.y) return 1;
    bool is_large = p.batch * p.height * p.width * p.routes * blocks * p.states > STEPS_FOR_THREADS;
    p.threads = is_large ? omp_get_max_threads() : 1;
    if (p.threads > 2 && p.batch * blocks < 2 * p.threads) {
        p.route_y = static_cast<float*>(malloc(p.routes * size * sizeof(float)));
        if (!p.route_y) return 1;
    }
    int64_t shares = p.threads / greatest_common_divisor(p.batch * (p.route_y ? p.routes : 1), p.threads);
    p.slots = blocks < shares ? blocks : shares;
    bool done = scan_forward(p);
    if (done && p.route_y) {
#pragma omp parallel for num_threads(p.threads)
        for (int64_t i = 0; i < p.batch * blocks; i++) package::merge(p, i);
    }
    free(p.route_y);
    return !done;
}

// recurrence(a (batch, L, F), b (batch, L, F), backwards) -> h of the shape of b: h_t = a_t·h_{t-1} + b_t from 0.
extern "C" int32_t aoti_torch_cpu_recurrence(Handle a, Handle b, int32_t backwards, Handle* result) {
    int64_t* sizes;
    const float *factors = dense(a), *summands = dense(b);
    if (!factors || !summands || aoti_torch_get_sizes(b, &sizes)) return 1;
    int64_t batch = sizes[0], length = sizes[1], features = sizes[2];
    float* states = made(3, sizes, result);
    if (!states) return batch * length * features != 0;
    int64_t step = backwards ? -features : features;
    for (int64_t i = 0; i < batch; i++) {
        int64_t at = (i * length + (backwards ? length - 1 : 0)) * features;
        for (int64_t t = 0; t < length; t++, at += step) {
            for (int64_t f = 0; f < features; f++) {
                states[at + f] = (t ? factors[at + f] * states[at - step + f] : 0) + summands[at + f];
            }
        }
    }
    return 0;
}
