"""From tensors to launches: geometry, buffers for carries and parts, and the order of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmamba.ops.backends.triton import kernels
from vmamba.ops.backends.triton.card import Numbers, architecture, ceiling, launch, multiprocessors
from vmamba.ops.backends.triton.configurations import (
    Configuration,
    Configurations,
    Plan,
    configurations_for,
    plan_in_use,
    segments_limited,
    walks,
)
from vmamba.ops.routes import Route

# The chain of carries: segments at a time, and columns of one warp.
_CHUNK, _COLUMNS = 32, 32
_CHAINED_AT_ONCE = 8  # segments, by each of the programs
_LEAST_DOT = 16
RUNS, EXTRA = kernels.RUNS.value, 3


class Problem(NamedTuple):
    """One scan, or four over a grid. All tensors are dense.

    Attributes:
        u: (batch, H, W, channels), float16, bfloat16 or float32.
        delta: the step, shaped as `u`, where there is no projection (R = 0); else None.
        parameters: (batch, H, W, K·(R + 2N)), of each route dt_low, B and C; without projection (batch, 1, L, G·2N), of
            each group of neighbouring channels B and C.
        dt_weight: (K, channels, R), float32.
        dt_bias: (K, channels), float32.
        A: (K, channels, N), float32.
        skip: (K, channels), float32, or None.
        routes: K of them.
        groups: G.
        softplus: whether the step is softplus(raw).
    """

    u: Tensor
    delta: Tensor | None
    parameters: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    skip: Tensor | None
    routes: Sequence[Route]
    groups: int
    softplus: bool


class _Kind(NamedTuple):
    """What decides how a problem is cut up and launched. Attributes as of `Problem`, with the sizes of its tensors."""

    batch: int
    height: int
    width: int
    channels: int
    N: int
    R: int  # 0 without projection
    pixel: int  # numbers of a position in `parameters`
    routes: tuple[Route, ...]
    groups: int
    softplus: bool
    dtype: torch.dtype
    multiprocessors: int  # of the card; 0 without one, which nothing has to fill

    @property
    def back(self) -> int:
        """Routes that run backwards, as bits."""
        return _bits(route.backwards for route in self.routes)


class _Axis(NamedTuple):
    """The routes along rows or along columns, and how their positions are cut into segments.

    Attributes:
        routes: as bits.
        programs: for each image and block of channels.
        grid: of all programs.
        segments, chunks: how many.
        numbers: of every kernel, for these routes or some of them, as bits.
        of_gradient: those of the backward pass's last kernel.
        walk: programs and numbers of `walk_kernel`, where routes are walked from end to end.
    """

    routes: int
    programs: int
    grid: int
    segments: int
    chunks: int
    numbers: dict[int, Numbers]
    of_gradient: Numbers
    walk: tuple[int, Numbers] | None


def run_forward(p: Problem, y: Tensor, last: Tensor | None = None) -> None:
    """Write y, shaped as `u`, and the last state (batch, K, N, channels) where that is wanted."""
    kind = _kind(p)
    axes = _axes(kind, _configurations(p.u).scan, plan_in_use())
    for i, axis in enumerate(axes):
        skip = p.skip if i == 0 else None
        if axis.walk is not None:
            tensors = {
                "u": p.u, "parameters": p.parameters, "dt_weight": p.dt_weight, "dt_bias": p.dt_bias, "A": p.A,
                "skip": skip, "y": y,
            }  # fmt: skip
            launch(kernels.walk_kernel, axis.walk[0], p.u, tensors, axis.walk[1])
            continue
        carries = _carry(p, kind, axis)
        _launch(
            kernels.scan_kernel, axis, axis.numbers[axis.routes],
            u=p.u, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight, dt_bias=p.dt_bias, A=p.A,
            skip=skip, sums=carries.sums, local=carries.local, carry_a=carries.carry_a, carry_h=carries.carry_h,
            entering=carries.entering, partial=y if i else None, last=last, y=y,
        )  # fmt: skip


class Gradients(NamedTuple):
    """Gradients for a `Problem`: of u and delta in their shapes and, in float32, of all that has no batch."""

    u: Tensor
    delta: Tensor | None
    parameters: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    skip: Tensor


def run_backward(p: Problem, grad_y: Tensor, grad_last: Tensor | None = None) -> Gradients:
    """Gradients from those of y and of the last state (batch, K, N, channels)."""
    kind, K = _kind(p), len(p.routes)
    batch, channels, N, R = kind.batch, kind.channels, kind.N, kind.R
    axes = _axes(kind, _configurations(p.u).gradient, plan_in_use())

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=p.u.device)

    grad_u = torch.empty_like(p.u)
    grad_delta = None if p.delta is None else empty(*p.u.shape)
    grad_parameters = empty(ceiling(channels // p.groups, axes[0].of_gradient["BLOCK"]), *p.parameters.shape)
    grad_skip, by_route = None, dict[int, Tensor]()
    for i, axis in enumerate(axes):
        carries = _carry(p, kind, axis, grad_y, grad_last)
        items, routes = batch * axis.programs, [k for k in range(K) if axis.routes >> k & 1]
        parts, skip = empty(items, len(routes), channels, R + 1 + N), empty(items, channels) if i == 0 else None
        _launch(
            kernels.gradient_kernel, axis, axis.of_gradient,
            u=p.u, grad_y=grad_y, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight,
            dt_bias=p.dt_bias, A=p.A, skip=p.skip if i == 0 else None, **carries._asdict(),
            partial=grad_u if i else None, grad_u=grad_u, grad_delta=grad_delta, grad_parameters=grad_parameters,
            parts=parts, grad_skip=skip,
        )  # fmt: skip
        by_route |= dict(zip(routes, parts.sum(0), strict=True))
        if skip is not None:
            grad_skip = skip.sum(0)
    assert grad_skip is not None
    grad_parameters = grad_parameters[0] if len(grad_parameters) == 1 else grad_parameters.sum(0)
    weight, bias, A = torch.stack([by_route[k] for k in range(K)]).split([R, 1, N], dim=2)
    return Gradients(grad_u, grad_delta, grad_parameters, weight, bias.squeeze(2), A, grad_skip)


class _Carries(NamedTuple):
    """What chunks and segments start from, as the kernels describe it."""

    sums: Tensor | None = None
    local: Tensor | None = None
    carry_a: Tensor | None = None
    carry_h: Tensor | None = None
    carry_adjoint: Tensor | None = None
    entering: Tensor | None = None
    adjoint: Tensor | None = None


def _carry(
    p: Problem, kind: _Kind, axis: _Axis, grad_y: Tensor | None = None, grad_last: Tensor | None = None
) -> _Carries:
    """What enters every chunk and every segment: of the state and, given grad_y, of its adjoint."""
    K, batch, channels, N = len(p.routes), kind.batch, kind.channels, kind.N
    segments, chunks, back = axis.segments, axis.chunks, kind.back

    def empty(*shape: int) -> Tensor:
        return torch.empty((batch, *shape), dtype=torch.float32, device=p.u.device)

    # With several states they are kept in memory from chunk to chunk.
    has_carries = segments > 1 or N > 1
    state = empty(segments, K, N, channels) if has_carries else None
    adjoint = empty(segments, K, N, channels) if has_carries and grad_y is not None else None
    routes = axis.routes if segments > 1 or grad_y is not None else axis.routes & back
    sums = local = decay = None
    if routes and chunks > 1:
        count = axis.routes.bit_count()
        sums, local = empty(chunks, count, channels), empty(chunks, count, N, channels)
        decay = empty(segments, K, N, channels) if segments > 1 else None
        _launch(
            kernels.carry_kernel, axis, axis.numbers[routes],
            u=p.u, grad_y=grad_y, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight, dt_bias=p.dt_bias,
            A=p.A, sums=sums, local=local, carry_a=decay, carry_h=state, carry_adjoint=adjoint,
        )  # fmt: skip
    if segments == 1:
        if adjoint is not None:
            adjoint = adjoint.zero_() if grad_last is None else grad_last.clone()
        return _Carries(sums, local, entering=state, adjoint=adjoint if N > 1 else grad_last)
    if N == 1 and grad_last is None and segments <= _CHAINED_AT_ONCE:
        return _Carries(sums, local, decay, state, adjoint)

    def chain(carry: Tensor | None, back: int, initial: Tensor | None) -> Tensor | None:
        if carry is None:
            return None
        entering, numbers = torch.empty_like(carry), _of_chain(segments, K, N * channels, axis.routes, back)
        tensors = {"carry_a": decay, "carry_h": carry, "initial": initial, "entering": entering}
        launch(kernels.chain_kernel, batch * ceiling(numbers["columns"], _COLUMNS), p.u, tensors, numbers)
        return entering

    entering, ending = chain(state, back, None), chain(adjoint, ~back & (1 << K) - 1, grad_last)
    return _Carries(sums, local, entering=entering, adjoint=ending)


def _kind(p: Problem) -> _Kind:
    batch, height, width, channels = p.u.shape
    R = 0 if p.delta is not None else p.dt_weight.shape[2]
    cores = multiprocessors(p.u) if p.u.device.type == "cuda" else 0
    return _Kind(
        batch, height, width, channels, p.A.shape[2], R, p.parameters.shape[3], tuple(p.routes), p.groups, p.softplus,
        p.u.dtype, cores,
    )  # fmt: skip


@functools.lru_cache(512)
def _axes(kind: _Kind, given: Configuration, plan: Plan | None) -> tuple[_Axis, ...]:
    """Of rows and of columns, where routes run along them."""
    config = _fit(given, kind)
    blocks, K, R = kind.groups * ceiling(kind.channels // kind.groups, config.block), len(kind.routes), kind.R
    axes: list[_Axis] = []
    for columns in (False, True):
        bits = _bits(route.columns == columns for route in kind.routes)
        if not bits:
            continue
        # Rows are one line, since they follow each other in memory; columns of a grid of one row or column are as well.
        is_one_line = not columns or kind.height == 1 or kind.width == 1
        lines, length = (1, kind.height * kind.width) if is_one_line else (kind.width, kind.height)
        run = min(config.run, 1 << length.bit_length() - 1)  # a chunk lies on one line
        chunks_per_line = ceiling(length, run)
        chunks = lines * chunks_per_line
        warps = chunks * kind.batch * blocks * config.warps / RUNS
        longest = segments_limited(max(1, config.segment // run), warps, kind.multiprocessors, plan)
        # Of the last program's segments some may be shorter or not there; the fewest such are best.
        several = min(range(longest, longest // 2, -1), key=lambda n: ceiling(chunks, RUNS * n) * n)
        segment = chunks if longest >= chunks else several
        segments = ceiling(chunks, segment)
        programs = ceiling(segments, RUNS)
        is_exact = kind.dtype == torch.float32
        is_full = kind.channels // kind.groups % config.block == 0
        width = 2 if is_full else 1  # channels that a thread may take at once
        rank = max(_LEAST_DOT, 1 << (R + EXTRA - 1).bit_length())
        is_held = kind.N == 1 and config.registers is not None and not torch.version.hip
        arguments = {
            "segments": segments, "length": segment, "positions": kind.height * kind.width, "chunks": chunks,
            "chunks_per_line": chunks_per_line, "line_length": length, "step": lines, "vectors": kind.channels // width,
            "COLUMNS": not is_one_line, "CHANNELS": kind.channels, "WIDTH": width, "GROUPS": kind.groups,
            "PIXEL": kind.pixel, "N": kind.N, "R": R, "RANK": rank, "K": K, "AXIS": bits, "BACK": kind.back,
            "SOFTPLUS": kind.softplus, "SEVERAL": segments > 1, "RUN": run, "BLOCK": config.block,
            "EXACT": is_exact, "PRECISION": "ieee" if torch.version.hip else "tf32x3" if is_exact else "tf32",
            "num_warps": config.warps, "num_stages": 1, **({"maxnreg": config.registers} if is_held else {}),
        }  # fmt: skip
        numbers = {routes: Numbers(arguments, ROUTES=routes) for routes in {bits, bits & kind.back}}
        gradient = Numbers(numbers[bits], images=kind.batch)
        walkers, pair = blocks * ceiling(kind.batch, RUNS), _pair(kind, bits)
        walk = None
        if pair and walks(chunks, walkers * config.warps, kind.multiprocessors, plan):
            others = {name: value for name, value in arguments.items() if name not in _OF_SEGMENTS}
            walk = walkers, Numbers(others, images=kind.batch, FORTH=pair[0], BACK=pair[1], ADDS=bool(axes))
        axes.append(_Axis(bits, programs, blocks * programs * kind.batch, segments, chunks, numbers, gradient, walk))
    return tuple(axes)


@functools.lru_cache(512)
def _of_chain(segments: int, routes: int, per_route: int, those: int, back: int) -> Numbers:
    return Numbers(
        segments=segments, columns=routes * per_route, per_route=per_route, ROUTES=those, BACK=back, CHUNK=_CHUNK,
        BLOCK=_COLUMNS, num_warps=1,
    )  # fmt: skip


# What a walk has no use for.
_OF_SEGMENTS = ("segments", "length", "GROUPS", "N", "AXIS", "BACK", "SOFTPLUS", "SEVERAL")


def _pair(kind: _Kind, bits: int) -> tuple[int, int] | None:
    """The two routes of an axis, if `walk_kernel` knows them: one forwards and one backwards, with a projected step."""
    forth, back = bits & ~kind.back, bits & kind.back
    if forth.bit_count() != 1 or back.bit_count() != 1 or kind.N != 1 or not kind.R:
        return None
    return forth.bit_length() - 1, back.bit_length() - 1


def _launch(kernel: Any, axis: _Axis, numbers: Numbers, u: Tensor, **others: Tensor | None) -> None:
    launch(kernel, axis.grid, u, {"u": u, **others}, numbers)


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << k for k, flag in enumerate(flags) if flag)


def _fit(config: Configuration, kind: _Kind) -> Configuration:
    """Blocks that divide the channels, or the smallest; a warp has 16 channels."""
    channels, block = kind.channels // kind.groups, config.block
    while block > _LEAST_DOT and channels % block:
        block //= 2
    return replace(config, block=block, warps=max(1, config.warps * block // config.block))


def _configurations(u: Tensor) -> Configurations:
    return configurations_for(architecture(u.device), u.shape[1] * u.shape[2])
