// What the C interface (interface.cpp) and the scans (scan.cpp, compiled once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

// One scan, or four over a grid. Filled in by ops/backends/native/scan.py, which has checked every shape; all tensors are
// dense, positions are those of the grid (row by row), strides count elements.
//
// The step of a position comes from `delta` where that is given (selective_scan), else from dt_low and dt_weight (ss2d).
struct Scan {
    int64_t batch, height, width, channels;
    int64_t groups;          // of neighbouring channels that share B and C
    int64_t states, rank;    // N and R
    int64_t routes;          // K
    int64_t slots;           // into how many tasks an image's channel blocks are split; forwards set by interface.cpp
    int64_t pixel_stride;    // of dt_low, B and C from one position to the next
    int64_t route_stride;    // of dt_low, B and C from one route to the next
    int64_t group_stride;    // of B and C from one group to the next
    const int32_t* route_bits;  // (K): 1 by columns, 2 backwards
    const void* u;           // (batch, L, channels), float or bfloat16
    const float* delta;      // (batch, L, channels) or null
    const float* dt_low;     // (batch, L, ...), the first R of a route's parameters
    const float* B;          // (batch, L, ...), as C in the same memory as dt_low
    const float* C;
    const float* dt_weight;  // (K, channels, R)
    const float* dt_bias;    // (K, channels) or null
    const float* A;          // (K, channels, N)
    const float* D;          // (K, channels) or null
    void* y;                 // (batch, L, channels), dtype of u
    float* last;             // (batch, channels, N) or null
    float* route_y;          // (K, batch, L, channels) in the order of adding, where `bytes_for_routes`, or null
    const void* grad_y;      // (batch, L, channels), dtype of u
    const float* grad_last;  // (batch, channels, N) or null
    float* grad_u;           // (batch, L, channels)
    float* grad_delta;       // (batch, L, channels) or null
    float* grad_parameters;  // (slots, batch, L, pixel_stride): gradients of dt_low, B, C where those lie
    float* grad_weights;     // (batch, K D R + K D + K D N + D), `weights_of`: of dt_weight, dt_bias, A and the sum over k of D's
    int32_t bfloat16, softplus, threads;  // at most so many
};

// Of an image in grad_weights.
inline int64_t weights_of(const Scan& p) { return p.routes * p.channels * (p.rank + 1 + p.states) + p.channels; }

// Of the memory in which a scan keeps its routes apart, as it does where there are few tasks and many threads; else 0. A
// scan without a `route_y` obtains it.
int64_t bytes_for_routes(const Scan&);

// The scans of one instruction set. A task is what one thread does at a time; tasks write to disjoint memory, and what
// a task computes does not depend on which thread runs it or how many there are.
struct ScanKernels {
    int64_t (*blocks)(const Scan&);  // of an image: 16 channels, or what is left of a group
    int64_t (*forward_tasks)(const Scan&);
    size_t (*forward_scratch)(const Scan&);  // bytes a thread needs
    void (*forward)(const Scan&, int64_t task, float* scratch);
    void (*merge)(const Scan&, int64_t batch_and_block);  // adds route_y up, one (image, channel block) a task
    int64_t (*backward_tasks)(const Scan&);
    size_t (*backward_scratch)(const Scan&);
    void (*backward)(const Scan&, int64_t task, float* scratch);
    // parts[i] += Σ over j = 1 .. count - 1 of parts[j·stride + i], in the order of j.
    void (*sum)(float* parts, int64_t count, int64_t stride, int64_t length);
};
