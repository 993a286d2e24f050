"""A layer's product with its weight in one pass over memory (`csrc/products.cpp`).

The weight is read where it is, at every call: nothing is kept between calls. The function needs the library
(`reason_unavailable`), is not recorded for autograd, and is for callers that have made sure that nobody wants that.

Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends.native.layers import require_native, vector
from vmamba.ops.backends.native.library import compute_function, fields, is_fast, kernels, pointer, reason_unavailable

__all__ = ["linear", "reason_unavailable", "wins"]


class _Product(ctypes.Structure):
    """`struct Product` of csrc/products.h."""

    _fields_ = fields(
        sizes="rows inputs outputs",
        pointers="x weight bias residual y",
        flags="bfloat16 weight_bfloat16 y_bfloat16 gelu threads",
    )


_call_linear = compute_function("vmamba_linear", _Product)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """activation(x · weightᵀ + bias) + residual, added up in float32.

    Args:
        x: (..., K), float32 or bfloat16.
        weight: (N, K), x's dtype, or float32 where x is bfloat16: its values are then rounded to bfloat16 as they are
            read, as autocast rounds them.
        bias: (N,) or None, float32 or bfloat16; added in float32.
        activation: "none", or "gelu", the exact one.
        residual: (..., N) or None, x's dtype, or float32 where x is bfloat16.

    Returns:
        (..., N) in the residual's dtype, without one in x's, contiguous.

    Raises:
        TypeError: a dtype other than these.
        ValueError: a shape that does not fit, an unknown activation, or a tensor that is not on the CPU.
        RuntimeError: the library is missing, or memory ran out.
    """
    require_native("x", x)
    require_native("weight", weight)
    checks.ndim("weight", weight, 2, "(N, K)")
    outputs, inputs = weight.shape
    checks.shape("x", x, (*x.shape[:-1], inputs), "(..., K)")
    _same_or_float32("weight", weight, x)
    offset = vector("bias", bias, outputs)
    if activation not in ("none", "gelu"):
        raise ValueError(f'activation is {activation!r}; expected "none" or "gelu"')
    x, weight = x.contiguous(), weight.contiguous()
    if residual is not None:
        require_native("residual", residual)
        checks.shape("residual", residual, (*x.shape[:-1], outputs), "(..., N)")
        _same_or_float32("residual", residual, x)
        residual = residual.contiguous()
    y = x.new_empty((*x.shape[:-1], outputs), dtype=x.dtype if residual is None else residual.dtype)
    if count := y.numel():
        _call_linear(
            _Product(
                rows=count // outputs, inputs=inputs, outputs=outputs, x=x.data_ptr(), weight=pointer(weight),
                bias=None if offset is None else pointer(offset), y=y.data_ptr(),
                residual=None if residual is None else residual.data_ptr(), bfloat16=x.dtype is torch.bfloat16,
                weight_bfloat16=weight.dtype is torch.bfloat16, y_bfloat16=y.dtype is torch.bfloat16,
                gelu=activation == "gelu", threads=torch.get_num_threads(),
            )
        )  # fmt: skip
    return y


def wins(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> bool:
    """Whether `linear` is faster than oneDNN, which it is for nearly every shape on the processors it was tried on.

    Args:
        rows: of x, all dimensions but the last together.
        in_features: K.
        out_features: N.
        dtype: of x.

    Returns:
        False where the library is missing or has only its slowest kernels, for products in bfloat16 where only oneDNN
        uses the processor's matrix unit (AMX), and where nothing could be read as it lies: many rows of an odd number
        of bfloat16.
    """
    if not rows * in_features * out_features or not multiplies_fast(dtype):
        return False
    return dtype is torch.float32 or in_features % 2 == 0 or rows < out_features


@torch.compiler.assume_constant_result
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether there are shapes for which `linear` is faster than oneDNN."""
    if dtype is torch.bfloat16:
        return is_fast() and (kernels() == "amx_bf16" or not torch.cpu._is_amx_tile_supported())
    return is_fast() and dtype is torch.float32


def _same_or_float32(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype is not x.dtype and value.dtype is not torch.float32:
        raise TypeError(f"{name} has dtype {value.dtype}; expected x's, {x.dtype}, or float32")
