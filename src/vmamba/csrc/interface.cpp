// The C interface that ops/backends/native/ calls through ctypes: picks the kernels for this processor and shares the tasks
// out among threads.

#include "interface.h"

#include "block.h"
#include "convolution.h"
#include "enlarging.h"
#include "memory.h"
#include "nms.h"
#include "roi_align.h"
#include "stem.h"
#include "threads.h"

#if defined(__linux__) && defined(VMAMBA_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define DECLARE(isa)                             \
    namespace isa {                              \
    extern const ScanKernels scan;               \
    extern const LayerKernels layers;            \
    extern const ProductKernels products;        \
    extern const RoIAlignKernels roi_align;      \
    extern const EnlargingKernels enlarging;     \
    extern const SuppressionKernels suppression; \
    extern const WinogradKernels winograd;       \
    }

#if defined(VMAMBA_X86)
namespace amx_bf16 { extern const ProductKernels products; }
namespace avx512_bf16 { extern const ProductKernels products; }
DECLARE(avx512)
DECLARE(avx2)
#endif
DECLARE(baseline)

namespace {

struct InstructionSet {
    const char* name;
    const ScanKernels* scan;
    const LayerKernels* layers;
    const ProductKernels* products;
    const RoIAlignKernels* roi_align;
    const EnlargingKernels* enlarging;
    const SuppressionKernels* suppression;
    const WinogradKernels* winograd;
};

#define ENTRY(isa) \
    {#isa, &isa::scan, &isa::layers, &isa::products, &isa::roi_align, &isa::enlarging, &isa::suppression, &isa::winograd}

// AVX-512 but for products.
#define WITH_PRODUCTS_OF(isa)                                                                    \
    {#isa, &avx512::scan, &avx512::layers, &isa::products, &avx512::roi_align, &avx512::enlarging, \
     &avx512::suppression, &avx512::winograd}

constexpr InstructionSet ALL[] = {  // the first that a processor has is the fastest
#if defined(VMAMBA_X86)
    WITH_PRODUCTS_OF(amx_bf16),
    WITH_PRODUCTS_OF(avx512_bf16),
    ENTRY(avx512),
    ENTRY(avx2),
#endif
    ENTRY(baseline),
};

const InstructionSet* chosen = ALL + sizeof ALL / sizeof *ALL - 1;

bool equal(const char* a, const char* b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

#if defined(VMAMBA_X86)
// Whether the processor has a matrix unit for bfloat16, and the system lets this process use it: Linux has to be asked.
bool has_tiles() {
#if defined(__linux__)
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr int ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (AMX_BF16 | AMX_TILE)) return false;
    return !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
#else
    return false;
#endif
}
#endif

bool runs_here(const char* name) {
#if defined(VMAMBA_X86)
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (equal(name, "avx2")) return has_avx2;
    bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (equal(name, "avx512")) return has_avx512;
    bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    if (equal(name, "avx512_bf16")) return has_bf16;
    if (equal(name, "amx_bf16")) return has_bf16 && has_tiles();
#endif
    return equal(name, "baseline");
}

constexpr int64_t SUM_LENGTH = 16384;

// Below these amounts of work, waking other threads takes longer: values of a layer, multiply-adds of a product, steps of a
// block of channels.
constexpr int64_t VALUES_FOR_THREADS = 16384, PRODUCTS_FOR_THREADS = 1 << 20, STEPS_FOR_THREADS = 512;

// A layer's tasks are shares of one size. Several for each thread: one that comes late, or is held up, does fewer.
constexpr int64_t TASKS_PER_THREAD = 4;

// The convolution's bands are of at most so many rows.
constexpr int64_t BAND_ROWS = 16;

template <class Call>
int32_t run(Call* p, void (*task)(const Call&, int64_t, float*), size_t scratch = 0) {
    p->tasks = p->threads > 1 ? p->threads * TASKS_PER_THREAD : 1;
    return !share<Call>(*p, p->tasks, scratch, task);
}

int32_t run_layer(Layer* p, int64_t values, void (*task)(const Layer&, int64_t, float*), size_t scratch = 0) {
    if (values <= VALUES_FOR_THREADS) p->threads = 1;
    return run(p, task, scratch);
}

int64_t values_of_image(const Layer& p) { return p.batch * p.height * p.width * p.channels; }

int64_t threads_of_scan(const Scan& p) {
    int64_t steps = p.batch * p.height * p.width * p.routes * chosen->scan->blocks(p) * p.states;
    return steps > STEPS_FOR_THREADS ? p.threads : 1;
}

int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
        int64_t rest = a % b;
        a = b, b = rest;
    }
    return a;
}

}  // namespace

const WinogradKernels& winograd_kernels() { return *chosen->winograd; }

int64_t bytes_for_routes(const Scan& p) {
    int64_t threads = threads_of_scan(p);
    bool are_tasks_few = threads > 2 && p.routes > 1 && p.batch * chosen->scan->blocks(p) < 2 * threads;
    return are_tasks_few ? p.routes * p.batch * p.height * p.width * p.channels * int64_t(sizeof(float)) : 0;
}

// A function that computes, 0 or 1 where memory ran out, and the size of its argument: library.py compares it.
#define COMPUTE(name, Structure)                                   \
    EXPORT int64_t name##_size() { return sizeof(Structure); }     \
    EXPORT int32_t name(Structure* p)

// Changes with the structures and the functions below, so that a library left over from another version is recognised.
EXPORT int32_t vmamba_interface() { return 13; }

EXPORT const char* vmamba_kernels() { return chosen->name; }

