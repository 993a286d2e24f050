"""A stem's first half in one pass: 3×3 convolution of an image, LayerNorm, GELU; docs/kernels.md has the plan.

A program makes PIXELS pixels of the grid with all their channels. It gathers the 9·C numbers that each pixel is made of
in a matrix, multiplies that with the filters, and has each pixel's channels for the norm at once. The image has any
strides and any floating dtype; filters and result are float16 or bfloat16, sums, norm and GELU float32. Sizes are
runtime arguments and are not specialised.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.ops.backends.triton.card import Numbers, ceiling, launch
from vmamba.ops.backends.triton.linear import gelu

_PIXELS, _WARPS = 128, 4
_SIZES = ("of_image", "of_channel", "of_row", "of_column", "height", "width", "rows", "columns", "pixels")


@triton.jit(do_not_specialize=_SIZES)
def stem_kernel(
    x, weight, bias, scale, offset, y,
    of_image, of_channel, of_row, of_column, height, width, rows, columns, pixels, eps,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, STRIDE: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """y (pixels, DIM) of x, whose strides are given; pixels are rows·columns of each image."""
    first = tl.program_id(0) * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    row = pixel // columns
    k = tl.arange(0, DEPTH)[None, :]  # as the filters lie in memory: channel, row, column
    r = (row % rows)[:, None] * STRIDE + (k % 9 // 3 - 1)
    c = (pixel - row * columns)[:, None] * STRIDE + (k % 3 - 1)
    at = (row // rows).to(tl.int64)[:, None] * of_image + (k // 9).to(tl.int64) * of_channel
    at += r.to(tl.int64) * of_row + c.to(tl.int64) * of_column  # strides of a part of a huge image are large, too
    is_inside = (r >= 0) & (r < height) & (c >= 0) & (c < width) & (k < 9 * CHANNELS) & (pixel < pixels)[:, None]
    patches = tl.load(x + at, mask=is_inside, other=0.0).to(weight.dtype.element_ty)
    lane = tl.arange(0, LANES)
    is_channel = lane < DIM
    k = tl.arange(0, DEPTH)[:, None]
    filters_at = weight + (lane[None, :] * (9 * CHANNELS) + k)
    filters = tl.load(filters_at, mask=is_channel[None, :] & (k < 9 * CHANNELS), other=0.0)
    z = tl.dot(patches, filters) + tl.load(bias + lane, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(z, axis=1)[:, None] * (1.0 / DIM)
    z = tl.where(is_channel[None, :], z - mean, 0.0)
    z *= tl.rsqrt(tl.sum(z * z, axis=1)[:, None] * (1.0 / DIM) + eps)
    z *= tl.load(scale + lane, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    z += tl.load(offset + lane, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    y_at = y + first.to(tl.int64) * DIM + (tl.arange(0, PIXELS)[:, None] * DIM + lane[None, :])
    is_there = is_channel[None, :] & (pixel < pixels)[:, None]
    tl.store(y_at, gelu(z).to(y.dtype.element_ty), mask=is_there)


def stem(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor, stride: int, eps: float) -> Tensor:
    """GELU(LayerNorm(convolution)), the convolution 3×3 with padding 1.

    Args:
        x: image (B, C, H, W), float16, bfloat16 or float32, in any memory format.
        weight: (C', C, 3, 3), float16 or bfloat16.
        bias, scale, offset: (C',), of the convolution and of the norm, in any of these dtypes.
        stride: of the convolution.
        eps: of the norm.

    Returns:
        (B, ⌈H/stride⌉, ⌈W/stride⌉, C') in the weight's dtype, contiguous.
    """
    height, width = (ceiling(size, stride) for size in x.shape[2:])
    y = torch.empty((len(x), height, width, len(weight)), dtype=weight.dtype, device=x.device)
    programs, numbers = _plan(x.shape, x.stride(), len(weight), stride, eps)
    if programs:
        others = {"weight": weight, "bias": bias, "scale": scale, "offset": offset}
        tensors = {"x": x, **{name: value.contiguous() for name, value in others.items()}, "y": y}
        launch(stem_kernel, programs, x, tensors, numbers)
    return y


@functools.lru_cache(512)
def _plan(shape: Sequence[int], strides: Sequence[int], dim: int, stride: int, eps: float) -> tuple[int, Numbers]:
    """Programs of the kernel and what it is given beside tensors."""
    (batch, channels, height, width), (of_image, of_channel, of_row, of_column) = shape, strides
    rows, columns = ceiling(height, stride), ceiling(width, stride)
    pixels = batch * rows * columns
    return ceiling(pixels, _PIXELS), Numbers(
        of_image=of_image, of_channel=of_channel, of_row=of_row, of_column=of_column, height=height, width=width,
        rows=rows, columns=columns, pixels=pixels, eps=eps, CHANNELS=channels, DIM=dim, STRIDE=stride, PIXELS=_PIXELS,
        DEPTH=max(16, 1 << (9 * channels - 1).bit_length()), LANES=max(16, 1 << (dim - 1).bit_length()),
        num_warps=_WARPS,
    )  # fmt: skip
