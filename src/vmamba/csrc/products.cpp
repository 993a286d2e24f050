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
constexpr int64_t MANY_PIXELS = 256;         // from here on the weight is packed

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

// Each task packs one of the blocks and multiplies it with one of the parts of the other factor.
struct Split {
    bool packs_pixels;
    int64_t words, padded, panels, strips, blocks, parts;

    explicit Split(const Product& p) {
        packs_pixels = p.rows < MANY_PIXELS;
        words = p.bfloat16 ? divide_up(p.inputs, Pair::VALUES) : p.inputs;
        padded = divide_up(words, LANES) * LANES;
        panels = packs_pixels ? divide_up(p.rows / LANES, WIDE) : divide_up(p.outputs, PANEL);
        strips = divide_up(packs_pixels ? p.outputs : p.rows, STRIP);
        int64_t threads = p.threads > 1 ? p.threads : 1;
        blocks = divide_up(panels * PANEL * words * sizeof(float), BLOCK_BYTES);
        if (blocks > 1) blocks = divide_up(blocks, threads) * threads;
        blocks = smaller(blocks, panels);
        if (blocks < 1) blocks = 1;
        parts = smaller(divide_up(threads, blocks), strips);
    }
    int64_t block_size() const { return divide_up(panels, blocks) * PANEL * words; }
};

// --- packing ---------------------------------------------------------------------------------------------------------

// `count` rows as a panel (words, PANEL).
template <class Kind, class T>
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
    const float* const* strip, const Factor<Kind, T>& factor, int64_t first, int64_t count, int64_t words, Sums sums
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
            for (int l = 0; l < LANES; l++) sums[r + l % DOWN][0][i + l / DOWN] = sum[0][l];
        }
    }
}

// --- results ---------------------------------------------------------------------------------------------------------

template <bool GELU>
inline Floats activate(Floats v) {
    return GELU ? v * normal(v).below : v;
}

