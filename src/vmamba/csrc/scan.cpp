// The selective scan and SS2D's four routes, for one instruction set: compiled once for each, with VMAMBA_ISA naming the
// namespace. No code is shared with the other builds, so no standard library function is instantiated here.
//
// Sixteen neighbouring channels (a block) are scanned together: a vector holds one position, and the recurrence runs from
// vector to vector. On a grid stored channels last a position's block is one cache line, so a route is a sequence of
// line addresses and costs no copy. Positions are taken 32 at a time (a chunk): first the steps of the whole chunk, which
// are independent, then the recurrence.

#include <cstdint>
#include <cstring>

#include "scan.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace VMAMBA_ISA {
namespace {

#include "simd.h"

constexpr int CHUNK = 32;

// Positions per register tile of the dt projection: enough independent sums to hide a multiply-add's latency.
constexpr int TILE = LANES == 4 ? 2 : 128 / BLOCK / VECTORS;

// The same for the two matrix products of the backward pass.
constexpr int GRADIENT_TILE = LANES == 16 ? 8 : 4;

// Images from this size on are fetched a chunk ahead: they leave the second-level caches, and what the processor fetches by
// itself comes late by rows, and not at all by columns, where no two positions are neighbours.
constexpr int64_t FAR_BYTES = 8 << 20;

// What the backward pass holds of a sequence at a time, per thread: about a second-level cache.
constexpr int64_t BACKWARD_BYTES = 1024 * 1024;

struct Block {
    Floats v[VECTORS];
};

// `valid` channels of a block, the rest 0.
template <bool FULL, class T>
inline Block load_block(const T* p, int valid) {
    Block block;
    if (FULL) {
        for (int i = 0; i < VECTORS; i++) block.v[i] = load(p + i * LANES);
    } else {
        T whole[BLOCK] = {};
        memcpy(whole, p, valid * sizeof(T));
        for (int i = 0; i < VECTORS; i++) block.v[i] = load(whole + i * LANES);
    }
    return block;
}

template <bool FULL, class T>
inline void store_block(T* p, const Block& block, int valid) {
    if (FULL) {
        for (int i = 0; i < VECTORS; i++) store(p + i * LANES, block.v[i]);
    } else {
        T whole[BLOCK];
        for (int i = 0; i < VECTORS; i++) store(whole + i * LANES, block.v[i]);
        memcpy(p, whole, valid * sizeof(T));
    }
}

inline Block load_block(const float* p) { return load_block<true>(p, BLOCK); }
inline void store_block(float* p, const Block& block) { store_block<true>(p, block, BLOCK); }

// Keeps a product from being fused with the addition that follows: routes that are added up at once and routes that are
// kept apart and added later must round alike.
inline void round_here(Block& block) {
    for (int i = 0; i < VECTORS; i++) {
#if defined(__AVX512F__)
        asm("" : "+v"(block.v[i]));
#elif defined(__x86_64__)
        asm("" : "+x"(block.v[i]));
#elif defined(__aarch64__)
        asm("" : "+w"(block.v[i]));
#else
        asm("" : "+m"(block.v[i]));
#endif
    }
}

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t length(const Scan& p) { return p.height * p.width; }

// Channels [first, first + valid) of one group.
struct Where {
    int64_t group, first;
    int valid;
};

inline int64_t blocks_per_group(const Scan& p) { return (p.channels / p.groups + BLOCK - 1) / BLOCK; }

inline Where locate(const Scan& p, int64_t block) {
    int64_t size = p.channels / p.groups, each = blocks_per_group(p), group = block / each;
    int64_t within = block % each * BLOCK;
    return {group, group * size + within, int(smaller(BLOCK, size - within))};
}

// Grid positions of steps [from, from + count) of a route.
inline void walk(const Scan& p, int route_bits, int64_t from, int count, int64_t* positions) {
    bool columns = route_bits & 1, backwards = route_bits & 2;
    int64_t first = backwards ? length(p) - 1 - from : from, direction = backwards ? -1 : 1;
    if (!columns) {
        for (int i = 0; i < count; i++) positions[i] = first + direction * i;
        return;
    }
    int64_t row = first % p.height, column = first / p.height;
    for (int i = 0; i < count; i++) {
        positions[i] = row * p.width + column;
        row += direction;
        if (row == p.height) row = 0, column++;
        if (row < 0) row = p.height - 1, column--;
    }
}

// Hands out pieces of a thread's scratch memory, each on a cache line of its own.
struct Scratch {
    float* memory;  // null: only count
    int64_t used = 0;
    float* floats(int64_t count) {
        float* piece = memory ? memory + used : nullptr;
        used += round_up(count, BLOCK);
        return piece;
    }
    int64_t* positions(int64_t count) { return reinterpret_cast<int64_t*>(floats(2 * count)); }
};

// A block's parameters on one route, padded with zeros to 16 channels; first those of block 0 of several.
struct Parameters {
    float *weight, *bias, *decay;  // (R, 16), (16), (N, 16)

