// Functions of the C interface (interface.cpp) that others call as well: block.cpp and its like what they consist of, and a
// package's operators (package.cpp) the kernels. With C's names no linker would notice that a structure is another one.
#pragma once

#include <cstdint>

#include "layers.h"
#include "products.h"
#include "scan.h"

#if !defined(EXPORT)
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

EXPORT void vmamba_initialise();
EXPORT int32_t vmamba_choose(const char* name);
EXPORT void vmamba_use_openmp(void* gomp_parallel);

// 0, or 1 where memory ran out.
EXPORT int32_t vmamba_layer_norm(Layer*);
EXPORT int32_t vmamba_depthwise_silu(Layer*);
EXPORT int32_t vmamba_gelu(Layer*);
EXPORT int32_t vmamba_gate(Layer*);
EXPORT int32_t vmamba_widen(Layer*);
EXPORT int32_t vmamba_linear(Product*);
EXPORT int32_t vmamba_scan(Scan*);
