"""Chains of layers in one pass over memory, on the CPU.

The functions are those of `csrc/layers.cpp`: they compute in float32 and need the CPU kernel's library
(`reason_unavailable`). None of them is recorded for autograd or seen by a tracer; they are for callers that have made
sure that neither is wanted. Images and rows are float32 or bfloat16, and results have their dtype; parameters are of
either dtype. Inputs that are not contiguous are copied.

Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends import native

_POINTER, _SIZE, _FLAG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
# Below this many values, waking other threads takes longer than the work.
_VALUES_FOR_THREADS = 16384
# The convolution works on bands of at most so many rows: the split fixes the order in which gradients are added up.
_BAND_ROWS = 16
_TAPS = 9


def reason_unavailable() -> str | None:
    """Why the functions of this module cannot be called, or None when they can."""
    return native.unavailable(torch.device("cpu"))


def _function(name: str, *arguments: type, result: type | None = None) -> Callable[..., Any]:
    library = native.library()
    if library is None:

        def missing(*_: object) -> None:
            raise RuntimeError(reason_unavailable())

        return missing
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, result
    return function


_call_layer_norm = _function("vmamba_layer_norm", *4 * (_POINTER,), _SIZE, _SIZE, _FLOAT, _FLAG, _FLAG)
_call_depthwise_silu = _function("vmamba_depthwise_silu", *4 * (_POINTER,), *5 * (_SIZE,), _FLAG, _FLAG)
_call_depthwise_silu_backward = _function(
    "vmamba_depthwise_silu_backward", *6 * (_POINTER,), *5 * (_SIZE,), _FLAG, _FLAG, result=_FLAG
)
_call_gelu = _function("vmamba_gelu", _POINTER, _POINTER, _SIZE, _FLAG, _FLAG)
_call_gelu_backward = _function("vmamba_gelu_backward", *4 * (_POINTER,), _SIZE, _FLAG, _FLAG)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, overwrite: bool = False
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., C), float32 or bfloat16.
        weight: (C,) or None for 1, float32 or bfloat16.
        bias: (C,) or None for 0, float32 or bfloat16.
        eps: added to the variance.
        overwrite: write the result to the memory of x (where that is contiguous), whose values are lost.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        TypeError: a dtype other than float32 and bfloat16.
        ValueError: a shape that does not fit, or a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    is_low = _is_bfloat16("x", x)
    if not x.ndim:
        raise ValueError("x has no dimensions; expected (..., C)")
    size = x.shape[-1]
    scale, offset = _vector("weight", weight, size), _vector("bias", bias, size)
    x = x.contiguous()
    y = x if overwrite else torch.empty_like(x)
    if count := x.numel():
        _call_layer_norm(
            x.data_ptr(), _address(scale), _address(offset), y.data_ptr(), count // size, size, eps, is_low,
            _threads(count),
        )  # fmt: skip
    return y


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a depthwise 3×3 convolution with stride 1 and padding 1.

    Args:
        x: (B, H, W, C), float32 or bfloat16.
        weight: (C, 1, 3, 3), float32 or bfloat16.
        bias: (C,) or None, float32 or bfloat16.

    Returns:
        (B, H, W, C) in x's dtype, contiguous.

    Raises:
        TypeError: a dtype other than float32 and bfloat16.
        ValueError: a shape that does not fit, or a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    is_low = _is_bfloat16("x", x)
    checks.ndim("x", x, 4, "(B, H, W, C)")
    batch, height, width, channels = x.shape
    filters, offset = _filter(weight, channels), _vector("bias", bias, channels)
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        _call_depthwise_silu(
            x.data_ptr(), filters.data_ptr(), _address(offset), y.data_ptr(), batch, height, width, channels,
            _bands(height), is_low, _threads(count),
        )  # fmt: skip
    return y


def depthwise_silu_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `depthwise_silu` from that of its result; the convolution is computed again.

    Args:
        grad_u: (B, H, W, C), x's dtype.
        x: (B, H, W, C), float32 or bfloat16.
        weight: (C, 1, 3, 3), float32 or bfloat16.
        bias: (C,) or None, float32 or bfloat16.

    Returns:
        The gradients of x, in x's dtype, of weight (C, 1, 3, 3) and of the bias (C,), added up in float32 and returned
        in the dtype of weight and bias (without a bias: of weight).

    Raises:
        TypeError: a dtype other than float32 and bfloat16, or grad_u's is not x's.
        ValueError: a shape that does not fit, or a tensor that is not on the CPU.
        RuntimeError: the library is missing, or memory ran out.
    """
    is_low = _is_bfloat16("x", x)
    checks.ndim("x", x, 4, "(B, H, W, C)")
    grad_u = _gradient("grad_u", grad_u, "x", x)
    batch, height, width, channels = x.shape
    filters, offset = _filter(weight, channels), _vector("bias", bias, channels)
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    if count := x.numel():
        bands, size = _bands(height), channels * _TAPS
        parts = x.new_empty((batch * bands, size + channels), dtype=torch.float32)
        if _call_depthwise_silu_backward(
            grad_u.data_ptr(), x.data_ptr(), filters.data_ptr(), _address(offset), grad_x.data_ptr(),
            parts.data_ptr(), batch, height, width, channels, bands, is_low, _threads(count),
        ):  # fmt: skip
            raise RuntimeError(f"depthwise_silu_backward: out of memory for an image of {height}×{width} pixels")
        # No views: those would keep the parts of all images.
        grad_weight, grad_bias = parts[0, :size].clone().view(filters.shape), parts[0, size:].clone()
    else:
        grad_weight, grad_bias = torch.zeros_like(filters), filters.new_zeros(channels)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to((weight if bias is None else bias).dtype)