    Parameters(const Scan& p, Scratch& scratch, int64_t blocks)
        : weight(scratch.floats(blocks * p.rank * BLOCK)),
          bias(scratch.floats(blocks * BLOCK)),
          decay(scratch.floats(blocks * p.states * BLOCK)) {}

    Parameters of_block(const Scan& p, int64_t block) const {
        Parameters those = *this;
        those.weight += block * p.rank * BLOCK, those.bias += block * BLOCK, those.decay += block * p.states * BLOCK;
        return those;
    }

    void pack(const Scan& p, const Where& at, int64_t k) {
        int64_t row = k * p.channels + at.first;
        for (int c = 0; c < BLOCK; c++) {
            bool real = c < at.valid;
            for (int64_t r = 0; r < p.rank; r++) weight[r * BLOCK + c] = real ? p.dt_weight[(row + c) * p.rank + r] : 0;
            for (int64_t n = 0; n < p.states; n++) decay[n * BLOCK + c] = real ? p.A[(row + c) * p.states + n] : 0;
            bias[c] = real && p.dt_bias ? p.dt_bias[row + c] : 0;
        }
    }
};

// Where one image's parameters of a route and a group begin.
struct Inputs {
    const float *dt_low, *B, *C, *delta;

    Inputs(const Scan& p, int64_t image, int64_t k, const Where& at) {
        int64_t begin = image * length(p) * p.pixel_stride + k * p.route_stride;
        dt_low = p.dt_low + begin;
        B = p.B + begin + at.group * p.group_stride;
        C = p.C + begin + at.group * p.group_stride;
        delta = p.delta ? p.delta + image * length(p) * p.channels + at.first : nullptr;
    }
};

// Δ before softplus at each position.
template <bool FULL>
inline void raw_steps(
    const Scan& p, const Inputs& in, const Parameters& of, const Where& at, const int64_t* positions, int count,
    float* raw
) {
    Block bias = load_block(of.bias);
    if (in.delta) {
        for (int t = 0; t < count; t++) {
            Block x = load_block<FULL>(in.delta + positions[t] * p.channels, at.valid);
            for (int i = 0; i < VECTORS; i++) x.v[i] += bias.v[i];
            store_block(raw + t * BLOCK, x);
        }
        return;
    }
    for (int t = 0; t < count; t += TILE) {
        const float* low[TILE];
        Block sum[TILE];
        // A tile that reaches past the end repeats the last position; `raw` has room for it.
        for (int j = 0; j < TILE; j++) {
            low[j] = in.dt_low + positions[smaller(t + j, count - 1)] * p.pixel_stride;
            sum[j] = bias;
        }
        for (int64_t r = 0; r < p.rank; r++) {
            Block w = load_block(of.weight + r * BLOCK);
#pragma GCC unroll 8
            for (int j = 0; j < TILE; j++) {
                for (int i = 0; i < VECTORS; i++) sum[j].v[i] += w.v[i] * low[j][r];
            }
        }
        for (int j = 0; j < TILE; j++) store_block(raw + (t + j) * BLOCK, sum[j]);
    }
}

// raw becomes Δ; slope, where wanted, dΔ/draw.
template <bool SLOPE>
inline void soften(const Scan& p, float* raw, float* slope, int count) {
    if (!p.softplus) {
        for (int i = 0; SLOPE && i < count * BLOCK; i++) slope[i] = 1;
        return;
    }
#pragma GCC unroll 2
    for (int i = 0; i < count * BLOCK; i += LANES) {
        Floats x = load(raw + i), z = exp_negative(negative_magnitude(x));
        store(raw + i, at_least(x, 0.0f) + log1p_unit(z));
        if (SLOPE) store(slope + i, (x < Floats{} ? z : splat(1.0f)) / (1.0f + z));
    }
}

template <int N>
inline int64_t count_states(const Scan& p) {
    return N ? N : p.states;
}

// How a route's result reaches y.
enum class Adding { ALONE, FIRST, FURTHER };  // kept apart; with the skip; onto what is there

// One block's steps of one chunk, from the state in `h` to the state in `h`.
template <int N, class T, bool FULL>
void scan_chunk(
    const Scan& p, const Inputs& in, const T* u, const Where& at, const Parameters& of, const Block& skip, float* h,
    const int64_t* positions, int count, float* steps, Adding adding, float* y, int64_t y_stride, const int64_t* ahead
) {
    int64_t states = count_states<N>(p), stride = p.pixel_stride;
    Block decay_1, h_1;  // in registers, where there is one state
    if (N == 1) decay_1 = load_block(of.decay), h_1 = load_block(h);
    raw_steps<FULL>(p, in, of, at, positions, count, steps);
    soften<false>(p, steps, nullptr, count);
    for (int t = 0; t < count; t++) {
        int64_t position = positions[t];
        if (ahead) {
            __builtin_prefetch(u + ahead[t] * p.channels);
            __builtin_prefetch(y + ahead[t] * y_stride, 1);
            __builtin_prefetch(in.dt_low + ahead[t] * stride);
        }
        Block delta = load_block(steps + t * BLOCK), x = load_block<FULL>(u + position * p.channels, at.valid), out;
        const float *B = in.B + position * stride, *C = in.C + position * stride;
        for (int i = 0; i < VECTORS; i++) {
            Floats weighted = delta.v[i] * x.v[i];
            if (N == 1) {
                h_1.v[i] = exp2(delta.v[i] * decay_1.v[i]) * h_1.v[i] + weighted * B[0];
                out.v[i] = h_1.v[i] * C[0];
            } else {
                Floats sum{};
                for (int64_t n = 0; n < states; n++) {
                    int64_t lane = n * BLOCK + i * LANES;
                    Floats state = exp2(delta.v[i] * load(of.decay + lane)) * load(h + lane) + weighted * B[n];
                    store(h + lane, state);
                    sum += state * C[n];
                }
                out.v[i] = sum;
            }
        }
        float* target = y + position * y_stride;
        if (adding != Adding::ALONE) {
            Block before;
            if (adding == Adding::FIRST) {
                for (int i = 0; i < VECTORS; i++) before.v[i] = x.v[i] * skip.v[i];
            } else {
                before = load_block<FULL>(target, at.valid);
            }
            round_here(before);
            round_here(out);
            for (int i = 0; i < VECTORS; i++) out.v[i] = before.v[i] + out.v[i];
        }
        store_block<FULL>(target, out, at.valid);
    }
    if (N == 1) store_block(h, h_1);
}

// D added up over the routes: each sees the same u.
inline Block skip_of(const Scan& p, const Where& at) {
    Block skip{};
    for (int64_t k = 0; p.D && k < p.routes; k++) {
        Block d = load_block<false>(p.D + k * p.channels + at.first, at.valid);
        for (int i = 0; i < VECTORS; i++) skip.v[i] += d.v[i];
    }
    return skip;
}

int64_t blocks(const Scan& p) { return p.groups * blocks_per_group(p); }

int64_t forward_tasks(const Scan& p) { return p.batch * p.slots * (p.route_y ? p.routes : 1); }

bool adds_in_scratch(const Scan& p) { return p.bfloat16 && !p.route_y; }

int64_t blocks_per_slot(const Scan& p) { return (blocks(p) + p.slots - 1) / p.slots; }

size_t forward_scratch(const Scan& p) {
    int64_t rows_per_block = p.rank + 1 + 2 * p.states + (adds_in_scratch(p) ? length(p) : 0);
    return (blocks_per_slot(p) * rows_per_block + CHUNK + 4 * CHUNK / BLOCK) * BLOCK * sizeof(float);
}

// The order in which routes are taken and added up: first those by rows. One that runs backwards then begins where the one
// before it has just been.
inline int64_t nth_route(const Scan& p, int64_t i) {
    for (int columns = 0; columns < 2; columns++) {
        for (int64_t k = 0; k < p.routes; k++) {
            if ((p.route_bits[k] & 1) == columns && i-- == 0) return k;
        }
    }
    return 0;
}

// One image's channels of one slot, on all routes or, where those are kept apart, on one. All blocks of a chunk are scanned
// before the next chunk, so that a position is fetched from memory once.
template <class T>
void forward_blocks(const Scan& p, int64_t task, float* memory) {
    int64_t k_first = 0, k_last = p.routes, total = length(p), N = p.states;
    if (p.route_y) k_first = task % p.routes, k_last = k_first + 1, task /= p.routes;
    int64_t image = task / p.slots, slot = task % p.slots;
    int64_t first = slot * blocks(p) / p.slots, count = (slot + 1) * blocks(p) / p.slots - first;

    Scratch scratch{memory};
    Parameters all(p, scratch, count);
    float *h = scratch.floats(count * N * BLOCK), *steps = scratch.floats(CHUNK * BLOCK);
    int64_t *positions = scratch.positions(CHUNK), *ahead = scratch.positions(CHUNK);
    int64_t offset = image * total * p.channels;
    const T* u = static_cast<const T*>(p.u) + offset;
    float* y = static_cast<float*>(p.y) + offset;
    if (p.route_y) y = p.route_y + k_first * p.batch * total * p.channels + offset;
    bool is_far = total * p.channels * int64_t(sizeof(T)) >= FAR_BYTES;
    float* sums = adds_in_scratch(p) ? scratch.floats(total * count * BLOCK) : nullptr;

    for (int64_t i = k_first; i < k_last; i++) {
        int64_t k = nth_route(p, i);
        Adding adding = p.route_y ? Adding::ALONE : i == 0 ? Adding::FIRST : Adding::FURTHER;
        for (int64_t j = 0; j < count; j++) {
            Parameters of = all.of_block(p, j);
            of.pack(p, locate(p, first + j), k);
            for (int64_t i = 0; i < N * BLOCK; i++) of.decay[i] *= LOG2_E, h[j * N * BLOCK + i] = 0;
        }
        for (int64_t from = 0; from < total; from += CHUNK) {
            int chunk = int(smaller(CHUNK, total - from));
            walk(p, p.route_bits[k], from, chunk, positions);
            const int64_t* next = is_far && from + CHUNK < total ? ahead : nullptr;
            if (next) walk(p, p.route_bits[k], smaller(from + CHUNK, total - CHUNK), CHUNK, ahead);
            for (int64_t j = 0; j < count; j++) {
                Where at = locate(p, first + j);
                Block skip = adding == Adding::FIRST ? skip_of(p, at) : Block{};
                auto scan = at.valid < BLOCK ? scan_chunk<0, T, false>
                            : N == 1         ? scan_chunk<1, T, true>
                            : N == 16        ? scan_chunk<16, T, true>
                                             : scan_chunk<0, T, true>;
                scan(
                    p, Inputs(p, image, k, at), u + at.first, at, all.of_block(p, j), skip, h + j * N * BLOCK, positions,
                    chunk, steps, adding, sums ? sums + j * BLOCK : y + at.first,
                    sums ? count * BLOCK : p.channels, next
                );
            }
        }
    }
    for (int64_t j = 0; j < count; j++) {
        Where at = locate(p, first + j);
        for (int64_t t = 0; sums && t < total; t++) {
            Block sum = load_block(sums + (t * count + j) * BLOCK);
            store_block<false>(reinterpret_cast<T*>(p.y) + offset + t * p.channels + at.first, sum, at.valid);
        }
        for (int c = 0; p.last && c < at.valid; c++) {
            float* last = p.last + (image * p.channels + at.first + c) * N;
            for (int64_t n = 0; n < N; n++) last[n] = h[(j * N + n) * BLOCK + c];
        }
    }
}

template <class T>
void merge_block(const Scan& p, int64_t task) {
    int64_t image = task / blocks(p), total = length(p);
    Where at = locate(p, task % blocks(p));
    Block skip = skip_of(p, at);
    int64_t offset = image * total * p.channels + at.first;
    for (int64_t t = 0; t < total; t++, offset += p.channels) {
        Block y = load_block<false>(static_cast<const T*>(p.u) + offset, at.valid);
        for (int i = 0; i < VECTORS; i++) y.v[i] = y.v[i] * skip.v[i];
        round_here(y);
        for (int64_t i = 0; i < p.routes; i++) {
            Block part = load_block<false>(p.route_y + i * p.batch * total * p.channels + offset, at.valid);
            for (int i = 0; i < VECTORS; i++) y.v[i] = y.v[i] + part.v[i];
        }
        store_block<false>(static_cast<T*>(p.y) + offset, y, at.valid);
    }
}

// --- backward --------------------------------------------------------------------------------------------------------
//
// With g the gradient that reaches h from y, the adjoint is the same recurrence the other way, G_t = g_t + a_{t+1}·G_{t+1};
// the gradients of a_t, of Δ_t B_t u_t and of C_t are G_t·h_{t-1}, G_t and g_t·h_t. States are computed again: the sequence is
// cut into spans whose steps and states fit the cache. A forward run leaves the state at the start of each span; then
// each span, last one first, is run forwards into the cache and backwards out of it.

// sums[i] = Σ over channels of rows[i], for `count` rows of a block; room for LANES rows more than count on both sides.
inline void sum_rows(const float* rows, int64_t count, float* sums) {
    for (int64_t from = 0; from < count; from += LANES) {
        Floats single[LANES];
        for (int j = 0; j < LANES; j++) {
            Block row = load_block(rows + (from + j) * BLOCK);
            single[j] = row.v[0];
            for (int i = 1; i < VECTORS; i++) single[j] += row.v[i];
        }
        store(sums + from, Folded<LANES / 2>::of(single));
    }
}

inline int64_t span_length(const Scan& p) {
    int64_t bytes_per_step = (2 + 2 * p.states) * BLOCK * sizeof(float);
    return smaller(round_up(length(p), CHUNK), larger(CHUNK, BACKWARD_BYTES / bytes_per_step / CHUNK * CHUNK));
}
inline int64_t spans(const Scan& p) { return (length(p) + span_length(p) - 1) / span_length(p); }

// Rows that are summed over channels together: at least a vector full of (position, state) pairs.
inline int64_t rows_together(const Scan& p) { return round_up(BLOCK, p.states); }

struct BackwardMemory {
    Parameters of;
    float *decay, *weight_rows;                  // A·log2 e (N, 16); dt_weight by channel, padded (16, R up)
    float *delta, *slope, *a, *h, *start;        // a span's (S, 16) ×2, (S, N, 16) ×2; each span's first state
    float *carry, *grad_A, *grad_weight;         // (N, 16), (N, 16), (R, 16)
    float *rows_B, *rows_C, *sums_B, *sums_C, *low;
    int64_t* positions;

