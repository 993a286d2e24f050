"""A VSS block of inference in one call (`csrc/block.cpp`).

The function needs the library (`reason_unavailable`), is not recorded for autograd, and is for callers that have made
sure that nobody wants that. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmamba.ops.backends.native.library import compute_function, fields, pointer, reason_unavailable
from vmamba.ops.backends.native.products import wins
from vmamba.ops.backends.native.scan import route_bits

__all__ = ["Affine", "Scan", "Told", "describe", "reason_unavailable", "vss_block"]

# Values of the widest layer that are computed at a time; 0 for as many as the kernel takes.
_STRETCH = 0


class Affine(NamedTuple):
    """The parameters of a linear layer, of a convolution or, with its eps, of a LayerNorm."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float = 0.0

    @classmethod
    def of(cls, layer: Any) -> Affine:
        """Those that a module has now."""
        return cls(layer.weight, layer.bias, layer.__dict__.get("eps", 0.0))  # a module looks long for what it has not


class Scan(NamedTuple):
    """The parameters of SS2D's scans, as `vmamba.ops.ss2d_scan` takes them, and a pattern along rows and columns."""

    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor
    A: Tensor
    D: Tensor
    pattern: str


class _Block(ctypes.Structure):
    """`struct Block` of csrc/block.h."""

    _fields_ = fields(
        sizes="batch height width channels inner hidden states rank routes stretch",
        pointers="route_bits x norm1_weight norm1_bias in_weight in_bias conv_weight conv_bias x_weight dt_weight"
        " dt_bias A D norm_weight norm_bias out_weight out_bias norm2_weight norm2_bias fc1_weight fc1_bias fc2_weight"
        " fc2_bias y",
        floats="norm1_eps norm_eps norm2_eps",
        flags="bfloat16 low_products low_in low_out low_fc1 low_fc2 low_parameters gated threads",
    )


_call_block = compute_function("vmamba_block", _Block)


class _UnfitError(Exception):
    """The call is not one that the kernel knows."""


