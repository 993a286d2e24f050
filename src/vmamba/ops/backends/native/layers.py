"""Chains of layers in one pass over memory (`csrc/layers.cpp`).

They compute in float32 and need the library (`reason_unavailable`). None of them is recorded for autograd or seen by a
tracer; they are for callers that have made sure that neither is wanted. Images and rows are float32 or bfloat16, and
results have their dtype; parameters are of either dtype. Inputs that are not contiguous are copied.

Results do not depend on the number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends.native.library import compute_function, fields, pointer, reason_unavailable

__all__ = ["depthwise_silu", "depthwise_silu_backward", "gelu", "gelu_backward", "layer_norm", "reason_unavailable"]

# The convolution's gradients are added up in bands of at most so many rows: the split fixes the order.
_BAND_ROWS = 16
_TAPS = 9


class _Layer(ctypes.Structure):
    """`struct Layer` of csrc/layers.h."""

    _fields_ = fields(
        sizes="batch height width channels bands tasks",
        pointers="x grad weight bias y grad_x grad_weights",
        floats="eps",
        flags="bfloat16 y_bfloat16 threads",
    )


_call_layer_norm = compute_function("vmamba_layer_norm", _Layer)
_call_depthwise_silu = compute_function("vmamba_depthwise_silu", _Layer)
_call_depthwise_silu_backward = compute_function("vmamba_depthwise_silu_backward", _Layer)
_call_gelu = compute_function("vmamba_gelu", _Layer)
_call_gelu_backward = compute_function("vmamba_gelu_backward", _Layer)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., C), float32 or bfloat16.
        weight: (C,) or None for 1, float32 or bfloat16.
        bias: (C,) or None for 0, float32 or bfloat16.
        eps: added to the variance.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        TypeError: a dtype other than float32 and bfloat16.
        ValueError: a shape that does not fit, or a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    require_native("x", x)
    if not x.ndim:
        raise ValueError("x has no dimensions; expected (..., C)")
    size = x.shape[-1]
    scale, offset = vector("weight", weight, size), vector("bias", bias, size)
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        _call_layer_norm(_layer(x, y=y, weight=scale, bias=offset, width=count // size, channels=size, eps=eps))
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
    filters, offset = _convolution(x, weight, bias)
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _call_depthwise_silu(_image_layer(x, y=y, weight=filters, bias=offset))
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
    filters, offset = _convolution(x, weight, bias)
    grad_u = _gradient("grad_u", grad_u, "x", x)
    x = x.contiguous()
    grad_x, channels = torch.empty_like(x), x.shape[-1]
    if x.numel():
        size = channels * _TAPS
        bands = -(-x.shape[1] // _BAND_ROWS)
        parts = x.new_empty((len(x) * bands, size + channels), dtype=torch.float32)
        _call_depthwise_silu_backward(
            _image_layer(x, bands=bands, grad=grad_u, weight=filters, bias=offset, grad_x=grad_x, grad_weights=parts)
        )
        # No views: those would keep the parts of all images.
        grad_weight, grad_bias = parts[0, :size].clone().view(filters.shape), parts[0, size:].clone()
    else:
        grad_weight, grad_bias = torch.zeros_like(filters), filters.new_zeros(channels)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to((weight if bias is None else bias).dtype)


def gelu(h: Tensor) -> Tensor:
    """The exact GELU, h·Φ(h) with Φ the normal distribution, to within 2e-7·max(1, |h|).

    Args:
        h: any shape, float32 or bfloat16.

    Returns:
        h's shape and dtype, contiguous.

    Raises:
        TypeError: a dtype other than float32 and bfloat16.
        ValueError: a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    require_native("h", h)
    h = h.contiguous()
    y = torch.empty_like(h)
    if count := h.numel():
        _call_gelu(_layer(h, y=y, channels=count))
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
    require_native("h", h)
    grad = _gradient("grad", grad, "h", h)
    h = h.contiguous()
    y, grad_h = torch.empty_like(h), grad if overwrite else torch.empty_like(h)
    if count := h.numel():
        _call_gelu_backward(_layer(h, grad=grad, y=y, grad_x=grad_h, channels=count))
    return y, grad_h


# --- arguments -------------------------------------------------------------------------------------------------------


def _layer(x: Tensor, **arguments: Tensor | float | None) -> _Layer:
    """What the library is told: of tensors, where they are. It writes nothing that is not given here."""
    fields = {name: pointer(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    is_low = x.dtype is torch.bfloat16
    threads = torch.get_num_threads()
    return _Layer(x=pointer(x), bfloat16=is_low, y_bfloat16=is_low, threads=threads, **fields)


def _image_layer(x: Tensor, **arguments: Tensor | float | None) -> _Layer:
    batch, height, width, channels = x.shape
    return _layer(x, batch=batch, height=height, width=width, channels=channels, **arguments)


def require_native(name: str, value: Tensor) -> None:
    """Raises where a value is neither in float32 nor in bfloat16, or not on the CPU."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
    if not value.is_cpu:
        raise ValueError(f"{name} is on {value.device}; the fused layers run on the CPU only")
    if value.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{name} has dtype {value.dtype}; the fused layers support float32 and bfloat16")


def _parameter(name: str, value: Tensor) -> Tensor:
    """In float32, contiguous."""
    require_native(name, value)
    return value.detach().float().contiguous()


def vector(name: str, value: Tensor | None, size: int) -> Tensor | None:
    if value is None:
        return None
    checks.shape(name, value, (size,), "(C,)")
    return _parameter(name, value)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The parameters of a convolution of x, in float32."""
    require_native("x", x)
    checks.ndim("x", x, 4, "(B, H, W, C)")
    channels = x.shape[-1]
    checks.shape("weight", weight, (channels, 1, 3, 3), "(C, 1, 3, 3)")
    return _parameter("weight", weight), vector("bias", bias, channels)


def _gradient(name: str, grad: Tensor, of: str, value: Tensor) -> Tensor:
    require_native(name, grad)
    if grad.dtype is not value.dtype:
        raise TypeError(f"{name} has dtype {grad.dtype}; expected that of {of}, {value.dtype}")
    checks.shape(name, grad, value.shape, f"the shape of {of}")
    return grad.contiguous()
