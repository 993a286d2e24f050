"""SS2D's operator on a grid: projections, four selective scans and their merge, as one function that kernels fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends import BACKENDS, choose_backend, eager
from vmamba.ops.precision import state_dtype, without_autocast
from vmamba.ops.registration import is_tracing_for_export, register_gradients, runs_eagerly
from vmamba.ops.routes import get_routes


def ss2d_scan(
    u: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str = "cross",
    *,
    backend: str | None = None,
) -> Tensor:
    """Scan a grid along four routes with input-dependent parameters and add the results (paper, figure 3 and eq. 2-4).

    For route k, at each pixel, [dt_low | B | C] = x_proj_weight[k] · u and Δ = softplus(dt_proj_weight[k] · dt_low +
    dt_proj_bias[k]); along the route, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t · h_t + D u_t. Both
    projections act on one pixel at a time, so they are taken on the grid, once, and not on four copies of it.

    Args:
        u: (B, H, W, D), float16, bfloat16, float32 or float64.
        x_proj_weight: (4, R + 2N, D).
        dt_proj_weight: (4, D, R).
        dt_proj_bias: (4, D).
        A: (4, D, N), negative.
        D: (4, D).
        pattern: the routes: "cross", "unidirectional" or "bidirectional".
        backend: "auto", or a name from `available_backends()`; None leaves the choice to `use_backend`, the environment
            variable VMAMBA_BACKEND and the device, in that order.

    Returns:
        (B, H, W, D) in the dtype of `u`. Projections, steps and states are float32 (float64 as soon as one argument
        is), also under autocast; on a GPU, the first projection of a bfloat16 `u` is bfloat16.

    Raises:
        ValueError: a shape or device that does not fit, an unknown pattern or backend.
        TypeError: an argument that is not a real floating-point tensor.
        RuntimeError: the backend asked for cannot run on this device.
    """
    checks.ndim("u", u, 4, "(B, H, W, D)")
    checks.ndim("A", A, 3, "(4, D, N)")
    checks.ndim("dt_proj_weight", dt_proj_weight, 3, "(4, D, R)")
    K, channels = len(get_routes(pattern)), u.shape[-1]
    N, R = A.shape[-1], dt_proj_weight.shape[-1]
    checks.shape("x_proj_weight", x_proj_weight, (K, R + 2 * N, channels), "(4, R + 2N, D)")
    checks.shape("dt_proj_weight", dt_proj_weight, (K, channels, R), "(4, D, R)")
    checks.shape("dt_proj_bias", dt_proj_bias, (K, channels), "(4, D)")
    checks.shape("A", A, (K, channels, N), "(4, D, N)")
    checks.shape("D", D, (K, channels), "(4, D)")
    arguments = {
        "u": u, "x_proj_weight": x_proj_weight, "dt_proj_weight": dt_proj_weight, "dt_proj_bias": dt_proj_bias,
        "A": A, "D": D,
    }  # fmt: skip
    checks.real_and_together(arguments)
    chosen = choose_backend(backend, u.device)

    with without_autocast(u.device):
        # A GPU multiplies bfloat16 at many times float32's speed, and adds up in float32; float16 could overflow.
        dtype = u.dtype if u.is_cuda and u.dtype == torch.bfloat16 else state_dtype(*arguments.values())
        projected = F.linear(u.to(dtype), x_proj_weight.to(dtype).flatten(0, 1)).unflatten(-1, (K, R + 2 * N))
        if chosen.traceable:
            return chosen.module.ss2d_scan(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern)
        if not torch.is_grad_enabled() and runs_eagerly(u):
            # The operator itself, without the dispatcher's detour, which in small models costs as much.
            return chosen.module.ss2d_scan(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern)
        if is_tracing_for_export():
            return eager.ss2d_scan_in_one(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern)
        return torch.ops.vmamba.ss2d_scan(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern, chosen.name)


@torch.library.custom_op("vmamba::ss2d_scan", mutates_args=())
def _forward(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor,
    pattern: str, backend: str,
) -> Tensor:  # fmt: skip
    with without_autocast(u.device):
        return BACKENDS[backend].module.ss2d_scan(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern)


@torch.library.custom_op("vmamba::ss2d_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor, u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor,
    pattern: str, backend: str,
) -> list[Tensor]:  # fmt: skip
    with without_autocast(u.device):
        return BACKENDS[backend].module.ss2d_scan_backward(
            grad_y, u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern
        )


@_forward.register_fake
def _(u: Tensor, *_: object) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


register_gradients(_forward, _backward, eager.ss2d_scan_backward, outputs=1)