def gelu(h: Tensor, overwrite: bool = False) -> Tensor:
    """The exact GELU, h·Φ(h) with Φ the normal distribution, to within 2e-7·max(1, |h|).

    Args:
        h: any shape, float32 or bfloat16.
        overwrite: write the result to the memory of h (where that is contiguous), whose values are lost.

    Returns:
        h's shape and dtype, contiguous.

    Raises:
        TypeError: a dtype other than float32 and bfloat16.
        ValueError: a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    is_low = _is_bfloat16("h", h)
    h = h.contiguous()
    y = h if overwrite else torch.empty_like(h)
    if count := h.numel():
        _call_gelu(h.data_ptr(), y.data_ptr(), count, is_low, _threads(count))
    return y


def gelu_backward(grad: Tensor, h: Tensor, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """`gelu(h)` and the gradient of h, in one pass.

    Args:
        grad: of the result of `gelu`, shape and dtype of h.
        h: any shape, float32 or bfloat16.
        overwrite: write the gradient of h to the memory of `grad` (where that is contiguous), whose values are lost.

    Returns:
        gelu(h) and the gradient of h, both in h's shape and dtype, contiguous.

    Raises:
        TypeError: a dtype other than float32 and bfloat16, or grad's is not h's.
        ValueError: a shape that does not fit, or a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    is_low = _is_bfloat16("h", h)
    grad = _gradient("grad", grad, "h", h)
    h = h.contiguous()
    y, grad_h = torch.empty_like(h), grad if overwrite else torch.empty_like(h)
    if count := h.numel():
        _call_gelu_backward(
            grad.data_ptr(), h.data_ptr(), y.data_ptr(), grad_h.data_ptr(), count, is_low, _threads(count)
        )
    return y, grad_h


# --- arguments -------------------------------------------------------------------------------------------------------


def _is_bfloat16(name: str, value: Tensor) -> bool:
    """Whether a value is in bfloat16; raises where it is neither that nor float32, or not on the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
    if not value.is_cpu:
        raise ValueError(f"{name} is on {value.device}; the fused layers run on the CPU only")
    dtype = value.dtype
    if dtype is torch.float32:
        return False
    if dtype is torch.bfloat16:
        return True
    raise TypeError(f"{name} has dtype {dtype}; the fused layers support float32 and bfloat16")


def _parameter(name: str, value: Tensor) -> Tensor:
    """In float32, contiguous."""
    return (value.detach().float() if _is_bfloat16(name, value) else value).contiguous()


def _vector(name: str, value: Tensor | None, size: int) -> Tensor | None:
    if value is None:
        return None
    checks.shape(name, value, (size,), "(C,)")
    return _parameter(name, value)


def _filter(weight: Tensor, channels: int) -> Tensor:
    checks.shape("weight", weight, (channels, 1, 3, 3), "(C, 1, 3, 3)")
    return _parameter("weight", weight)


def _gradient(name: str, grad: Tensor, of: str, value: Tensor) -> Tensor:
    _is_bfloat16(name, grad)
    if grad.dtype is not value.dtype:
        raise TypeError(f"{name} has dtype {grad.dtype}; expected that of {of}, {value.dtype}")
    checks.shape(name, grad, value.shape, f"the shape of {of}")
    return grad.contiguous()


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def _bands(height: int) -> int:
    return -(-height // _BAND_ROWS)


def _threads(values: int) -> int:
    return torch.get_num_threads() if values > _VALUES_FOR_THREADS else 1
