// The C interface that ops/backends/native.py calls through ctypes: picks the kernels for this processor and shares the
// tasks out among threads.

#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "scan.h"

#if defined(VMAMBA_X86)
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }

namespace {

const Kernels* chosen = &baseline::kernels;

// GOMP_parallel of the OpenMP runtime that torch has loaded, or null. A pool of our own beside torch's would compete with
// its threads, which keep spinning for a while after each of its operators.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp = nullptr;

// OpenMP's threads do not survive a fork, and its runtime does not notice: a forked child works alone.
std::atomic<bool> forked{false};

struct Work {
    const Problem* problem;
    void (*run)(const Problem&, int64_t, float*);
    int64_t tasks;
    size_t scratch;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
};

void worker(void* argument) {
    Work& work = *static_cast<Work*>(argument);
    void* scratch = nullptr;
    if (work.scratch && posix_memalign(&scratch, 64, work.scratch)) {
        work.out_of_memory = true;
        return;
    }
    for (int64_t task; (task = work.next.fetch_add(1)) < work.tasks;) {
        work.run(*work.problem, task, static_cast<float*>(scratch));
    }
    free(scratch);
}

void* thread_main(void* argument) {
    worker(argument);
    return nullptr;
}

// Whether all tasks were done.
bool share(const Problem& p, int64_t tasks, size_t scratch, void (*run)(const Problem&, int64_t, float*)) {
    Work work;
    work.problem = &p;
    work.run = run;
    work.tasks = tasks;
    work.scratch = scratch;
    int64_t threads = forked ? 1 : p.threads < tasks ? p.threads : tasks;
    if (threads > 256) threads = 256;
    if (threads <= 1) {
        worker(&work);
    } else if (openmp) {
        openmp(worker, &work, unsigned(threads), 0);
    } else {
        pthread_t others[256];
        int started = 0;
        while (started < threads - 1 && !pthread_create(&others[started], nullptr, thread_main, &work)) started++;
        worker(&work);
        for (int i = 0; i < started; i++) pthread_join(others[i], nullptr);
    }
    return !work.out_of_memory;
}

constexpr int64_t SUM_LENGTH = 16384;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Changes with struct Problem, so that a library left over from another version is recognised.
EXPORT int32_t vmamba_interface() { return 1; }

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
    bool runs[] = {has_avx512, has_avx2, true};
#else
    const Kernels* all[] = {&baseline::kernels};
    bool runs[] = {true};
#endif
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const char *a = name, *b = all[i]->name;
        while (*a && *a == *b) a++, b++;
        if (runs[i] && (!*name || *a == *b)) {
            chosen = all[i];
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
    if (!share(*p, chosen->forward_tasks(*p), chosen->forward_scratch(*p), chosen->forward)) return 1;
    if (p->route_y) {
        auto merge = [](const Problem& q, int64_t task, float*) { chosen->merge(q, task); };
        share(*p, p->batch * chosen->blocks(*p), 0, merge);
    }
    return 0;
}

// The sums over slots and over images go to the first slot and the first image.
EXPORT int32_t vmamba_backward(const Problem* p) {
    if (!share(*p, chosen->backward_tasks(*p), chosen->backward_scratch(*p), chosen->backward)) return 1;
    if (p->slots > 1) {
        auto add_slots = [](const Problem& q, int64_t task, float*) {
            int64_t size = q.batch * q.height * q.width * q.pixel_stride, from = task * SUM_LENGTH;
            float* part = q.grad_parameters + from;
            chosen->sum(part, q.slots, size, size - from < SUM_LENGTH ? size - from : SUM_LENGTH);
        };
        int64_t size = p->batch * p->height * p->width * p->pixel_stride;
        share(*p, (size + SUM_LENGTH - 1) / SUM_LENGTH, 0, add_slots);
    }
    if (p->batch > 1) {
        auto add_images = [](const Problem& q, int64_t task, float*) {
            int64_t size = q.routes * q.channels * (q.rank + 1 + q.states) + q.channels, from = task * SUM_LENGTH;
            float* part = q.grad_weights + from;
            chosen->sum(part, q.batch, size, size - from < SUM_LENGTH ? size - from : SUM_LENGTH);
        };
        int64_t size = p->routes * p->channels * (p->rank + 1 + p->states) + p->channels;
        share(*p, (size + SUM_LENGTH - 1) / SUM_LENGTH, 0, add_images);
    }
    return 0;
}
