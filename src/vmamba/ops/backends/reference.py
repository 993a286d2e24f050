"""The definition: a plain loop over the sequence. Slow, and what every other backend is held against.

Run it in float64 for reference numbers. Autograd differentiates the loop itself, to any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.arguments import ScanArguments, SS2DArguments, in_state_dtype
from vmamba.ops.routes import cross_merge, cross_scan


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Selective scan of one sequence, step by step (paper, equations 2 to 4).

    Returns:
        y (batch, D, L) in the dtype of `u`, and the last state (batch, D, N) in the dtype of the recurrence.
    """
    u, step, A, B, C, D, z, delta_bias, delta_softplus = in_state_dtype(arguments)
    batch, channels, length = u.shape
    if delta_bias is not None:
        step = step + delta_bias[:, None]
    if delta_softplus:
        step = F.softplus(step)
    B, C = (value.repeat_interleave(channels // value.shape[1], dim=1) for value in (B, C))
    h = u.new_zeros(batch, channels, A.shape[1])
    ys = []
    for t in range(length):
        h = torch.exp(step[:, :, t, None] * A) * h + (step[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(u)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y.to(arguments.u.dtype), h


def ss2d_scan(arguments: SS2DArguments) -> Tensor:
    """SS2D's operator as the paper draws it: cross-scan, a grouped selective scan, cross-merge.

    Returns:
        (batch, H, W, D) in the dtype of `u`.
    """
    u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern = in_state_dtype(arguments)
    height, width = u.shape[1:3]
    K, _, R = dt_proj_weight.shape
    N = A.shape[-1]
    sequences = cross_scan(u.permute(0, 3, 1, 2), pattern).flatten(1, 2)
    # cross_scan of the projections gives every route's parameters in every route's order; route k wants its own.
    parameters = cross_scan(projected.flatten(3).permute(0, 3, 1, 2), pattern).unflatten(2, (K, -1))
    parameters = torch.stack([parameters[:, k, k] for k in range(K)], dim=1)
    dt_low, B, C = parameters.split([R, N, N], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt_low, dt_proj_weight).flatten(1, 2)
    y, _ = selective_scan(
        ScanArguments(sequences, delta, A.flatten(0, 1), B, C, D.flatten(), None, dt_proj_bias.flatten(), True)
    )
    merged = cross_merge(y.unflatten(1, (K, -1)), (height, width), pattern)
    return merged.permute(0, 2, 3, 1).to(arguments.u.dtype)
