"""The kernels: selective scans along the routes of a grid, channels last. docs/kernels.md explains the plan.

Words used here, and shapes:

- A *run* is RUN consecutive positions of an axis (rows or columns), all on one line of the grid.
- A *tile* is RUNS neighbouring runs times BLOCK neighbouring channels, held as [RUN, LANES] with LANES = RUNS·BLOCK: a
  thread owns channels of a run and has its positions in registers, so the recurrence is a chain of multiply-adds
  without any exchange between threads. The last run of a line ends where the line does and begins within the run
  before it. Positions that another run has, and runs and channels that do not exist, have Δ = 0, which leaves the
  state as it is.
- A route enters a tile with a state, and leaves it with another: its *carry*. Carries are
  (images, tiles, K, N, channels), float32.
- With WALK a program takes all tiles of an axis, one after the other, and hands on itself what enters the next one.
- A *step* here is Δ·log₂e, so that exp(Δ·A) is exp2(step·A) and Δ·B is step·(ln 2·B).

The height and width of the grid and the number of images are runtime arguments and are not specialised; that nothing
is known of what divides them also keeps the compiler from loading more than WIDTH channels at once. A kernel is
compiled for channels, N, R, the dtypes and the tile's shape.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

_SIZES = (
    "images", "tiles", "positions", "vectors", "runs", "runs_per_line", "line_length", "step", "columns", "per_route",
)  # fmt: skip
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
def _place(run, axis, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """First position of a run, and how many of its first positions do not count: all, past the last run."""
    runs, runs_per_line, line_length, step = axis
    real = tl.minimum(run, runs - 1)
    if COLUMNS:
        line = real // runs_per_line
        wanted = (real - line * runs_per_line) * RUN
        first = tl.minimum(wanted, line_length - RUN)
        place = line + first * step
    else:
        wanted = real * RUN
        first = tl.minimum(wanted, line_length - RUN)
        place = first
    return place, tl.where(run < runs, wanted - first, RUN)


@triton.jit
def _rows(axis, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions from the first of a run to each, [RUN, 1]."""
    i = tl.arange(0, RUN)[:, None]
    return i * axis[3] if COLUMNS else i


@triton.jit
def _program(tiles, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr):
    """This program's image, block of a group's channels, and group; its first tile, and the one after its last."""
    blocks: tl.constexpr = tl.cdiv(CHANNELS // GROUPS, BLOCK)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % GROUPS
    item = tl.program_id(0) // blocks // GROUPS
    if WALK:
        return item.to(tl.int64), block, group, 0, tiles
    return (item // tiles).to(tl.int64), block, group, item % tiles, item % tiles + 1


@triton.jit
def _tile(tile, block, group, axis, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
          RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of each lane the channel, whether it exists, and the run's first position; of each row and lane whether it
    counts; the last two also of each run, without channels.
    """
    size: tl.constexpr = CHANNELS // GROUPS
    lane = tl.arange(0, RUNS * BLOCK)
    within = block * BLOCK + lane % BLOCK
    is_channel = within < size
    place, dead = _place(tile * RUNS + lane // BLOCK, axis, RUN, COLUMNS)
    if size % BLOCK != 0:
        dead = tl.where(is_channel, dead, RUN)
        within = tl.minimum(within, size - 1)
    i = tl.arange(0, RUN)[:, None]
    is_real = i >= dead[None, :]
    if size % BLOCK == 0 and BLOCK > 1:
        is_real = tl.max_constancy(is_real, [1, 2])  # so that two channels are stored at once
    run_place, run_dead = _place(tile * RUNS + tl.arange(0, RUNS), axis, RUN, COLUMNS)
    return group * size + within, is_channel, place, is_real, run_place, i >= run_dead[None, :]


@triton.jit
def _shared(pointer, rows, run_place, PIXEL: tl.constexpr):
    """A number of each position that all channels share, [RUN, RUNS], float32."""
    return tl.load(pointer + (run_place.to(tl.int64) * PIXEL)[None, :] + rows * PIXEL).to(tl.float32)


@triton.jit
def _to_lanes(x, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """[RUN, RUNS] as [RUN, LANES]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [RUN, RUNS, BLOCK]), [RUN, RUNS * BLOCK])


@triton.jit
def _low_and_weight(parameters, dt_weight, tile, block, axis, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
                    PIXEL: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """dt_low [RUN·RUNS, RANK] and log₂e·dt_weightᵀ [RANK, BLOCK], with zeros beyond R."""
    line = tl.arange(0, RUN * RUNS)
    place, _dead = _place(tile * RUNS + line % RUNS, axis, RUN, COLUMNS)
    position = place + line // RUNS * (axis[3] if COLUMNS else 1)
    channel = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), CHANNELS - 1)
    r = tl.arange(0, RANK)
    low = tl.load(parameters + (position.to(tl.int64) * PIXEL)[:, None] + r[None, :], mask=(r < R)[None, :], other=0.0)
    weight = tl.load(dt_weight + channel[None, :] * R + r[:, None], mask=(r < R)[:, None], other=0.0)
    return low.to(tl.float32), weight * LOG2_E


