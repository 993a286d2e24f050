// What the C interface (interface.cpp) and nms.cpp, compiled once per instruction set, share.
#pragma once

#include <cstdint>

constexpr int64_t NMS_BLOCK = 16;  // memory for the boxes is filled up to a multiple of this

// One call of non-maximum suppression. Filled in by ops/backends/native/nms.py, which has checked every shape.
struct Suppression {
    int64_t count, size;  // of boxes, and that filled up
    int64_t found;        // how many stay; a result
    const float* boxes;   // (4, size): x1, y1, x2, y2 of the boxes by falling score
    float* areas;         // (size)
    int32_t* gone;        // (size), begun with 0
    int64_t* kept;        // (count): the numbers of those that stay
    float iou;            // of boxes that overlap more, the later one goes
};

struct SuppressionKernels {
    void (*suppress)(Suppression&);
};