// Chooses kernels by name, "" for the fastest; false where this processor or this build lacks them.
EXPORT int32_t vmamba_choose(const char* name) {
    for (const InstructionSet& set : ALL) {
        if ((!*name || equal(name, set.name)) && runs_here(set.name)) {
            chosen = &set;
            return 1;
        }
    }
    return 0;
}

// Once, before anything else.
EXPORT void vmamba_initialise() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

// Null: start threads of our own for each call.
EXPORT void vmamba_use_openmp(void* gomp_parallel) { openmp = reinterpret_cast<Parallel>(gomp_parallel); }

// On as many tasks as make equal shares for the threads.
COMPUTE(vmamba_scan, Scan) {
    const ScanKernels& scan = *chosen->scan;
    int64_t apart = bytes_for_routes(*p), blocks = scan.blocks(*p);
    Memory memory;
    if (apart && !p->route_y) {
        int64_t begin = memory.piece(apart);
        char* base = memory.obtain();
        if (!base) return 1;
        p->route_y = reinterpret_cast<float*>(base + begin);
    }
    p->threads = threads_of_scan(*p);
    int64_t shares = p->threads / common_divisor(p->batch * (p->route_y ? p->routes : 1), p->threads);
    p->slots = blocks < shares ? blocks : shares;
    if (!share<Scan>(*p, scan.forward_tasks(*p), scan.forward_scratch(*p), scan.forward)) return 1;
    if (p->route_y) {
        auto merge = [](const Scan& q, int64_t task, float*) { chosen->scan->merge(q, task); };
        share<Scan>(*p, p->batch * blocks, 0, merge);
    }
    return 0;
}

// The sums over slots and over images go to the first slot and the first image.
COMPUTE(vmamba_scan_backward, Scan) {
    const ScanKernels& scan = *chosen->scan;
    p->threads = threads_of_scan(*p);
    if (!share<Scan>(*p, scan.backward_tasks(*p), scan.backward_scratch(*p), scan.backward)) return 1;
    if (p->slots > 1) {
        auto add_slots = [](const Scan& q, int64_t task, float*) {
            int64_t size = q.batch * q.height * q.width * q.pixel_stride, from = task * SUM_LENGTH;
            float* part = q.grad_parameters + from;
            chosen->scan->sum(part, q.slots, size, size - from < SUM_LENGTH ? size - from : SUM_LENGTH);
        };
        int64_t size = p->batch * p->height * p->width * p->pixel_stride;
        share<Scan>(*p, divide_up(size, SUM_LENGTH), 0, add_slots);
    }
    if (p->batch > 1) {
        auto add_images = [](const Scan& q, int64_t task, float*) {
            int64_t size = weights_of(q), from = task * SUM_LENGTH;
            float* part = q.grad_weights + from;
            chosen->scan->sum(part, q.batch, size, size - from < SUM_LENGTH ? size - from : SUM_LENGTH);
        };
        share<Scan>(*p, divide_up(weights_of(*p), SUM_LENGTH), 0, add_images);
    }
    return 0;
}

COMPUTE(vmamba_layer_norm, Layer) { return run_layer(p, p->width * p->channels, chosen->layers->layer_norm); }

COMPUTE(vmamba_depthwise_silu, Layer) {
    p->bands = divide_up(p->height, BAND_ROWS);
    return run_layer(p, values_of_image(*p), chosen->layers->depthwise_silu);
}

// The sum over images and bands goes to the first of grad_weights.
COMPUTE(vmamba_depthwise_silu_backward, Layer) {
    const LayerKernels& layers = *chosen->layers;
    size_t scratch = layers.depthwise_silu_backward_scratch(*p);
    if (run_layer(p, values_of_image(*p), layers.depthwise_silu_backward, scratch)) return 1;
    int64_t size = p->channels * (TAPS + 1);
    chosen->scan->sum(p->grad_weights, p->batch * p->bands, size, size);
    return 0;
}

COMPUTE(vmamba_gelu, Layer) { return run_layer(p, p->channels, chosen->layers->gelu); }

COMPUTE(vmamba_gelu_backward, Layer) { return run_layer(p, p->channels, chosen->layers->gelu_backward); }

COMPUTE(vmamba_gate, Layer) { return run_layer(p, p->channels, chosen->layers->gate); }

COMPUTE(vmamba_widen, Layer) { return run_layer(p, p->channels, chosen->layers->widen); }

COMPUTE(vmamba_linear, Product) {
    const ProductKernels& products = *chosen->products;
    if (p->rows * p->inputs * p->outputs <= PRODUCTS_FOR_THREADS) p->threads = 1;
    return !share<Product>(*p, products.tasks(*p), products.scratch(*p), products.multiply);
}

COMPUTE(vmamba_block, Block) { return run_block(*p); }

COMPUTE(vmamba_convolution, Convolution) { return run_convolution(*p); }

COMPUTE(vmamba_stem, Stem) { return run_stem(*p); }

COMPUTE(vmamba_roi_align, RoIAlign) {
    const RoIAlignKernels& roi_align = *chosen->roi_align;
    return !share<RoIAlign>(*p, p->regions, roi_align.scratch(*p), roi_align.forward);
}

COMPUTE(vmamba_roi_align_backward, RoIAlign) {
    const RoIAlignKernels& roi_align = *chosen->roi_align;
    return run(p, roi_align.backward, roi_align.scratch(*p));
}

COMPUTE(vmamba_add_enlarged, Enlarging) {
    const EnlargingKernels& enlarging = *chosen->enlarging;
    return !share<Enlarging>(*p, p->batch * p->height, enlarging.scratch(*p), enlarging.add);
}

// Each box waits for the one before it: one thread.
COMPUTE(vmamba_nms, Suppression) {
    chosen->suppression->suppress(*p);
    return 0;
}
