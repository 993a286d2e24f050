// The C interface that ops/backends/native.py and ops/fused.py call through ctypes: picks the kernels for this processor and
// shares the tasks out among threads.

#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "layers.h"
#include "scan.h"

#if defined(VMAMBA_X86)
namespace avx512 { extern const Kernels kernels; extern const LayerKernels layers; }
namespace avx2 { extern const Kernels kernels; extern const LayerKernels layers; }
#endif
namespace baseline { extern const Kernels kernels; extern const LayerKernels layers; }

// Of the OpenMP runtime that torch has loaded; null where the dynamic linker does not find it.
#if defined(__ELF__)
extern "C" int omp_get_thread_num() __attribute__((weak));
#else
constexpr int (*omp_get_thread_num)() = nullptr;
#endif

namespace {

const Kernels* chosen = &baseline::kernels;
const LayerKernels* chosen_layers = &baseline::layers;

// GOMP_parallel of the OpenMP runtime that torch has loaded, or null. A pool of our own beside torch's would compete with
// its threads, which keep spinning for a while after each of its operators.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp = nullptr;

// OpenMP's threads do not survive a fork, and its runtime does not notice: a forked child works alone.
std::atomic<bool> forked{false};

constexpr int64_t MAX_THREADS = 256;

// Each thread begins with its own stretch of the tasks, because the operator before, torch's or ours, left a like stretch of
// the data in its cache; then it helps the others.
struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
};

template <class Call>
struct Work {
    const Call* call;
    void (*run)(const Call&, int64_t, float*);
    int64_t threads;
    size_t scratch;
    std::atomic<int64_t> arrived{0};
    std::atomic<bool> out_of_memory{false};
    Stretch stretches[MAX_THREADS];  // of `threads` threads
};

template <class Call>
void worker(void* argument) {
    Work<Call>& work = *static_cast<Work<Call>*>(argument);
    void* scratch = nullptr;
    if (work.scratch && posix_memalign(&scratch, 64, work.scratch)) {
        work.out_of_memory = true;
        return;
    }
    int64_t own = openmp && omp_get_thread_num ? omp_get_thread_num() : work.arrived.fetch_add(1);
    for (int64_t i = 0; i < work.threads; i++) {
        Stretch& stretch = work.stretches[(own + i) % work.threads];
        for (int64_t task; (task = stretch.next.fetch_add(1)) < stretch.end;) {
            work.run(*work.call, task, static_cast<float*>(scratch));
        }
    }
    free(scratch);
}

template <class Call>
void* thread_main(void* argument) {
    worker<Call>(argument);
    return nullptr;
}

// Whether all tasks were done. A Call is a Problem or a Layer.
template <class Call>
bool share(const Call& p, int64_t tasks, size_t scratch, void (*run)(const Call&, int64_t, float*)) {
    Work<Call> work;
    int64_t threads = forked ? 1 : p.threads < tasks ? p.threads : tasks;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 1) threads = 1;
    work.call = &p;
    work.run = run;
    work.threads = threads;
    work.scratch = scratch;
    for (int64_t i = 0; i < threads; i++) {
        work.stretches[i].next = tasks * i / threads;
        work.stretches[i].end = tasks * (i + 1) / threads;
    }
    if (threads == 1) {
        worker<Call>(&work);
    } else if (openmp) {
        openmp(worker<Call>, &work, unsigned(threads), 0);
    } else {
        pthread_t others[MAX_THREADS];
        int started = 0;
        while (started < threads - 1 && !pthread_create(&others[started], nullptr, thread_main<Call>, &work)) started++;
        worker<Call>(&work);
        for (int i = 0; i < started; i++) pthread_join(others[i], nullptr);
    }
    return !work.out_of_memory;
}

constexpr int64_t SUM_LENGTH = 16384;

// A layer's tasks are shares of one size. Several for each thread: one that comes late, or is held up, does fewer.
constexpr int64_t TASKS_PER_THREAD = 4;

