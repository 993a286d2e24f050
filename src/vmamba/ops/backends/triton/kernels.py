"""The kernels: selective scans along the routes of a grid, channels last. docs/kernels.md explains the plan.

Words used here, and shapes:

- A *chunk* is RUN consecutive positions of an axis (rows or columns), all on one line of the grid; chunks are numbered
  along the axis. The last chunk of a line ends where the line does and begins within the chunk before it.
- A *segment* is `length` consecutive chunks. A program takes RUNS neighbouring segments times BLOCK neighbouring
  channels of one image and goes through the segments chunk by chunk, in all of them at once: it holds [RUN, LANES],
  LANES = RUNS·BLOCK. A thread owns channels of a segment and has the positions of a chunk in registers, so the
  recurrence is a chain of multiply-adds, and no thread needs what another one has. Positions that another chunk has
  have Δ = 0, which leaves the state as it is; so have segments that do not exist.
- Every route has a state, and in the backward pass its adjoint, which runs the other way. One of them runs *along* the
  axis, as the chunks are gone through, and the other *against* it: the state of a route that runs backwards, the
  adjoint of one that runs forwards.
- A *walk* takes RUNS images in the place of segments, and each from its first chunk to its last.
- A *step* here is Δ·log₂e, so that exp(Δ·A) is exp2(step·A) and Δ·B is step·(ln 2·B).

The height and width of the grid and the number of images are runtime arguments and are not specialised; that nothing
is known of what divides them also keeps the compiler from loading more than WIDTH channels at once. A kernel is
compiled for channels, N, R, the dtypes and the tile's shape.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005  the compiler knows sums of tuples, and no stars
from __future__ import annotations

import triton
import triton.language as tl

_SIZES = (
    "images", "segments", "length", "positions", "vectors", "chunks", "chunks_per_line", "line_length", "step",
    "columns", "per_route",
)  # fmt: skip
RUNS = tl.constexpr(4)  # what neighbouring threads of a product have
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _compose(a_1, h_1, a_2, h_2):
    """h → a·h + b, first with (a_1, h_1), then with (a_2, h_2)."""
    return a_1 * a_2, h_1 * a_2 + h_2


@triton.jit
def _compose_and_lag(a_1, h_1, lag_a_1, lag_h_1, a_2, h_2, lag_a_2, lag_h_2):
    """The same, and beside it the composition of all steps but the last; a single step's is (1, 0)."""
    return a_1 * a_2, h_1 * a_2 + h_2, a_1 * lag_a_2, h_1 * lag_a_2 + lag_h_2


@triton.jit
def _softplus(x, EXACT: tl.constexpr):
    """Of x in units of ln 2, max(x, 0) + log2(1 + z) with z = 2^-|x|; also log2(1 + z) and z.

    log2(1 + z) / z is a polynomial on [0, 1], with a relative error of 3e-8 or 6e-5: the argument 1 + z would lose the
    small steps that a trained model has.
    """
    z = tl.exp2(-tl.abs(x))
    if EXACT:
        p = 0.00754918 * z - 0.04256707
        p = p * z + 0.11285621
        p = p * z - 0.19711899
        p = p * z + 0.27564143
        p = p * z - 0.35840848
        p = p * z + 0.48069296
        p = p * z - 0.72134021
        p = p * z + 1.442695
    else:
        p = 0.05965155 * z - 0.22711949
        p = p * z + 0.44189889
        p = p * z - 0.71698744
        p = p * z + 1.44261321
    return tl.maximum(x, 0.0) + z * p, z * p, z


@triton.jit
def _put(values, i: tl.constexpr, value):
    """A tuple with another i-th value."""
    return values[:i] + (value,) + values[i + 1 :]


@triton.jit
def _routes_before(k: tl.constexpr, ROUTES: tl.constexpr):
    """How many of the routes of an axis have a smaller number."""
    return (
        (ROUTES & 1) * (k > 0) + (ROUTES >> 1 & 1) * (k > 1) + (ROUTES >> 2 & 1) * (k > 2) + (ROUTES >> 3 & 1) * (k > 3)
    )


