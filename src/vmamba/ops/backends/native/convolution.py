"""A dense 3×3 convolution of a grid in inference (`csrc/convolution.cpp`, `csrc/winograd.cpp`).

The function needs the library (`reason_unavailable`), is not recorded for autograd, and is for callers that have made
sure that nobody wants that. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from vmamba.ops.backends.native.library import compute_function, fields, is_fast, pointer, reason_unavailable
from vmamba.ops.backends.native.products import wins

__all__ = ["convolution", "reason_unavailable"]

_LEAST_TILES, _LEAST_CHANNELS = 48, 96


class _Convolution(ctypes.Structure):
    """`struct Convolution` of csrc/convolution.h."""

    _fields_ = fields(
        sizes="batch height width channels outputs stride",
        pointers="x weight bias y",
        flags="bfloat16 weight_bfloat16 by_tiles threads",
    )


_call_convolution = compute_function("vmamba_convolution", _Convolution)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor | None:
    """A 3×3 convolution with padding 1, added up in float32.

    In float32 with stride 1 a large grid is computed by tiles of 4×4 results, with a quarter of the multiplications
    (Winograd's F(4×4, 3×3); Lavin and Gray, CVPR 2016). Errors are twice as large: of a sum of 512·9 products 1e-6 of
    its standard deviation. A NaN or infinity spoils its whole tile.

    Args:
        x: (B, H, W, C), float32 or bfloat16.
        weight: (N, C, 3, 3), x's dtype, or float32 where x is bfloat16.
        bias: (N,) or None, of such a dtype.
        stride: down and across.

    Returns:
        (B, ⌈H / stride⌉, ⌈W / stride⌉, N) in x's dtype, contiguous; None where shapes or dtypes are not these, or
        products of this size are faster elsewhere.

    Raises:
        RuntimeError: memory ran out.
    """
    if x.ndim != 4 or not x.numel() or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    batch, height, width, channels = x.shape
    outputs = len(weight)
    if weight.shape != (outputs, channels, 3, 3) or (bias is not None and bias.shape != (outputs,)):
        return None
    for value in (x, weight, bias):
        if value is not None and (value.dtype not in (x.dtype, torch.float32) or not value.is_cpu):
            return None
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    by_tiles = _tiles_win(x, outputs, stride)
    if not by_tiles and not _patches_win(x, outputs, stride):
        return None
    if by_tiles:
        weight = weight.permute(0, 2, 3, 1)
    x, weight, offset = x.contiguous(), weight.contiguous(), None if bias is None else bias.float().contiguous()
    y = x.new_empty((batch, rows, columns, outputs))
    _call_convolution(
        _Convolution(
            batch=batch, height=height, width=width, channels=channels, outputs=outputs, stride=stride,
            x=pointer(x), weight=pointer(weight), bias=None if offset is None else pointer(offset),
            y=y.data_ptr(), bfloat16=x.dtype is torch.bfloat16, weight_bfloat16=weight.dtype is torch.bfloat16,
            by_tiles=by_tiles, threads=torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def _tiles_win(x: Tensor, outputs: int, stride: int) -> bool:
    """Whether it is fastest by tiles: it takes enough of them to make up for transforming the weight."""
    batch, height, width, channels = x.shape
    tiles = batch * math.ceil(height / 4) * math.ceil(width / 4)
    fits = stride == 1 and x.dtype is torch.float32
    return fits and is_fast() and tiles >= _LEAST_TILES and min(channels, outputs) >= _LEAST_CHANNELS


def _patches_win(x: Tensor, outputs: int, stride: int) -> bool:
    """Whether it is fastest as a product with patches. With stride 1 these have nine times the size of the grid."""
    batch, height, width, channels = x.shape
    rows = batch * math.ceil(height / stride) * math.ceil(width / stride)
    return stride > 1 and wins(rows, 9 * channels, outputs, x.dtype)
