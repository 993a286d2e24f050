// What the C interface (interface.cpp) and the fused layers (layers.cpp, compiled once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr int TAPS = 9;  // of the convolution

// One call of a layer. Filled in by ops/backends/native/layers.py, which has checked every shape; all tensors are dense,
// images are (batch, height, width, channels). Without a grid, LayerNorm's rows are `width` pixels, and GELU's values the
// channels of one.
struct Layer {
    int64_t batch, height, width, channels;
    int64_t bands;         // of rows, into which the convolution splits each image; forwards set by interface.cpp
    int64_t tasks;         // equal shares of the work, as many as keep all threads busy; set by interface.cpp
    const void* x;         // float or bfloat16
    const void* grad;      // of y, dtype of x
    const float* weight;   // LayerNorm's (channels) or null, the convolution's (channels, 3, 3)
    const float* bias;     // (channels) or null
    void* y;               // dtype of x; LayerNorm's float or bfloat16
    void* grad_x;          // dtype of x
    float* grad_weights;   // (batch, bands, channels · TAPS + channels): of the convolution's weight, then of its bias
    float eps;
    int32_t bfloat16, y_bfloat16, threads;  // at most so many
};

// The layers of one instruction set; a task runs as those of struct ScanKernels do.
struct LayerKernels {
    void (*layer_norm)(const Layer&, int64_t task, float*);
    void (*depthwise_silu)(const Layer&, int64_t task, float*);
    size_t (*depthwise_silu_backward_scratch)(const Layer&);  // bytes a thread needs
    void (*depthwise_silu_backward)(const Layer&, int64_t task, float* scratch);
    void (*gelu)(const Layer&, int64_t task, float*);
    void (*gelu_backward)(const Layer&, int64_t task, float*);
    void (*gate)(const Layer&, int64_t task, float*);   // y = y · SiLU(x)
    void (*widen)(const Layer&, int64_t task, float*);  // bfloat16 to float
};