    BackwardMemory(const Scan& p, Scratch& s) : of(p, s, 1) {
        int64_t n = p.states, span = span_length(p), rows = rows_together(p) + BLOCK;
        decay = s.floats(n * BLOCK);
        weight_rows = s.floats(BLOCK * round_up(p.rank, BLOCK));
        delta = s.floats(span * BLOCK);
        slope = s.floats(span * BLOCK);
        a = s.floats(span * n * BLOCK);
        h = s.floats(span * n * BLOCK);
        start = s.floats(spans(p) * n * BLOCK);
        carry = s.floats(n * BLOCK);
        grad_A = s.floats(n * BLOCK);
        grad_weight = s.floats(p.rank * BLOCK);
        rows_B = s.floats(rows * BLOCK);
        rows_C = s.floats(rows * BLOCK);
        sums_B = s.floats(rows);
        sums_C = s.floats(rows);
        low = s.floats(round_up(p.rank, BLOCK) * GRADIENT_TILE);
        positions = s.positions(span);
    }
};

size_t backward_scratch(const Scan& p) {
    Scratch counting{nullptr};
    BackwardMemory unused(p, counting);
    return counting.used * sizeof(float);
}

// Runs steps [from, from + count) from the state in `state`; keeps everything where `keep`, else only the new state.
template <int N, class T, bool FULL, bool KEEP>
void replay(
    const Scan& p, const Inputs& in, const T* u, const Where& at, int64_t k, int64_t from, int64_t count,
    float* state, BackwardMemory& m
) {
    int64_t states = count_states<N>(p), stride = p.pixel_stride;
    Block decay_1, state_1;
    if (N == 1) decay_1 = load_block(m.decay), state_1 = load_block(state);
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        int chunk = int(smaller(CHUNK, count - begin));
        int64_t kept = KEEP ? begin : 0;
        int64_t* positions = m.positions + kept;
        float *delta = m.delta + kept * BLOCK, *slope = m.slope + kept * BLOCK;
        walk(p, p.route_bits[k], from + begin, chunk, positions);
        raw_steps<FULL>(p, in, m.of, at, positions, chunk, delta);
        soften<KEEP>(p, delta, slope, chunk);
        for (int t = 0; t < chunk; t++) {
            Block d = load_block(delta + t * BLOCK), x = load_block<FULL>(u + positions[t] * p.channels, at.valid);
            const float* B = in.B + positions[t] * stride;
            float *a_out = m.a + (kept + t) * states * BLOCK, *h_out = m.h + (kept + t) * states * BLOCK;
            for (int i = 0; i < VECTORS; i++) {
                Floats weighted = d.v[i] * x.v[i];
                for (int64_t n = 0; n < states; n++) {
                    int64_t lane = n * BLOCK + i * LANES;
                    Floats a = exp2(d.v[i] * (N == 1 ? decay_1.v[i] : load(m.decay + lane)));
                    Floats next = a * (N == 1 ? state_1.v[i] : load(state + lane)) + weighted * B[n];
                    if (N == 1) state_1.v[i] = next;
                    else store(state + lane, next);
                    if (KEEP) store(a_out + lane, a), store(h_out + lane, next);
                }
            }
        }
    }
    if (N == 1) store_block(state, state_1);
}

