"""What VMamba is measured against on a GPU: other models, and SS2D's operator as the released models compute it.

That is: four copies of the image, projections of each, one selective scan, a merge. The selective scan itself is an
argument: mamba-ssm's CUDA kernel, or plain torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measuring import CONVNEXT, DEIT, OURS, SWIN
from torch import Tensor
from torch.nn import functional as F

import vmamba.nn.ss2d
from vmamba.ops import selective_scan

Scan = Callable[..., Tensor]

plain_scan: Scan = functools.partial(selective_scan, backend="eager")


class NotMeasuredError(Exception):
    """Why there is no number."""


def mamba_scan() -> Scan:
    """mamba-ssm's `selective_scan_fn`.

    Raises:
        NotMeasuredError: it cannot be imported.
    """
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("mamba_ssm"):
            raise NotMeasuredError("mamba-ssm is absent") from None
        raise NotMeasuredError(f"mamba-ssm lacks a module: {error}") from None
    except (ImportError, OSError) as error:
        raise NotMeasuredError(f"mamba-ssm cannot be imported: {error}") from None


# By name: a model, and what makes the scan that its SS2D is built from where that is not our own.
MINE, RELEASED, CHAIN = "VMamba-T", "VMamba-T, mamba-ssm's scan", "VMamba-T, torch chain"
SWIN_T, CONVNEXT_T, DEIT_S = "Swin-T", "ConvNeXt-T", "DeiT-S"
CONTENDERS: dict[str, tuple[str, Callable[[], Scan] | None]] = {
    MINE: (OURS, None),
    RELEASED: (OURS, mamba_scan),
    CHAIN: (OURS, lambda: plain_scan),
    SWIN_T: (SWIN, None),
    CONVNEXT_T: (CONVNEXT, None),
    DEIT_S: (DEIT, None),
}


class CrossScan(torch.autograd.Function):
    """(B, C, H, W) to four sequences (B, 4, C, L), which are written once each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape[2:]
        return _scan_grid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _merge_sequences(grad, *ctx.size).unflatten(-1, ctx.size)


class CrossMerge(torch.autograd.Function):
    """Four sequences (B, 4, C, L) back on a grid and added: (B, C, L)."""

    @staticmethod
    def forward(ctx: Any, ys: Tensor, height: int, width: int) -> Tensor:
        ctx.size = height, width
        return _merge_sequences(ys, height, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scan_grid(grad.unflatten(-1, ctx.size)), None, None


def _scan_grid(x: Tensor) -> Tensor:
    sequences = x.new_empty((x.shape[0], 4, x.shape[1], x.shape[2] * x.shape[3]))
    sequences[:, 0] = x.flatten(2)
    sequences[:, 1] = sequences[:, 0].view(x.shape).transpose(2, 3).flatten(2)
    sequences[:, 2:] = sequences[:, :2].flip(-1)
    return sequences


def _merge_sequences(ys: Tensor, height: int, width: int) -> Tensor:
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    return ys[:, 0] + ys[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)


def released_ss2d(
    u: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str = "cross",
    *,
    scan: Scan,
) -> Tensor:
    """`vmamba.ops.ss2d_scan` step by step; `scan` has the arguments of mamba-ssm's `selective_scan_fn`."""
    assert pattern == "cross"
    batch, height, width, channels = u.shape
    R, N, length = dt_proj_weight.shape[2], A.shape[2], height * width
    sequences = CrossScan.apply(u.permute(0, 3, 1, 2))
    projected = F.conv1d(sequences.flatten(1, 2), x_proj_weight.flatten(0, 1).unsqueeze(-1), groups=4)
    low, B, C = projected.view(batch, 4, -1, length).split([R, N, N], dim=2)
    delta = F.conv1d(low.flatten(1, 2), dt_proj_weight.flatten(0, 1).unsqueeze(-1), groups=4)
    y = scan(
        sequences.view(batch, 4 * channels, length), delta.to(u.dtype), A.flatten(0, 1), B.contiguous().to(u.dtype),
        C.contiguous().to(u.dtype), D.flatten(), delta_bias=dt_proj_bias.flatten(), delta_softplus=True,
    )  # fmt: skip
    merged = CrossMerge.apply(y.reshape(batch, 4, channels, length), height, width)
    return merged.view(batch, channels, height, width).permute(0, 2, 3, 1)


@functools.cache
def released_with(scan: Scan) -> Scan:
    """`released_ss2d` with this scan; the same object each time, since compiled code depends on which it is."""
    return functools.partial(released_ss2d, scan=scan)


@contextmanager
def replaced_scan(scan: Scan | None) -> Iterator[None]:
    """Every SS2D computes `released_ss2d` with this scan in the `with` block; None leaves it as it is."""
    if scan is None:
        yield
        return
    original = vmamba.nn.ss2d.ss2d_scan
    vmamba.nn.ss2d.ss2d_scan = released_with(scan)
    try:
        yield
    finally:
        vmamba.nn.ss2d.ss2d_scan = original