bool share(Layer& layer, size_t scratch, void (*run)(const Layer&, int64_t, float*)) {
    layer.tasks = layer.threads > 1 ? layer.threads * TASKS_PER_THREAD : 1;
    return share(layer, layer.tasks, scratch, run);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Changes with struct Problem and the functions below, so that a library left over from another version is recognised.
EXPORT int32_t vmamba_interface() { return 2; }

EXPORT int64_t vmamba_problem_size() { return sizeof(Problem); }

EXPORT const char* vmamba_kernels() { return chosen->name; }

// Chooses kernels by name; false where this processor or this build lacks them.
EXPORT int32_t vmamba_choose(const char* name) {
#if defined(VMAMBA_X86)
    __builtin_cpu_init();
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const Kernels* all[] = {&avx512::kernels, &avx2::kernels, &baseline::kernels};
    const LayerKernels* all_layers[] = {&avx512::layers, &avx2::layers, &baseline::layers};
    bool runs[] = {has_avx512, has_avx2, true};
#else
    const Kernels* all[] = {&baseline::kernels};
    const LayerKernels* all_layers[] = {&baseline::layers};
    bool runs[] = {true};
#endif
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const char *a = name, *b = all[i]->name;
        while (*a && *a == *b) a++, b++;
        if (runs[i] && (!*name || *a == *b)) {
            chosen = all[i], chosen_layers = all_layers[i];
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

// Both return 0, or 1 where memory ran out.
EXPORT int32_t vmamba_forward(const Problem* p) {
    if (!share<Problem>(*p, chosen->forward_tasks(*p), chosen->forward_scratch(*p), chosen->forward)) return 1;
    if (p->route_y) {
        auto merge = [](const Problem& q, int64_t task, float*) { chosen->merge(q, task); };
        share<Problem>(*p, p->batch * chosen->blocks(*p), 0, merge);
    }
    return 0;
}

// The sums over slots and over images go to the first slot and the first image.
EXPORT int32_t vmamba_backward(const Problem* p) {
    if (!share<Problem>(*p, chosen->backward_tasks(*p), chosen->backward_scratch(*p), chosen->backward)) return 1;
    if (p->slots > 1) {
        auto add_slots = [](const Problem& q, int64_t task, float*) {
            int64_t size = q.batch * q.height * q.width * q.pixel_stride, from = task * SUM_LENGTH;
            float* part = q.grad_parameters + from;
            chosen->sum(part, q.slots, size, size - from < SUM_LENGTH ? size - from : SUM_LENGTH);
        };
        int64_t size = p->batch * p->height * p->width * p->pixel_stride;
        share<Problem>(*p, (size + SUM_LENGTH - 1) / SUM_LENGTH, 0, add_slots);
    }
    if (p->batch > 1) {
        auto add_images = [](const Problem& q, int64_t task, float*) {
            int64_t size = q.routes * q.channels * (q.rank + 1 + q.states) + q.channels, from = task * SUM_LENGTH;
            float* part = q.grad_weights + from;
            chosen->sum(part, q.batch, size, size - from < SUM_LENGTH ? size - from : SUM_LENGTH);
        };
        int64_t size = p->routes * p->channels * (p->rank + 1 + p->states) + p->channels;
        share<Problem>(*p, (size + SUM_LENGTH - 1) / SUM_LENGTH, 0, add_images);
    }
    return 0;
}

// --- fused layers; struct Layer says what the arguments are ---

EXPORT void vmamba_layer_norm(
    const void* x, const float* weight, const float* bias, void* y, int64_t rows, int64_t channels, float eps,
    int32_t bfloat16, int32_t threads
) {
    Layer layer{};
    layer.x = x, layer.weight = weight, layer.bias = bias, layer.y = y;
    layer.width = rows, layer.channels = channels, layer.eps = eps;
    layer.bfloat16 = bfloat16, layer.threads = threads;
    share(layer, 0, chosen_layers->layer_norm);
}

EXPORT void vmamba_depthwise_silu(
    const void* x, const float* weight, const float* bias, void* y, int64_t batch, int64_t height, int64_t width,
    int64_t channels, int64_t bands, int32_t bfloat16, int32_t threads
) {
    Layer layer{};
    layer.x = x, layer.weight = weight, layer.bias = bias, layer.y = y;
    layer.batch = batch, layer.height = height, layer.width = width, layer.channels = channels, layer.bands = bands;
    layer.bfloat16 = bfloat16, layer.threads = threads;
    share(layer, 0, chosen_layers->depthwise_silu);
}

// Returns 0, or 1 where memory ran out. The sum over images and bands goes to the first of grad_weights.
EXPORT int32_t vmamba_depthwise_silu_backward(
    const void* grad, const void* x, const float* weight, const float* bias, void* grad_x, float* grad_weights,
    int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t bands, int32_t bfloat16, int32_t threads
) {
    Layer layer{};
    layer.grad = grad, layer.x = x, layer.weight = weight, layer.bias = bias;
    layer.grad_x = grad_x, layer.grad_weights = grad_weights;
    layer.batch = batch, layer.height = height, layer.width = width, layer.channels = channels, layer.bands = bands;
    layer.bfloat16 = bfloat16, layer.threads = threads;
    size_t scratch = chosen_layers->depthwise_silu_backward_scratch(layer);
    if (!share(layer, scratch, chosen_layers->depthwise_silu_backward)) return 1;
    int64_t size = channels * (TAPS + 1);
    chosen->sum(grad_weights, batch * bands, size, size);
    return 0;
}

EXPORT void vmamba_gelu(const void* x, void* y, int64_t count, int32_t bfloat16, int32_t threads) {
    Layer layer{};
    layer.x = x, layer.y = y, layer.channels = count, layer.bfloat16 = bfloat16, layer.threads = threads;
    share(layer, 0, chosen_layers->gelu);
}

EXPORT void vmamba_gelu_backward(
    const void* grad, const void* x, void* y, void* grad_x, int64_t count, int32_t bfloat16, int32_t threads
) {
    Layer layer{};
    layer.grad = grad, layer.x = x, layer.y = y, layer.grad_x = grad_x;
    layer.channels = count, layer.bfloat16 = bfloat16, layer.threads = threads;
    share(layer, 0, chosen_layers->gelu_backward);
}
