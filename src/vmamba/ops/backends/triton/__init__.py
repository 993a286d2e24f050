"""Triton kernels for GPUs (NVIDIA from Ampere on, AMD): projection of the step, scan and merge in one pass.

A scan is cut into tiles, which are all worked on at once: a first kernel finds what each tile does to the state, a
second chains that along the route, a third computes the results from the state that enters each tile. So a single
large image fills a card as well as a batch does; a sequence that fits into one tile needs the third kernel alone.
docs/kernels.md has the details.

Images are float16, bfloat16 or float32; the state, the step and all sums are float32. As soon as one argument is
float64, and for N = 0, R = 0, empty tensors and rows beyond 2²⁵ numbers, the call goes to the eager backend. Nothing is
added up in an order that varies, so results repeat bit by bit. There is no synchronisation with the host: calls can be
captured in a graph.

Triton itself is imported with the first call. With TRITON_INTERPRET=1 in the environment the kernels run on the CPU,
very slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends import eager
from vmamba.ops.backends.triton.configurations import Configuration, Configurations, use_configurations
from vmamba.ops.precision import state_dtype
from vmamba.ops.registration import as_result
from vmamba.ops.routes import Route, get_routes

if TYPE_CHECKING:
    from vmamba.ops.backends.triton import launch

__all__ = [
    "Configuration", "Configurations", "selective_scan", "selective_scan_backward", "ss2d_scan", "ss2d_scan_backward",
    "unavailable", "use_configurations",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which is not installed (`pip install triton`; there are packages for Linux only)"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return "it runs on NVIDIA and AMD GPUs only"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}; it needs 8.0 (Ampere) or newer"
    return None


# --- four routes over a grid -----------------------------------------------------------------------------------------


def ss2d_scan(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> Tensor:
    """SS2D's operator on a grid; arguments and result as in `reference.ss2d_scan`.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
    """
    inputs = (u, projected, dt_proj_weight, dt_proj_bias, A, D)
    if _is_for_eager(*inputs) or _is_too_wide(u, projected):
        return eager.ss2d_scan(*inputs, pattern)
    from vmamba.ops.backends.triton import launch

    problem = _grid_problem(*inputs, pattern)
    y = torch.empty_like(problem.u)
    launch.run_forward(problem, y)
    return y


def ss2d_scan_backward(
    grad_y: Tensor,
    u: Tensor,
    projected: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
) -> list[Tensor]:
    """Gradients of `ss2d_scan` for its six tensors, in order.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
    """
    inputs = (u, projected, dt_proj_weight, dt_proj_bias, A, D)
    if _is_for_eager(grad_y, *inputs) or _is_too_wide(u, projected):
        return eager.ss2d_scan_backward(grad_y, *inputs, pattern)
    from vmamba.ops.backends.triton import launch

    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (B, H, W, D)")
    problem = _grid_problem(*inputs, pattern)
    g = launch.run_backward(problem, grad_y.contiguous())
    results = (g.u, g.parameters, g.dt_weight, g.dt_bias, g.A, g.skip.expand(D.shape))
    return [as_result(value, like) for value, like in zip(results, inputs, strict=True)]


def _grid_problem(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> launch.Problem:
    from vmamba.ops.backends.triton import launch

    routes = get_routes(pattern)
    checks.grid(u, projected, dt_proj_weight, dt_proj_bias, A, D, len(routes))
    weight, bias, A = (_single(value) for value in (dt_proj_weight, dt_proj_bias, A))
    return launch.Problem(
        u.contiguous(), None, projected.contiguous().flatten(3), weight, bias, A, _single(D).sum(0), routes, 1, True
    )


# --- one sequence ----------------------------------------------------------------------------------------------------


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Selective scan; arguments and results as in `reference.selective_scan`.

    Raises:
        ValueError: a shape that does not fit.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    if _is_for_eager(*arguments):
        return eager.selective_scan(*arguments, delta_softplus)
    y, last = _ungated(_sequence_problem(u, delta, A, B, C, D, delta_bias, delta_softplus))
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(u.dtype).contiguous(), last


def selective_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Gradients of `selective_scan` for u, delta, A, B, C and those of D, z and delta_bias that are given, in order.

    Raises:
        ValueError: a shape that does not fit.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    if _is_for_eager(grad_y, grad_last, *arguments):
        return eager.selective_scan_backward(grad_y, grad_last, *arguments, delta_softplus)
    from vmamba.ops.backends.triton import launch

    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (batch, D, L)")
    checks.shape("grad_last", grad_last, (*u.shape[:2], A.shape[1]), "(batch, D, N)")
    problem = _sequence_problem(u, delta, A, B, C, D, delta_bias, delta_softplus)
    grad, grad_z = grad_y.float(), None
    if z is not None:
        grad, grad_z = eager.gate_backward(grad, _ungated(problem)[0], z.float())
    g = launch.run_backward(problem, _time_first(grad), _single(grad_last.transpose(1, 2)).unsqueeze(1).unsqueeze(1))
    assert g.delta is not None
    grad_B, grad_C = g.parameters.squeeze(1).unflatten(2, (B.shape[1], -1)).permute(0, 2, 3, 1).chunk(2, dim=2)
    results = (
        (g.u.squeeze(1).transpose(1, 2), u), (g.delta.squeeze(1).transpose(1, 2), delta), (g.A, A), (grad_B, B),
        (grad_C, C), (g.skip, D), (grad_z, z), (g.dt_bias, delta_bias),
    )  # fmt: skip
    return [as_result(value, like) for value, like in results if value is not None and like is not None]


def _sequence_problem(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool,
) -> launch.Problem:  # fmt: skip
    """A sequence as a grid of one row, time before channels."""
    from vmamba.ops.backends.triton import launch

    checks.sequence(u, delta, A, B, C, D, delta_bias)
    channels, groups = u.shape[1], B.shape[1]
    parameters = torch.cat([B.float(), C.float()], dim=2).permute(0, 3, 1, 2).contiguous()
    bias = _single(A).new_zeros(channels) if delta_bias is None else _single(delta_bias)
    return launch.Problem(
        _time_first(u), _time_first(delta), parameters.flatten(2).unsqueeze(1), _single(A).new_zeros(1), bias[None],
        _single(A)[None], None if D is None else _single(D), (Route(columns=False, backwards=False),), groups,
        delta_softplus,
    )  # fmt: skip


def _ungated(problem: launch.Problem) -> tuple[Tensor, Tensor]:
    """y before the gate (batch, D, L), float32, and the last state (batch, D, N)."""
    from vmamba.ops.backends.triton import launch

    y = torch.empty_like(problem.u, dtype=torch.float32)
    _, channels, N = problem.A.shape
    last = torch.empty((y.shape[0], N, channels), dtype=torch.float32, device=y.device)
    launch.run_forward(problem, y, last)
    return y.squeeze(1).transpose(1, 2), last.transpose(1, 2).contiguous()


# --- both ------------------------------------------------------------------------------------------------------------


def _is_for_eager(*tensors: Tensor | None) -> bool:
    return state_dtype(*tensors) == torch.float64 or any(value is not None and not value.numel() for value in tensors)


def _is_too_wide(u: Tensor, projected: Tensor) -> bool:
    """Whether steps down a column overflow the 32-bit offsets within a run; all other offsets have 64."""
    return u.shape[2] * max(u.shape[3], projected[0, 0, 0].numel()) > 2**25


def _time_first(value: Tensor) -> Tensor:
    """(batch, D, L) as (batch, 1, L, D)."""
    return value.transpose(1, 2).unsqueeze(1).contiguous()


def _single(value: Tensor) -> Tensor:
    return value.float().contiguous()
