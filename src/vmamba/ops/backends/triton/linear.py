"""A product with a weight, and the GELU of it before it leaves the registers; docs/kernels.md has the plan.

A program makes ROWS × COLUMNS numbers of the result. Neighbouring programs have the same rows, so that x is read from
memory once, and the weight, which is small, comes from the cache. x, weight, bias and result are float16 or bfloat16,
sums and the GELU float32. The number of rows is a runtime argument and is not specialised.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.ops.backends.triton.card import Numbers, ceiling, launch

HALF_LOG2_E = tl.constexpr(0.7213475204444817)
P = tl.constexpr(0.3275911 * 0.7071067811865476)

# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def gelu(x):
    """x·Φ(x) = max(x, 0) - |x|·erfc(|x|/√2) / 2, which loses nothing to cancellation where x is far below 0.

    erfc(z) is exp(-z²) times a polynomial of 1 / (1 + 0.3275911·z), with an absolute error of 1.5e-7 (Abramowitz and
    Stegun, 7.1.26).
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + size * P)
    p = 1.061405429 * t - 1.453152027
    p = p * t + 1.421413741
    p = p * t - 0.284496736
    p = (p * t + 0.254829592) * t
    return tl.maximum(x, 0.0) - (0.5 * size) * p * tl.exp2(-(x * x) * HALF_LOG2_E)


@triton.jit(do_not_specialize=("rows",))
def linear_gelu_kernel(
    x, weight, bias, y, rows,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y (rows, WIDTH) of x (rows, DEPTH) and weight (WIDTH, DEPTH)."""
    blocks: tl.constexpr = tl.cdiv(WIDTH, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    is_row = row < rows - first
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < WIDTH
    k = tl.arange(0, STEP)
    x_at = x + first * DEPTH + (row[:, None] * DEPTH + k[None, :])
    weight_at = weight + (column[None, :] * DEPTH + k[:, None])
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, DEPTH, STEP):
        if DEPTH % STEP == 0:
            left = tl.load(x_at, mask=is_row[:, None], other=0.0)
            right = tl.load(weight_at, mask=is_column[None, :], other=0.0)
        else:
            left = tl.load(x_at, mask=is_row[:, None] & (k < DEPTH - start)[None, :], other=0.0)
            right = tl.load(weight_at, mask=is_column[None, :] & (k < DEPTH - start)[:, None], other=0.0)
        sums = tl.dot(left, right, sums)
        x_at += STEP
        weight_at += STEP
    result = gelu(sums + tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :])
    y_at = y + first * WIDTH + (row[:, None] * WIDTH + column[None, :])
    tl.store(y_at, result.to(y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What a program makes: rows and columns, in steps of so many of the channels that are summed over. Powers of two.

    Attributes:
        rows, columns: at least 16.
        step: at least 16.
        warps: of a program.
        stages: steps that are under way.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


# The fastest of ten on an H100: for at most so many channels, whose result takes longer to write than to compute, and
# for more.
_SHALLOW, SHALLOW, DEEP = 128, Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 3)


def tile_for(depth: int, is_hip: bool = bool(torch.version.hip)) -> Tile:
    """The tile for so many channels that is known to be fast; AMD's cards have memory for three steps under way."""
    tile = SHALLOW if depth <= _SHALLOW else DEEP
    return replace(tile, stages=min(tile.stages, 3)) if is_hip else tile


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, tile: Tile | None = None) -> Tensor:
    """GELU(x · weightᵀ + bias).

    Args:
        x: (..., C), float16 or bfloat16.
        weight: (C', C), in x's dtype like the bias.
        bias: (C',).
        tile: of the kernel; None for the one that is known to be fast.

    Returns:
        (..., C') in x's dtype, contiguous.
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)
    programs, numbers = _plan(x.shape, len(weight), tile or tile_for(x.shape[-1]))
    if programs:
        tensors = {"x": x, "weight": weight, "bias": bias.contiguous(), "y": y}
        launch(linear_gelu_kernel, programs, x, tensors, numbers)
    return y


@functools.lru_cache(512)
def _plan(shape: Sequence[int], width: int, tile: Tile) -> tuple[int, Numbers]:
    """Programs of the kernel and what it is given beside tensors."""
    rows, depth = math.prod(shape[:-1]), shape[-1]
    step = tile.step
    while step > 16 and depth % step:
        step //= 2
    programs = ceiling(rows, tile.rows) * ceiling(width, tile.columns)
    return programs, Numbers(
        rows=rows, DEPTH=depth, WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, STEP=step, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
