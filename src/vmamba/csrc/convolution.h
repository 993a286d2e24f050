// A dense 3×3 convolution in inference: what the C interface (interface.cpp) offers, and convolution.cpp does.
#pragma once

#include <cstdint>

// One call of a convolution with padding 1. Filled in by ops/backends/native/convolution.py, which has checked every shape;
// all tensors are dense.
struct Convolution {
    int64_t batch, height, width, channels, outputs, stride;
    const void* x;       // (batch, height, width, channels), float or bfloat16
    const void* weight;  // (outputs, channels, 3, 3), that or float
    const float* bias;   // (outputs) or null
    void* y;             // (batch, ⌈height/stride⌉, ⌈width/stride⌉, outputs), dtype of x
    int32_t bfloat16, weight_bfloat16, threads;
};

// 0, or 1 where memory ran out.
int32_t run_convolution(const Convolution&);
