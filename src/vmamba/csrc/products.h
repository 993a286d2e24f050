// What the C interface (interface.cpp) and the product (products.cpp, compiled once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

// One call of y = act(x · weightᵀ + bias) + residual. Filled in by ops/backends/native/products.py, which has checked
// every shape; all tensors are dense.
struct Product {
    int64_t rows, inputs, outputs;
    const void* x;         // (rows, inputs), float or bfloat16
    const void* weight;    // (outputs, inputs), that or float, which is rounded to bfloat16 where x is that
    const float* bias;     // (outputs) or null
    const void* residual;  // (rows, outputs) or null, dtype of y
    void* y;               // (rows, outputs), float or, where x is that, bfloat16
    int32_t bfloat16, weight_bfloat16, y_bfloat16, gelu, threads;  // at most so many
};

// The product of one instruction set; a task runs as those of struct ScanKernels do.
struct ProductKernels {
    int64_t (*tasks)(const Product&);
    size_t (*scratch)(const Product&);  // bytes a thread needs
    void (*multiply)(const Product&, int64_t task, float* scratch);
};
