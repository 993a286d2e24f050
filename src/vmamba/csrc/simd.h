// Vectors of the instruction set being compiled for, as GCC and Clang's vector extension has them, and the functions of
// float that the kernels need. Included inside the instruction set's own namespace: nothing here may be shared between
// object files that were compiled for different processors.

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Sixteen channels are a block, whatever the width of a vector.
constexpr int BLOCK = 16;
constexpr int VECTORS = BLOCK / LANES;

constexpr float LOG2_E = 1.44269504f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// Vectors at any address. Unlike memcpy these accesses are ones to floats in the compiler's eyes, so that it need not load
// every pointer again after a store.
typedef float FloatsInMemory __attribute__((vector_size(LANES * 4), aligned(4)));

inline Floats load(const float* p) { return *reinterpret_cast<const FloatsInMemory*>(p); }

inline Floats load(const uint16_t* p) {
    Halves v;
    memcpy(&v, p, sizeof v);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);  // __builtin_convertvector takes it in halves
#else
    return (Floats)(__builtin_convertvector(v, Words) << 16);
#endif
}

inline void store(float* p, Floats v) { *reinterpret_cast<FloatsInMemory*>(p) = v; }

// bfloat16, rounded to nearest even; a NaN stays one.
inline void store(uint16_t* p, Floats v) {
#if defined(__AVX512BF16__)
    __m256bh halves = _mm512_cvtneps_pbh((__m512)v);  // gives 0 where v is subnormal
#else
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words kept = v == v ? rounded : (bits >> 16) | 0x40;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    Halves halves = (Halves)_mm512_cvtepi32_epi16((__m512i)kept);
#else
    Halves halves = __builtin_convertvector(kept, Halves);
#endif
#endif
    memcpy(p, &halves, sizeof halves);
}

// `valid` values, the other lanes 0.
template <bool FULL, class T>
inline Floats load_part(const T* p, int64_t valid) {
    if (FULL) return load(p);
    T whole[LANES] = {};
    memcpy(whole, p, valid * sizeof(T));
    return load(whole);
}

template <bool FULL, class T>
inline void store_part(T* p, Floats v, int64_t valid) {
    if (FULL) return store(p, v);
    T whole[LANES];
    store(whole, v);
    memcpy(p, whole, valid * sizeof(T));
}

// step(i, valid, kind) for each vector of `count` values, whose `kind.FULL` says whether it fills all lanes.
struct Whole { static constexpr bool FULL = true; };
struct Part { static constexpr bool FULL = false; };

template <class Step>
inline void each_vector(int64_t count, Step step) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) step(i, int64_t(LANES), Whole());
    if (i < count) step(i, count - i, Part());
}

inline Floats splat(float x) { return x - Floats{}; }

template <int COUNT, int... I>
struct Lanes : Lanes<COUNT - 1, COUNT - 1, I...> {};
template <int... I>
struct Lanes<0, I...> {
    // Adds neighbours at distance S: lanes with bit S unset hold sums of a, the others of b.
    template <int S>
    static inline Floats fold(Floats a, Floats b) {
        return __builtin_shufflevector(a, b, ((I & S) ? LANES + I - S : I)...) +
               __builtin_shufflevector(a, b, ((I & S) ? LANES + I : I + S)...);
    }
};

template <int S>
struct Folded {
    // Lane i of the result is the sum of rows[i]'s lanes within groups of 2S: log2(LANES) levels give whole sums.
    static inline Floats of(const Floats* rows) {
        return Lanes<LANES>::template fold<S>(Folded<S / 2>::of(rows), Folded<S / 2>::of(rows + S));
    }
};
template <>
struct Folded<0> {
    static inline Floats of(const Floats* rows) { return rows[0]; }
};

// Both return x where it is NaN.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline Floats at_least(Floats x, float low) { return (Floats)_mm512_max_ps((__m512)splat(low), (__m512)x); }
inline Floats at_most(Floats x, float high) { return (Floats)_mm512_min_ps((__m512)splat(high), (__m512)x); }
#elif defined(__AVX2__)
inline Floats at_least(Floats x, float low) { return (Floats)_mm256_max_ps((__m256)splat(low), (__m256)x); }
inline Floats at_most(Floats x, float high) { return (Floats)_mm256_min_ps((__m256)splat(high), (__m256)x); }
#elif defined(__SSE2__)
inline Floats at_least(Floats x, float low) { return (Floats)_mm_max_ps((__m128)splat(low), (__m128)x); }
inline Floats at_most(Floats x, float high) { return (Floats)_mm_min_ps((__m128)splat(high), (__m128)x); }
#else
inline Floats at_least(Floats x, float low) { return x < splat(low) ? splat(low) : x; }
inline Floats at_most(Floats x, float high) { return x > splat(high) ? splat(high) : x; }
#endif

