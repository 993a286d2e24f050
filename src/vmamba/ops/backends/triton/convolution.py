"""SiLU of a depthwise 3×3 convolution on a channels-last grid, forward and backward; docs/kernels.md has the plan.

A program takes bands of ROWS rows, COLUMNS columns and BLOCK channels of an image. It goes down the rows; of each it
loads the pixels to the left, at and to the right of its columns, [COLUMNS, BLOCK] each and 0 outside the image, and
adds them to the three results that they have a part in. Two more rows are under way meanwhile; that has to be written,
since the compiler moves no load past a store. Images are float16, bfloat16 or float32, parameters too; all arithmetic
is float32. Batch, height and width are runtime arguments and are not specialised.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.ops.backends.triton.card import Numbers, ceiling, launch, multiprocessors

LOG2_E = tl.constexpr(1.4426950408889634)


# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _place(tile, bands, strips, height, width, stride, channel, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr):  # fmt: skip
    """Of a tile the first row; offsets of that row's pixels, [COLUMNS, BLOCK]; and for the columns to the left, here
    and to the right whether they exist.
    """
    first = tile // strips % bands * ROWS
    column = tile % strips * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    start = ((tile // strips // bands).to(tl.int64) * height + first) * stride
    is_channel = channel < CHANNELS
    inside = ((column >= 1) & (column <= width) & is_channel, (column < width) & is_channel,
              (column < width - 1) & is_channel)  # fmt: skip
    return first, start + (column * CHANNELS + channel), inside


@triton.jit
def _row(image, row, height, inside, CHANNELS: tl.constexpr):
    """Pixels of a row to the left, here and to the right."""
    is_row = (row >= 0) & (row < height)
    left = tl.load(image - CHANNELS, mask=inside[0] & is_row, other=0.0)
    here = tl.load(image, mask=inside[1] & is_row, other=0.0)
    return left, here, tl.load(image + CHANNELS, mask=inside[2] & is_row, other=0.0)


@triton.jit
def _floats(row):
    return row[0].to(tl.float32), row[1].to(tl.float32), row[2].to(tl.float32)


@triton.jit
def _weights(weight, row: tl.constexpr, channel, CHANNELS: tl.constexpr, FLIP: tl.constexpr):
    """A row of the filters, left to right, [1, BLOCK] each; of those turned by half a turn with FLIP."""
    step: tl.constexpr = -1 if FLIP else 1
    at = weight + channel * 9 + (8 if FLIP else 0) + 3 * step * row
    left = tl.load(at, mask=channel < CHANNELS, other=0.0)
    here = tl.load(at + step, mask=channel < CHANNELS, other=0.0)
    right = tl.load(at + 2 * step, mask=channel < CHANNELS, other=0.0)
    return left.to(tl.float32), here.to(tl.float32), right.to(tl.float32)


@triton.jit
def _bias(bias, channel, CHANNELS: tl.constexpr):
    """[1, BLOCK], 0 where there is none."""
    if bias is None:
        value = channel * 0.0
    else:
        value = tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    return value


@triton.jit
def _add(total, row, weights):
    return total + row[0] * weights[0] + row[1] * weights[1] + row[2] * weights[2]


@triton.jit(do_not_specialize=("height", "width", "bands", "strips"))
def convolution_kernel(
    x, weight, bias, y, height, width, bands, strips,
    CHANNELS: tl.constexpr, FLIP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The convolution with the weight, turned by half a turn with FLIP, and its SiLU with SILU."""
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    stride = width.to(tl.int64) * CHANNELS
    first, at, inside = _place(
        tl.program_id(0) // blocks, bands, strips, height, width, stride, channel, CHANNELS, ROWS, COLUMNS
    )
    top = _weights(weight, 0, channel, CHANNELS, FLIP)
    middle = _weights(weight, 1, channel, CHANNELS, FLIP)
    bottom = _weights(weight, 2, channel, CHANNELS, FLIP)
    offset = _bias(bias, channel, CHANNELS) + tl.zeros([COLUMNS, BLOCK], tl.float32)
    next_row = _row(x + at - stride, first - 1, height, inside, CHANNELS)
    later_row = _row(x + at, first, height, inside, CHANNELS)
    above = offset  # sums of the result above this row, and of the one on it
    here = offset
    for i in tl.static_range(-1, ROWS + 1):
        row = _floats(next_row)
        next_row = later_row
        if i < ROWS - 1:
            later_row = _row(x + at + (i + 2) * stride, first + i + 2, height, inside, CHANNELS)
        if i > 0:
            z = _add(above, row, bottom)
            if SILU:
                z = z / (1.0 + tl.exp2(-z * LOG2_E))
            is_row = first + i - 1 < height
            tl.store(y + at + (i - 1) * stride, z.to(y.dtype.element_ty), mask=inside[1] & is_row)
        above = _add(here, row, middle)
        here = _add(offset, row, top)


