// A whole VSS block in inference: what the C interface (interface.cpp) offers, and block.cpp does.
#pragma once

#include <cstdint>

// One call of x + SS2D(LayerNorm(x)), then of x + MLP(LayerNorm(x)). Filled in by ops/backends/native/block.py, which has
// checked every shape; all tensors are dense. A pointer that is null: a bias, a LayerNorm's weight or bias that is not
// there; `fc1_weight` and all that goes with it, where there is no MLP.
//
// Images are float or bfloat16; products and the scan take float or bfloat16 (`low_products`), bfloat16 with a bfloat16
// image. Weights of the products have that dtype or are float, and so has every other parameter but A: which of them are
// bfloat16 is said by the bits of `low_parameters` (`smalls` in block.cpp).
struct Block {
    int64_t batch, height, width, channels, inner, hidden;
    int64_t states, rank, routes;
    int64_t stretch;                    // values of the widest layer that are computed at a time; 0 for the usual number
    const int32_t* route_bits;          // as in struct Scan, as all of the scan's parameters
    const void* x;                      // (batch, height, width, channels)
    const float *norm1_weight, *norm1_bias;
    const void* in_weight;              // (inner, channels); with a gate (2 inner, channels)
    const float* in_bias;
    const float *conv_weight, *conv_bias;
    const float* x_weight;              // (routes (rank + 2 states), inner)
    const float *dt_weight, *dt_bias, *A, *D;
    const float *norm_weight, *norm_bias;
    const void* out_weight;             // (channels, inner)
    const float* out_bias;
    const float *norm2_weight, *norm2_bias;
    const void* fc1_weight;             // (hidden, channels)
    const float* fc1_bias;
    const void* fc2_weight;             // (channels, hidden)
    const float* fc2_bias;
    void* y;                            // (batch, height, width, channels), dtype of x, other memory than x
    float norm1_eps, norm_eps, norm2_eps;
    int32_t bfloat16, low_products, low_in, low_out, low_fc1, low_fc2;  // low_*: which weights are bfloat16
    int32_t low_parameters, gated, threads;
};

// 0, or 1 where memory ran out.
int32_t run_block(const Block&);