// to[i] += from[i]
inline void add_row(float* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(to + i) + load(from + i));
    for (; LANES > 8 && i + 8 <= count; i += 8) {
        for (int j = 0; j < 8; j++) to[i + j] += from[i + j];
    }
    for (; i < count; i++) to[i] += from[i];
}

// In the backward pass `slope` ends up as the gradient of Δ before softplus. Two small matrix products over the positions of
// a span give those of dt_weight and dt_low.
// Columns [r, r + WIDTH) of m.grad_weight.
template <int WIDTH>
void weight_gradient_tile(const Scan& p, const float* dt_low, BackwardMemory& m, int64_t count, int64_t r) {
    const float* gradient = m.slope;
    const int64_t *positions = m.positions, stride = p.pixel_stride;
    Block sum[WIDTH];
    for (int j = 0; j < WIDTH; j++) sum[j] = load_block(m.grad_weight + (r + j) * BLOCK);
    for (int64_t t = 0; t < count; t++) {
        const float* low = dt_low + positions[t] * stride + r;
        Block g = load_block(gradient + t * BLOCK);
        for (int j = 0; j < WIDTH; j++) {
            for (int i = 0; i < VECTORS; i++) sum[j].v[i] += g.v[i] * low[j];
        }
    }
    for (int j = 0; j < WIDTH; j++) store_block(m.grad_weight + (r + j) * BLOCK, sum[j]);
}

