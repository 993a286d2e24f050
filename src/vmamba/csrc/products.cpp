// The product of pixels with a layer's weight, for one instruction set: compiled once for each, as scan.cpp is, and
// under the same rules.
//
// One factor is packed, a block at a time that fits the cache, so that its rows are the lanes of vectors. The other is
// read where it is: a strip of its rows is multiplied with all of the block, element by element, while the next strip
// is fetched. Few pixels are packed themselves, and the weight is read from memory once; for many pixels, packing the
// weight is less work, and no result needs to be transposed.
//
// What a value comes to does not depend on how the work was split into tasks.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "products.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"
#include "panel.h"

constexpr int64_t BLOCK_BYTES = 512 * 1024;  // half of a second-level cache
constexpr int64_t PARTS_PER_THREAD = 4;      // one that is held up does fewer

// --- words -----------------------------------------------------------------------------------------------------------

// A float that is multiplied as a bfloat16.
struct Rounded {
    float value;
};

template <bool FULL>
inline Floats load_part(const Rounded* p, int64_t valid) {
    uint16_t rounded[LANES];
    store(rounded, load_part<FULL>(&p->value, valid));
    return load(rounded);
}

// How a strip of ROWS of the one factor is multiplied with a panel of VECTORS of the other, which is the weight's from
// MANY_PIXELS on. Of the `next` strip, BYTES are 16 words of each row, of which this panel is to fetch `bytes` if all panels
// are to fetch them once.
template <class Kind>
struct ByVectors : Kind {
    static constexpr int ROWS = STRIP, VECTORS = WIDE, MANY_PIXELS = 256;
    static constexpr bool TILES = false;
    template <int BYTES>
    static void multiply(
        const float* const* strip, const float* panel, int64_t words, int64_t width, const char* next, int64_t,
        Floats* sums
    ) {
        Sums& all = *reinterpret_cast<Sums*>(sums);
        if (width > 2 * LANES) multiply_panel<Kind, 3, BYTES>(strip, panel, words, next, all);
        else if (width > LANES) multiply_panel<Kind, 2, BYTES>(strip, panel, words, next, all);
        else multiply_panel<Kind, 1, BYTES>(strip, panel, words, next, all);
    }
    static void begin() {}
    static void end() {}
};

