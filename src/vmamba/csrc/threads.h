// How the tasks of a call are shared out among threads.
#pragma once

#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

// Of the OpenMP runtime that torch has loaded; null where the dynamic linker does not find it.
#if defined(__ELF__)
extern "C" int omp_get_thread_num() __attribute__((weak));
#else
constexpr int (*omp_get_thread_num)() = nullptr;
#endif

// GOMP_parallel of the OpenMP runtime that torch has loaded, or null. A pool of our own beside torch's would compete with
// its threads, which keep spinning for a while after each of its operators.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline Parallel openmp = nullptr;

// OpenMP's threads do not survive a fork, and its runtime does not notice: a forked child works alone.
inline std::atomic<bool> forked{false};

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
    if (work.scratch >= sizeof(int64_t)) *static_cast<int64_t*>(scratch) = -1;  // no task has left anything in it
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

// Whether all tasks were done. A Call is one of the structures, which all say how many `threads` they want.
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