void weight_gradient(const Scan& p, const float* dt_low, BackwardMemory& m, int64_t count) {
    int64_t r = 0;
    for (; r + GRADIENT_TILE <= p.rank; r += GRADIENT_TILE) weight_gradient_tile<GRADIENT_TILE>(p, dt_low, m, count, r);
    for (; r + 2 <= p.rank; r += 2) weight_gradient_tile<2>(p, dt_low, m, count, r);
    for (; r < p.rank; r++) weight_gradient_tile<1>(p, dt_low, m, count, r);
}

void low_gradient(const Scan& p, float* grad_low, BackwardMemory& m, int64_t count) {
    int64_t padded = round_up(p.rank, LANES);
    for (int64_t t = 0; t < count; t += GRADIENT_TILE) {
        const float* gradient[GRADIENT_TILE];
        for (int j = 0; j < GRADIENT_TILE; j++) gradient[j] = m.slope + smaller(t + j, count - 1) * BLOCK;
        for (int64_t r = 0; r < padded; r += LANES) {
            Floats sum[GRADIENT_TILE] = {};
            for (int c = 0; c < BLOCK; c++) {
                Floats w = load(m.weight_rows + c * padded + r);
                for (int j = 0; j < GRADIENT_TILE; j++) sum[j] += w * gradient[j][c];
            }
            for (int j = 0; j < GRADIENT_TILE; j++) store(m.low + j * padded + r, sum[j]);
        }
        for (int j = 0; j < GRADIENT_TILE && t + j < count; j++) {
            add_row(grad_low + m.positions[t + j] * p.pixel_stride, m.low + j * padded, p.rank);
        }
    }
}