@triton.jit
def _steps(
    u_at, rows, is_real, channel, tile, block, axis, delta, parameters, dt_weight, dt_bias,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PIXEL: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The step of a route and dΔ/draw, [RUN, LANES], both 0 where there is no position."""
    if R == 0:
        raw = tl.load(_at(delta + u_at, rows * CHANNELS)).to(tl.float32) * LOG2_E
    else:
        low, weight = _low_and_weight(
            parameters, dt_weight, tile, block, axis, COLUMNS, CHANNELS, PIXEL, R, RANK, RUN, RUNS, BLOCK
        )
        raw = tl.reshape(tl.dot(low, weight, input_precision=PRECISION), [RUN, RUNS * BLOCK])
    # The compiler would spread the layout of a matrix product over all that follows from it. Where it meets another
    # one, that of a load later in the program has precedence: this load has as many dimensions for that reason.
    raw += tl.load(dt_bias + channel[None, :]) * LOG2_E
    if SOFTPLUS:
        value, log, z = _softplus(raw, EXACT)
        slope = tl.where(raw < 0, z, 1.0) * tl.exp2(-log)
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
    """Pointers [RUN, LANES]. The hint decides which way a warp lies: its lanes along channels."""
    return tl.max_contiguous(base[None, :] + row, [1, 2])


@triton.jit
def _states(a, b, start, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """h after each position, from the state that enters the tile; and after each run, [LANES]."""
    a, h = tl.associative_scan((_walk(a, BACKWARDS), _walk(b, BACKWARDS)), 0, _compose)
    enters, all_a, all_h = _enter(_last_row(a, RUN), _last_row(h, RUN), start, RUNS, BLOCK, BACKWARDS)
    return _walk(h + a * enters[None, :], BACKWARDS), all_h + all_a * start


@triton.jit
def _states_before(a, b, start, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """h before each position; and after each run, [LANES]."""
    a, h, lag_a, lag_h = tl.associative_scan(
        (_walk(a, BACKWARDS), _walk(b, BACKWARDS), tl.full([RUN, RUNS * BLOCK], 1.0, tl.float32),
         tl.zeros([RUN, RUNS * BLOCK], tl.float32)), 0, _compose_and_lag,
    )  # fmt: skip
    enters, all_a, all_h = _enter(_last_row(a, RUN), _last_row(h, RUN), start, RUNS, BLOCK, BACKWARDS)
    return _walk(lag_h + lag_a * enters[None, :], BACKWARDS), all_h + all_a * start


@triton.jit
def _sum_runs(x, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(x, [RUNS, BLOCK]), axis=0)


@triton.jit
def _is_last(is_channel, RUNS: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """Lanes of the run that a route visits last."""
    return is_channel & (tl.arange(0, RUNS * BLOCK) // BLOCK == (0 if BACKWARDS else RUNS - 1))


@triton.jit
def _load_entering(carries, at, is_channel, tile, CHAINED: tl.constexpr, LANES: tl.constexpr):
    """What enters a tile [LANES]: as an earlier kernel left it, or as this program did one tile before."""
    if carries is None:
        state = tl.zeros([LANES], tl.float32)
    elif CHAINED:
        state = tl.load(carries + at, mask=is_channel & (tile > 0), other=0.0)
    else:
        state = tl.load(carries + at)
    return state


@triton.jit
def _add_part(to, part, mask, tile, WALK: tl.constexpr):
    """A tile's part of a sum over all positions: by itself, or added up along the walk."""
    if WALK:
        part += tl.load(to, mask=mask & (tile > 0), other=0.0)
    tl.store(to, part, mask=mask)


@triton.jit
def _write_carry(a, b, is_channel, to_a, to_h, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
                 BACKWARDS: tl.constexpr):  # fmt: skip
    """What a tile does to a state."""
    a, h = tl.associative_scan((_walk(a, BACKWARDS), _walk(b, BACKWARDS)), 0, _compose)
    zero = tl.zeros([RUNS * BLOCK], tl.float32)
    _enters, a, h = _enter(_last_row(a, RUN), _last_row(h, RUN), zero, RUNS, BLOCK, BACKWARDS)
    is_last = _is_last(is_channel, RUNS, BLOCK, BACKWARDS)
    if to_a is not None:
        tl.store(to_a, a, mask=is_last)
    tl.store(to_h, h, mask=is_last)


@triton.jit(do_not_specialize=_SIZES)
def carry_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, carry_a, carry_h, carry_adjoint,
    tiles, positions, vectors, runs, runs_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each tile does to the state of a route, h → a·h + carry_h; and to its adjoint, where grad_y is given."""
    axis = (runs, runs_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, tile, _stop = _program(tiles, CHANNELS, GROUPS, BLOCK, False)
    channel, is_channel, place, is_real, run_place, _is_counted = _tile(
        tile, block, group, axis, COLUMNS, CHANNELS, GROUPS, RUN, RUNS, BLOCK
    )
    u_at = (image * positions + place) * vectors * WIDTH + channel
    parameters += image * positions * PIXEL
    x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
    if grad_y is not None:
        g = tl.where(is_real, tl.load(_at(grad_y + u_at, rows * CHANNELS)).to(tl.float32), 0.0)
    for k in tl.static_range(K):
        if (ROUTES >> k) & 1:
            of_route = parameters + k * (R + 2 * N)
            B = of_route + R + group * (2 * N)
            steps, _slope = _steps(
                u_at, rows, is_real, channel, tile, block, axis, delta, of_route, dt_weight + k * CHANNELS * R,
                dt_bias + k * CHANNELS, COLUMNS, CHANNELS, PIXEL, R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT, PRECISION,
            )  # fmt: skip
            weighted = steps * x
            for n in range(N):
                to = ((image * tiles + tile) * K + k) * N * CHANNELS + n * CHANNELS + channel
                a = tl.exp2(steps * tl.load(A + (k * CHANNELS + channel) * N + n)[None, :])
                b = weighted * _to_lanes(_shared(B + n, rows, run_place, PIXEL) * LN_2, RUN, RUNS, BLOCK)
                _write_carry(a, b, is_channel, carry_a + to, carry_h + to, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 1)
                if grad_y is not None:
                    b = a * g * _to_lanes(_shared(B + N + n, rows, run_place, PIXEL), RUN, RUNS, BLOCK)
                    _write_carry(a, b, is_channel, None, carry_adjoint + to, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 0)


@triton.jit(do_not_specialize=_SIZES)
def chain_kernel(carry_a, carry_h, initial, entering, tiles, columns, per_route, ROUTES: tl.constexpr,
                 BACK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The state that enters each tile, from what the tiles do; a column is a (route, n, channel)."""
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


@triton.jit(do_not_specialize=_SIZES)
def states_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, initial, entering, adjoint,
    tiles, positions, vectors, runs, runs_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What enters each tile against the axis, in one walk: of routes that run backwards the state, of others the
    adjoint, for which grad_y must be given, and which enters the last tile as `initial`.
    """
    axis = (runs, runs_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, _first, _stop = _program(tiles, CHANNELS, GROUPS, BLOCK, True)
    parameters += image * positions * PIXEL
    for i in range(tiles):
        tile = tiles - 1 - i
        channel, is_channel, place, is_real, run_place, _is_counted = _tile(
            tile, block, group, axis, COLUMNS, CHANNELS, GROUPS, RUN, RUNS, BLOCK
        )
        is_last = _is_last(is_channel, RUNS, BLOCK, True)
        u_at = (image * positions + place) * vectors * WIDTH + channel
        if grad_y is not None:
            g = tl.where(is_real, tl.load(_at(grad_y + u_at, rows * CHANNELS)).to(tl.float32), 0.0)
        if ROUTES & BACK:
            x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                of_route = parameters + k * (R + 2 * N)
                B = of_route + R + group * (2 * N)
                steps, _slope = _steps(
                    u_at, rows, is_real, channel, tile, block, axis, delta, of_route, dt_weight + k * CHANNELS * R,
                    dt_bias + k * CHANNELS, COLUMNS, CHANNELS, PIXEL, R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT,
                    PRECISION,
                )  # fmt: skip
                for n in range(N):
                    at = ((image * tiles + tile) * K + k) * N * CHANNELS + n * CHANNELS + channel
                    a = tl.exp2(steps * tl.load(A + (k * CHANNELS + channel) * N + n)[None, :])
                    start = tl.zeros([RUNS * BLOCK], tl.float32)
                    if (BACK >> k) & 1:
                        to = entering + at
                        b = steps * x * _to_lanes(_shared(B + n, rows, run_place, PIXEL) * LN_2, RUN, RUNS, BLOCK)
                    else:
                        to = adjoint + at
                        b = a * g * _to_lanes(_shared(B + N + n, rows, run_place, PIXEL), RUN, RUNS, BLOCK)
                        if initial is not None:
                            start = tl.load(initial + (image * K + k) * N * CHANNELS + n * CHANNELS + channel)
                    start = tl.load(to, mask=is_channel & (i > 0), other=start)
                    tl.store(to, start, mask=is_last & (i == 0))
                    a, h = tl.associative_scan((_walk(a, True), _walk(b, True)), 0, _compose)
                    _enters, a, h = _enter(_last_row(a, RUN), _last_row(h, RUN), start, RUNS, BLOCK, True)
                    tl.store(to - K * N * CHANNELS, h + a * start, mask=is_last & (tile > 0))
        tl.debug_barrier()  # all threads have written before the next tile reads


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(
    u, delta, parameters, dt_weight, dt_bias, A, skip, entering, partial, last, y,
    tiles, positions, vectors, runs, runs_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """y of the routes along one axis, added to `partial` and the skip where those are given; and into `last` the last
    state (images, K, N, channels) of routes that run forwards.

    With WALK `entering` holds the states of routes that run backwards, and has room for the others.
    """
    axis = (runs, runs_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, first, stop = _program(tiles, CHANNELS, GROUPS, BLOCK, WALK)
    parameters += image * positions * PIXEL
    for tile in range(first, stop):
        channel, is_channel, place, is_real, run_place, _is_counted = _tile(
            tile, block, group, axis, COLUMNS, CHANNELS, GROUPS, RUN, RUNS, BLOCK
        )
        u_at = (image * positions + place) * vectors * WIDTH + channel
        is_last = _is_last(is_channel, RUNS, BLOCK, False)
        x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
        total = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
        if partial is not None:
            total = tl.load(_at(partial + u_at, rows * CHANNELS)).to(tl.float32)
        if skip is not None:
            total += tl.load(skip + channel)[None, :] * x
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                of_route = parameters + k * (R + 2 * N)
                B = of_route + R + group * (2 * N)
                steps, _slope = _steps(
                    u_at, rows, is_real, channel, tile, block, axis, delta, of_route, dt_weight + k * CHANNELS * R,
                    dt_bias + k * CHANNELS, COLUMNS, CHANNELS, PIXEL, R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT,
                    PRECISION,
                )  # fmt: skip
                weighted = steps * x
                for n in range(N):
                    at = ((image * tiles + tile) * K + k) * N * CHANNELS + n * CHANNELS + channel
                    start = _load_entering(
                        entering, at, is_channel, tile, WALK and ((BACK >> k) & 1) == 0, RUNS * BLOCK
                    )
                    a = tl.exp2(steps * tl.load(A + (k * CHANNELS + channel) * N + n)[None, :])
                    b = weighted * _to_lanes(_shared(B + n, rows, run_place, PIXEL) * LN_2, RUN, RUNS, BLOCK)
                    h, after = _states(a, b, start, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 1)
                    if WALK and ((BACK >> k) & 1) == 0:
                        tl.store(entering + at + K * N * CHANNELS, after, mask=is_last & (tile < tiles - 1))
                    if last is not None:
                        to = last + (image * K + k) * N * CHANNELS + n * CHANNELS + channel
                        tl.store(to, after, mask=is_last & (tile == tiles - 1))
                    total += h * _to_lanes(_shared(B + N + n, rows, run_place, PIXEL), RUN, RUNS, BLOCK)
        tl.store(_at(y + u_at, rows * CHANNELS), total.to(y.dtype.element_ty), mask=is_real)
        if WALK:
            tl.debug_barrier()  # all threads have written before the next tile reads


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    u, grad_y, delta, parameters, dt_weight, dt_bias, A, skip, entering, adjoint, partial,
    grad_u, grad_delta, grad_parameters, grad_weight, grad_bias, grad_A, grad_skip,
    images, tiles, positions, vectors, runs, runs_per_line, line_length, step,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, PIXEL: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, BACK: tl.constexpr,
    SOFTPLUS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Gradients of everything for the routes along one axis.

    grad_u is added to `partial` where that is given. The others are parts to be summed: grad_parameters
    (blocks of a group, images, positions, pixel) over blocks, and over the first dimension, which is images with WALK
    and images·tiles without, grad_weight (..., K, channels, R), grad_bias (..., K, channels),
    grad_A (..., K, N, channels), grad_skip (..., channels).

    With WALK `entering` holds the states of routes that run backwards and `adjoint` that of the others; both have room
    for the rest.
    """
    axis = (runs, runs_per_line, line_length, step)
    rows = _rows(axis, RUN, COLUMNS)
    image, block, group, first, stop = _program(tiles, CHANNELS, GROUPS, BLOCK, WALK)
    parameters += image * positions * PIXEL
    grad_parameters += (block * images + image) * positions * PIXEL
    item = image if WALK else image * tiles + first
    for tile in range(first, stop):
        channel, is_channel, place, is_real, run_place, is_shared = _tile(
            tile, block, group, axis, COLUMNS, CHANNELS, GROUPS, RUN, RUNS, BLOCK
        )
        u_at = (image * positions + place) * vectors * WIDTH + channel
        is_last = _is_last(is_channel, RUNS, BLOCK, False)
        x = tl.load(_at(u + u_at, rows * CHANNELS)).to(tl.float32)
        g = tl.where(is_real, tl.load(_at(grad_y + u_at, rows * CHANNELS)).to(tl.float32), 0.0)

        # Channels once, for gradients that are summed over positions; positions once, for those over channels.
        size: tl.constexpr = CHANNELS // GROUPS
        within = block * BLOCK + tl.arange(0, BLOCK)
        is_one, one = within < size, group * size + tl.minimum(within, size - 1)
        shared = (run_place.to(tl.int64) * PIXEL)[None, :] + rows * PIXEL

        total = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
        if partial is not None:
            total = tl.load(_at(partial + u_at, rows * CHANNELS)).to(tl.float32)
        if skip is not None:
            total += tl.load(skip + channel)[None, :] * g
        if grad_skip is not None:
            part = _sum_runs(tl.sum(g * x, axis=0), RUNS, BLOCK)
            _add_part(grad_skip + item * CHANNELS + one, part, is_one, tile, WALK)
        for k in tl.static_range(K):
            if (ROUTES >> k) & 1:
                of_route = parameters + k * (R + 2 * N)
                B = of_route + R + group * (2 * N)
                to_B = grad_parameters + k * (R + 2 * N) + R + group * (2 * N)
                steps, slope = _steps(
                    u_at, rows, is_real, channel, tile, block, axis, delta, of_route, dt_weight + k * CHANNELS * R,
                    dt_bias + k * CHANNELS, COLUMNS, CHANNELS, PIXEL, R, RANK, SOFTPLUS, RUN, RUNS, BLOCK, EXACT,
                    PRECISION,
                )  # fmt: skip
                weighted = steps * x
                to_weighted = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
                to_steps = tl.zeros([RUN, RUNS * BLOCK], tl.float32)
                for n in range(N):
                    at = ((image * tiles + tile) * K + k) * N * CHANNELS + n * CHANNELS + channel
                    start = _load_entering(
                        entering, at, is_channel, tile, WALK and ((BACK >> k) & 1) == 0, RUNS * BLOCK
                    )
                    end = _load_entering(adjoint, at, is_channel, tile, WALK and ((BACK >> k) & 1) == 1, RUNS * BLOCK)
                    decay = tl.load(A + (k * CHANNELS + channel) * N + n)
                    a = tl.exp2(steps * decay[None, :])
                    B_n = _to_lanes(_shared(B + n, rows, run_place, PIXEL) * LN_2, RUN, RUNS, BLOCK)
                    b = weighted * B_n
                    h, after = _states(a, b, start, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 1)
                    G = g * _to_lanes(_shared(B + N + n, rows, run_place, PIXEL), RUN, RUNS, BLOCK)
                    before, after_end = _states_before(a, a * G, end, RUN, RUNS, BLOCK, ((BACK >> k) & 1) == 0)
                    G += before
                    if WALK:
                        to = at + K * N * CHANNELS
                        if (BACK >> k) & 1:
                            tl.store(adjoint + to, after_end, mask=is_last & (tile < tiles - 1))
                        else:
                            tl.store(entering + to, after, mask=is_last & (tile < tiles - 1))
                    to_exponent = G * (h - b)
                    to_weighted += G * B_n
                    to_steps += to_exponent * (decay * LN_2)[None, :]
                    part = _sum_runs(tl.sum(to_exponent * steps, axis=0), RUNS, BLOCK) * LN_2
                    _add_part(grad_A + ((item * K + k) * N + n) * CHANNELS + one, part, is_one, tile, WALK)
                    part_B = tl.sum(tl.reshape(G * weighted, [RUN, RUNS, BLOCK]), axis=2) * LN_2
                    part_C = tl.sum(tl.reshape(g * h, [RUN, RUNS, BLOCK]), axis=2)
                    tl.store(to_B + shared + n, part_B, mask=is_shared)
                    tl.store(to_B + N + shared + n, part_C, mask=is_shared)
                total += steps * to_weighted
                to_raw = slope * (to_steps + x * to_weighted)
                part = _sum_runs(tl.sum(to_raw, axis=0), RUNS, BLOCK) * LOG2_E
                _add_part(grad_bias + (item * K + k) * CHANNELS + one, part, is_one, tile, WALK)
                if R == 0:
                    tl.store(_at(grad_delta + u_at, rows * CHANNELS), to_raw * LOG2_E, mask=is_real)
                else:
                    low, weight = _low_and_weight(
                        of_route, dt_weight + k * CHANNELS * R, tile, block, axis, COLUMNS, CHANNELS, PIXEL, R, RANK,
                        RUN, RUNS, BLOCK,
                    )  # fmt: skip
                    to_raw = tl.reshape(to_raw, [RUN * RUNS, BLOCK])
                    r = tl.arange(0, RANK)
                    line = tl.arange(0, RUN * RUNS)
                    line_place, line_dead = _place(tile * RUNS + line % RUNS, axis, RUN, COLUMNS)
                    line_place += line // RUNS * (axis[3] if COLUMNS else 1)
                    tl.store(
                        grad_parameters + k * (R + 2 * N) + (line_place.to(tl.int64) * PIXEL)[:, None] + r[None, :],
                        tl.dot(to_raw, tl.trans(weight), input_precision=PRECISION),
                        mask=(line // RUNS >= line_dead)[:, None] & (r < R)[None, :],
                    )
                    _add_part(
                        grad_weight + ((item * K + k) * CHANNELS + one)[:, None] * R + r[None, :],
                        tl.dot(tl.trans(to_raw), low, input_precision=PRECISION) * LOG2_E,
                        is_one[:, None] & (r < R)[None, :], tile, WALK,
                    )  # fmt: skip
        tl.store(_at(grad_u + u_at, rows * CHANNELS), total.to(grad_u.dtype.element_ty), mask=is_real)
        if WALK:
            tl.debug_barrier()  # all threads have written before the next tile reads
