"""From tensors to launches: geometry, buffers for carries and parts, and the order of the kernels."""

from __future__ import annotations

import math
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
    walks_for,
)
from vmamba.ops.routes import Route

# The chain of carries: tiles at a time, and columns of one warp.
_CHUNK, _COLUMNS = 32, 32
_LEAST_DOT = 16


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
    """The routes along rows or along columns, and how their positions are cut into tiles."""

    routes: int  # bits
    is_columns: bool  # on which neighbours are as many positions apart as there are columns
    configuration: Configuration
    geometry: dict[str, int]


def run_forward(p: Problem, y: Tensor, last: Tensor | None = None) -> None:
    """Write y, shaped as `u`, and the last state (batch, K, N, channels) where that is wanted."""
    with _device(p.u):
        config = _fit(_configurations(p.u).scan, p)
        axes = _axes(p, config)
        partial = None
        for i, axis in enumerate(axes):
            walks = _walks(p, axis)
            entering = (_walk_back if walks else _carry)(p, axis)[0]
            is_final = i == len(axes) - 1
            to = y if is_final or y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
            _launch(
                kernels.scan_kernel, p, axis, axis.routes, walks, WALK=walks,
                u=p.u, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight, dt_bias=p.dt_bias, A=p.A,
                skip=p.skip if i == 0 else None, entering=entering, partial=partial, last=last, y=to,
            )  # fmt: skip
            partial = to


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

        grad_parameters = empty(triton.cdiv(channels // p.groups, config.block), *p.parameters.shape)
        grad_delta = None if p.delta is None else empty(*p.u.shape)
        grad_weight, grad_bias, grad_A = empty(K, channels, R), empty(K, channels), empty(K, N, channels)
        grad_skip = partial = None
        for i, axis in enumerate(axes):
            walks = _walks(p, axis)
            entering, adjoint = (_walk_back if walks else _carry)(p, axis, grad_y, grad_last)
            items = batch if walks else batch * axis.geometry["tiles"]
            is_final = i == len(axes) - 1
            to = torch.empty_like(p.u, dtype=p.u.dtype if is_final else torch.float32)
            weight, bias, A = empty(items, K, channels, R), empty(items, K, channels), empty(items, K, N, channels)
            skip = empty(items, channels) if i == 0 else None
            _launch(
                kernels.gradient_kernel, p, axis, axis.routes, walks, WALK=walks,
                u=p.u, grad_y=grad_y, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight,
                dt_bias=p.dt_bias, A=p.A, skip=p.skip if i == 0 else None, entering=entering, adjoint=adjoint,
                partial=partial, grad_u=to, grad_delta=grad_delta, grad_parameters=grad_parameters,
                grad_weight=weight, grad_bias=bias, grad_A=A, grad_skip=skip, images=batch,
            )  # fmt: skip
            partial = to
            for k in range(K):
                if axis.routes >> k & 1:
                    grad_weight[k], grad_bias[k], grad_A[k] = weight[:, k].sum(0), bias[:, k].sum(0), A[:, k].sum(0)
            if skip is not None:
                grad_skip = skip.sum(0)
    assert partial is not None
    assert grad_skip is not None
    grad_parameters = grad_parameters[0] if len(grad_parameters) == 1 else grad_parameters.sum(0)
    return Gradients(partial, grad_delta, grad_parameters, grad_weight, grad_bias, grad_A.transpose(1, 2), grad_skip)


def _walks(p: Problem, axis: _Axis) -> bool:
    """Whether each program takes all tiles of an axis, one after the other, instead of one of them."""
    if axis.geometry["tiles"] == 1:
        return False
    programs = p.u.shape[0] * _blocks(p, axis.configuration)
    return walks_for(_multiprocessors(p.u), programs * axis.configuration.warps)


def _walk_back(
    p: Problem, axis: _Axis, grad_y: Tensor | None = None, grad_last: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Where what enters each tile goes, (batch, tiles, K, N, channels), with what enters against the axis in it: the
    state of routes that run backwards and, given grad_y, the adjoint of the others."""
    entering = _carries(p, axis)
    adjoint = None if grad_y is None else _carries(p, axis)
    against = axis.routes if grad_y is not None else axis.routes & _back(p)
    if against:
        _launch(
            kernels.states_kernel, p, axis, against, True,
            u=p.u, grad_y=grad_y, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight, dt_bias=p.dt_bias,
            A=p.A, initial=grad_last, entering=entering, adjoint=adjoint,
        )  # fmt: skip
    return entering, adjoint


def _carry(
    p: Problem, axis: _Axis, grad_y: Tensor | None = None, grad_last: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What enters each tile, (batch, tiles, K, N, channels): the state and, given grad_y, its adjoint.

    None stands for zeros, where one tile holds the sequence.
    """
    tiles = axis.geometry["tiles"]
    if tiles == 1:
        return None, grad_last
    K, channels, N = p.A.shape
    carry_a, carry_h, carry_adjoint = (
        _carries(p, axis), _carries(p, axis), None if grad_y is None else _carries(p, axis)
    )  # fmt: skip
    _launch(
        kernels.carry_kernel, p, axis, axis.routes, False,
        u=p.u, grad_y=grad_y, delta=p.delta, parameters=p.parameters, dt_weight=p.dt_weight, dt_bias=p.dt_bias, A=p.A,
        carry_a=carry_a, carry_h=carry_h, carry_adjoint=carry_adjoint,
    )  # fmt: skip

    def chain(carry: Tensor, back: int, initial: Tensor | None) -> Tensor:
        entering, columns = torch.empty_like(carry), K * N * channels
        kernels.chain_kernel[(p.u.shape[0] * triton.cdiv(columns, _COLUMNS),)](
            carry_a, carry, initial, entering, tiles, columns, N * channels,
            ROUTES=axis.routes, BACK=back, CHUNK=_CHUNK, BLOCK=_COLUMNS, num_warps=1,
        )  # fmt: skip
        return entering

    entering = chain(carry_h, _back(p), None)
    return entering, None if carry_adjoint is None else chain(carry_adjoint, ~_back(p) & (1 << K) - 1, grad_last)


def _carries(p: Problem, axis: _Axis) -> Tensor:
    K, channels, N = p.A.shape
    return torch.empty((p.u.shape[0], axis.geometry["tiles"], K, N, channels), dtype=torch.float32, device=p.u.device)


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
        # A run lies on one line. Where that is short, more runs of fewer positions keep the size of the tile.
        run = min(config.run, 1 << length.bit_length() - 1)
        fitting = replace(config, run=run, runs=config.runs * config.run // run)
        runs_per_line = triton.cdiv(length, run)
        axes.append(
            _Axis(bits, not is_one_line, fitting, {
                "tiles": triton.cdiv(lines * runs_per_line, fitting.runs), "positions": height * width,
                "runs": lines * runs_per_line, "runs_per_line": runs_per_line, "line_length": length, "step": lines,
                "vectors": channels // _width(p, fitting),
            })
        )  # fmt: skip
    return axes


def _launch(kernel: Any, p: Problem, axis: _Axis, routes: int, walks: bool, **arguments: object) -> None:
    K, channels, N = p.A.shape
    R = 0 if p.delta is not None else p.dt_weight.shape[2]
    config = axis.configuration
    tiles = 1 if walks else axis.geometry["tiles"]
    is_exact = p.u.dtype == torch.float32
    precision = "ieee" if is_exact or torch.version.hip else "tf32"
    is_held = walks and N == 1 and config.registers is not None and not torch.version.hip
    options = {"maxnreg": config.registers} if is_held else {}
    kernel[(_blocks(p, config) * tiles * p.u.shape[0],)](
        **arguments, **axis.geometry, COLUMNS=axis.is_columns, CHANNELS=channels, WIDTH=_width(p, config),
        GROUPS=p.groups, PIXEL=p.parameters.shape[3], N=N, R=R, RANK=max(_LEAST_DOT, triton.next_power_of_2(R)), K=K,
        ROUTES=routes, BACK=_back(p), SOFTPLUS=p.softplus, RUN=config.run, RUNS=config.runs, BLOCK=config.block,
        EXACT=is_exact, PRECISION=precision, num_warps=config.warps, num_stages=1, **options,
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


def _multiprocessors(u: Tensor) -> float:
    """How many the card has; without a card no walk would fill it."""
    return torch.cuda.get_device_properties(u.device).multi_processor_count if u.device.type == "cuda" else math.inf


def _fit(config: Configuration, p: Problem) -> Configuration:
    """Fewer channels and more runs where there are fewer channels than a block has."""
    channels = p.u.shape[3] // p.groups
    block = min(config.block, max(triton.next_power_of_2(channels), 1 if p.delta is not None else _LEAST_DOT))
    return replace(config, runs=config.runs * config.block // block, block=block)


def _configurations(u: Tensor) -> Configurations:
    architecture = ""
    if u.device.type == "cuda" and torch.version.hip:
        architecture = torch.cuda.get_device_properties(u.device).gcnArchName.split(":")[0]
    elif u.device.type == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(u.device))
    return configurations_for(architecture, u.shape[1] * u.shape[2])


def _device(u: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(u.device) if u.device.type == "cuda" else nullcontext()