@triton.jit
def _place(chunk, axis, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """First position of a chunk, and how many of its first positions do not count: all, past the last chunk."""
    chunks, chunks_per_line, line_length, step = axis
    real = tl.minimum(chunk, chunks - 1)
    if COLUMNS:
        line = real // chunks_per_line
        wanted = (real - line * chunks_per_line) * RUN
        first = tl.minimum(wanted, line_length - RUN)
        place = line + first * step
    else:
        wanted = real * RUN
        first = tl.minimum(wanted, line_length - RUN)
        place = first
    return place, tl.where(chunk < chunks, wanted - first, RUN)


@triton.jit
def _rows(axis, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions from the first of a chunk to each, [RUN, 1]."""
    i = tl.arange(0, RUN)[:, None]
    return i * axis[3] if COLUMNS else i


@triton.jit
def _program(segments, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image, block of a group's channels, group, and first segment; and its own number but for the
    channels."""
    blocks: tl.constexpr = tl.cdiv(CHANNELS // GROUPS, BLOCK)
    per_image = tl.cdiv(segments, RUNS)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % GROUPS
    item = tl.program_id(0) // blocks // GROUPS
    return (item // per_image).to(tl.int64), block, group, item % per_image * RUNS, item.to(tl.int64)


@triton.jit
def _lanes(block, group, first, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each lane the channel, whether it exists, and the segment.

    Lanes are [BLOCK / 2, RUNS, 2], neighbouring channels innermost.
    """
    size: tl.constexpr = CHANNELS // GROUPS
    lane = tl.arange(0, RUNS * BLOCK)
    within = block * BLOCK + lane // (2 * RUNS) * 2 + lane % 2
    is_channel = within < size
    if size % BLOCK != 0:
        within = tl.minimum(within, size - 1)
    return group * size + within, is_channel, first + lane // 2 % RUNS


@triton.jit
def _chunk(i, first, segment, is_channel, length, axis, COLUMNS: tl.constexpr, FULL: tl.constexpr, RUN: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """The i-th chunk of every segment: of each lane the chunk's first position, and of each row and lane whether it
    counts; the same of each segment, without channels.
    """
    place, dead = _place(segment * length + i, axis, RUN, COLUMNS)
    if not FULL:
        dead = tl.where(is_channel, dead, RUN)
    row = tl.arange(0, RUN)[:, None]
    is_real = row >= dead[None, :]
    if FULL:
        is_real = tl.max_constancy(is_real, [1, 2])  # so that two channels are stored at once
    run_place, run_dead = _place((first + tl.arange(0, RUNS)) * length + i, axis, RUN, COLUMNS)
    return place, is_real, run_place, row >= run_dead[None, :]


@triton.jit
def _shared(pointer, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """A number of each position that all channels share, [RUN, RUNS], as float32 [RUN, LANES]."""
    x = tl.load(pointer).to(tl.float32)
    return tl.reshape(tl.broadcast_to(x[:, None, :, None], [RUN, BLOCK // 2, RUNS, 2]), [RUN, RUNS * BLOCK])


@triton.jit
def _product_to_lanes(x, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, RUN·RUNS], as products have it, as [RUN, LANES]."""
    x = tl.reshape(x, [BLOCK // 16, 2, 8, RUN // 2, RUNS, 2])
    return tl.reshape(tl.permute(x, [3, 5, 0, 2, 4, 1]), [RUN, RUNS * BLOCK])


@triton.jit
def _lanes_to_product(x, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """[RUN, LANES] as [BLOCK, RUN·RUNS]."""
    x = tl.reshape(x, [RUN // 2, 2, BLOCK // 16, 8, RUNS, 2])
    return tl.reshape(tl.permute(x, [2, 5, 3, 0, 4, 1]), [BLOCK, RUN * RUNS])


@triton.jit
def _product_channels(block, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row of a product the channel, and whether it exists."""
    row = tl.arange(0, BLOCK)
    channel = block * BLOCK + row // 16 * 16 + row % 8 * 2 + row // 8 % 2
    return tl.minimum(channel, CHANNELS - 1), channel < CHANNELS


@triton.jit
def _weight(dt_weight, dt_bias, block, CHANNELS: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """log₂e·dt_weight, [BLOCK, RANK]; then the bias in two parts, of which the first is exact in tf32; then what makes
    a step of zero; then zeros."""
    channel, _is_channel = _product_channels(block, CHANNELS, BLOCK)
    r = tl.arange(0, RANK)[None, :]
    weight = tl.load(dt_weight + channel[:, None] * R + r, mask=r < R, other=0.0) * LOG2_E
    bias = tl.load(dt_bias + channel)[:, None] * LOG2_E
    coarse = ((bias.to(tl.int32, bitcast=True) >> 13) << 13).to(tl.float32, bitcast=True)
    weight = tl.where(r == R, coarse, weight)
    weight = tl.where(r == R + 1, bias - coarse, weight)
    return tl.where(r == R + 2, -1e30, weight)


@triton.jit
def _line_place(i, first, length, axis, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """Of each of the RUN·RUNS columns of a product where the position is, and whether it counts."""
    column = tl.arange(0, RUN * RUNS)
    row = column // (2 * RUNS) * 2 + column % 2
    place, dead = _place((first + column // 2 % RUNS) * length + i, axis, RUN, COLUMNS)
    return place + row * (axis[3] if COLUMNS else 1), row >= dead


@triton.jit
def _lows(parameters, line_place, is_line, PIXEL: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
          RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr):  # fmt: skip
    """Of each route dt_low, [RANK, RUN·RUNS]; then 1 twice for the bias, 1 where a position does not count, zeros."""
    r = tl.arange(0, RANK)[:, None]
    others = tl.where((r == R) | (r == R + 1) | ((r == R + 2) & (is_line == 0)[None, :]), 1.0, 0.0)
    at = parameters + (line_place.to(tl.int64) * PIXEL)[None, :] + r
    lows = ()
    for k in tl.static_range(K):
        low = 0.0
        if R > 0 and (ROUTES >> k) & 1:
            low = tl.load(at + k * (R + 2 * N), mask=r < R, other=others.to(parameters.dtype.element_ty))
        lows = lows + (low,)
    return lows


@triton.jit
def _steps(raw, SOFTPLUS: tl.constexpr, RUN: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr):
    """The step of a route and dΔ/draw, [RUN, LANES]."""
    if SOFTPLUS:
        value, log, z = _softplus(raw, EXACT)
        slope = tl.where(raw < 0, z, 1.0) * tl.exp2(-log)
    else:
        value = raw
        slope = tl.full([RUN, LANES], 1.0, tl.float32)
    return value, slope


@triton.jit
def _walk(x, BACKWARDS: tl.constexpr):
    """Rows in the order of a route. The rows are a thread's registers: this moves nothing."""
    return tl.flip(x, 0) if BACKWARDS else x


@triton.jit
def _last_row(x, RUN: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, RUN)[:, None] == RUN - 1, x, 0.0), axis=0)


@triton.jit
def _at(base, row):
    """Pointers [RUN, LANES]. The hint decides which way a warp lies: its lanes along channels."""
    return tl.max_contiguous(base[None, :] + row, [1, 2])


@triton.jit
def _states(a, b, start, RUN: tl.constexpr, BACKWARDS: tl.constexpr):
    """h after each position, from the state that enters the chunk."""
    first: tl.constexpr = RUN - 1 if BACKWARDS else 0
    b = tl.where(tl.arange(0, RUN)[:, None] == first, a * start[None, :] + b, b)
    _a, h = tl.associative_scan((_walk(a, BACKWARDS), _walk(b, BACKWARDS)), 0, _compose)
    return _walk(h, BACKWARDS)


@triton.jit
def _states_before(a, b, start, RUN: tl.constexpr, BACKWARDS: tl.constexpr):
    """h before each position, and after each, from the state that enters the chunk."""
    is_first = tl.arange(0, RUN)[:, None] == (RUN - 1 if BACKWARDS else 0)
    zero = tl.zeros_like(a)
    h = tl.where(is_first, a * start[None, :] + b, b)
    before = tl.where(is_first, start[None, :] + zero, -0.0)  # to which the compiler knows that adding changes nothing
    _a, h, _lag, before = tl.associative_scan(
        (_walk(a, BACKWARDS), _walk(h, BACKWARDS), zero + 1.0, _walk(before, BACKWARDS)), 0, _compose_and_lag
    )
    return _walk(before, BACKWARDS), _walk(h, BACKWARDS)


@triton.jit
def _after(a, b, RUN: tl.constexpr, BACKWARDS: tl.constexpr):
    """h after a chunk, from zero, [LANES]."""
    _a, h = tl.associative_scan((_walk(a, BACKWARDS), _walk(b, BACKWARDS)), 0, _compose)
    return _last_row(h, RUN)


@triton.jit
def _sum_runs(x, BLOCK: tl.constexpr):
    """[LANES] summed over segments, [BLOCK]."""
    return tl.reshape(tl.sum(tl.reshape(x, [BLOCK // 2, RUNS, 2]), axis=1), [BLOCK])


@triton.jit
def _sum_channels(x, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """[RUN, LANES] summed over channels, [RUN, RUNS]."""
    return tl.sum(tl.sum(tl.reshape(x, [RUN, BLOCK // 2, RUNS, 2]), axis=3), axis=1)


@triton.jit
def _add_part(to, part, mask, i):
    """A chunk's part of a sum over all positions of a program."""
    part += tl.load(to, mask=mask & (i > 0), other=0.0)
    tl.store(to, part, mask=mask)


@triton.jit
def _skip(skip, CHANNELS: tl.constexpr, K: tl.constexpr):
    """The skips of all routes, added up, [LANES]."""
    total = tl.load(skip)
    for k in tl.static_range(1, K):
        total += tl.load(skip + k * CHANNELS)
    return total


@triton.jit
def _zeros(K: tl.constexpr, LANES: tl.constexpr):
    """A tuple of K vectors of zeros."""
    zeros = ()
    for _k in tl.static_range(K):
        zeros = zeros + (tl.zeros([LANES], tl.float32),)
    return zeros


@triton.jit
def _weights(dt_weight, dt_bias, block, CHANNELS: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr,
             ROUTES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of each route the weight, for as long as the program runs."""
    weights = ()
    for k in tl.static_range(K):
        if R > 0 and (ROUTES >> k) & 1:
            weight = _weight(dt_weight + k * CHANNELS * R, dt_bias + k * CHANNELS, block, CHANNELS, R, RANK, BLOCK)
        else:
            weight = 0.0
        weights = weights + (weight,)
    return weights


@triton.jit
def _raw(u_at, rows, is_real, low, weight, delta, bias, CHANNELS: tl.constexpr, R: tl.constexpr, SOFTPLUS: tl.constexpr,
         RUN: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The step of a route before softplus, [RUN, LANES], of which nothing is left where there is no position."""
    if R == 0:
        raw = (tl.load(_at(delta + u_at, rows * CHANNELS)).to(tl.float32) + tl.load(bias)[None, :]) * LOG2_E
        raw = tl.where(is_real, raw, -1e30 if SOFTPLUS else 0.0)
    else:
        raw = _product_to_lanes(tl.dot(weight, low.to(tl.float32), input_precision=PRECISION), RUN, BLOCK)
    return raw


@triton.jit(do_not_specialize=_SIZES)
def carry_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, sums, local, carry_a, carry_h, carry_adjoint,
    segments, length, positions, vectors, chunks, chunks_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr, ROUTES: tl.constexpr,
    BACK: tl.constexpr, SOFTPLUS: tl.constexpr, SEVERAL: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last chunk of every segment to the first: what enters each against the axis, into `local` (images,
    chunks, routes of the axis, N, channels), as if nothing entered the segment, and the sum of the steps from there to
    where the segment is entered, `sums` (images, chunks, routes of the axis, channels); and where there are SEVERAL
    segments, what each does to the state of a route, h → a·h + carry_h, and to its adjoint, where grad_y is given.

    With N > 1, carry_h and carry_adjoint are given in any case: the state is kept in them from chunk to chunk.
    """
    LANES: tl.constexpr = RUNS * BLOCK
    FULL: tl.constexpr = CHANNELS // GROUPS % BLOCK == 0
    axis = (chunks, chunks_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, first, _item = _program(segments, CHANNELS, GROUPS, BLOCK)
    channel, is_channel, segment = _lanes(block, group, first, CHANNELS, GROUPS, BLOCK)
    is_segment = is_channel & (segment < segments)
    parameters += image * positions * PIXEL
    weights = _weights(dt_weight, dt_bias, block, CHANNELS, R, RANK, K, ROUTES, BLOCK)
    all_steps, states, adjoints = _zeros(K, LANES), _zeros(K, LANES), _zeros(K, LANES)
    for j in range(length):
        i = length - 1 - j
        place, is_real, run_place, _is_counted = _chunk(
            i, first, segment, is_channel, length, axis, COLUMNS, FULL, RUN, BLOCK
        )
        u_at = (image * positions + place) * vectors * WIDTH + channel
        line_place, is_line = _line_place(i, first, length, axis, COLUMNS, RUN)
        shared = parameters + (run_place.to(tl.int64) * PIXEL)[None, :] + (rows * PIXEL + group * (2 * N))
        lows = _lows(parameters, line_place, is_line, PIXEL, N, R, RANK, K, ROUTES)
        at_chunk = (image * chunks + segment * length + i) * _routes_before(4, AXIS) * CHANNELS + channel
        is_chunk = is_channel & (segment * length + i < chunks)
        x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
        if grad_y is not None:
            g = tl.where(is_real, tl.load(_at(grad_y + u_at, rows * CHANNELS)).to(tl.float32), 0.0)
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                raw = _raw(
                    u_at, rows, is_real, lows[k], weights[k], delta, dt_bias + k * CHANNELS + channel, CHANNELS, R,
                    SOFTPLUS, RUN, BLOCK, PRECISION,
                )  # fmt: skip
                steps, _slope = _steps(raw, SOFTPLUS, RUN, LANES, EXACT)
                chunk_steps, later_steps = tl.sum(steps, axis=0), all_steps[k]
                if (BACK >> k) & 1 or grad_y is not None:
                    tl.store(sums + at_chunk + _routes_before(k, AXIS) * CHANNELS, later_steps, mask=is_chunk)
                all_steps = _put(all_steps, k, later_steps + chunk_steps)
                for n in range(N):
                    at = ((image * segments + segment) * K + k) * N * CHANNELS + n * CHANNELS + channel
                    to_local = local + at_chunk * N + (_routes_before(k, AXIS) * N + n) * CHANNELS - channel * (N - 1)
                    decay = tl.load(A + (k * CHANNELS + channel) * N + n)
                    a = tl.exp2(steps * decay[None, :])
                    if SEVERAL or (BACK >> k) & 1:
                        b = steps * x * (_shared(shared + (k * (R + 2 * N) + R + n), RUN, BLOCK) * LN_2)
                        h = _after(a, b, RUN, ((BACK >> k) & 1) == 1)
                        state = states[k] if N == 1 else tl.load(carry_h + at, mask=is_segment & (j > 0), other=0.0)
                        if (BACK >> k) & 1:
                            tl.store(to_local, state, mask=is_chunk)
                            state = h + tl.exp2(chunk_steps * decay) * state
                        else:
                            state += tl.exp2(later_steps * decay) * h
                        if N == 1:
                            states = _put(states, k, state)
                        else:
                            tl.store(carry_h + at, state, mask=is_segment)
                    if grad_y is not None and (SEVERAL or ((BACK >> k) & 1) == 0):
                        b = a * g * _shared(shared + (k * (R + 2 * N) + R + N + n), RUN, BLOCK)
                        h = _after(a, b, RUN, ((BACK >> k) & 1) == 0)
                        state = (
                            adjoints[k] if N == 1 else tl.load(carry_adjoint + at, mask=is_segment & (j > 0), other=0.0)
                        )
                        if (BACK >> k) & 1:
                            state += tl.exp2(later_steps * decay) * h
                        else:
                            tl.store(to_local, state, mask=is_chunk)
                            state = h + tl.exp2(chunk_steps * decay) * state
                        if N == 1:
                            adjoints = _put(adjoints, k, state)
                        else:
                            tl.store(carry_adjoint + at, state, mask=is_segment)
        if N > 1:
            tl.debug_barrier()  # all threads have written before the next chunk reads
    if SEVERAL:
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                at = ((image * segments + segment) * K + k) * N * CHANNELS + channel
                for n in range(N):
                    decay = tl.load(A + (k * CHANNELS + channel) * N + n)
                    tl.store(carry_a + at + n * CHANNELS, tl.exp2(all_steps[k] * decay), mask=is_segment)
                if N == 1:
                    tl.store(carry_h + at, states[k], mask=is_segment)
                    if grad_y is not None:
                        tl.store(carry_adjoint + at, adjoints[k], mask=is_segment)


@triton.jit(do_not_specialize=_SIZES)
def chain_kernel(carry_a, carry_h, initial, entering, segments, columns, per_route, ROUTES: tl.constexpr,
                 BACK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The state that enters each segment, from what the segments do; a column is a (route, n, channel)."""
    blocks = tl.cdiv(columns, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    route = column // per_route
    is_column = (column < columns) & ((ROUTES >> route) & 1 == 1)
    is_backwards = (BACK >> route) & 1 == 1
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + image * columns + column, mask=is_column, other=0.0)
    base = image * segments * columns + column
    for begin in range(0, segments, CHUNK):
        j = (begin + tl.arange(0, CHUNK))[:, None]
        segment = tl.where(is_backwards[None, :], segments - 1 - j, j)
        row = segment.to(tl.int64) * columns
        is_segment = (j < segments) & is_column[None, :]
        a = tl.load(_at(carry_a + base, row), mask=is_segment, other=1.0)
        h = tl.load(_at(carry_h + base, row), mask=is_segment, other=0.0)
        a, h, lag_a, lag_h = tl.associative_scan(
            (a, h, tl.full([CHUNK, BLOCK], 1.0, tl.float32), tl.zeros([CHUNK, BLOCK], tl.float32)), 0, _compose_and_lag
        )
        tl.store(_at(entering + base, row), lag_h + lag_a * state[None, :], mask=is_segment)
        state = _last_row(h, CHUNK) + _last_row(a, CHUNK) * state


@triton.jit
def _entering(entering, carry_a, carry_h, at, segment, segments, is_segment, K: tl.constexpr, CHANNELS: tl.constexpr,
              ROUTES: tl.constexpr, BACK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Of each route what enters the segments, for N = 1: found by chain_kernel, or by what the segments before do."""
    states = ()
    for k in tl.static_range(K):
        state = tl.zeros([LANES], tl.float32)
        if (ROUTES >> k) & 1:
            if entering is not None:
                state = tl.load(entering + at + k * CHANNELS, mask=is_segment, other=0.0)
            elif carry_a is not None:
                for j in range(segments - 1):
                    other = segments - 1 - j if (BACK >> k) & 1 else j
                    is_before = is_segment & (segment < other if (BACK >> k) & 1 else segment > other)
                    from_other = at + ((other - segment) * K + k) * CHANNELS
                    a = tl.load(carry_a + from_other, mask=is_before, other=1.0)
                    state = a * state + tl.load(carry_h + from_other, mask=is_before, other=0.0)
        states = states + (state,)
    return states


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(
    u, delta, parameters, dt_weight, dt_bias, A, skip, sums, local, carry_a, carry_h, entering, partial, last, y,
    segments, length, positions, vectors, chunks, chunks_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr, ROUTES: tl.constexpr,
    BACK: tl.constexpr, SOFTPLUS: tl.constexpr, SEVERAL: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of the routes along one axis, added to `partial` and the skip where those are given; and into `last` the last
    state (images, K, N, channels) of routes that run forwards.

    `sums` and `local` are carry_kernel's, None where there is a single chunk. Where there are SEVERAL segments, what
    enters them is in `entering` (images, segments, K, N, channels), or to be found from carry_a and carry_h. With N > 1
    `entering` is given in any case, since the state is kept in it from chunk to chunk.
    """
    LANES: tl.constexpr = RUNS * BLOCK
    FULL: tl.constexpr = CHANNELS // GROUPS % BLOCK == 0
    axis = (chunks, chunks_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, first, _item = _program(segments, CHANNELS, GROUPS, BLOCK)
    channel, is_channel, segment = _lanes(block, group, first, CHANNELS, GROUPS, BLOCK)
    is_segment = is_channel & (segment < segments)
    parameters += image * positions * PIXEL
    weights = _weights(dt_weight, dt_bias, block, CHANNELS, R, RANK, K, ROUTES, BLOCK)
    at_segment = (image * segments + segment) * K * N * CHANNELS + channel
    states = _entering(
        entering if N == 1 else None, carry_a, carry_h, at_segment, segment, segments, is_segment, K, CHANNELS, ROUTES,
        BACK, LANES,
    )  # fmt: skip
    for i in range(length):
        place, is_real, run_place, _is_counted = _chunk(
            i, first, segment, is_channel, length, axis, COLUMNS, FULL, RUN, BLOCK
        )
        u_at = (image * positions + place) * vectors * WIDTH + channel
        line_place, is_line = _line_place(i, first, length, axis, COLUMNS, RUN)
        shared = parameters + (run_place.to(tl.int64) * PIXEL)[None, :] + (rows * PIXEL + group * (2 * N))
        lows = _lows(parameters, line_place, is_line, PIXEL, N, R, RANK, K, ROUTES)
        at_chunk = (image * chunks + segment * length + i) * _routes_before(4, AXIS) * CHANNELS + channel
        is_chunk = is_channel & (segment * length + i < chunks)
        x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
        total = tl.zeros([RUN, LANES], tl.float32)
        if partial is not None:
            total = tl.load(_at(partial + u_at, rows * CHANNELS)).to(tl.float32)
        if skip is not None:
            total += _skip(skip + channel, CHANNELS, K)[None, :] * x
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                raw = _raw(
                    u_at, rows, is_real, lows[k], weights[k], delta, dt_bias + k * CHANNELS + channel, CHANNELS, R,
                    SOFTPLUS, RUN, BLOCK, PRECISION,
                )  # fmt: skip
                steps, _slope = _steps(raw, SOFTPLUS, RUN, LANES, EXACT)
                weighted = steps * x
                if (BACK >> k) & 1 and local is not None:
                    later_steps = tl.load(
                        sums + at_chunk + _routes_before(k, AXIS) * CHANNELS, mask=is_chunk, other=0.0
                    )
                for n in range(N):
                    at = at_segment + (k * N + n) * CHANNELS
                    decay = tl.load(A + (k * CHANNELS + channel) * N + n)
                    if N == 1:
                        start = states[k]
                    else:
                        has_entered = SEVERAL if (BACK >> k) & 1 else SEVERAL | (i > 0)
                        start = tl.load(entering + at, mask=is_segment & has_entered, other=0.0)
                    if (BACK >> k) & 1 and local is not None:
                        from_local = (
                            local + at_chunk * N + (_routes_before(k, AXIS) * N + n) * CHANNELS - channel * (N - 1)
                        )
                        start *= tl.exp2(later_steps * decay)
                        start += tl.load(from_local, mask=is_chunk, other=0.0)
                    a = tl.exp2(steps * decay[None, :])
                    b = weighted * (_shared(shared + (k * (R + 2 * N) + R + n), RUN, BLOCK) * LN_2)
                    h = _states(a, b, start, RUN, ((BACK >> k) & 1) == 1)
                    if ((BACK >> k) & 1) == 0:
                        after = _last_row(h, RUN)
                        if N == 1:
                            states = _put(states, k, after)
                        else:
                            tl.store(entering + at, after, mask=is_segment)
                        if last is not None:
                            to = last + (image * K + k) * N * CHANNELS + n * CHANNELS + channel
                            tl.store(to, after, mask=is_channel & (segment == segments - 1) & (i == length - 1))
                    total += h * _shared(shared + (k * (R + 2 * N) + R + N + n), RUN, BLOCK)
        tl.store(_at(y + u_at, rows * CHANNELS), total.to(y.dtype.element_ty), mask=is_real)
        if N > 1:
            tl.debug_barrier()


@triton.jit
def _visit(chunk, k: tl.constexpr, u, parameters, image, run_image, line_image, channel, axis, positions, vectors,
           COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PIXEL: tl.constexpr, R: tl.constexpr,
           RANK: tl.constexpr, K: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All that a route needs of one chunk of every image: where it is, which of its rows count, u, dt_low, B and C."""
    place, dead = _place(chunk, axis, RUN, COLUMNS)
    rows = _rows(axis, RUN, COLUMNS)
    at = (image * positions + place) * vectors * WIDTH + channel
    x = tl.load(_at(u + at, rows * CHANNELS)).to(tl.float32)
    column = tl.arange(0, RUN * RUNS)
    row = column // (2 * RUNS) * 2 + column % 2
    line_place = line_image * positions + place + row * (axis[3] if COLUMNS else 1)
    low = _lows(parameters, line_place, row >= dead, PIXEL, 1, R, RANK, K, 1 << k)[k]
    shared = parameters + ((run_image * positions + place) * PIXEL)[None, :] + (rows * PIXEL + k * (R + 2) + R)
    return at, dead, x, low, _shared(shared, RUN, BLOCK), _shared(shared + 1, RUN, BLOCK)


@triton.jit
def _walked(x, low, B, C, state, weight, decay, BACKWARDS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
            EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y of one route in a chunk, and the state behind it."""
    raw = _product_to_lanes(tl.dot(weight, low.to(tl.float32), input_precision=PRECISION), RUN, BLOCK)
    steps, _slope = _steps(raw, True, RUN, RUNS * BLOCK, EXACT)
    h = _states(tl.exp2(steps * decay[None, :]), steps * x * (B * LN_2), state, RUN, BACKWARDS)
    return h * C, _last_row(_walk(h, BACKWARDS), RUN)


@triton.jit(do_not_specialize=_SIZES)
def walk_kernel(
    u, parameters, dt_weight, dt_bias, A, skip, y,
    images, positions, vectors, chunks, chunks_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PIXEL: tl.constexpr, R: tl.constexpr,
    RANK: tl.constexpr, K: tl.constexpr, FORTH: tl.constexpr, BACK: tl.constexpr, ADDS: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of two routes along one axis, FORTH forwards and BACK backwards, for one state a channel; with the skip where
    that is given, and where it ADDS onto what is in y.

    A program takes RUNS images in the place of segments and goes through all chunks of both routes, of one from the
    first, of the other from the last: nothing is computed twice, and each route has work while the other waits. Up to
    the middle a route finds chunks where the other has not been; from there on it adds to what that left.
    """
    LANES: tl.constexpr = RUNS * BLOCK
    FULL: tl.constexpr = CHANNELS % BLOCK == 0
    axis = (chunks, chunks_per_line, line_length, step)
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK)
    block, first = tl.program_id(0) % blocks, tl.program_id(0) // blocks * RUNS
    channel, is_channel, image = _lanes(block, 0, first, CHANNELS, 1, BLOCK)
    is_lane = image < images
    if not FULL:
        is_lane = is_lane & is_channel
    image = tl.minimum(image, images - 1).to(tl.int64)
    run_image = tl.minimum(first + tl.arange(0, RUNS), images - 1).to(tl.int64)
    line_image = tl.minimum(first + tl.arange(0, RUN * RUNS) // 2 % RUNS, images - 1).to(tl.int64)
    weight_forth = _weight(
        dt_weight + FORTH * CHANNELS * R, dt_bias + FORTH * CHANNELS, block, CHANNELS, R, RANK, BLOCK
    )
    weight_back = _weight(dt_weight + BACK * CHANNELS * R, dt_bias + BACK * CHANNELS, block, CHANNELS, R, RANK, BLOCK)
    decay_forth = tl.load(A + FORTH * CHANNELS + channel)
    decay_back = tl.load(A + BACK * CHANNELS + channel)
    state_forth, state_back = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    row = tl.arange(0, RUN)[:, None]
    row_step = _rows(axis, RUN, COLUMNS) * CHANNELS
    for i in range(chunks):
        at_forth, dead_forth, x_forth, low_forth, B_forth, C_forth = _visit(
            i, FORTH, u, parameters, image, run_image, line_image, channel, axis, positions, vectors, COLUMNS, CHANNELS,
            WIDTH, PIXEL, R, RANK, K, RUN, BLOCK,
        )  # fmt: skip
        at_back, dead_back, x_back, low_back, B_back, C_back = _visit(
            chunks - 1 - i, BACK, u, parameters, image, run_image, line_image, channel, axis, positions, vectors,
            COLUMNS, CHANNELS, WIDTH, PIXEL, R, RANK, K, RUN, BLOCK,
        )  # fmt: skip
        is_behind, is_middle = 2 * i > chunks - 1, 2 * i == chunks - 1
        is_forth, is_back = is_lane[None, :] & (row >= dead_forth), is_lane[None, :] & (row >= dead_back)
        if FULL:  # so that two channels are loaded and stored at once
            is_forth, is_back = tl.max_constancy(is_forth, [1, 2]), tl.max_constancy(is_back, [1, 2])
        if is_behind:  # what the other route has left, perhaps by another thread
            tl.debug_barrier()
        there_forth = tl.load(_at(y + at_forth, row_step), mask=is_forth & (is_behind | ADDS), other=0.0).to(tl.float32)
        there_back = tl.load(
            _at(y + at_back, row_step), mask=is_back & (is_behind | ADDS) & (is_middle == 0), other=0.0
        ).to(tl.float32)
        if skip is not None:
            skipped = tl.where(is_behind, 0.0, _skip(skip + channel, CHANNELS, K))[None, :]
            there_forth += skipped * x_forth
            there_back += tl.where(is_middle, 0.0, skipped) * x_back
        y_forth, state_forth = _walked(
            x_forth, low_forth, B_forth, C_forth, state_forth, weight_forth, decay_forth, False, RUN, BLOCK, EXACT,
            PRECISION,
        )  # fmt: skip
        y_back, state_back = _walked(
            x_back, low_back, B_back, C_back, state_back, weight_back, decay_back, True, RUN, BLOCK, EXACT, PRECISION
        )
        y_forth += there_forth
        y_back += tl.where(is_middle, y_forth, there_back)
        tl.store(_at(y + at_forth, row_step), y_forth.to(y.dtype.element_ty), mask=is_forth & (is_middle == 0))
        tl.store(_at(y + at_back, row_step), y_back.to(y.dtype.element_ty), mask=is_back)


@triton.jit
def _part(parts, item, k: tl.constexpr, ROUTES: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr):
    """Where this program's part of a route's sums begins; there is room for the routes of this axis only."""
    return parts + (item * _routes_before(4, ROUTES) + _routes_before(k, ROUTES)) * CHANNELS * NUMBERS


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, skip, sums, local, carry_a, carry_h, carry_adjoint, entering,
    adjoint, partial,
    grad_u, grad_delta, grad_parameters, parts, grad_skip,
    images, segments, length, positions, vectors, chunks, chunks_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr, ROUTES: tl.constexpr,
    BACK: tl.constexpr, SOFTPLUS: tl.constexpr, SEVERAL: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of everything for the routes along one axis.

    grad_u is added to `partial` where that is given. The others are parts to be summed: grad_parameters
    (blocks of a group, images, positions, pixel) over blocks, and over the first dimension, which is images times
    programs of an image, grad_skip (..., channels) and `parts` (..., these routes, channels, R + 1 + N), those of
    dt_weight, dt_bias and A.

    `sums`, `local` and what enters as in scan_kernel; `adjoint` is given also where something enters the only segment.
    """
    LANES: tl.constexpr = RUNS * BLOCK
    FULL: tl.constexpr = CHANNELS // GROUPS % BLOCK == 0
    size: tl.constexpr = CHANNELS // GROUPS
    NUMBERS: tl.constexpr = R + 1 + N
    axis = (chunks, chunks_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, first, item = _program(segments, CHANNELS, GROUPS, BLOCK)
    channel, is_channel, segment = _lanes(block, group, first, CHANNELS, GROUPS, BLOCK)
    is_segment = is_channel & (segment < segments)
    parameters += image * positions * PIXEL
    grad_parameters += (block * images + image) * positions * PIXEL
    weights = _weights(dt_weight, dt_bias, block, CHANNELS, R, RANK, K, ROUTES, BLOCK)
    at_segment = (image * segments + segment) * K * N * CHANNELS + channel
    states = _entering(
        entering if N == 1 else None, carry_a, carry_h, at_segment, segment, segments, is_segment, K, CHANNELS, ROUTES,
        BACK, LANES,
    )  # fmt: skip
    adjoints = _entering(
        adjoint if N == 1 else None, carry_a, carry_adjoint, at_segment, segment, segments, is_segment, K, CHANNELS,
        ROUTES, (1 << K) - 1 - BACK, LANES,
    )  # fmt: skip
    # Channels once, for gradients that are summed over positions.
    within = block * BLOCK + tl.arange(0, BLOCK)
    is_one, one = within < size, group * size + tl.minimum(within, size - 1)
    decays, biases, skips = _zeros(K, LANES), _zeros(K, LANES), tl.zeros([LANES], tl.float32)
    products = ()
    for _k in tl.static_range(K):
        products = products + (tl.zeros([BLOCK, RANK], tl.float32),)
    for i in range(length):
        place, is_real, run_place, is_shared = _chunk(
            i, first, segment, is_channel, length, axis, COLUMNS, FULL, RUN, BLOCK
        )
        u_at = (image * positions + place) * vectors * WIDTH + channel
        line_place, is_line = _line_place(i, first, length, axis, COLUMNS, RUN)
        shared = parameters + (run_place.to(tl.int64) * PIXEL)[None, :] + (rows * PIXEL + group * (2 * N))
        to_shared = grad_parameters + (run_place.to(tl.int64) * PIXEL)[None, :] + (rows * PIXEL + group * (2 * N))
        lows = _lows(parameters, line_place, is_line, PIXEL, N, R, RANK, K, ROUTES)
        at_chunk = (image * chunks + segment * length + i) * _routes_before(4, AXIS) * CHANNELS + channel
        is_chunk = is_channel & (segment * length + i < chunks)
        x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
        g = tl.where(is_real, tl.load(_at(grad_y + u_at, rows * CHANNELS)).to(tl.float32), 0.0)
        total = tl.zeros([RUN, LANES], tl.float32)
        if partial is not None:
            total = tl.load(_at(partial + u_at, rows * CHANNELS)).to(tl.float32)
        if skip is not None:
            total += _skip(skip + channel, CHANNELS, K)[None, :] * g
        if grad_skip is not None:
            skips += tl.sum(g * x, axis=0)
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                raw = _raw(
                    u_at, rows, is_real, lows[k], weights[k], delta, dt_bias + k * CHANNELS + channel, CHANNELS, R,
                    SOFTPLUS, RUN, BLOCK, PRECISION,
                )  # fmt: skip
                steps, slope = _steps(raw, SOFTPLUS, RUN, LANES, EXACT)
                weighted = steps * x
                to_weighted = tl.zeros([RUN, LANES], tl.float32)
                to_steps = tl.zeros([RUN, LANES], tl.float32)
                if local is not None:
                    later_steps = tl.load(
                        sums + at_chunk + _routes_before(k, AXIS) * CHANNELS, mask=is_chunk, other=0.0
                    )
                for n in range(N):
                    at = at_segment + (k * N + n) * CHANNELS
                    decay = tl.load(A + (k * CHANNELS + channel) * N + n)
                    if N == 1:
                        start, end = states[k], adjoints[k]
                    else:
                        has_entered = SEVERAL if (BACK >> k) & 1 else SEVERAL | (i > 0)
                        start = tl.load(entering + at, mask=is_segment & has_entered, other=0.0)
                        end = tl.load(adjoint + at, mask=is_segment, other=0.0)
                    if local is not None:
                        from_local = (
                            local + at_chunk * N + (_routes_before(k, AXIS) * N + n) * CHANNELS - channel * (N - 1)
                        )
                        factor = tl.exp2(later_steps * decay)
                        summand = tl.load(from_local, mask=is_chunk, other=0.0)
                        if (BACK >> k) & 1:
                            start = start * factor + summand
                        else:
                            end = end * factor + summand
                    a = tl.exp2(steps * decay[None, :])
                    B_n = _shared(shared + (k * (R + 2 * N) + R + n), RUN, BLOCK) * LN_2
                    b = weighted * B_n
                    h = _states(a, b, start, RUN, ((BACK >> k) & 1) == 1)
                    G = g * _shared(shared + (k * (R + 2 * N) + R + N + n), RUN, BLOCK)
                    before, c = _states_before(a, a * G, end, RUN, ((BACK >> k) & 1) == 0)
                    G += before
                    if (BACK >> k) & 1:
                        after = _last_row(c, RUN)
                        if N == 1:
                            adjoints = _put(adjoints, k, after)
                        else:
                            tl.store(adjoint + at, after, mask=is_segment)
                    else:
                        after = _last_row(h, RUN)
                        if N == 1:
                            states = _put(states, k, after)
                        else:
                            tl.store(entering + at, after, mask=is_segment)
                    to_exponent = G * (h - b)
                    to_weighted += G * B_n
                    to_steps += to_exponent * (decay * LN_2)[None, :]
                    part = tl.sum(to_exponent * steps, axis=0)
                    if N == 1:
                        decays = _put(decays, k, decays[k] + part)
                    else:
                        to_A = _part(parts, item, k, ROUTES, CHANNELS, NUMBERS) + one * NUMBERS + (R + 1 + n)
                        _add_part(to_A, _sum_runs(part, BLOCK) * LN_2, is_one, i)
                    to_B = to_shared + (k * (R + 2 * N) + R + n)
                    tl.store(to_B, _sum_channels(G * weighted, RUN, BLOCK) * LN_2, mask=is_shared)
                    tl.store(to_B + N, _sum_channels(g * h, RUN, BLOCK), mask=is_shared)
                total += steps * to_weighted
                to_raw = slope * (to_steps + x * to_weighted)
                if R == 0:
                    to_raw = tl.where(is_real, to_raw, 0.0) * LOG2_E
                    tl.store(_at(grad_delta + u_at, rows * CHANNELS), to_raw, mask=is_real)
                    biases = _put(biases, k, biases[k] + tl.sum(to_raw, axis=0))
                else:
                    to_raw = _lanes_to_product(to_raw, RUN, BLOCK)
                    r = tl.arange(0, RANK)[:, None]
                    to_low = grad_parameters + (line_place.to(tl.int64) * PIXEL)[None, :] + (k * (R + 2 * N) + r)
                    part_low = tl.dot(tl.trans(weights[k]), to_raw, input_precision=PRECISION)
                    tl.store(to_low, part_low, mask=is_line[None, :] & (r < R))
                    low = lows[k].to(tl.float32)
                    if RUN * RUNS >= 16:
                        product = tl.dot(to_raw, tl.trans(low), products[k], input_precision=PRECISION)
                    else:  # the compiler knows no products of so few
                        product = products[k] + tl.sum(to_raw[:, None, :] * low[None, :, :], axis=2)
                    products = _put(products, k, product)
        tl.store(_at(grad_u + u_at, rows * CHANNELS), total.to(grad_u.dtype.element_ty), mask=is_real)
        if N > 1:
            tl.debug_barrier()
    if grad_skip is not None:
        tl.store(grad_skip + item * CHANNELS + one, _sum_runs(skips, BLOCK), mask=is_one)
    for k in tl.static_range(K):
        if (ROUTES >> k) & 1:
            to_one = _part(parts, item, k, ROUTES, CHANNELS, NUMBERS) + one * NUMBERS
            if N == 1:
                tl.store(to_one + R + 1, _sum_runs(decays[k], BLOCK) * LN_2, mask=is_one)
            if R == 0:
                tl.store(to_one, _sum_runs(biases[k], BLOCK), mask=is_one)
            else:  # the column after the weights' is the bias's
                row, is_row = _product_channels(block, CHANNELS, BLOCK)
                r = tl.arange(0, RANK)[None, :]
                to = _part(parts, item, k, ROUTES, CHANNELS, NUMBERS) + row[:, None] * NUMBERS + r
                tl.store(to, products[k] * LOG2_E, mask=is_row[:, None] & (r <= R))