// A word is two bfloat16, whose products are added to one sum.
#if defined(__AVX512BF16__)
struct Pair {
    static constexpr int VALUES = 2;
    template <bool FULL>
    static Floats words(const uint16_t* p, int64_t valid) {
        Floats v = {};
        memcpy(&v, p, FULL ? sizeof v : valid * sizeof *p);
        return v;
    }
    template <bool FULL>
    static Floats words(const Rounded* p, int64_t valid) {
        int64_t first = FULL ? LANES : smaller(valid, LANES);
        Floats low = load_part<FULL>(&p->value, first), high = load_part<FULL>(&p[first].value, valid - first);
        return (Floats)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
    static Floats add(Floats sum, Floats a, Floats b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#else
using Pair = Single;
#endif

#if defined(__AMX_BF16__)
// Words of pairs by the processor's matrix unit (AMX), which multiplies tiles of 16 rows of 16 words. As few tiles as will
// do are named: where a core's threads share what stands behind the names, each waits for the other in a loop that names all
// eight (docs/kernels.md).
struct Tiles : Pair {
    static constexpr int ROWS = LANES, VECTORS = 2, MANY_PIXELS = 128;
    static constexpr bool TILES = true;

    template <int BYTES>
    static void multiply(
        const float* const* strip, const float* panel, int64_t words, int64_t width, const char* next, int64_t bytes,
        Floats* sums
    ) {
        width > LANES ? multiply<true>(strip, panel, words, next, bytes, sums)
                      : multiply<false>(strip, panel, words, next, bytes, sums);
    }

    template <bool BOTH>
    static void multiply(
        const float* const* strip, const float* panel, int64_t words, const char* next, int64_t bytes, Floats* sums
    ) {
        const float* rows = strip[0];
        int64_t stride = (strip[1] - strip[0]) * sizeof *rows;
        constexpr int WIDTH = VECTORS * sizeof(Floats);
        _tile_zero(0);
        if (BOTH) _tile_zero(1);
        for (int64_t i = 0; i < words; i += LANES, panel += LANES * VECTORS * LANES) {
            fetch(next, bytes), next += bytes;
            _tile_loadd(2, rows + i, stride);
            _tile_loadd(3, panel, WIDTH);
            _tile_dpbf16ps(0, 2, 3);
            if (!BOTH) continue;
            _tile_loadd(3, panel + LANES, WIDTH);
            _tile_dpbf16ps(1, 2, 3);
        }
        _tile_stored(0, sums, WIDTH);
        if (BOTH) _tile_stored(1, sums + 1, WIDTH);
    }

    // Around a task: four tiles of 16 rows of 64 bytes.
    static void begin() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    static void end() { _tile_release(); }
};
using Low = Tiles;
#else
using Low = ByVectors<Pair>;
#endif

// One of the two factors.
template <class Kind, class T>
struct Factor {
    const T* data;
    int64_t rows, values;  // in each row

    // Rows past the end are the last.
    const T* row(int64_t i) const { return data + smaller(i, rows - 1) * values; }

    // A vector of a row's words; those past its end are 0.
    Floats words(const T* row, int64_t word) const {
        int64_t i = word * Kind::VALUES, left = values - i;
        bool is_full = left >= LANES * Kind::VALUES;
        return is_full ? Kind::template words<true>(row + i, left) : Kind::template words<false>(row + i, left);
    }

    bool is_words() const {
        return !std::is_same<T, Rounded>::value && sizeof(T) * Kind::VALUES == sizeof(float) &&
               values % Kind::VALUES == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(float) == 0;
    }
};

// --- splitting -------------------------------------------------------------------------------------------------------

// Each task packs one of the blocks, unless the thread's last one has, and multiplies it with one of the parts of the
// other factor.
constexpr int64_t HEADER = LANES;  // of a thread's scratch, in floats: which block it holds

template <class Kind>
struct Split {
    static constexpr int PANEL = Kind::VECTORS * LANES;
    bool packs_pixels;
    int64_t words, padded, panels, strips, blocks, parts;

    explicit Split(const Product& p) {
        packs_pixels = p.rows < Kind::MANY_PIXELS;
        words = divide_up(p.inputs, Kind::VALUES);
        padded = divide_up(words, LANES) * LANES;
        if (Kind::TILES) words = padded;
        panels = packs_pixels ? divide_up(p.rows - rest(p), PANEL) : divide_up(p.outputs, PANEL);
        strips = divide_up(packs_pixels ? p.outputs : p.rows, Kind::ROWS);
        int64_t threads = p.threads > 1 ? p.threads : 1;
        blocks = divide_up(panels * PANEL * words * sizeof(float), BLOCK_BYTES);
        if (blocks > 1) blocks = divide_up(blocks, threads) * threads;
        blocks = smaller(blocks, panels);
        if (blocks < 1) blocks = 1;
        parts = smaller(divide_up(threads * PARTS_PER_THREAD, blocks), strips);
    }
    // Pixels beside whole vectors of them, for multiply_rest.
    int64_t rest(const Product& p) const { return packs_pixels && !Kind::TILES ? p.rows % LANES : 0; }
    int64_t tasks() const { return blocks * parts; }
    int64_t block_size() const { return divide_up(panels, blocks) * PANEL * words; }
    size_t scratch() const { return (HEADER + block_size() + Kind::ROWS * padded) * sizeof(float); }
};

// --- packing ---------------------------------------------------------------------------------------------------------

// `count` rows as a panel (words, PANEL).
template <int PANEL, class Kind, class T>
void pack(const Factor<Kind, T>& factor, int64_t first, int64_t count, int64_t words, float* panel) {
    for (int64_t begin = 0; begin < count; begin += LANES, panel += LANES) {
        const T* rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = factor.row(first + begin + i);
        for (int64_t j = 0; j < words; j += LANES) {
            Floats v[LANES];
            for (int i = 0; i < LANES; i++) v[i] = factor.words(rows[i], j);
            transpose<LANES>(v);
            int64_t valid = smaller(LANES, words - j);
            for (int i = 0; i < valid; i++) store(panel + (j + i) * PANEL, v[i]);
        }
    }
}

// --- multiplying -----------------------------------------------------------------------------------------------------

// The strip's rows times fewer than LANES rows, which would leave lanes of a panel empty: the lanes are words instead.
template <class Kind, class T>
void multiply_rest(
    const float* const* strip, const Factor<Kind, T>& factor, int64_t first, int64_t count, int64_t words, Floats* sums
) {
    constexpr int DOWN = LANES < 16 ? LANES / 2 : 4, ACROSS = LANES / DOWN;
    for (int r = 0; r < STRIP; r += DOWN) {
        for (int64_t i = 0; i < count; i += ACROSS) {
            const T* rows[ACROSS];
            for (int a = 0; a < ACROSS; a++) rows[a] = factor.row(first + i + a);
            Floats sum[LANES] = {};
            for (int64_t j = 0; j < words; j += LANES) {
                Floats w[DOWN], x[ACROSS];
                int64_t left = words - j;
#pragma GCC unroll 4
                for (int d = 0; d < DOWN; d++) {
                    const float* p = strip[r + d] + j;
                    w[d] = left >= LANES ? load(p) : load_part<false>(p, left);
                }
#pragma GCC unroll 4
                for (int a = 0; a < ACROSS; a++) x[a] = factor.words(rows[a], j);
#pragma GCC unroll 16
                for (int l = 0; l < LANES; l++) sum[l] = Kind::add(sum[l], w[l % DOWN], x[l / DOWN]);
            }
            transpose<LANES>(sum);
            for (int l = 1; l < LANES; l++) sum[0] += sum[l];
            for (int l = 0; l < LANES; l++) sums[(r + l % DOWN) * WIDE][i + l / DOWN] = sum[0][l];
        }
    }
}

// --- results ---------------------------------------------------------------------------------------------------------

template <bool GELU>
inline Floats activate(Floats v) {
    return GELU ? v * normal(v).below : v;
}

// Sums are rows of VECTORS. Lanes are pixels, and the rows up to STRIP outputs.
template <bool GELU, class Y, int VECTORS>
void store_pixels(const Product& p, const Floats* sums, int64_t pixel, int64_t output, int64_t pixels, int64_t outputs) {
    constexpr int PARTS = LANES / STRIP;  // of a vector, once transposed: `outputs` of one pixel each
    float bias[STRIP] = {};
    if (p.bias) memcpy(bias, p.bias + output, outputs * sizeof *bias);
    for (int64_t begin = 0; begin < pixels; begin += LANES) {
        Floats v[STRIP];
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) v[r] = activate<GELU>(sums[r * VECTORS + begin / LANES] + bias[r]);
        transpose<STRIP>(v);
        int64_t valid = pixels - begin, size = outputs * sizeof(Y);
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            Y values[LANES] = {};
            auto place = [&](int part) { return (pixel + begin + part * STRIP + r) * p.outputs + output; };
            if (p.residual) {
                const Y* residual = static_cast<const Y*>(p.residual);
                for (int i = 0; i < PARTS && i * STRIP + r < valid; i++) {
                    memcpy(values + i * STRIP, residual + place(i), size);
                }
                v[r] += load(values);
            }
            store(values, v[r]);
            for (int i = 0; i < PARTS && i * STRIP + r < valid; i++) {
                Y *y = static_cast<Y*>(p.y) + place(i), *part = values + i * STRIP;
                outputs == STRIP ? memcpy(y, part, STRIP * sizeof(Y)) : memcpy(y, part, size);
            }
        }
    }
}

// Lanes are outputs, and the rows pixels: one vector of each.
template <bool GELU, class Y, int VECTORS, bool FULL>
void store_column(const Product& p, const Floats* sums, int64_t pixel, int64_t output, int64_t pixels, int64_t valid) {
    Floats bias = p.bias ? load_part<FULL>(p.bias + output, valid) : Floats{};
    for (int64_t r = 0, place = pixel * p.outputs + output; r < pixels; r++, place += p.outputs) {
        Floats v = activate<GELU>(sums[r * VECTORS] + bias);
        if (p.residual) v += load_part<FULL>(static_cast<const Y*>(p.residual) + place, valid);
        store_part<FULL>(static_cast<Y*>(p.y) + place, v, valid);
    }
}

template <bool GELU, class Y, int VECTORS>
void store_outputs(const Product& p, const Floats* sums, int64_t output, int64_t pixel, int64_t outputs, int64_t pixels) {
    for (int64_t begin = 0; begin < outputs; begin += LANES) {
        auto store = outputs - begin >= LANES ? store_column<GELU, Y, VECTORS, true> : store_column<GELU, Y, VECTORS, false>;
        store(p, sums + begin / LANES, pixel, output + begin, pixels, outputs - begin);
    }
}

template <bool GELU, class Y, int VECTORS>
constexpr decltype(&store_pixels<GELU, Y, VECTORS>) STORES[] = {store_outputs<GELU, Y, VECTORS>, store_pixels<GELU, Y, VECTORS>};

// --- tasks -----------------------------------------------------------------------------------------------------------

template <class Kind, class L, class R>
void multiply_block(
    const Product& p, const Split<Kind>& split, const Factor<Kind, L>& packed, const Factor<Kind, R>& other, int64_t task,
    float* scratch
) {
    constexpr int ROWS = Kind::ROWS, VECTORS = Kind::VECTORS, PANEL = Split<Kind>::PANEL;
    constexpr int BYTES = 16 * ROWS * sizeof(R) * Kind::VALUES;
    auto* const* stores = p.gelu ? (p.y_bfloat16 ? STORES<true, uint16_t, VECTORS> : STORES<true, float, VECTORS>)
                                 : (p.y_bfloat16 ? STORES<false, uint16_t, VECTORS> : STORES<false, float, VECTORS>);
    int64_t block = task / split.parts, part = task % split.parts, words = split.words;
    bool is_last = block + 1 == split.blocks;
    int64_t rest = is_last ? split.rest(p) : 0;
    int64_t begin = split.panels * block / split.blocks * PANEL;
    int64_t end = is_last ? packed.rows - rest : split.panels * (block + 1) / split.blocks * PANEL;
    int64_t& packed_before = *reinterpret_cast<int64_t*>(scratch);
    scratch += HEADER;
    for (int64_t i = begin; i < end && packed_before != block; i += PANEL) {
        pack<PANEL>(packed, i, smaller(PANEL, end - i), words, scratch + (i - begin) * words);
    }
    packed_before = block;
    float* converted = scratch + split.block_size();
    Floats sums[ROWS * VECTORS] = {};
    auto store_sums = [&](int64_t i, int64_t row, int64_t width, int64_t valid) {
        for (int64_t r = 0; r < valid; r += STRIP) {
            stores[split.packs_pixels](p, sums + r * VECTORS, i, row + r, width, smaller(STRIP, valid - r));
        }
    };
    Kind::begin();
    // Of the next strip, what each panel fetches while it is multiplied.
    int64_t share = Kind::TILES && begin < end ? divide_up(BYTES, 64 * divide_up(end - begin, PANEL)) * 64 : 0;
    int64_t last = split.strips * (part + 1) / split.parts;
    for (int64_t s = split.strips * part / split.parts; s < last; s++) {
        int64_t row = s * ROWS, valid = smaller(ROWS, other.rows - row);
        const float* strip[ROWS];
        bool is_in_place = other.is_words() && (!Kind::TILES || (valid == ROWS && words * Kind::VALUES == other.values));
        for (int r = 0; r < ROWS; r++) {
            const R* source = other.row(row + r);
            strip[r] = is_in_place ? reinterpret_cast<const float*>(source) : converted + r * split.padded;
            if (is_in_place) continue;
            for (int64_t j = 0; j < words; j += LANES) store(converted + r * split.padded + j, other.words(source, j));
        }
        const char* next = reinterpret_cast<const char*>(other.row(row + ROWS));
        for (int64_t i = begin; i < end; i += PANEL) {
            int64_t width = smaller(PANEL, end - i);
            const float* panel = scratch + (i - begin) * words;
            Kind::template multiply<BYTES>(strip, panel, words, width, next, share, sums);
            if (Kind::TILES) next += share * (words / LANES);
            store_sums(i, row, width, valid);
        }
        if (begin >= end) fetch(next, ROWS * other.values * sizeof(R));
        if constexpr (!Kind::TILES) {
            if (rest) {
                multiply_rest(strip, packed, end, rest, words, sums);
                store_sums(end, row, rest, valid);
            }
        }
    }
    Kind::end();
}

template <class Kind, class X, class W>
void multiply_as(const Product& p, int64_t task, float* scratch) {
    Split<Kind> split(p);
    Factor<Kind, X> x{static_cast<const X*>(p.x), p.rows, p.inputs};
    Factor<Kind, W> weight{static_cast<const W*>(p.weight), p.outputs, p.inputs};
    split.packs_pixels ? multiply_block<Kind>(p, split, x, weight, task, scratch)
                       : multiply_block<Kind>(p, split, weight, x, task, scratch);
}

void multiply(const Product& p, int64_t task, float* scratch) {
    if (!p.bfloat16) return multiply_as<ByVectors<Single>, float, float>(p, task, scratch);
    p.weight_bfloat16 ? multiply_as<Low, uint16_t, uint16_t>(p, task, scratch)
                      : multiply_as<Low, uint16_t, Rounded>(p, task, scratch);
}

int64_t multiply_tasks(const Product& p) {
    return p.bfloat16 ? Split<Low>(p).tasks() : Split<ByVectors<Single>>(p).tasks();
}

size_t multiply_scratch(const Product& p) {
    return p.bfloat16 ? Split<Low>(p).scratch() : Split<ByVectors<Single>>(p).scratch();
}

}  // namespace

extern const ProductKernels products;
const ProductKernels products = {multiply_tasks, multiply_scratch, multiply};

}  // namespace VMAMBA_ISA
