// What the C interface (interface.cpp) and enlarging.cpp, compiled once per instruction set, share.
#pragma once

#include <cstddef>
#include <cstdint>

// One call that adds to y the 3×3 convolution, padded with 0, of a coarse map enlarged bilinearly to y's size. Filled in by
// ops/backends/native/enlarging.py, which has checked every shape; all tensors are dense.
struct Enlarging {
    int64_t batch, height, width, channels;  // of y
    int64_t rows, columns;                   // of the coarse map
    int64_t first, count;                    // of y's channels, those that z has
    const float* z;                          // (batch, rows, columns, 3, 3, count): what a coarse pixel gives to each tap
    float* y;                                // (batch, height, width, channels)
    int32_t threads;
};

// Enlarging of one instruction set; a task runs as those of struct ScanKernels do.
struct EnlargingKernels {
    size_t (*scratch)(const Enlarging&);                        // bytes a thread needs
    void (*add)(const Enlarging&, int64_t task, float* scratch);  // to a row
};
