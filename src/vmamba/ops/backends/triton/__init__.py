"""Triton kernels for GPUs (NVIDIA from Ampere on, AMD): projection of the step, scan and merge in one pass.

A scan is cut into segments, which are all worked on at once: a first kernel finds what each segment does to the state,
a second chains that along the route, a third computes the results from the state that enters each segment. So a single
large image fills a card as well as a batch does. Small grids in large batches are walked from end to end by one kernel
instead. docs/kernels.md has the details.

Images are float16, bfloat16 or float32; the state, the step and all sums are float32. As soon as one argument is
float64, and for N = 0, R = 0, a single position, empty tensors and rows beyond 2²⁵ numbers, the call goes to the eager
backend. Nothing is added up in an order that varies, so results repeat bit by bit. There is no synchronisation with
the host: calls can be captured in a graph.

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
from vmamba.ops.arguments import ScanArguments, SS2DArguments, as_gradients
from vmamba.ops.backends import eager
from vmamba.ops.backends.triton.configurations import (
    Configuration,
    Configurations,
    Plan,
    use_configurations,
    use_plan,
)
from vmamba.ops.precision import state_dtype
from vmamba.ops.routes import Route, get_routes

if TYPE_CHECKING:
    from vmamba.ops.backends.triton import launch

__all__ = [
    "Configuration", "Configurations", "Plan", "selective_scan", "selective_scan_backward", "ss2d_scan",
    "ss2d_scan_backward", "unavailable", "use_configurations", "use_plan",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


_available: set[torch.device] = set()  # what was found to be; to ask a card takes as long as several launches


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None when it can."""
    if device in _available:
        return None
    reason = _look_for_a_reason(device)
    if reason is None and device.type == "cuda":
        _available.add(device)
    return reason


def _look_for_a_reason(device: torch.device) -> str | None:
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


def ss2d_scan(arguments: SS2DArguments) -> Tensor:
    """SS2D's operator on a grid; result as in `reference.ss2d_scan`.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
    """
    if _is_for_eager(arguments) or _is_too_wide(arguments):
        return eager.ss2d_scan(arguments)
    from vmamba.ops.backends.triton import launch

    problem = _grid_problem(arguments)
    y = torch.empty_like(problem.u)
    launch.run_forward(problem, y)
    return y


def ss2d_scan_backward(grad_y: Tensor, arguments: SS2DArguments) -> tuple[Tensor, ...]:
    """Gradients of `ss2d_scan` for its six tensors, in order.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
    """
    if _is_for_eager(arguments, grad_y) or _is_too_wide(arguments):
        return eager.ss2d_scan_backward(grad_y, arguments)
    from vmamba.ops.backends.triton import launch

    checks.shape("grad_y", grad_y, tuple(arguments.u.shape), "the shape of u, (B, H, W, D)")
    g = launch.run_backward(_grid_problem(arguments), grad_y.contiguous())
    grads = (g.u, g.parameters, g.dt_weight, g.dt_bias, g.A, g.skip.expand(arguments.D.shape))
    return as_gradients(grads, arguments, own=True)


def _grid_problem(arguments: SS2DArguments) -> launch.Problem:
    from vmamba.ops.backends.triton import launch

    arguments.check()
    u, projected, *weights, D, pattern = arguments
    weight, bias, A = (_single(value) for value in weights)
    return launch.Problem(
        u.contiguous(), None, projected.contiguous().flatten(3), weight, bias, A, _single(D),
        get_routes(pattern), 1, True,
    )  # fmt: skip


# --- one sequence ----------------------------------------------------------------------------------------------------


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Selective scan; results as in `reference.selective_scan`.

    Raises:
        ValueError: a shape that does not fit.
    """
    if _is_for_eager(arguments):
        return eager.selective_scan(arguments)
    y, last = _ungated(_sequence_problem(arguments))
    if arguments.z is not None:
        y = y * F.silu(arguments.z.float())
    return y.to(arguments.u.dtype).contiguous(), last


def selective_scan_backward(grad_y: Tensor, grad_last: Tensor, arguments: ScanArguments) -> tuple[Tensor, ...]:
    """Gradients of `selective_scan` for its eight tensors, in order; empty for those that are None.

    Raises:
        ValueError: a shape that does not fit.
    """
    if _is_for_eager(arguments, grad_y, grad_last):
        return eager.selective_scan_backward(grad_y, grad_last, arguments)
    from vmamba.ops.backends.triton import launch

    u, z, groups = arguments.u, arguments.z, arguments.B.shape[1]
    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (batch, D, L)")
    checks.shape("grad_last", grad_last, (*u.shape[:2], arguments.A.shape[1]), "(batch, D, N)")
    problem = _sequence_problem(arguments)
    grad, grad_z = grad_y.float(), None
    if z is not None:
        grad, grad_z = eager.gate_backward(grad, _ungated(problem)[0], z.float())
    g = launch.run_backward(problem, _time_first(grad), _single(grad_last.transpose(1, 2)).unsqueeze(1).unsqueeze(1))
    assert g.delta is not None
    grad_B, grad_C = g.parameters.squeeze(1).unflatten(2, (groups, -1)).permute(0, 2, 3, 1).chunk(2, dim=2)
    grad_u, grad_delta = (value.squeeze(1).transpose(1, 2) for value in (g.u, g.delta))
    grads = (grad_u, grad_delta, g.A, grad_B, grad_C, g.skip, grad_z, g.dt_bias)
    return as_gradients(grads, arguments, own=True)


def _sequence_problem(arguments: ScanArguments) -> launch.Problem:
    """A sequence as a grid of one row, time before channels."""
    from vmamba.ops.backends.triton import launch

    arguments.check()
    u, delta, A, B, C, D, _, delta_bias, delta_softplus = arguments
    parameters = torch.cat([B.float(), C.float()], dim=2).permute(0, 3, 1, 2).contiguous()
    bias = _single(A).new_zeros(u.shape[1]) if delta_bias is None else _single(delta_bias)
    return launch.Problem(
        _time_first(u), _time_first(delta), parameters.flatten(2).unsqueeze(1), _single(A).new_zeros(1), bias[None],
        _single(A)[None], None if D is None else _single(D)[None], (Route(columns=False, backwards=False),), B.shape[1],
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


def _is_for_eager(arguments: ScanArguments | SS2DArguments, *grads: Tensor) -> bool:
    tensors = [value for value in (*arguments[:-1], *grads) if value is not None]
    u = arguments.u
    positions = u.shape[1] * u.shape[2] if isinstance(arguments, SS2DArguments) else u.shape[2]
    return positions == 1 or state_dtype(*tensors) == torch.float64 or not all(value.numel() for value in tensors)


def _is_too_wide(arguments: SS2DArguments) -> bool:
    """Whether steps down a column overflow the 32-bit offsets within a run; all other offsets have 64."""
    u, projected = arguments.u, arguments.projected
    return u.shape[2] * max(u.shape[3], projected[0, 0, 0].numel()) > 2**25


def _time_first(value: Tensor) -> Tensor:
    """(batch, D, L) as (batch, 1, L, D)."""
    return value.transpose(1, 2).unsqueeze(1).contiguous()


def _single(value: Tensor) -> Tensor:
    return value.float().contiguous()