@triton.jit(do_not_specialize=("height", "width", "bands", "strips", "tiles", "share"))
def gradient_kernel(
    x, grad, weight, bias, grad_z, parts, height, width, bands, strips, tiles, share,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradient of the SiLU that of the convolution, and a share of tiles' parts of the parameters' gradients,
    10·CHANNELS floats: the weight's in its own order, then the bias's.
    """
    blocks: tl.constexpr = tl.cdiv(CHANNELS, BLOCK)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(0) // blocks
    stride = width.to(tl.int64) * CHANNELS
    top = _weights(weight, 0, channel, CHANNELS, False)
    middle = _weights(weight, 1, channel, CHANNELS, False)
    bottom = _weights(weight, 2, channel, CHANNELS, False)
    offset = _bias(bias, channel, CHANNELS)
    zero = tl.zeros([COLUMNS, BLOCK], tl.float32)
    of_top = (zero, zero, zero)
    of_middle = (zero, zero, zero)
    of_bottom = (zero, zero, zero)
    of_bias = zero
    for tile in range(part * share, tl.minimum((part + 1) * share, tiles)):
        first, at, inside = _place(tile, bands, strips, height, width, stride, channel, CHANNELS, ROWS, COLUMNS)
        above = _floats(_row(x + at - stride, first - 1, height, inside, CHANNELS))
        here = _floats(_row(x + at, first, height, inside, CHANNELS))
        next_row = _row(x + at + stride, first + 1, height, inside, CHANNELS)
        next_grad = tl.load(grad + at, mask=inside[1], other=0.0)
        later_row = next_row
        later_grad = next_grad
        if ROWS > 1:
            later_row = _row(x + at + 2 * stride, first + 2, height, inside, CHANNELS)
            later_grad = tl.load(grad + at + stride, mask=inside[1] & (first + 1 < height), other=0.0)
        for i in tl.static_range(ROWS):
            below = _floats(next_row)
            g = next_grad.to(tl.float32)
            next_row = later_row
            next_grad = later_grad
            if i < ROWS - 2:
                later_row = _row(x + at + (i + 3) * stride, first + i + 3, height, inside, CHANNELS)
                is_row = first + i + 2 < height
                later_grad = tl.load(grad + at + (i + 2) * stride, mask=inside[1] & is_row, other=0.0)
            z = _add(_add(_add(offset, above, top), here, middle), below, bottom)
            sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2_E))
            g *= sigmoid * (1.0 + z * (1.0 - sigmoid))
            is_row = first + i < height
            tl.store(grad_z + at + i * stride, g.to(grad_z.dtype.element_ty), mask=inside[1] & is_row)
            of_top = _add_products(of_top, above, g)
            of_middle = _add_products(of_middle, here, g)
            of_bottom = _add_products(of_bottom, below, g)
            of_bias += g
            above = here
            here = below
    parts += part.to(tl.int64) * (10 * CHANNELS)
    _store_sums(parts, of_top, channel, CHANNELS)
    _store_sums(parts + 3, of_middle, channel, CHANNELS)
    _store_sums(parts + 6, of_bottom, channel, CHANNELS)
    tl.store(parts + 9 * CHANNELS + channel, tl.sum(of_bias, axis=0)[None, :], mask=channel < CHANNELS)


@triton.jit
def _add_products(sums, row, g):
    return sums[0] + row[0] * g, sums[1] + row[1] * g, sums[2] + row[2] * g


@triton.jit
def _store_sums(parts, sums, channel, CHANNELS: tl.constexpr):
    for i in tl.static_range(3):
        tl.store(parts + channel * 9 + i, tl.sum(sums[i], axis=0)[None, :], mask=channel < CHANNELS)


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time; all numbers but rows are powers of two.

    Attributes:
        rows: of a band. Two more are read.
        columns, block: columns and channels.
        warps: of a program; a thread has columns·block / 32 / warps channels, and loads up to 16 bytes of them at once.
    """

    rows: int
    columns: int
    block: int
    warps: int


# The first that makes so many warps is taken, else the last. Chosen by what the compiler makes of them; none has been
# timed on a card.
TILES = (Tile(7, 8, 32, 2), Tile(2, 8, 32, 2), Tile(1, 8, 32, 2))
_WARPS = 1024
# Of the parameters' gradients, by the bytes of a number: the warps of a program, how many run on a multiprocessor at a
# time, and the registers that a thread may have for that. There are as many programs, since each leaves a part of the
# gradients.
_GRADIENT = {2: (2, 6, 168), 4: (4, 4, 128)}

_override: Tile | None = None


@contextmanager
def use_tiles(tile: Tile) -> Iterator[None]:
    """Use this in the `with` block, in all threads (backward passes have their own), for tuning and tests."""
    global _override
    before, _override = _override, tile
    try:
        yield
    finally:
        _override = before


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a depthwise 3×3 convolution with stride 1 and padding 1.

    Args:
        x: (B, H, W, C), float16, bfloat16 or float32.
        weight: (C, 1, 3, 3), like the bias float16, bfloat16 or float32.
        bias: (C,) or None.

    Returns:
        (B, H, W, C) in x's dtype, contiguous.
    """
    return _convolve(x.contiguous(), weight, bias, flip=False, silu=True)


def depthwise_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `depthwise_silu` from that of its result; the convolution is computed again.

    Args:
        grad: (B, H, W, C).
        x, weight, bias: as given to `depthwise_silu`.

    Returns:
        The gradients of x, in x's dtype, of weight (C, 1, 3, 3) and of the bias (C,), added up in float32, on one
        kind of card always in the same order, and returned in the dtype of weight and bias (without a bias: of weight).
    """
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    channels, grad_z = x.shape[-1], torch.empty_like(x, memory_format=torch.contiguous_format)
    is_nvidia = x.device.type == "cuda" and not torch.version.hip
    grid, programs, numbers = _plan_gradient(x.shape, x.element_size(), multiprocessors(x), is_nvidia, _override)
    parts = x.new_empty((programs, 10 * channels), dtype=torch.float32)
    if grid:
        tensors = {"x": x, "grad": grad, **_parameters(weight, bias), "grad_z": grad_z, "parts": parts}
        launch(gradient_kernel, grid, x, tensors, numbers)
    grad_weight, grad_bias = parts[:, : 9 * channels].sum(0).view(weight.shape), parts[:, 9 * channels :].sum(0)
    grad_x = _convolve(grad_z, weight, None, flip=True, silu=False)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to((weight if bias is None else bias).dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool, silu: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, numbers = _plan(x.shape, flip, silu, _override)
    if grid:
        launch(convolution_kernel, grid, x, {"x": x, **_parameters(weight, bias), "y": y}, numbers)
    return y


def _parameters(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    return {"weight": weight.contiguous(), "bias": None if bias is None else bias.contiguous()}


@functools.lru_cache(512)
def _plan(shape: Sequence[int], flip: bool, silu: bool, override: Tile | None) -> tuple[int, Numbers]:
    """Programs of a convolution and what its kernel is given beside tensors."""
    blocks, tile, places = _cut(shape, TILES if override is None else (override,))
    count = places.pop("tiles") * blocks
    return count, Numbers(places, FLIP=flip, SILU=silu, **_constants(tile, shape[-1]))


@functools.lru_cache(512)
def _plan_gradient(
    shape: Sequence[int], size: int, cores: int, is_nvidia: bool, override: Tile | None
) -> tuple[int, int, Numbers]:
    """The same for the parameters' gradients of numbers of so many bytes, and how many parts they come in."""
    warps, resident, registers = _GRADIENT[size]
    tiles = tuple(replace(tile, warps=warps) for tile in TILES) if override is None else (override,)
    blocks, tile, places = _cut(shape, tiles)
    share = max(ceiling(places["tiles"] * blocks, resident * cores), 1)
    programs = ceiling(places["tiles"], share)
    options = {"maxnreg": registers} if is_nvidia else {}
    return programs * blocks, programs, Numbers(places, share=share, **_constants(tile, shape[-1]), **options)


def _constants(tile: Tile, channels: int) -> dict[str, int]:
    return {
        "CHANNELS": channels, "ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK": tile.block, "num_warps": tile.warps,
        "num_stages": 1,
    }  # fmt: skip


def _cut(shape: Sequence[int], tiles: tuple[Tile, ...]) -> tuple[int, Tile, dict[str, int]]:
    """Blocks of channels, the tile that is taken, and how many there are in what place."""
    batch, height, width, channels = shape
    for tile in tiles:
        blocks, bands, strips = (
            ceiling(size, by) for size, by in ((channels, tile.block), (height, tile.rows), (width, tile.columns))
        )
        count = batch * bands * strips
        if count * blocks * tile.warps >= _WARPS and tile.rows < 2 * height:
            break
    return blocks, tile, {"height": height, "width": width, "bands": bands, "strips": strips, "tiles": count}