def vss_block(
    x: Tensor,
    norm1: Affine,
    in_proj: Affine,
    conv: Affine,
    scan: Scan,
    norm: Affine,
    out_proj: Affine,
    mlp: Sequence[Affine] = (),
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """x + SS2D(LayerNorm(x)), then of that x + MLP(LayerNorm(x)), the exact GELU in between.

    Args:
        x: (B, H, W, C), float32, or bfloat16 where `dtype` is; left as it is.
        norm1: before SS2D, (C,).
        in_proj: (D, C), with a gate (2D, C).
        conv: depthwise, (D, 1, 3, 3).
        scan: of D channels.
        norm: after the scans, (D,).
        out_proj: (C, D).
        mlp: LayerNorm (C,), weights (M, C) and (C, M), or nothing.
        gated: whether the second half of in_proj makes a gate.
        dtype: of the products and of what lies between them, float32 or bfloat16. Parameters have this dtype or, beside
            bfloat16, float32.

    Returns:
        (B, H, W, C) in the dtype of x, contiguous; None where shapes or dtypes are not these, the scans have no state
        or no rank, or products of this size are faster elsewhere.

    Raises:
        RuntimeError: memory ran out.
    """
    told = describe(x, norm1, in_proj, conv, scan, norm, out_proj, mlp, gated, dtype)
    return None if told is None else told(x, scan.A)


class Told:
    """What the kernel is told of a block, for images of one shape.

    Attributes:
        lasts: whether it is true for as long as the parameters stay where they are, and are as they are.
    """

    def __init__(self, block: _Block, keep: Sequence[Tensor]) -> None:
        self.lasts = not keep
        self._block, self._keep = block, keep

    def __call__(self, x: Tensor, A: Tensor) -> Tensor:
        """The result for an image; the scan's A is given each time, since it is computed from a parameter."""
        image, decay = x.contiguous(), A.float().contiguous()
        y = torch.empty_like(image)
        block = _Block.from_buffer_copy(self._block)  # another thread may be calling
        block.x, block.A, block.y = pointer(image), pointer(decay), y.data_ptr()
        block.threads = torch.get_num_threads()
        _call_block(block)
        return y


def describe(
    x: Tensor, norm1: Affine, in_proj: Affine, conv: Affine, scan: Scan, norm: Affine, out_proj: Affine,
    mlp: Sequence[Affine], gated: bool, dtype: torch.dtype,
) -> Told | None:  # fmt: skip
    """What `vss_block` tells the kernel; None where it gives None."""
    keep: list[Tensor] = []
    try:
        return Told(_described(keep, x, norm1, in_proj, conv, scan, norm, out_proj, mlp, gated, dtype), keep)
    except _UnfitError:
        return None


def _described(
    keep: list[Tensor], x: Tensor, norm1: Affine, in_proj: Affine, conv: Affine, scan: Scan, norm: Affine,
    out_proj: Affine, mlp: Sequence[Affine], gated: bool, dtype: torch.dtype,
) -> _Block:  # fmt: skip
    """All but the image, A and the result; `keep` is given what was made for the call."""
    if x.ndim != 4 or not x.numel() or x.dtype not in (dtype, torch.float32) or in_proj.weight is None:
        raise _UnfitError
    channels, rows, inner = x.shape[-1], x.numel() // x.shape[-1], len(in_proj.weight) // (2 if gated else 1)
    routes, states, rank = scan.A.shape[0], scan.A.shape[-1], scan.dt_proj_weight.shape[-1]
    if not states * rank:
        raise _UnfitError

    def address(value: Tensor | None, *shape: int) -> int | None:
        if value is None:
            return None
        if value.shape != shape or value.dtype not in (torch.float32, dtype) or not value.is_cpu:
            raise _UnfitError
        if not value.is_contiguous():
            value = value.detach().contiguous()
            keep.append(value)
        return pointer(value)

    def weight(layer: Affine, outputs: int, inputs: int) -> int | None:
        if layer.weight is None or not wins(rows, inputs, outputs, dtype):
            raise _UnfitError
        return address(layer.weight, outputs, inputs)

    def is_low(value: Tensor | None) -> bool:
        return value is not None and value.dtype is torch.bfloat16

    if scan.A.shape != (routes, inner, states) or not scan.A.is_cpu:
        raise _UnfitError
    norm2, fc1, fc2 = mlp or (Affine(None, None),) * 3
    batch, height, width, _ = x.shape
    wide, hidden = (2 if gated else 1) * inner, 0 if fc1.weight is None else len(fc1.weight)
    block = _Block(
        batch=batch, height=height, width=width, channels=channels, inner=inner, hidden=hidden, states=states,
        rank=rank, routes=routes, stretch=_STRETCH,
        route_bits=route_bits(scan.pattern).data_ptr(),
        in_weight=weight(in_proj, wide, channels), out_weight=weight(out_proj, channels, inner),
        low_in=is_low(in_proj.weight), low_out=is_low(out_proj.weight),
        norm1_eps=norm1.eps, norm_eps=norm.eps, norm2_eps=norm2.eps,
        bfloat16=is_low(x), low_products=dtype is torch.bfloat16, gated=gated,
    )  # fmt: skip
    if mlp:
        block.fc1_weight, block.low_fc1 = weight(fc1, hidden, channels), is_low(fc1.weight)
        block.fc2_weight, block.low_fc2 = weight(fc2, channels, hidden), is_low(fc2.weight)
    smalls: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (  # in the order of csrc/block.cpp
        ("norm1_weight", norm1.weight, (channels,)),
        ("norm1_bias", norm1.bias, (channels,)),
        ("in_bias", in_proj.bias, (wide,)),
        ("conv_weight", conv.weight, (inner, 1, 3, 3)),
        ("conv_bias", conv.bias, (inner,)),
        ("x_weight", scan.x_proj_weight, (routes, rank + 2 * states, inner)),
        ("dt_weight", scan.dt_proj_weight, (routes, inner, rank)),
        ("dt_bias", scan.dt_proj_bias, (routes, inner)),
        ("D", scan.D, (routes, inner)),
        ("norm_weight", norm.weight, (inner,)),
        ("norm_bias", norm.bias, (inner,)),
        ("out_bias", out_proj.bias, (channels,)),
        ("norm2_weight", norm2.weight, (channels,)),
        ("norm2_bias", norm2.bias, (channels,)),
        ("fc1_bias", fc1.bias, (hidden,)),
        ("fc2_bias", fc2.bias, (channels,)),
    )
    for i, (name, value, shape) in enumerate(smalls):
        setattr(block, name, address(value, *shape))
        block.low_parameters |= is_low(value) << i
    return block
