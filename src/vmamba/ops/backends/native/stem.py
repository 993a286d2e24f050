"""The stem of inference in one call (`csrc/stem.cpp`).

The function needs the library (`reason_unavailable`), is not recorded for autograd, and is for callers that have made
sure that nobody wants that. Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from vmamba.ops.backends.native.block import Affine
from vmamba.ops.backends.native.library import compute_function, fields, pointer, reason_unavailable
from vmamba.ops.backends.native.products import wins

__all__ = ["conv_stem", "reason_unavailable"]


class _Stem(ctypes.Structure):
    """`struct Stem` of csrc/stem.h."""

    _fields_ = fields(
        sizes="batch channels height width middle outputs stride1 stride2",
        pointers="x weight1 bias1 norm1_weight norm1_bias weight2 bias2 norm2_weight norm2_bias y",
        floats="norm1_eps norm2_eps",
        flags="threads",
    )


_call_stem = compute_function("vmamba_stem", _Stem)


def conv_stem(
    x: Tensor, conv1: Affine, norm1: Affine, conv2: Affine, norm2: Affine, strides: tuple[int, int]
) -> Tensor | None:
    """LayerNorm(convolution(GELU(LayerNorm(convolution(x))))), the exact GELU; both convolutions 3×3 with padding 1.

    Args:
        x: (B, C, H, W), float32, as are all parameters.
        conv1, norm1: (M, C, 3, 3) and (M,).
        conv2, norm2: (N, M, 3, 3) and (N,).
        strides: of the convolutions.

    Returns:
        (B, H', W', N), contiguous, with H' = ⌈⌈H / strides[0]⌉ / strides[1]⌉ and so W'; None where shapes or dtypes are
        not these, or products of this size are faster elsewhere.

    Raises:
        RuntimeError: memory ran out.
    """
    weight1, weight2 = conv1.weight, conv2.weight
    if x.ndim != 4 or not x.numel() or weight1 is None or weight2 is None:
        return None
    batch, channels, height, width = x.shape
    middle, outputs = len(weight1), len(weight2)
    shapes = ((middle, channels, 3, 3), (middle,), (outputs, middle, 3, 3), (outputs,))
    tensors: list[Tensor | None] = [x]
    for layer, shape in zip((conv1, norm1, conv2, norm2), shapes, strict=True):
        if layer.weight is not None and layer.weight.shape != shape:
            return None
        if layer.bias is not None and layer.bias.shape != shape[:1]:
            return None
        tensors += [layer.weight, layer.bias]
    if any(value is not None and (value.dtype is not torch.float32 or not value.is_cpu) for value in tensors):
        return None
    rows, columns = (math.ceil(math.ceil(side / strides[0]) / strides[1]) for side in (height, width))
    if not wins(batch * rows * columns, 9 * middle, outputs, torch.float32):
        return None
    tensors = [None if value is None else value.contiguous() for value in tensors]
    y = torch.empty((batch, rows, columns, outputs), dtype=torch.float32, device="cpu")
    names = ("x", "weight1", "bias1", "norm1_weight", "norm1_bias", "weight2", "bias2", "norm2_weight", "norm2_bias")
    _call_stem(
        _Stem(
            batch=batch, channels=channels, height=height, width=width, middle=middle, outputs=outputs,
            stride1=strides[0], stride2=strides[1], y=y.data_ptr(), norm1_eps=norm1.eps, norm2_eps=norm2.eps,
            threads=torch.get_num_threads(),
            **{name: None if value is None else pointer(value) for name, value in zip(names, tensors, strict=True)},
        )
    )  # fmt: skip
    return y