template <int N, class T, bool FULL>
void backward_route(
    const Scan& p, int64_t image, const Where& at, int64_t k, const Block& skip, float* grad_parameters,
    float* grad_weights, BackwardMemory& m
) {
    int64_t states = count_states<N>(p), total = length(p), stride = p.pixel_stride, R = p.rank;
    int64_t padded = round_up(R, LANES), span = span_length(p);
    int64_t offset = image * total * p.channels + at.first;
    const T *u = static_cast<const T*>(p.u) + offset, *grad_y = static_cast<const T*>(p.grad_y) + offset;
    float *grad_u = p.grad_u + offset, *grad_delta = p.grad_delta ? p.grad_delta + offset : nullptr;
    float* grad_low = grad_parameters + k * p.route_stride;
    float* grad_B = grad_low + (p.B - p.dt_low) + at.group * p.group_stride;
    float* grad_C = grad_low + (p.C - p.dt_low) + at.group * p.group_stride;
    Inputs in(p, image, k, at);

    m.of.pack(p, at, k);
    for (int64_t i = 0; i < states * BLOCK; i++) m.decay[i] = m.of.decay[i] * LOG2_E, m.carry[i] = 0, m.grad_A[i] = 0;
    for (int64_t i = 0; i < R * BLOCK; i++) m.grad_weight[i] = 0;
    for (int c = 0; c < BLOCK; c++) {
        for (int64_t r = 0; r < padded; r++) m.weight_rows[c * padded + r] = r < R ? m.of.weight[r * BLOCK + c] : 0;
    }
    if (p.grad_last) {
        for (int c = 0; c < at.valid; c++) {
            const float* last = p.grad_last + (image * p.channels + at.first + c) * states;
            for (int64_t n = 0; n < states; n++) m.carry[n * BLOCK + c] = last[n];
        }
    }
    Block grad_bias{}, grad_D{}, decay_1, carry_1, grad_A_1{};  // _1: in registers, where there is one state
    if (N == 1) decay_1 = load_block(m.of.decay), carry_1 = load_block(m.carry);
    int64_t together = rows_together(p) / states;

    for (int64_t i = 0; i < states * BLOCK; i++) m.start[i] = 0;
    for (int64_t s = 0; s + 1 < spans(p); s++) {
        float *here = m.start + s * states * BLOCK, *next = here + states * BLOCK;
        memcpy(next, here, states * BLOCK * sizeof(float));
        replay<N, T, FULL, false>(p, in, u, at, k, s * span, span, next, m);
    }

    for (int64_t s = spans(p) - 1; s >= 0; s--) {
        int64_t from = s * span, count = smaller(span, total - from);
        float* start = m.start + s * states * BLOCK;
        float* running = m.rows_B;  // not yet in use
        memcpy(running, start, states * BLOCK * sizeof(float));
        replay<N, T, FULL, true>(p, in, u, at, k, from, count, running, m);

        for (int64_t end = count; end > 0;) {
            int64_t begin = larger(0, end - together);
            for (int64_t t = end - 1; t >= begin; t--) {
                int64_t position = m.positions[t];
                const float *B = in.B + position * stride, *C = in.C + position * stride;
                const float *a = m.a + t * states * BLOCK, *h = m.h + t * states * BLOCK;
                const float* before = t ? h - states * BLOCK : start;
                float *row_B = m.rows_B + (t - begin) * states * BLOCK, *row_C = m.rows_C + (t - begin) * states * BLOCK;
                Block d = load_block(m.delta + t * BLOCK), x = load_block<FULL>(u + position * p.channels, at.valid);
                Block g = load_block<FULL>(grad_y + position * p.channels, at.valid);
                Block to_u, to_raw = load_block(m.slope + t * BLOCK);
                for (int i = 0; i < VECTORS; i++) {
                    Floats weighted = d.v[i] * x.v[i], to_weighted{}, to_delta{};
                    for (int64_t n = 0; n < states; n++) {
                        int64_t lane = n * BLOCK + i * LANES;
                        Floats G = g.v[i] * C[n] + (N == 1 ? carry_1.v[i] : load(m.carry + lane));
                        Floats carry = G * load(a + lane), to_exponent = carry * load(before + lane);
                        store(row_B + lane, G * weighted);
                        store(row_C + lane, g.v[i] * load(h + lane));
                        to_weighted += G * B[n];
                        to_delta += to_exponent * (N == 1 ? decay_1.v[i] : load(m.of.decay + lane));
                        if (N == 1) {
                            carry_1.v[i] = carry;
                            grad_A_1.v[i] += d.v[i] * to_exponent;
                        } else {
                            store(m.carry + lane, carry);
                            store(m.grad_A + lane, load(m.grad_A + lane) + d.v[i] * to_exponent);
                        }
                    }
                    to_u.v[i] = d.v[i] * to_weighted;
                    to_raw.v[i] = to_raw.v[i] * (to_delta + x.v[i] * to_weighted);
                    grad_bias.v[i] += to_raw.v[i];
                }
                store_block(m.slope + t * BLOCK, to_raw);
                if (k == 0) {
                    for (int i = 0; i < VECTORS; i++) {
                        to_u.v[i] += g.v[i] * skip.v[i];
                        grad_D.v[i] += g.v[i] * x.v[i];
                    }
                } else {
                    Block others = load_block<FULL>(grad_u + position * p.channels, at.valid);
                    for (int i = 0; i < VECTORS; i++) to_u.v[i] += others.v[i];
                }
                store_block<FULL>(grad_u + position * p.channels, to_u, at.valid);
                if (grad_delta) store_block<FULL>(grad_delta + position * p.channels, to_raw, at.valid);
            }
            sum_rows(m.rows_B, (end - begin) * states, m.sums_B);
            sum_rows(m.rows_C, (end - begin) * states, m.sums_C);
            for (int64_t t = begin; t < end; t++) {
                add_row(grad_B + m.positions[t] * stride, m.sums_B + (t - begin) * states, states);
                add_row(grad_C + m.positions[t] * stride, m.sums_C + (t - begin) * states, states);
            }
            end = begin;
        }
        if (!in.delta) {
            weight_gradient(p, in.dt_low, m, count);
            low_gradient(p, grad_low, m, count);
        }
    }
    if (N == 1) store_block(m.grad_A, grad_A_1);

    int64_t K = p.routes, D = p.channels, row = k * D + at.first;
    float *to_weight = grad_weights + row * R, *to_bias = grad_weights + K * D * R + row;
    float *to_A = grad_weights + K * D * (R + 1) + row * states, *to_D = grad_weights + K * D * (R + 1 + states) + at.first;
    for (int c = 0; c < at.valid; c++) {
        for (int64_t r = 0; r < R; r++) to_weight[c * R + r] = m.grad_weight[r * BLOCK + c];
        for (int64_t n = 0; n < states; n++) to_A[c * states + n] = m.grad_A[n * BLOCK + c];
    }
    store_block<FULL>(to_bias, grad_bias, at.valid);
    if (k == 0) store_block<FULL>(to_D, grad_D, at.valid);
}