// Lanes are pixels, and the strip's rows outputs.
template <bool GELU, class Y>
void store_pixels(const Product& p, Sums sums, int64_t pixel, int64_t output, int64_t pixels, int64_t outputs) {
    constexpr int PARTS = LANES / STRIP;  // of a vector, once transposed: `outputs` of one pixel each
    float bias[STRIP] = {};
    if (p.bias) memcpy(bias, p.bias + output, outputs * sizeof *bias);
    for (int64_t begin = 0; begin < pixels; begin += LANES) {
        Floats v[STRIP];
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) v[r] = activate<GELU>(sums[r][begin / LANES] + bias[r]);
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

// Lanes are outputs, and the strip's rows pixels: one vector of each.
template <bool GELU, class Y, bool FULL>
void store_column(const Product& p, const Floats* sums, int64_t pixel, int64_t output, int64_t pixels, int64_t valid) {
    Floats bias = p.bias ? load_part<FULL>(p.bias + output, valid) : Floats{};
    for (int64_t r = 0, place = pixel * p.outputs + output; r < pixels; r++, place += p.outputs) {
        Floats v = activate<GELU>(sums[r * WIDE] + bias);
        if (p.residual) v += load_part<FULL>(static_cast<const Y*>(p.residual) + place, valid);
        store_part<FULL>(static_cast<Y*>(p.y) + place, v, valid);
    }
}

template <bool GELU, class Y>
void store_outputs(const Product& p, Sums sums, int64_t output, int64_t pixel, int64_t outputs, int64_t pixels) {
    for (int64_t begin = 0; begin < outputs; begin += LANES) {
        auto store = outputs - begin >= LANES ? store_column<GELU, Y, true> : store_column<GELU, Y, false>;
        store(p, *sums + begin / LANES, pixel, output + begin, pixels, outputs - begin);
    }
}

template <bool GELU, class Y>
constexpr decltype(&store_pixels<GELU, Y>) STORES[] = {store_outputs<GELU, Y>, store_pixels<GELU, Y>};

// --- tasks -----------------------------------------------------------------------------------------------------------

template <class Kind, class L, class R>
void multiply_block(
    const Product& p, const Split& split, const Factor<Kind, L>& packed, const Factor<Kind, R>& other, int64_t task,
    float* scratch
) {
    constexpr int BYTES = 16 * STRIP * sizeof(R) * Kind::VALUES;
    const auto* stores = p.gelu ? (p.y_bfloat16 ? STORES<true, uint16_t> : STORES<true, float>)
                                : (p.y_bfloat16 ? STORES<false, uint16_t> : STORES<false, float>);
    auto store_sums = stores[split.packs_pixels];
    int64_t block = task / split.parts, part = task % split.parts, words = split.words;
    bool is_last = block + 1 == split.blocks;
    int64_t rest = is_last && split.packs_pixels ? packed.rows % LANES : 0;
    int64_t begin = split.panels * block / split.blocks * PANEL;
    int64_t end = is_last ? packed.rows - rest : split.panels * (block + 1) / split.blocks * PANEL;
    for (int64_t i = begin; i < end; i += PANEL) {
        pack(packed, i, smaller(PANEL, end - i), words, scratch + (i - begin) * words);
    }
    float* converted = scratch + split.block_size();
    Sums sums = {};
    int64_t last = split.strips * (part + 1) / split.parts;
    for (int64_t s = split.strips * part / split.parts; s < last; s++) {
        int64_t row = s * STRIP, valid = smaller(STRIP, other.rows - row);
        const float* strip[STRIP];
        for (int r = 0; r < STRIP; r++) {
            const R* source = other.row(row + r);
            strip[r] = other.is_words() ? reinterpret_cast<const float*>(source) : converted + r * split.padded;
            if (other.is_words()) continue;
            for (int64_t j = 0; j < words; j += LANES) store(converted + r * split.padded + j, other.words(source, j));
        }
        const char* next = reinterpret_cast<const char*>(other.row(row + STRIP));
        for (int64_t i = begin; i < end; i += PANEL) {
            int64_t width = smaller(PANEL, end - i);
            const float* panel = scratch + (i - begin) * words;
            if (width > 2 * LANES) multiply_panel<Kind, 3, BYTES>(strip, panel, words, next, sums);
            else if (width > LANES) multiply_panel<Kind, 2, BYTES>(strip, panel, words, next, sums);
            else multiply_panel<Kind, 1, BYTES>(strip, panel, words, next, sums);
            store_sums(p, sums, i, row, width, valid);
        }
        if (begin >= end) fetch(next, STRIP * other.values * sizeof(R));
        if (rest) {
            multiply_rest(strip, packed, end, rest, words, sums);
            store_sums(p, sums, end, row, rest, valid);
        }
    }
}

template <class Kind, class X, class W>
void multiply_as(const Product& p, int64_t task, float* scratch) {
    Split split(p);
    Factor<Kind, X> x{static_cast<const X*>(p.x), p.rows, p.inputs};
    Factor<Kind, W> weight{static_cast<const W*>(p.weight), p.outputs, p.inputs};
    split.packs_pixels ? multiply_block<Kind>(p, split, x, weight, task, scratch)
                       : multiply_block<Kind>(p, split, weight, x, task, scratch);
}

void multiply(const Product& p, int64_t task, float* scratch) {
    if (!p.bfloat16) return multiply_as<Single, float, float>(p, task, scratch);
    p.weight_bfloat16 ? multiply_as<Pair, uint16_t, uint16_t>(p, task, scratch)
                      : multiply_as<Pair, uint16_t, Rounded>(p, task, scratch);
}

int64_t multiply_tasks(const Product& p) {
    Split split(p);
    return split.blocks * split.parts;
}

size_t multiply_scratch(const Product& p) {
    Split split(p);
    return (split.block_size() + STRIP * split.padded) * sizeof(float);
}

}  // namespace

extern const ProductKernels products;
const ProductKernels products = {multiply_tasks, multiply_scratch, multiply};

}  // namespace VMAMBA_ISA
