// What a dense 3×3 convolution with padding 1 multiplies, for those that are products (stem.cpp, convolution.cpp).
#pragma once

#include <cstdint>
#include <cstring>

constexpr int64_t SIDE = 3, TAPS_OF_PATCH = SIDE * SIDE;

// The pixels (3, 3, size) of an image (height, width, size) from row `top` and column `left` on, 0 outside of it. `rows`
// begins with the image's row `first`.
template <class T>
inline void gather_patch(
    const T* rows, int64_t first, int64_t height, int64_t width, int64_t size, int64_t top, int64_t left, T* patch
) {
    int64_t begin = left < 0 ? -left : 0, end = left + SIDE > width ? width - left : SIDE;
    for (int64_t y = top; y < top + SIDE; y++, patch += SIDE * size) {
        bool inside = y >= 0 && y < height;
        if (!inside || begin > 0 || end < SIDE) memset(patch, 0, SIDE * size * sizeof(T));
        if (!inside) continue;
        const T* pixel = rows + ((y - first) * width + left + begin) * size;
        memcpy(patch + begin * size, pixel, (end - begin) * size * sizeof(T));
    }
}

// Between the orders (size, 3, 3) of a filter and (3, 3, size) of a patch.
template <class T>
inline void as_patch(const T* filter, int64_t size, T* patch) {
    for (int64_t tap = 0; tap < TAPS_OF_PATCH; tap++) {
        for (int64_t c = 0; c < size; c++) patch[tap * size + c] = filter[c * TAPS_OF_PATCH + tap];
    }
}
