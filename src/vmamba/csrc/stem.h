// The stem in inference: what the C interface (interface.cpp) offers, and stem.cpp does.
#pragma once

#include <cstdint>

// One call of convolution, LayerNorm, GELU, convolution, LayerNorm, both convolutions 3×3 with padding 1. Filled in by
// ops/backends/native/stem.py, which has checked every shape; all tensors are dense and float.
struct Stem {
    int64_t batch, channels, height, width;  // of the images
    int64_t middle, outputs;                 // channels after the convolutions
    int64_t stride1, stride2;
    const float* x;                          // (batch, channels, height, width)
    const float *weight1, *bias1;            // (middle, channels, 3, 3); (middle) or null
    const float *norm1_weight, *norm1_bias;  // (middle) or null
    const float *weight2, *bias2;            // (outputs, middle, 3, 3); (outputs) or null
    const float *norm2_weight, *norm2_bias;  // (outputs) or null
    float* y;                                // (batch, ⌈height/stride⌉, ⌈width/stride⌉, outputs)
    float norm1_eps, norm2_eps;
    int32_t threads;
};

// 0, or 1 where memory ran out.
int32_t run_stem(const Stem&);
