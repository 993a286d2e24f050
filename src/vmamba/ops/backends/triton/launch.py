"""From tensors to launches: geometry, buffers for carries and parts, and the order of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vmamba.ops.backends.triton import kernels
from vmamba.ops.backends.triton.configurations import (
    Configuration,
    Configurations,
    configurations_for,
    segments_limited,
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
        skip: (channels,), float32, or None.
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


class _Axis(NamedTuple):
    """The routes along rows or along columns, and how their positions are cut into segments."""

    routes: int  # bits
    is_columns: bool  # on which neighbours are as many positions apart as there are columns
    configuration: Configuration
    programs: int  # for each image and block of channels
    geometry: dict[str, int]


def run_forward(p: Problem, y: Tensor, last: Tensor | None = None) -> None:
    """Write y, shaped as `u`, and the last state (batch, K, N, channels) where that is wanted."""
    with _device(p.u):
        axes = _axes(p, _fit(_configurations(p.u).scan, p))
        for i, axis in enumerate(axes):
            carries = _carry(p, axis)
            _launch(
                kernels.scan_kernel, p, axis, axis.routes,
                u=p.u, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight, dt_bias=p.dt_bias, A=p.A,
                skip=p.skip if i == 0 else None, sums=carries.sums, local=carries.local, carry_a=carries.carry_a,
                carry_h=carries.carry_h, entering=carries.entering, partial=y if i else None, last=last, y=y,
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
    batch, channels = p.u.shape[0], p.u.shape[3]
    K, _, N = p.A.shape
    R = 0 if p.delta is not None else p.dt_weight.shape[2]
    with _device(p.u):
        config = _fit(_configurations(p.u).gradient, p)
        axes = _axes(p, config)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=p.u.device)

        grad_u = torch.empty_like(p.u)
        grad_delta = None if p.delta is None else empty(*p.u.shape)
        grad_parameters = empty(triton.cdiv(channels // p.groups, config.block), *p.parameters.shape)
        grad_skip, by_route = None, dict[int, Tensor]()
        for i, axis in enumerate(axes):
            carries = _carry(p, axis, grad_y, grad_last)
            items, routes = batch * axis.programs, [k for k in range(K) if axis.routes >> k & 1]
            parts, skip = empty(items, len(routes), channels, R + 1 + N), empty(items, channels) if i == 0 else None
            _launch(
                kernels.gradient_kernel, p, axis, axis.routes,
                u=p.u, grad_y=grad_y, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight,
                dt_bias=p.dt_bias, A=p.A, skip=p.skip if i == 0 else None, **carries._asdict(),
                partial=grad_u if i else None, grad_u=grad_u, grad_delta=grad_delta, grad_parameters=grad_parameters,
                parts=parts, grad_skip=skip, images=batch,
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


def _carry(p: Problem, axis: _Axis, grad_y: Tensor | None = None, grad_last: Tensor | None = None) -> _Carries:
    """What enters every chunk and every segment: of the state and, given grad_y, of its adjoint."""
    K, channels, N = p.A.shape
    batch, segments, chunks = p.u.shape[0], axis.geometry["segments"], axis.geometry["chunks"]

    def empty(*shape: int) -> Tensor:
        return torch.empty((batch, *shape), dtype=torch.float32, device=p.u.device)

    # With several states they are kept in memory from chunk to chunk.
    has_carries = segments > 1 or N > 1
    state = empty(segments, K, N, channels) if has_carries else None
    adjoint = empty(segments, K, N, channels) if has_carries and grad_y is not None else None
    routes = axis.routes if segments > 1 or grad_y is not None else axis.routes & _back(p)
    sums = local = decay = None
    if routes and chunks > 1:
        sums, local = empty(chunks, K, channels), empty(chunks, K, N, channels)
        decay = empty(segments, K, N, channels) if segments > 1 else None
        _launch(
            kernels.carry_kernel, p, axis, routes,
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
        entering, columns = torch.empty_like(carry), K * N * channels
        kernels.chain_kernel[(batch * triton.cdiv(columns, _COLUMNS),)](
            decay, carry, initial, entering, segments, columns, N * channels,
            ROUTES=axis.routes, BACK=back, CHUNK=_CHUNK, BLOCK=_COLUMNS, num_warps=1,
        )  # fmt: skip
        return entering

    entering, ending = chain(state, _back(p), None), chain(adjoint, ~_back(p) & (1 << K) - 1, grad_last)
    return _Carries(sums, local, entering=entering, adjoint=ending)


def _axes(p: Problem, config: Configuration) -> list[_Axis]:
    _, height, width, channels = p.u.shape
    axes = []
    for columns in (False, True):
        bits = _bits(route.columns == columns for route in p.routes)
        if not bits:
            continue
        # Rows are one line, since they follow each other in memory; columns of a grid of one row or column are as well.
        is_one_line = not columns or height == 1 or width == 1
        lines, length = (1, height * width) if is_one_line else (width, height)
        # A chunk lies on one line.
        run = min(config.run, 1 << length.bit_length() - 1)
        fitting = replace(config, run=run)
        chunks_per_line = triton.cdiv(length, run)
        chunks = lines * chunks_per_line
        segment = _chunks_of_a_segment(p, fitting, chunks)
        segments = triton.cdiv(chunks, segment)
        axes.append(
            _Axis(bits, not is_one_line, fitting, triton.cdiv(segments, RUNS), {
                "segments": segments, "length": segment, "positions": height * width,
                "chunks": chunks, "chunks_per_line": chunks_per_line, "line_length": length, "step": lines,
                "vectors": channels // _width(p, fitting),
            })
        )  # fmt: skip
    return axes


def _chunks_of_a_segment(p: Problem, config: Configuration, chunks: int) -> int:
    """As many as the configuration allows, but few enough for the card to have something to do."""
    longest = max(1, config.segment // config.run)
    warps = p.u.shape[0] * _blocks(p, config) * config.warps / RUNS  # for each segment
    longest = segments_limited(longest, chunks * warps, _multiprocessors(p.u))
    if longest >= chunks:
        return chunks
    # Of the last program's segments some may be shorter or not there; the fewest such are best.
    return min(range(longest, longest // 2, -1), key=lambda n: -(-chunks // (RUNS * n)) * n)


def _launch(kernel: Any, p: Problem, axis: _Axis, routes: int, **arguments: object) -> None:
    K, channels, N = p.A.shape
    R = 0 if p.delta is not None else p.dt_weight.shape[2]
    config = axis.configuration
    is_exact = p.u.dtype == torch.float32
    precision = "ieee" if torch.version.hip else "tf32x3" if is_exact else "tf32"
    rank = max(_LEAST_DOT, triton.next_power_of_2(R + EXTRA))
    is_held = N == 1 and config.registers is not None and not torch.version.hip
    options = {"maxnreg": config.registers} if is_held else {}
    kernel[(_blocks(p, config) * axis.programs * p.u.shape[0],)](
        **arguments, **axis.geometry, COLUMNS=axis.is_columns, CHANNELS=channels, WIDTH=_width(p, config),
        GROUPS=p.groups, PIXEL=p.parameters.shape[3], N=N, R=R, RANK=rank, K=K,
        ROUTES=routes, BACK=_back(p), SOFTPLUS=p.softplus, SEVERAL=axis.geometry["segments"] > 1, RUN=config.run,
        BLOCK=config.block, EXACT=is_exact, PRECISION=precision, num_warps=config.warps, num_stages=1, **options,
    )  # fmt: skip


def _width(p: Problem, config: Configuration) -> int:
    """Channels that a thread may take at once: two, where blocks are full and so have neighbours in memory."""
    return 2 if p.u.shape[3] // p.groups % config.block == 0 and config.block % 2 == 0 else 1


def _blocks(p: Problem, config: Configuration) -> int:
    return p.groups * triton.cdiv(p.u.shape[3] // p.groups, config.block)


def _bits(flags: Any) -> int:
    return sum(1 << k for k, flag in enumerate(flags) if flag)


def _back(p: Problem) -> int:
    return _bits(route.backwards for route in p.routes)


def _multiprocessors(u: Tensor) -> int:
    """How many the card has; without a card none, which nothing has to fill."""
    return torch.cuda.get_device_properties(u.device).multi_processor_count if u.device.type == "cuda" else 0


def _fit(config: Configuration, p: Problem) -> Configuration:
    """Blocks that divide the channels, or the smallest; a warp has 16 channels."""
    channels, block = p.u.shape[3] // p.groups, config.block
    while block > _LEAST_DOT and channels % block:
        block //= 2
    return replace(config, block=block, warps=max(1, config.warps * block // config.block))


def _configurations(u: Tensor) -> Configurations:
    architecture = ""
    if u.device.type == "cuda" and torch.version.hip:
        architecture = torch.cuda.get_device_properties(u.device).gcnArchName.split(":")[0]
    elif u.device.type == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(u.device))
    return configurations_for(architecture, u.shape[1] * u.shape[2])


def _device(u: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(u.device) if u.device.type == "cuda" else nullcontext()
