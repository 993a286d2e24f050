// A convolution as a product with patches, which are gathered a few pixels at a time and stay in the cache.
//
// A patch has the order of the weight, (channels, 3, 3), where there are few pixels: the weight is then read as it lies. To
// gather many patches that way takes longer than to bring the weight into the order of the image, (3, 3, channels).
//
// Or by tiles (winograd.cpp), the transforms of so many at a time that they stay in the cache.

#include "convolution.h"

#include "interface.h"
#include "memory.h"
#include "patches.h"
#include "threads.h"

namespace {

constexpr int64_t PATCH_BYTES = 4 << 20;  // of the patches that are multiplied at a time
constexpr int64_t LEAST_PIXELS = 256;     // but so many, since the weight is packed for each time
constexpr int64_t VALUES_BYTES = 8 << 20;  // of the tiles' transforms
constexpr int64_t PIXELS_OF_TASK = 16, ROWS_OF_TASK = 16;

// Patches of the pixels [first, first + count), or the weight in another order.
struct Gathering {
    const Convolution& p;
    int64_t rows, columns;  // of the result
    bool as_weight;
    int64_t first, count;
    void* to;
    int32_t threads;
};

template <class T>
void gather(const Gathering& g, int64_t task, float*) {
    const Convolution& p = g.p;
    int64_t size = p.channels, end = (task + 1) * PIXELS_OF_TASK < g.count ? (task + 1) * PIXELS_OF_TASK : g.count;
    for (int64_t i = task * PIXELS_OF_TASK; i < end; i++) {
        int64_t pixel = g.first + i, column = pixel % g.columns, row = pixel / g.columns % g.rows;
        const T* image = static_cast<const T*>(p.x) + pixel / g.columns / g.rows * p.height * p.width * size;
        T* patch = static_cast<T*>(g.to) + i * TAPS_OF_PATCH * size;
        int64_t top = row * p.stride - 1, left = column * p.stride - 1;
        if (!g.as_weight) {
            gather_patch(image, 0, p.height, p.width, size, top, left, patch);
            continue;
        }
        for (int64_t tap = 0; tap < TAPS_OF_PATCH; tap++) {
            int64_t y = top + tap / SIDE, x = left + tap % SIDE;
            bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            const T* from = image + (y * p.width + x) * size;
            for (int64_t c = 0; c < size; c++) patch[c * TAPS_OF_PATCH + tap] = inside ? from[c] : T();
        }
    }
}

template <class T>
void reorder(const Gathering& g, int64_t task, float*) {
    int64_t size = g.p.channels, end = (task + 1) * ROWS_OF_TASK < g.p.outputs ? (task + 1) * ROWS_OF_TASK : g.p.outputs;
    for (int64_t row = task * ROWS_OF_TASK; row < end; row++) {
        int64_t offset = row * TAPS_OF_PATCH * size;
        as_patch(static_cast<const T*>(g.p.weight) + offset, size, static_cast<T*>(g.to) + offset);
    }
}

int32_t run_by_tiles(const Convolution& p) {
    const WinogradKernels& winograd = winograd_kernels();
    int64_t tiles = p.batch * divide_up(p.height, SIDE_OF_TILE) * divide_up(p.width, SIDE_OF_TILE);
    int64_t size = NUMBERS_OF_TILE * p.channels * sizeof(float), unit = winograd.tiles_of_task;
    int64_t longest = VALUES_BYTES / (size * unit) * unit;
    if (longest < unit) longest = unit;
    if (longest > tiles) longest = tiles;
    Memory memory;
    int64_t weight = memory.piece(winograd.weight_floats(p) * sizeof(float));
    int64_t values = memory.piece(longest * size);
    char* base = memory.obtain();
    if (!base) return 1;
    Tiles call{p, reinterpret_cast<float*>(base + weight), reinterpret_cast<float*>(base + values), 0, 0, p.threads};
    if (!share<Tiles>(call, winograd.weight_tasks(p), 0, winograd.transform_weight)) return 1;
    for (; call.first < tiles; call.first += longest) {
        call.count = tiles - call.first < longest ? tiles - call.first : longest;
        if (!share<Tiles>(call, call.count, 0, winograd.transform_values)) return 1;
        if (!share<Tiles>(call, winograd.tasks(call), winograd.scratch(call), winograd.multiply)) return 1;
    }
    return 0;
}

}  // namespace

int32_t run_convolution(const Convolution& p) {
    if (p.by_tiles) return run_by_tiles(p);
    int64_t rows = divide_up(p.height, p.stride), columns = divide_up(p.width, p.stride), pixels = p.batch * rows * columns;
    int64_t inputs = p.channels * TAPS_OF_PATCH, size = p.bfloat16 ? 2 : 4, weight_size = p.weight_bfloat16 ? 2 : 4;
    bool as_weight = pixels <= p.outputs;
    int64_t stretch = PATCH_BYTES / (inputs * size);
    if (stretch < LEAST_PIXELS) stretch = LEAST_PIXELS;
    int64_t parts = divide_up(pixels, stretch), longest = divide_up(pixels, parts);

    Memory memory;
    int64_t patches = memory.piece(longest * inputs * size);
    int64_t reordered = memory.piece(as_weight ? 0 : p.outputs * inputs * weight_size);
    char* base = memory.obtain();
    if (!base) return 1;
    Gathering gathering{p, rows, columns, as_weight, 0, 0, base + reordered, p.threads};
    if (!as_weight) {
        auto task = p.weight_bfloat16 ? reorder<uint16_t> : reorder<float>;
        if (!share<Gathering>(gathering, divide_up(p.outputs, ROWS_OF_TASK), 0, task)) return 1;
    }
    gathering.to = base + patches;
    for (int64_t i = 0; i < parts; i++) {
        gathering.first = pixels * i / parts, gathering.count = pixels * (i + 1) / parts - gathering.first;
        auto task = p.bfloat16 ? gather<uint16_t> : gather<float>;
        if (!share<Gathering>(gathering, divide_up(gathering.count, PIXELS_OF_TASK), 0, task)) return 1;
        Product call{};
        call.rows = gathering.count, call.inputs = inputs, call.outputs = p.outputs, call.x = gathering.to;
        call.weight = as_weight ? p.weight : base + reordered, call.bias = p.bias, call.bfloat16 = p.bfloat16;
        call.weight_bfloat16 = p.weight_bfloat16, call.y_bfloat16 = p.bfloat16, call.threads = p.threads;
        call.y = static_cast<char*>(p.y) + gathering.first * p.outputs * size;
        if (vmamba_linear(&call)) return 1;
    }
    return 0;
}
