"""LayerNorm over the last dimension, forward and backward; docs/kernels.md has the plan.

A program takes ROWS rows with all their channels in registers, as PARTS tensors [ROWS, LANES]: a thread owns four
neighbouring channels of each part of one row, and warps have different rows. A row is read once; its mean is taken
first and then the variance of what is left. Rows are float16, bfloat16 or float32, parameters too; all arithmetic is
float32. The number of rows is a runtime argument and is not specialised.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton's tuples are joined, not unpacked)
from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmamba.ops.backends.triton.card import Numbers, ceiling, launch, multiprocessors

# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _channel(part: tl.constexpr, LANES: tl.constexpr):
    """[1, LANES]; the compiler is told to give a thread four of them, whatever the dtype."""
    return part * LANES + tl.max_contiguous(tl.arange(0, LANES), 4)[None, :]


@triton.jit
def _load(x, first, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """The rows from the first on, as they are in memory, 0 where there are none."""
    x += first * CHANNELS
    row = tl.arange(0, ROWS)[:, None]
    values = ()
    for i in tl.static_range(PARTS):
        channel = _channel(i, LANES)
        is_there = (channel < CHANNELS) & (row < rows - first)
        values = values + (tl.load(x + (row * CHANNELS + channel), mask=is_there, other=0.0),)
    return values


@triton.jit
def _load_parameter(values, CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """The same for every row: each thread loads it, so that nothing goes from thread to thread."""
    loaded = ()
    for i in tl.static_range(PARTS):
        at = tl.broadcast_to(_channel(i, LANES), ROWS, LANES)
        loaded = loaded + (tl.load(values + at, mask=at < CHANNELS, other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def _store(
    y, values, first, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr
):
    y += first * CHANNELS
    row = tl.arange(0, ROWS)[:, None]
    for i in tl.static_range(PARTS):
        channel = _channel(i, LANES)
        is_there = (channel < CHANNELS) & (row < rows - first)
        tl.store(y + (row * CHANNELS + channel), values[i].to(y.dtype.element_ty), mask=is_there)


@triton.jit
def _mean_product(a, b, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Of each row, [ROWS, 1]; one of the two is 0 beyond the channels."""
    total = a[0] * b[0]
    for i in tl.static_range(1, PARTS):
        total += a[i] * b[i]
    return tl.sum(total, axis=1)[:, None] * (1.0 / CHANNELS)


