// The inner loop of products, for those that are made of it (products.cpp, winograd.cpp). Included inside the instruction
// set's own namespace after simd.h.

// A strip of rows times a panel of vectors: as many sums as there are registers for.
constexpr int STRIP = LANES == 16 ? 8 : 4;
constexpr int WIDE = 3;
constexpr int PANEL = WIDE * LANES;
using Sums = Floats[STRIP][WIDE];

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes hold words of 32 bits. Here they are floats.
struct Single {
    static constexpr int VALUES = 1;
    template <bool FULL, class T>
    static Floats words(const T* p, int64_t valid) { return load_part<FULL>(p, valid); }
    static Floats add(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

template <int COUNT, int S, int... I>
struct Exchange : Exchange<COUNT - 1, S, COUNT - 1, I...> {};
template <int S, int... I>
struct Exchange<0, S, I...> {
    static Floats low(Floats a, Floats b) { return __builtin_shufflevector(a, b, (I & S ? LANES + I - S : I)...); }
    static Floats high(Floats a, Floats b) { return __builtin_shufflevector(a, b, (I & S ? LANES + I : I + S)...); }
};

// Transposes each square of COUNT lanes of COUNT vectors.
template <int COUNT, int S = 1>
inline void transpose(Floats* v) {
    if constexpr (S < COUNT) {
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) {
            if (i & S) continue;
            Floats a = v[i], b = v[i + S];
            v[i] = Exchange<LANES, S>::low(a, b);
            v[i + S] = Exchange<LANES, S>::high(a, b);
        }
        transpose<COUNT, S * 2>(v);
    }
}

inline void fetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// The strip's rows times V vectors of a panel. BYTES of the `next` strip are 16 words of each row.
template <class Kind, int V, int BYTES>
inline void multiply_panel(const float* const* strip, const float* panel, int64_t words, const char* next, Sums sums) {
    Floats sum[STRIP][V] = {};
    const float* rows[STRIP];
    for (int r = 0; r < STRIP; r++) rows[r] = strip[r];
    auto multiply_word = [&](int64_t i) __attribute__((always_inline)) {
        Floats x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) x[v] = load(panel + i * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            Floats w = splat(rows[r][i]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = Kind::add(sum[r][v], w, x[v]);
        }
    };
    int64_t i = 0;
    for (; i + 16 <= words; i += 16, next += BYTES) {
        fetch(next, BYTES);
#pragma GCC unroll 1
        for (int j = 0; j < 16; j++) multiply_word(i + j);
    }
    for (; i < words; i++) multiply_word(i);
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] = sum[r][v];
    }
}