int64_t backward_tasks(const Scan& p) { return p.batch * p.slots; }

template <class T>
void backward_blocks(const Scan& p, int64_t task, float* memory) {
    Scratch scratch{memory};
    BackwardMemory m(p, scratch);
    int64_t image = task / p.slots, slot = task % p.slots, size = length(p) * p.pixel_stride, K = p.routes;
    float* grad_parameters = p.grad_parameters + (slot * p.batch + image) * size;
    float* grad_weights = p.grad_weights + image * weights_of(p);
    memset(grad_parameters, 0, size * sizeof(float));
    for (int64_t block = slot * blocks(p) / p.slots; block < (slot + 1) * blocks(p) / p.slots; block++) {
        Where at = locate(p, block);
        Block skip = skip_of(p, at);
        auto route = at.valid < BLOCK    ? backward_route<0, T, false>
                     : p.states == 1     ? backward_route<1, T, true>
                     : p.states == 16    ? backward_route<16, T, true>
                                         : backward_route<0, T, true>;
        for (int64_t k = 0; k < K; k++) route(p, image, at, k, skip, grad_parameters, grad_weights, m);
    }
}

void forward(const Scan& p, int64_t task, float* scratch) {
    p.bfloat16 ? forward_blocks<uint16_t>(p, task, scratch) : forward_blocks<float>(p, task, scratch);
}
void merge(const Scan& p, int64_t task) { p.bfloat16 ? merge_block<uint16_t>(p, task) : merge_block<float>(p, task); }
void backward(const Scan& p, int64_t task, float* scratch) {
    p.bfloat16 ? backward_blocks<uint16_t>(p, task, scratch) : backward_blocks<float>(p, task, scratch);
}

void sum(float* parts, int64_t count, int64_t stride, int64_t length) {
    for (int64_t j = 1; j < count; j++) {
        for (int64_t i = 0; i < length; i++) parts[i] += parts[j * stride + i];
    }
}

}  // namespace

extern const ScanKernels scan;
const ScanKernels scan = {
    blocks, forward_tasks, forward_scratch, forward, merge, backward_tasks, backward_scratch, backward, sum,
};

}  // namespace VMAMBA_ISA