@triton.jit
def _mean(values, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Of each row, [ROWS, 1]; `values` are 0 beyond the channels."""
    total = values[0]
    for i in tl.static_range(1, PARTS):
        total += values[i]
    return tl.sum(total, axis=1)[:, None] * (1.0 / CHANNELS)


@triton.jit
def _standardised(x, eps, CHANNELS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):
    """Rows with mean 0 and variance 1, 0 beyond the channels, and what they were multiplied by, [ROWS, 1]."""
    values = ()
    for i in tl.static_range(PARTS):
        values = values + (x[i].to(tl.float32),)
    mean = _mean(values, CHANNELS, PARTS)
    apart = ()
    for i in tl.static_range(PARTS):
        apart = apart + (tl.where(_channel(i, LANES) < CHANNELS, values[i] - mean, 0.0),)
    scale = tl.rsqrt(_mean_product(apart, apart, CHANNELS, PARTS) + eps)
    normal = ()
    for i in tl.static_range(PARTS):
        normal = normal + (apart[i] * scale,)
    return normal, scale


@triton.jit(do_not_specialize=("rows",))
def norm_kernel(
    x, weight, bias, y, rows, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    values = _load(x, first, rows, CHANNELS, ROWS, PARTS, LANES)
    w = _load_parameter(weight, CHANNELS, ROWS, PARTS, LANES)
    b = _load_parameter(bias, CHANNELS, ROWS, PARTS, LANES)
    normal, _ = _standardised(values, eps, CHANNELS, PARTS, LANES)
    result = ()
    for i in tl.static_range(PARTS):
        result = result + (normal[i] * w[i] + b[i],)
    _store(y, result, first, rows, CHANNELS, ROWS, PARTS, LANES)


@triton.jit(do_not_specialize=("rows", "share"))
def norm_backward_kernel(
    x, grad, weight, grad_x, parts, rows, share, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradient of share·ROWS rows, and their part of the parameters': the weight's, then the bias's."""
    w = _load_parameter(weight, CHANNELS, ROWS, PARTS, LANES)
    of_weight = ()
    for _ in tl.static_range(PARTS):
        of_weight = of_weight + (tl.zeros([ROWS, LANES], tl.float32),)
    of_bias = of_weight
    first = tl.program_id(0).to(tl.int64) * share * ROWS
    rows = tl.minimum(first + share * ROWS, rows)  # nothing is read of another program's share
    next_x = _load(x, first, rows, CHANNELS, ROWS, PARTS, LANES)
    next_grad = _load(grad, first, rows, CHANNELS, ROWS, PARTS, LANES)
    for _ in range(share):
        values = next_x
        g = next_grad
        next_x = _load(x, first + ROWS, rows, CHANNELS, ROWS, PARTS, LANES)
        next_grad = _load(grad, first + ROWS, rows, CHANNELS, ROWS, PARTS, LANES)
        normal, scale = _standardised(values, eps, CHANNELS, PARTS, LANES)
        is_row = tl.arange(0, ROWS)[:, None] < rows - first
        normal = _where(is_row, normal, PARTS)  # elsewhere, where eps is 0, not a number
        of_weight, of_bias, g = _add(of_weight, of_bias, normal, g, w, PARTS)
        mean = _mean(g, CHANNELS, PARTS)
        slope = _mean_product(g, normal, CHANNELS, PARTS)
        result = ()
        for i in tl.static_range(PARTS):
            result = result + (scale * (g[i] - mean - normal[i] * slope),)
        _store(grad_x, result, first, rows, CHANNELS, ROWS, PARTS, LANES)
        first += ROWS
    parts += tl.program_id(0).to(tl.int64) * (2 * CHANNELS)
    for i in tl.static_range(PARTS):
        channel = _channel(i, LANES)
        tl.store(parts + channel, tl.sum(of_weight[i], axis=0)[None, :], mask=channel < CHANNELS)
        tl.store(parts + CHANNELS + channel, tl.sum(of_bias[i], axis=0)[None, :], mask=channel < CHANNELS)


@triton.jit
def _where(is_row, values, PARTS: tl.constexpr):
    kept = ()
    for i in tl.static_range(PARTS):
        kept = kept + (tl.where(is_row, values[i], 0.0),)
    return kept


@triton.jit
def _add(of_weight, of_bias, normal, grad, w, PARTS: tl.constexpr):
    """Both sums with these rows added to them, and the gradient of `normal`."""
    new_of_weight = ()
    new_of_bias = ()
    of_normal = ()
    for i in tl.static_range(PARTS):
        g = grad[i].to(tl.float32)
        new_of_weight = new_of_weight + (of_weight[i] + g * normal[i],)
        new_of_bias = new_of_bias + (of_bias[i] + g,)
        of_normal = of_normal + (g * w[i],)
    return new_of_weight, new_of_bias, of_normal


# --- launches --------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., C), float16, bfloat16 or float32, C at most 4096.
        weight, bias: (C,), float16, bfloat16 or float32.
        eps: added to the variance.
        dtype: of the result.

    Returns:
        x's shape in `dtype`, contiguous.
    """
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    programs, numbers = _plan(x.shape, eps)
    if programs:
        tensors = {"x": x, "weight": weight.contiguous(), "bias": bias.contiguous(), "y": y}
        launch(norm_kernel, programs, x, tensors, numbers)
    return y


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm` from that of its result; mean and variance are computed again.

    Args:
        grad: x's shape.
        x, weight, bias, eps: as given to `layer_norm`.

    Returns:
        The gradients of x, in x's dtype, of weight and of bias (C,), added up in float32, on one kind of card always in
        the same order, and returned in the dtype of each.
    """
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    programs, numbers = _plan_backward(x.shape, eps, multiprocessors(x), x.device.type == "cuda")
    parts = x.new_empty((programs, 2, x.shape[-1]), dtype=torch.float32)
    if programs:
        tensors = {"x": x, "grad": grad, "weight": weight.contiguous(), "grad_x": grad_x, "parts": parts}
        launch(norm_backward_kernel, programs, x, tensors, numbers)
    grad_weight, grad_bias = parts[:, 0].sum(0), parts[:, 1].sum(0)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _residents(options: dict[str, int]) -> tuple[int, int]:
    """How many programs of gradients a multiprocessor is given, and how many registers a thread may have for that.

    They all run at a time, since each leaves a part of the parameters' gradients. Chosen by what the compiler makes of
    it; not timed on a card.
    """
    warps, registers = (16, 128) if options["PARTS"] <= 4 else (8, 255)
    return warps // options["num_warps"], registers


@functools.lru_cache(512)
def _plan(shape: Sequence[int], eps: float) -> tuple[int, Numbers]:
    """Programs of the kernel and what it is given beside tensors."""
    rows, blocks, options = _cut(shape)
    return blocks, Numbers(options, rows=rows, eps=eps)


@functools.lru_cache(512)
def _plan_backward(shape: Sequence[int], eps: float, cores: int, on_card: bool) -> tuple[int, Numbers]:
    """The same for gradients, on a card of so many multiprocessors."""
    rows, blocks, options = _cut(shape)
    resident, registers = _residents(options)
    if on_card and not torch.version.hip:
        options["maxnreg"] = registers
    share = max(ceiling(blocks, resident * cores), 1)
    return ceiling(blocks, share), Numbers(options, rows=rows, share=share, eps=eps)


def _cut(shape: Sequence[int]) -> tuple[int, int, dict[str, int]]:
    """How many rows, how many times as many as a program takes at a time, and what kernels are compiled for."""
    channels, warps = shape[-1], 4
    # A row has 8 to 32 lanes of a warp, the most of which none is idle if there are so many, or all lanes of all warps:
    # a thread has at most six parts of it, whose gradients fit into registers.
    lanes = math.gcd(channels, 128)
    if lanes < 32:
        lanes = min(1 << (channels - 1).bit_length(), 128)
    while lanes < 128 and ceiling(channels, lanes) > 6:
        lanes *= 2
    if channels > 6 * 128:
        warps = 4 if channels <= 6 * 512 else 8
        lanes = 128 * warps
    together, rows = warps * 128 // lanes, math.prod(shape[:-1])
    options = {"CHANNELS": channels, "ROWS": together, "PARTS": ceiling(channels, lanes), "LANES": lanes}
    return rows, ceiling(rows, together), options | {"num_warps": warps}
