"""The definition: a plain loop over the sequence. Slow, and what every other backend is held against.

Run it in float64 for reference numbers. Autograd differentiates the loop itself, to any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.precision import state_dtype
from vmamba.ops.routes import cross_merge, cross_scan


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
    """Selective scan of one sequence, step by step (paper, equations 2 to 4).

    Args:
        u, delta: (batch, D, L).
        A: (D, N).
        B, C: (batch, G, N, L), each group shared by D / G neighbouring channels.
        D, delta_bias: (D,) or None.
        z: (batch, D, L) or None.
        delta_softplus: whether the step is softplus(delta + delta_bias).

    Returns:
        y (batch, D, L) in the dtype of `u`, and the last state (batch, D, N) in the dtype of the recurrence.
    """
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)
    x, step, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    batch, channels, length = u.shape
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    B = B.to(dtype).repeat_interleave(channels // B.shape[1], dim=1)
    C = C.to(dtype).repeat_interleave(channels // C.shape[1], dim=1)
    h = x.new_zeros(batch, channels, A.shape[1])
    ys = []
    for t in range(length):
        h = torch.exp(step[:, :, t, None] * A) * h + (step[:, :, t] * x[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def ss2d_scan(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> Tensor:
    """SS2D's operator as the paper draws it: cross-scan, a grouped selective scan, cross-merge.

    Args:
        u: (batch, H, W, D).
        projected: (batch, H, W, K, R + 2N), x_proj applied to every pixel: dt_low, B and C of each route.
        dt_proj_weight: (K, D, R).
        dt_proj_bias: (K, D).
        A: (K, D, N).
        D: (K, D).
        pattern: a key of `PATTERNS`.

    Returns:
        (batch, H, W, D) in the dtype of `u`.
    """
    dtype = state_dtype(u, projected, dt_proj_weight, dt_proj_bias, A, D)
    height, width = u.shape[1:3]
    K, _, R = dt_proj_weight.shape
    N = A.shape[-1]
    sequences = cross_scan(u.permute(0, 3, 1, 2), pattern).flatten(1, 2)
    # cross_scan of the projections gives every route's parameters in every route's order; route k wants its own.
    parameters = cross_scan(projected.flatten(3).permute(0, 3, 1, 2), pattern).unflatten(2, (K, -1))
    parameters = torch.stack([parameters[:, k, k] for k in range(K)], dim=1).to(dtype)
    dt_low, B, C = parameters.split([R, N, N], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt_low, dt_proj_weight.to(dtype)).flatten(1, 2)
    y, _ = selective_scan(
        sequences.to(dtype), delta, A.flatten(0, 1), B, C, D.flatten(), None, dt_proj_bias.flatten(), True
    )
    merged = cross_merge(y.unflatten(1, (K, -1)), (height, width), pattern)
    return merged.permute(0, 2, 3, 1).to(u.dtype)