inline Floats negative_magnitude(Floats x) { return (Floats)((Words)x | 0x80000000u); }

// Exponentials split x into n·step + r with n whole, and are 2^n times a polynomial in r whose constant term is 1, so that
// the exponential of 0 is exactly 1. `scale` multiplies by 2^n; at the lowest argument let through it gives 0.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline Floats nearest(Floats x) { return (Floats)_mm512_roundscale_ps((__m512)x, 8); }
inline Floats scale(Floats mantissa, Floats n) { return (Floats)_mm512_scalef_ps((__m512)mantissa, (__m512)n); }
constexpr float LOWEST_EXP2 = -160.0f, LOWEST_EXP = -110.0f, LOWEST_NORMAL = -14.9f;
#else
constexpr float ROUNDING = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest whole number in the low bits
inline Floats nearest(Floats x) { return (x + ROUNDING) - ROUNDING; }
inline Floats scale(Floats mantissa, Floats n) {
    return mantissa * (Floats)((((Words)(n + ROUNDING)) << 23) + (127u << 23));
}
constexpr float LOWEST_EXP2 = -127.0f, LOWEST_EXP = -88.1f, LOWEST_NORMAL = -13.27f;
#endif

// 2^x for x from LOWEST_EXP2 to 128; 1 ulp.
inline Floats exp2_within(Floats x) {
    Floats n = nearest(x), r = x - n;
    Floats p = splat(0.00015353362f);
    p = p * r + 0.00133988739f;
    p = p * r + 0.00961843692f;
    p = p * r + 0.0555033237f;
    p = p * r + 0.240226477f;
    p = p * r + 0.693147182f;
    return scale(p * r + 1.0f, n);
}

// 2^x; 1 ulp.
inline Floats exp2(Floats x) { return exp2_within(at_most(at_least(x, LOWEST_EXP2), 128.0f)); }

// e^x for x <= 0; 1 ulp.
inline Floats exp_negative(Floats x) {
    x = at_least(x, LOWEST_EXP);
    Floats n = nearest(x * 1.44269504f);
    Floats r = x - n * 0.693145752f;  // ln 2 in two parts, the first short enough for an exact product
    r = r - n * 1.42860677e-6f;
    Floats p = splat(0.00138436444f);
    p = p * r + 0.00837416295f;
    p = p * r + 0.0416680016f;
    p = p * r + 0.166664317f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
    return scale(p * r + 1.0f, n);
}

// log(1 + z) for 0 <= z <= 1; 2 ulp.
inline Floats log1p_unit(Floats z) {
    Floats p = splat(0.0052326913f);
    p = p * z + -0.0295052268f;
    p = p * z + 0.078225933f;
    p = p * z + -0.136632442f;
    p = p * z + 0.191060066f;
    p = p * z + -0.24842982f;
    p = p * z + 0.333190978f;
    p = p * z + -0.499994934f;
    p = p * z + 1.0f;
    return p * z;
}

// 1/x for x from 1 to 2^100; 2 ulp, in a fourth of the time of a division.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
inline Floats reciprocal(Floats x) {
    Floats r = (Floats)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
}
#else
inline Floats reciprocal(Floats x) { return 1.0f / x; }
#endif

// The normal distribution's density at x, and the part of it that lies below x to within 1e-7.
struct Normal {
    Floats density, below;
};

// Below -|x| lies e^(-x²/2) times a polynomial in u = c|x| / (1 + c|x|): the form of Abramowitz and Stegun 7.1.26, fitted to
// 2e-8, and to a few millionths of what is left down to x = -5. It is 1/2 plus something small near 0, hence exact there.
inline Normal normal(Floats x) {
    Floats m = at_least(negative_magnitude(x), LOWEST_NORMAL), z = exp2_within(m * m * (-0.5f * LOG2_E));
    Floats a = m * -0.274f, u = a * reciprocal(1.0f + a);
    Floats p = splat(-0.126521751f);
    p = p * u + 0.246344104f;
    p = p * u + 0.219009578f;
    p = p * u + -1.25917804f;
    p = p * u + 1.8738662f;
    p = p * u + -1.45599139f;
    Floats tail = (p * u + 0.5f) * z;
    return {z * 0.398942280f, x > Floats{} ? 1.0f - tail : tail};
}
