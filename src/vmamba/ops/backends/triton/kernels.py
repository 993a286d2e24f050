"""The kernels: selective scans along the routes of a grid, channels last. docs/kernels.md explains the plan.

Words used here, and shapes:

- A *run* is up to RUN consecutive positions of an axis (rows or columns), all on one line of the grid.
- A *tile* is RUNS neighbouring runs times BLOCK neighbouring channels, held as [RUN, LANES] with LANES = RUNS·BLOCK: a
  thread owns a channel of a run and has its positions in registers, so the recurrence is a chain of multiply-adds
  without any exchange between threads. Rows past a run's end have Δ = 0, which leaves the state as it is.
- A route enters a tile with a state, and leaves it with another: its *carry*. Carries are
  (images, tiles, K, N, channels), float32.

Sizes are runtime arguments and are not specialised, but for a single group. A kernel is compiled for N, R, the dtypes
and the tile's shape.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

_SIZES = (
    "images", "tiles", "positions", "channels", "runs", "run_length", "runs_per_line", "line_length", "step",
    "line_step", "pixel", "columns", "per_route",
)  # fmt: skip
LOG2_E = tl.constexpr(1.4426950408889634)


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
    """max(x, 0) + log(1 + z) with z = exp(-|x|); also log(1 + z) and z.

    log(1 + z) / z is a polynomial on [0, 1], with a relative error of 3e-8 or 9e-6: the argument 1 + z would lose the
    small steps that a trained model has.
    """
    z = tl.exp2(tl.abs(x) * -LOG2_E)
    if EXACT:
        p = 0.00523262398 * z - 0.0295049571
        p = p * z + 0.0782254932
        p = p * z - 0.136632069
        p = p * z + 0.191059885
        p = p * z - 0.248429775
        p = p * z + 0.333190962
        p = p * z - 0.499994931
        p = p * z + 0.99999997
    else:
        p = -0.023868856 * z + 0.101221543
        p = p * z - 0.210048038
        p = p * z + 0.325206446
        p = p * z - 0.499361335
        p = p * z + 0.999991598
    log = z * p
    return tl.maximum(x, 0.0) + log, log, z


@triton.jit
def _place(run, axis):
    """First position of a run, how many it has, and how many of these count: none past the last run.

    Nothing is loaded under a mask: rows, runs and channels that do not exist are copies of the last one that does, and
    get Δ = 0.
    """
    runs, run_length, runs_per_line, line_length, step, line_step = axis
    real = tl.minimum(run, runs - 1)
    first = (real % runs_per_line) * run_length
    size = tl.minimum(run_length, line_length - first)
    return real // runs_per_line * line_step + first * step, size, tl.where(run < runs, size, 0)


@triton.jit
def _tile(tiles, channels, groups, axis, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image, tile, block of a group's channels, and group; of each lane the channel, whether it exists,
    and the run's first position; of each row and lane how far along the grid it is from there, and whether it exists.
    """
    size = channels // groups
    blocks = tl.cdiv(size, BLOCK)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % groups
    item = tl.program_id(0) // blocks // groups
    lane = tl.arange(0, RUNS * BLOCK)
    within = block * BLOCK + lane % BLOCK
    place, size_of_run, count = _place(item % tiles * RUNS + lane // BLOCK, axis)
    i = tl.arange(0, RUN)[:, None]
    return (
        (item // tiles).to(tl.int64), item % tiles, block, group,
        group * size + tl.minimum(within, size - 1), within < size, place.to(tl.int64),
        tl.minimum(i, size_of_run[None, :] - 1) * axis[4], i < tl.where(within < size, count, 0)[None, :],
    )  # fmt: skip


@triton.jit
def _low_and_weight(parameters, tile, block, dt_weight, channels, axis, pixel, R: tl.constexpr, RANK: tl.constexpr,
                    RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dt_low [RUN·RUNS, RANK] and dt_weightᵀ [RANK, BLOCK], with zeros beyond R."""
    row = tl.arange(0, RUN * RUNS)
    place, size, _count = _place(tile * RUNS + row % RUNS, axis)
    position = place + tl.minimum(row // RUNS, size - 1) * axis[4]
    channel = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), channels - 1)
    r = tl.arange(0, RANK)
    low = tl.load(parameters + (position.to(tl.int64) * pixel)[:, None] + r[None, :], mask=(r < R)[None, :], other=0.0)
    weight = tl.load(dt_weight + channel[None, :] * R + r[:, None], mask=(r < R)[:, None], other=0.0)
    return low.to(tl.float32), weight


@triton.jit
def _steps(
    u_offset, row, is_real, pixel_offset, pixel, channel, tile, block, channels, axis, delta, parameters, B, dt_weight,
    dt_bias, R: tl.constexpr, RANK: tl.constexpr, SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    BLOCK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Δ of a route and dΔ/draw, [RUN, LANES], both 0 where there is no position."""
    if R == 0:
        raw = tl.load(_at(delta + u_offset, row * channels)).to(tl.float32)
    else:
        low, weight = _low_and_weight(
            parameters, tile, block, dt_weight, channels, axis, pixel, R, RANK, RUN, RUNS, BLOCK
        )
        raw = tl.reshape(tl.dot(low, weight, input_precision=PRECISION), [RUN, RUNS * BLOCK])
        raw = _in_layout_of(raw, tl.load(_at(B + pixel_offset, row * pixel)), INTERPRETED)
    raw += tl.load(dt_bias + channel)[None, :]
    if SOFTPLUS:
        value, log, z = _softplus(raw, EXACT)
        slope = tl.where(raw < 0, z, 1.0) * tl.exp2(log * -LOG2_E)
    else:
        value = raw
        slope = tl.full([RUN, RUNS * BLOCK], 1.0, tl.float32)
    return tl.where(is_real, value, 0.0), tl.where(is_real, slope, 0.0)


@triton.jit
def _walk(x, BACKWARDS: tl.constexpr):
    """Rows in the order of a route. The rows are a thread's registers: this moves nothing."""
    return tl.flip(x, 0) if BACKWARDS else x


@triton.jit
def _last_row(x, RUN: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, RUN)[:, None] == RUN - 1, x, 0.0), axis=0)


@triton.jit
def _enter(a, h, start, RUNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """From what each run does to a state, (a, h), and the state that enters the tile: what enters each run; and the
    composition up to and including each run. All [LANES]."""
    if RUNS == 1:
        return start, a, h
    one = tl.full([RUNS, BLOCK], 1.0, tl.float32)
    zero = tl.zeros([RUNS, BLOCK], tl.float32)
    a, h, lag_a, lag_h = tl.associative_scan(
        (tl.reshape(a, [RUNS, BLOCK]), tl.reshape(h, [RUNS, BLOCK]), one, zero), 0, _compose_and_lag, reverse=BACKWARDS
    )
    enters = tl.reshape(lag_a, [RUNS * BLOCK]) * start + tl.reshape(lag_h, [RUNS * BLOCK])
    return enters, tl.reshape(a, [RUNS * BLOCK]), tl.reshape(h, [RUNS * BLOCK])


@triton.jit
def _at(base, row):
    """Pointers [RUN, LANES]. The hint decides only which way a warp lies: its lanes along channels."""
    return tl.max_contiguous(base[None, :] + row, [1, 2])


@triton.jit
def _first(x, y):
    return x


@triton.jit
def _in_layout_of(x, y, INTERPRETED: tl.constexpr):
    """x, in the registers that y is in.

    The compiler spreads the layout of a matrix product over what follows from it; a load later in the program has
    precedence where an operation joins the two. This is that operation, and it costs no instruction.
    """
    return x if INTERPRETED else tl.map_elementwise(_first, x, y)


@triton.jit
def _states(a, b, start, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """h after each position, from the state that enters the tile."""
    a, h = tl.associative_scan((_walk(a, BACKWARDS), _walk(b, BACKWARDS)), 0, _compose)
    enters, _a, _h = _enter(_last_row(a, RUN), _last_row(h, RUN), start, RUNS, BLOCK, BACKWARDS)
    return _walk(h + a * enters[None, :], BACKWARDS)


@triton.jit
def _states_before(a, b, start, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """h before each position."""
    a, h, lag_a, lag_h = tl.associative_scan(
        (_walk(a, BACKWARDS), _walk(b, BACKWARDS), tl.full([RUN, RUNS * BLOCK], 1.0, tl.float32),
         tl.zeros([RUN, RUNS * BLOCK], tl.float32)), 0, _compose_and_lag,
    )  # fmt: skip
    enters, _a, _h = _enter(_last_row(a, RUN), _last_row(h, RUN), start, RUNS, BLOCK, BACKWARDS)
    return _walk(lag_h + lag_a * enters[None, :], BACKWARDS)


@triton.jit
def _sum_runs(x, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(x, [RUNS, BLOCK]), axis=0)


@triton.jit
def _write_carry(a, b, is_channel, to_a, to_h, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
                 BACKWARDS: tl.constexpr):  # fmt: skip
    """What a tile does to a state."""
    run = tl.arange(0, RUNS * BLOCK) // BLOCK
    a, h = tl.associative_scan((_walk(a, BACKWARDS), _walk(b, BACKWARDS)), 0, _compose)
    zero = tl.zeros([RUNS * BLOCK], tl.float32)
    _enters, a, h = _enter(_last_row(a, RUN), _last_row(h, RUN), zero, RUNS, BLOCK, BACKWARDS)
    is_last = is_channel & (run == (0 if BACKWARDS else RUNS - 1))
    if to_a is not None:
        tl.store(to_a, a, mask=is_last)
    tl.store(to_h, h, mask=is_last)


@triton.jit(do_not_specialize=_SIZES)
def carry_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, carry_a, carry_h, carry_adjoint,
    tiles, positions, channels, groups, runs, run_length, runs_per_line, line_length, step, line_step, pixel,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What each tile does to the state of a route, h → a·h + carry_h; and to its adjoint, where grad_y is given."""
    axis = (runs, run_length, runs_per_line, line_length, step, line_step)
    image, tile, block, group, channel, is_channel, place, row, is_real = _tile(
        tiles, channels, groups, axis, RUN, RUNS, BLOCK
    )
    u_offset = (image * positions + place) * channels + channel
    parameters += image * positions * pixel
    pixel_offset = place * pixel
    x = tl.load(_at(u + u_offset, row * channels)).to(tl.float32)
    if grad_y is not None:
        g = tl.where(is_real, tl.load(_at(grad_y + u_offset, row * channels)).to(tl.float32), 0.0)
    for k in tl.static_range(K):
        if (ROUTES >> k) & 1:
            of_route = parameters + k * (R + 2 * N)
            B = of_route + R + group * (2 * N)
            steps, _slope = _steps(
                u_offset, row, is_real, pixel_offset, pixel, channel, tile, block, channels, axis, delta, of_route, B,
                dt_weight + k * channels * R, dt_bias + k * channels,
                R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT, PRECISION, INTERPRETED,
            )  # fmt: skip
            weighted = steps * x
            for n in range(N):
                to = ((image * tiles + tile) * K + k) * N * channels + n * channels + channel
                a = tl.exp2(steps * (tl.load(A + (k * channels + channel) * N + n) * LOG2_E)[None, :])
                b = weighted * tl.load(_at(B + pixel_offset + n, row * pixel)).to(tl.float32)
                _write_carry(a, b, is_channel, carry_a + to, carry_h + to, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 1)
                if grad_y is not None:
                    b = a * g * tl.load(_at(B + N + pixel_offset + n, row * pixel)).to(tl.float32)
                    _write_carry(a, b, is_channel, None, carry_adjoint + to, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 0)


@triton.jit(do_not_specialize=_SIZES)
def chain_kernel(carry_a, carry_h, initial, entering, last, tiles, columns, per_route, ROUTES: tl.constexpr,
                 BACK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The state that enters each tile, and the last one, from what the tiles do; a column is a (route, n, channel)."""
    blocks = tl.cdiv(columns, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    route = column // per_route
    is_column = (column < columns) & ((ROUTES >> route) & 1 == 1)
    is_backwards = (BACK >> route) & 1 == 1
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + image * columns + column, mask=is_column, other=0.0)
    base = image * tiles * columns + column
    for begin in range(0, tiles, CHUNK):
        j = (begin + tl.arange(0, CHUNK))[:, None]
        tile = tl.where(is_backwards[None, :], tiles - 1 - j, j)
        row = tile.to(tl.int64) * columns
        is_tile = (j < tiles) & is_column[None, :]
        a = tl.load(_at(carry_a + base, row), mask=is_tile, other=1.0)
        h = tl.load(_at(carry_h + base, row), mask=is_tile, other=0.0)
        a, h, lag_a, lag_h = tl.associative_scan(
            (a, h, tl.full([CHUNK, BLOCK], 1.0, tl.float32), tl.zeros([CHUNK, BLOCK], tl.float32)), 0, _compose_and_lag
        )
        tl.store(_at(entering + base, row), lag_h + lag_a * state[None, :], mask=is_tile)
        state = _last_row(h, CHUNK) + _last_row(a, CHUNK) * state
    if last is not None:
        tl.store(last + image * columns + column, state, mask=is_column)


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(
    u, delta, parameters, dt_weight, dt_bias, A, skip, entering, partial, y,
    tiles, positions, channels, groups, runs, run_length, runs_per_line, line_length, step, line_step, pixel,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y of the routes along one axis, added to `partial` and the skip where those are given."""
    axis = (runs, run_length, runs_per_line, line_length, step, line_step)
    image, tile, block, group, channel, _is_channel, place, row, is_real = _tile(
        tiles, channels, groups, axis, RUN, RUNS, BLOCK
    )
    u_offset = (image * positions + place) * channels + channel
    parameters += image * positions * pixel
    pixel_offset = place * pixel
    x = tl.load(_at(u + u_offset, row * channels)).to(tl.float32)
    total = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
    if partial is not None:
        total = tl.load(_at(partial + u_offset, row * channels)).to(tl.float32)
    if skip is not None:
        total += tl.load(skip + channel)[None, :] * x
    for k in tl.static_range(K):
        if (ROUTES >> k) & 1:
            of_route = parameters + k * (R + 2 * N)
            B = of_route + R + group * (2 * N)
            steps, _slope = _steps(
                u_offset, row, is_real, pixel_offset, pixel, channel, tile, block, channels, axis, delta, of_route, B,
                dt_weight + k * channels * R, dt_bias + k * channels,
                R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT, PRECISION, INTERPRETED,
            )  # fmt: skip
            weighted = steps * x
            for n in range(N):
                start = tl.zeros([RUNS * BLOCK], tl.float32)
                if entering is not None:
                    start = tl.load(entering + ((image * tiles + tile) * K + k) * N * channels + n * channels + channel)
                a = tl.exp2(steps * (tl.load(A + (k * channels + channel) * N + n) * LOG2_E)[None, :])
                b = weighted * tl.load(_at(B + pixel_offset + n, row * pixel)).to(tl.float32)
                h = _states(a, b, start, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 1)
                total += h * tl.load(_at(B + N + pixel_offset + n, row * pixel)).to(tl.float32)
    tl.store(_at(y + u_offset, row * channels), total.to(y.dtype.element_ty), mask=is_real)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, skip, entering, adjoint, partial,
    grad_u, grad_delta, grad_parameters, grad_weight, grad_bias, grad_A, grad_skip,
    images, tiles, positions, channels, groups, runs, run_length, runs_per_line, line_length, step, line_step, pixel,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Gradients of everything for the routes along one axis.

    grad_u is added to `partial` where that is given. The others are parts to be summed: grad_parameters
    (blocks of a group, images, positions, pixel) over blocks, and (images·tiles, ...) over tiles: grad_weight
    (K, channels, R), grad_bias (K, channels), grad_A (K, N, channels), grad_skip (channels).
    """
    axis = (runs, run_length, runs_per_line, line_length, step, line_step)
    image, tile, block, group, channel, _is_channel, place, row, is_real = _tile(
        tiles, channels, groups, axis, RUN, RUNS, BLOCK
    )
    item = image * tiles + tile
    u_offset = (image * positions + place) * channels + channel
    parameters += image * positions * pixel
    pixel_offset = place * pixel
    x = tl.load(_at(u + u_offset, row * channels)).to(tl.float32)
    g = tl.where(is_real, tl.load(_at(grad_y + u_offset, row * channels)).to(tl.float32), 0.0)

    # The same positions without channels, for gradients that are summed over these: [RUN, RUNS] and [RUN·RUNS].
    size = channels // groups
    within = block * BLOCK + tl.arange(0, BLOCK)
    is_one, one = within < size, group * size + tl.minimum(within, size - 1)
    i = tl.arange(0, RUN)[:, None]
    grad_parameters += (block * images + image) * positions * pixel
    run_place, _run_size, run_count = _place(tile * RUNS + tl.arange(0, RUNS), axis)
    shared = (run_place.to(tl.int64) * pixel)[None, :] + i * (step * pixel)
    is_shared = i < run_count[None, :]

    total = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
    if partial is not None:
        total = tl.load(_at(partial + u_offset, row * channels)).to(tl.float32)
    if skip is not None:
        total += tl.load(skip + channel)[None, :] * g
    if grad_skip is not None:
        tl.store(grad_skip + item * channels + one, _sum_runs(tl.sum(g * x, axis=0), RUNS, BLOCK), mask=is_one)
    for k in tl.static_range(K):
        if (ROUTES >> k) & 1:
            of_route = parameters + k * (R + 2 * N)
            B = of_route + R + group * (2 * N)
            to_B = grad_parameters + k * (R + 2 * N) + R + group * (2 * N)
            steps, slope = _steps(
                u_offset, row, is_real, pixel_offset, pixel, channel, tile, block, channels, axis, delta, of_route, B,
                dt_weight + k * channels * R, dt_bias + k * channels,
                R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT, PRECISION, INTERPRETED,
            )  # fmt: skip
            weighted = steps * x
            to_weighted = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
            to_steps = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
            for n in range(N):
                at_carry = ((image * tiles + tile) * K + k) * N * channels + n * channels + channel
                start = tl.zeros([RUNS * BLOCK], tl.float32)
                end = tl.zeros([RUNS * BLOCK], tl.float32)
                if entering is not None:
                    start = tl.load(entering + at_carry)
                if adjoint is not None:
                    end = tl.load(adjoint + at_carry)
                decay = tl.load(A + (k * channels + channel) * N + n)
                a = tl.exp2(steps * (decay * LOG2_E)[None, :])
                B_n = tl.load(_at(B + pixel_offset + n, row * pixel)).to(tl.float32)
                b = weighted * B_n
                h = _states(a, b, start, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 1)
                G = g * tl.load(_at(B + N + pixel_offset + n, row * pixel)).to(tl.float32)
                G += _states_before(a, a * G, end, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 0)
                to_exponent = G * (h - b)
                to_weighted += G * B_n
                to_steps += to_exponent * decay[None, :]
                part = _sum_runs(tl.sum(to_exponent * steps, axis=0), RUNS, BLOCK)
                tl.store(grad_A + ((item * K + k) * N + n) * channels + one, part, mask=is_one)
                part_B = tl.sum(tl.reshape(G * weighted, [RUN, RUNS, BLOCK]), axis=2)
                part_C = tl.sum(tl.reshape(g * h, [RUN, RUNS, BLOCK]), axis=2)
                tl.store(to_B + shared + n, part_B, mask=is_shared)
                tl.store(to_B + N + shared + n, part_C, mask=is_shared)
            total += steps * to_weighted
            to_raw = slope * (to_steps + x * to_weighted)
            part = _sum_runs(tl.sum(to_raw, axis=0), RUNS, BLOCK)
            tl.store(grad_bias + (item * K + k) * channels + one, part, mask=is_one)
            if R == 0:
                tl.store(_at(grad_delta + u_offset, row * channels), to_raw, mask=is_real)
            else:
                low, weight = _low_and_weight(
                    of_route, tile, block, dt_weight + k * channels * R, channels, axis, pixel,
                    R, RANK, RUN, RUNS, BLOCK,
                )  # fmt: skip
                to_raw = tl.reshape(to_raw, [RUN * RUNS, BLOCK])
                r = tl.arange(0, RANK)
                line = tl.arange(0, RUN * RUNS)
                line_place, _line_size, line_count = _place(tile * RUNS + line % RUNS, axis)
                to_low = (line_place + line // RUNS * step).to(tl.int64) * pixel
                tl.store(
                    grad_parameters + k * (R + 2 * N) + to_low[:, None] + r[None, :],
                    tl.dot(to_raw, tl.trans(weight), input_precision=PRECISION),
                    mask=(line // RUNS < line_count)[:, None] & (r < R)[None, :],
                )
                tl.store(
                    grad_weight + ((item * K + k) * channels + one)[:, None] * R + r[None, :],
                    tl.dot(tl.trans(to_raw), low, input_precision=PRECISION),
                    mask=is_one[:, None] & (r < R)[None, :],
                )
    tl.store(_at(grad_u + u_offset, row * channels), total.to(grad_u.dtype.element_ty), mask=is_real)
