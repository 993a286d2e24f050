// A dense 3×3 convolution in inference: what the C interface (interface.cpp) offers, convolution.cpp does, and winograd.cpp,
// compiled once per instruction set, where the grid is large.
#pragma once

#include <cstddef>
#include <cstdint>

// One call of a convolution with padding 1. Filled in by ops/backends/native/convolution.py, which has checked every shape;
// all tensors are dense.
struct Convolution {
    int64_t batch, height, width, channels, outputs, stride;
    const void* x;       // (batch, height, width, channels), float or bfloat16
    const void* weight;  // (outputs, channels, 3, 3), that or float; by tiles (outputs, 3, 3, channels), float
    const float* bias;   // (outputs) or null
    void* y;             // (batch, ⌈height/stride⌉, ⌈width/stride⌉, outputs), dtype of x
    int32_t bfloat16, weight_bfloat16, by_tiles, threads;
};

// 0, or 1 where memory ran out.
int32_t run_convolution(const Convolution&);

constexpr int64_t SIDE_OF_TILE = 4, NUMBERS_OF_TILE = 36;

// A stretch of the tiles of a convolution of stride 1 in float, and where their transforms lie. See winograd.cpp.
struct Tiles {
    const Convolution& p;
    float* weight;
    float* values;
    int64_t first, count;
    int32_t threads;
};

// The steps of one instruction set; a task runs as those of struct ScanKernels do.
struct WinogradKernels {
    int64_t tiles_of_task;
    int64_t (*weight_floats)(const Convolution&);
    int64_t (*weight_tasks)(const Convolution&);
    void (*transform_weight)(const Tiles&, int64_t task, float*);
    void (*transform_values)(const Tiles&, int64_t task, float*);  // of one tile
    int64_t (*tasks)(const Tiles&);
    size_t (*scratch)(const Tiles&);  // bytes a thread needs
    void (*multiply)(const Tiles&, int64_t task, float* scratch);
};

// Those chosen for this processor.
const WinogradKernels& winograd_kernels();
