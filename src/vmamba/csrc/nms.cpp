// Non-maximum suppression for one instruction set: compiled once for each, as scan.cpp is, and under the same rules. The
// overlap of two boxes is torchvision's in every bit: its operations in their order, none of them fused (CMakeLists.txt).

#include <cstdint>
#include <cstring>

#include "nms.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"

inline Floats larger_of(Floats a, Floats b) { return a < b ? b : a; }
inline Floats smaller_of(Floats a, Floats b) { return b < a ? b : a; }

void suppress(Suppression& p) {
    const float *x1 = p.boxes, *y1 = x1 + p.size, *x2 = y1 + p.size, *y2 = x2 + p.size;
    for (int64_t j = 0; j < p.size; j += LANES) {
        store(p.areas + j, (load(x2 + j) - load(x1 + j)) * (load(y2 + j) - load(y1 + j)));
    }
    p.found = 0;
    for (int64_t i = 0; i < p.count; i++) {
        if (p.gone[i]) continue;
        p.kept[p.found++] = i;
        Floats left = splat(x1[i]), top = splat(y1[i]), right = splat(x2[i]), bottom = splat(y2[i]);
        Floats area = splat(p.areas[i]);
        // From the vector that has the next box on: what becomes of those before it no longer matters.
        for (int64_t j = (i + 1) / LANES * LANES; j < p.size; j += LANES) {
            Floats width = larger_of(Floats{}, smaller_of(right, load(x2 + j)) - larger_of(left, load(x1 + j)));
            Floats height = larger_of(Floats{}, smaller_of(bottom, load(y2 + j)) - larger_of(top, load(y1 + j)));
            Floats both = width * height;
            Ints goes = both / (area + load(p.areas + j) - both) > splat(p.iou), gone;
            memcpy(&gone, p.gone + j, sizeof gone);
            gone |= goes;
            memcpy(p.gone + j, &gone, sizeof gone);
        }
    }
}

}  // namespace

extern const SuppressionKernels suppression;
const SuppressionKernels suppression = {suppress};

}  // namespace VMAMBA_ISA
