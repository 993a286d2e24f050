// What the C interface (interface.cpp) and RoIAlign (roi_align.cpp, compiled once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

// One call of RoIAlign. Filled in by ops/backends/native/roi_align.py, which has checked every shape; all tensors are dense.
struct RoIAlign {
    int64_t batch, height, width, channels;
    int64_t regions, side;
    int64_t tasks;      // of the backward pass; set by interface.cpp
    const float* x;     // (batch, height, width, channels)
    const float* rois;  // (regions, 5): the image, then x1, y1, x2, y2
    float* y;           // (regions, channels, side, side)
    const float* grad;  // of y
    float* grad_x;      // of x, begun with 0
    float scale;        // cells of the map in a unit of the regions
    int32_t threads;
};

// RoIAlign of one instruction set; a task runs as those of struct ScanKernels do.
struct RoIAlignKernels {
    size_t (*scratch)(const RoIAlign&);  // bytes a thread needs
    void (*forward)(const RoIAlign&, int64_t task, float* scratch);   // a region
    void (*backward)(const RoIAlign&, int64_t task, float* scratch);  // a share of the channels
};
