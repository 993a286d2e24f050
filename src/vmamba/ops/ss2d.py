"""SS2D's operator on a grid: projections, four selective scans and their merge, as one function that kernels fuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.arguments import SS2DArguments
from vmamba.ops.backends import Backend, choose_backend
from vmamba.ops.layers import linear
from vmamba.ops.operators import call_operator
from vmamba.ops.precision import state_dtype, without_autocast
from vmamba.ops.registration import is_tracing_for_export
from vmamba.ops.routes import SEQUENCE, Pattern, is_along_axes, name_of, orders_for, permute

Watcher = Callable[[SS2DArguments, Tensor], None]

_watcher: ContextVar[Watcher | None] = ContextVar("vmamba_watcher", default=None)


@contextmanager
def watch_scans(watcher: Watcher | None) -> Iterator[None]:
    """Show every call of `ss2d_scan` in the `with` block (of this thread or task) to a function.

    Args:
        watcher: is given the arguments, the first projection done, and the result; None for nobody. A compiled graph
            calls nothing.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def ss2d_scan(
    u: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: Pattern = "cross",
    *,
    backend: str | None = None,
) -> Tensor:
    """Scan a grid along four routes with input-dependent parameters and add the results (paper, figure 3 and eq. 2-4).

    For route k, at each pixel, [dt_low | B | C] = x_proj_weight[k] · u and Δ = softplus(dt_proj_weight[k] · dt_low +
    dt_proj_bias[k]); along the route, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t · h_t + D u_t. Both
    projections act on one pixel at a time, so they are taken on the grid, once, and not on four copies of it.

    Args:
        u: (B, H, W, D), float16, bfloat16, float32 or float64.
        x_proj_weight: (K, R + 2N, D), for K routes: four, or as many as the pattern has.
        dt_proj_weight: (K, D, R).
        dt_proj_bias: (K, D).
        A: (K, D, N), negative.
        D: (K, D).
        pattern: the routes, a name in `PATTERNS` or a function from (H, W) to four orders (`register_pattern`).
        backend: "auto", or a name from `available_backends()`; None leaves the choice to `use_backend`, the environment
            variable VMAMBA_BACKEND and the device, in that order.

    Returns:
        (B, H, W, D) in the dtype of `u`. Projections, steps and states are float32 (float64 as soon as one argument
        is), also under autocast; on a GPU, the first projection of a bfloat16 `u` is bfloat16.

    Raises:
        ValueError: a shape or device that does not fit, an unknown backend or pattern, or a function without orders.
        TypeError: an argument that is not a real floating-point tensor.
        RuntimeError: the backend asked for cannot run on this device.
    """
    given = SS2DArguments(u, u, dt_proj_weight, dt_proj_bias, A, D, name_of(pattern))
    routes, size = given.check_parameters()
    checks.shape("x_proj_weight", x_proj_weight, (routes, size, u.shape[-1]), "(K, R + 2N, D)")
    checks.real_on_one_device(
        u=u, x_proj_weight=x_proj_weight, dt_proj_weight=dt_proj_weight, dt_proj_bias=dt_proj_bias, A=A, D=D
    )
    is_fused = is_along_axes(given.pattern)
    chosen = choose_backend(
        backend, u.device, u.dtype if is_fused else state_dtype(u), given.pattern if is_fused else SEQUENCE
    )
    with without_autocast(u.device):
        # A GPU multiplies bfloat16 at many times float32's speed, and adds up in float32; float16 could overflow.
        is_low = u.is_cuda and u.dtype == torch.bfloat16
        dtype = u.dtype if is_low else state_dtype(x_proj_weight, *given[:-1])
        projected = linear(u.to(dtype), x_proj_weight.to(dtype).flatten(0, 1)).unflatten(-1, (routes, size))
        given = given._replace(projected=projected)
        y: Tensor
        if chosen.traceable or is_fused or is_tracing_for_export():
            y = call_operator("ss2d_scan", chosen, given)
        else:
            y = _scan_by_routes(chosen, given)
    if not torch.compiler.is_compiling() and (watcher := _watcher.get()) is not None:
        watcher(given, y)
    return y


def scans_natively(u: Tensor, pattern: str) -> bool:
    """Whether `ss2d_scan` of such an image would run the kernel of the CPU, with nobody to watch it."""
    if not is_along_axes(pattern) or (not torch.compiler.is_compiling() and _watcher.get() is not None):
        return False
    return choose_backend(None, u.device, u.dtype, pattern).name == "native"


def _scan_by_routes(backend: Backend, arguments: SS2DArguments) -> Tensor:
    """The operator's result for a pattern that is a function, by one call for each route.

    The route's order makes of the grid one of a single row, for which every backend has its kernel.
    """
    u, projected, weight, bias, A, D, pattern = arguments
    height, width = u.shape[1:3]
    visited, steps = orders_for(pattern, u, height, width)
    pixels = u.flatten(1, 2).to(state_dtype(*arguments[:-1]))  # in which the routes are added up
    ys = []
    for k, parameters in enumerate(projected.flatten(1, 2).unbind(2)):
        row = permute(pixels, visited[k], steps[k], 1).unsqueeze(1)
        parameters = permute(parameters, visited[k], steps[k], 1)[:, None, :, None]
        this = slice(k, k + 1)
        route = SS2DArguments(row, parameters, weight[this], bias[this], A[this], D[this], SEQUENCE)
        y: Tensor = call_operator("ss2d_scan", backend, route)
        ys.append(permute(y.squeeze(1), steps[k], visited[k], 1))
    return functools.reduce(torch.add, ys).to(u.dtype).unflatten(1, (height, width))
