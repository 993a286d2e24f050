"""How the modules call their layers on the CPU: with packed weights, in fewer passes over memory, in less of it.

torch brings a weight into the layout of its kernels again at every call, which for one image takes longer than some of
the products themselves. In inference that is done once here, and the packed copy is kept for as long as the layer
lives, as torch.compile does when it freezes a model. Norms and activations are fused (`vmamba.ops.fused`).

Each of these ways is taken only where it is known to give the layer's own result: with plain layers without hooks and
outside of every kind of tracing; a packed copy, while the weight is at the same address and version and has the same
values at some places (a write through `weight.data` leaves the version as it was). Everything else calls the layer.
Under `torch.backends.mkldnn.flags(enabled=False)` no copy is made or used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vmamba.nn.conv import GridConv2d
from vmamba.ops import fused
from vmamba.ops.registration import runs_eagerly

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "gelu": F.gelu, "swish": F.silu}
_PLACES = 64
# Values of a layer that are computed at a time, 8 MB in float32. A larger tensor costs more to obtain than to fill: the
# operating system has to clear its pages first.
_STRETCH = 2**21


# --- which way -------------------------------------------------------------------------------------------------------


class Caller(Protocol):
    """Calls a layer and then an activation: "none", "gelu" or "swish"."""

    def __call__(self, layer: nn.Module, x: Tensor, activation: str = "none", overwrite: bool = False) -> Tensor:
        """activation(layer(x)); with `overwrite` the memory of `x` may be used, which nobody else holds."""


def caller(module: nn.Module, x: Tensor) -> Caller:
    """How the layers of `module` are best called in a forward pass with the input `x`."""
    if not is_eager(x) or not x.numel():
        return call
    dtype = autocast_dtype(x)
    if dtype not in (torch.float32, torch.bfloat16):
        return call
    if torch.is_grad_enabled():
        return functools.partial(_call_in_training, dtype)
    return call if module.training else functools.partial(_call_in_inference, dtype)


def call(layer: nn.Module, x: Tensor, activation: str = "none", overwrite: bool = False) -> Tensor:
    """The layer as it is, then the activation."""
    return _ACTIVATIONS[activation](layer(x))


def is_eager(x: Tensor) -> bool:
    """Whether what is called with `x` is computed at once on the CPU, and nothing traces or transforms it."""
    return runs_eagerly(x) and x.device.type == "cpu"


def is_inference(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` evaluates `x` at once on the CPU, and nobody will ask for gradients."""
    return not torch.is_grad_enabled() and not module.training and is_eager(x)


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether calling `layer` does what the class `kind` does and nothing else: no subclass, no hooks."""
    return type(layer) is kind and not _has_hooks(layer) and not _has_any_global_hook()


def is_unwatched(module: nn.Module) -> bool:
    """Whether no hook sees what goes into or comes out of `module` and the modules in it."""
    return not any(map(_has_hooks, module.modules())) and not _has_any_global_hook()


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes with `x` on the CPU."""
    is_cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


@functools.cache
def _packable_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


def _can_fuse(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16) and fused.reason_unavailable() is None


def _is_depthwise(layer: GridConv2d) -> bool:
    """Whether it is the convolution that `fused.depthwise_silu` knows."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    is_small = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros")
    return is_small and layer.groups == layer.in_channels == layer.out_channels


# --- stretches -------------------------------------------------------------------------------------------------------


def stretches(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Rows (M, C) in as few equal parts as keep a layer of `width` values a row to `_STRETCH` values."""
    return rows.tensor_split(max(1, -(-len(rows) * width // _STRETCH)))


def in_stretches(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """function(x) for a function of single pixels, (..., C) to (..., C'), stretch by stretch; without autograd.

    `width` is how many values of a pixel the widest layer in the function has.
    """
    parts = stretches(x.flatten(0, -2), width)
    if len(parts) == 1:
        return function(x)
    first = function(parts[0])
    y = first.new_empty(*x.shape[:-1], first.shape[-1])
    results = stretches(y.flatten(0, -2), width)
    results[0].copy_(first)
    for part, result in zip(parts[1:], results[1:], strict=True):
        result.copy_(function(part))
    return y


# --- inference -------------------------------------------------------------------------------------------------------


def _call_in_inference(
    dtype: torch.dtype, layer: Any, x: Tensor, activation: str = "none", overwrite: bool = False
) -> Tensor:
    """The layer in `dtype`, its weight packed where that is possible."""
    if is_plain(layer, nn.LayerNorm):
        if len(layer.normalized_shape) > 1 or not _can_fuse(x):
            return call(layer, x, activation)
        y = fused.layer_norm(x, layer.weight, layer.bias, layer.eps, overwrite)
        return fused.gelu(y, overwrite=True) if activation == "gelu" else _ACTIVATIONS[activation](y)
    is_linear = is_plain(layer, nn.Linear)
    if not is_linear and not is_plain(layer, GridConv2d):
        return call(layer, x, activation)
    weight, channels = layer.weight, layer.in_features if is_linear else layer.in_channels
    is_own = type(weight) is nn.Parameter and not weight.is_inference() and weight.device.type == "cpu"
    if not is_own or x.shape[-1] != channels or not (weight.dtype == dtype or torch.is_autocast_enabled("cpu")):
        return call(layer, x, activation)
    if not is_linear and activation == "swish" and _is_depthwise(layer) and _can_fuse(x):
        return fused.depthwise_silu(x.to(dtype), weight, layer.bias)
    if dtype not in _packable_dtypes() or not torch.backends.mkldnn.enabled:
        return call(layer, x, activation)

    x, bias = x.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    if is_linear:
        packed = _pack(layer, dtype, lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, None))
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")
    x = x.permute(0, 3, 1, 2)
    geometry, size = (layer.padding, layer.stride, layer.dilation, layer.groups), tuple(x.shape)
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    packed = _pack(layer, dtype, lambda weight: reorder(weight, *geometry, size), size)
    y = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, activation, [], "none")
    return y.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class _Copy:
    """A packed weight, and what tells whether the layer's own is still the one it was made from.

    `places` is a part of the layer's own memory, `values` what it held.
    """

    packed: Tensor
    version: tuple[object, ...]
    places: Tensor
    values: Tensor


_copies: WeakKeyDictionary[nn.Module, dict[torch.dtype, _Copy]] = WeakKeyDictionary()


def _pack(layer: Any, dtype: torch.dtype, reorder: Callable[[Tensor], Tensor], size: tuple[int, ...] = ()) -> Tensor:
    """The kept copy of the layer's weight, made now if there is none or if the weight or the image's size changed."""
    weight = layer.weight
    version = (weight.data_ptr(), weight._version, size)
    copies = _copies.setdefault(layer, {})
    copy = copies.get(dtype)
    if copy is None or copy.version != version or not torch.equal(copy.places, copy.values):
        weight = weight.detach()
        places = weight.as_strided((min(_PLACES, weight.numel()),), (max(1, weight.numel() // _PLACES),))
        copies[dtype] = copy = _Copy(reorder(weight.to(dtype)), version, places, places.clone())
    return copy.packed


# --- training --------------------------------------------------------------------------------------------------------


def _call_in_training(
    dtype: torch.dtype, layer: Any, x: Tensor, activation: str = "none", overwrite: bool = False
) -> Tensor:
    """The layer with faster products, or in one pass with its activation; the rest as it is."""
    if is_plain(layer, nn.Linear) and activation == "none" and x.shape[-1] == layer.in_features:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        y = _Linear.apply(x.to(dtype).flatten(0, -2), layer.weight.to(dtype), bias)
        return y.view(*x.shape[:-1], -1)
    if activation == "swish" and is_plain(layer, GridConv2d) and _is_depthwise(layer) and _can_fuse(x):
        return _DepthwiseSilu.apply(x.to(dtype), layer.weight, layer.bias)
    return call(layer, x, activation)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return differentiable_gradients(F.linear, inputs, needed, grad)
        x, weight, _ = inputs
        return (
            product(grad, weight.t()) if needed[0] else None,
            grad.t() @ x if needed[1] else None,
            grad.sum(0) if needed[2] else None,
        )


class _DepthwiseSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return fused.depthwise_silu(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled():
            grad_x, grad_weight, grad_bias = fused.depthwise_silu_backward(grad, x, weight, bias)
            return grad_x, grad_weight, None if bias is None else grad_bias

        def plainly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            image, low_bias = x.permute(0, 3, 1, 2), None if bias is None else bias.to(x.dtype)
            y = F.conv2d(image, weight.to(x.dtype), low_bias, padding=1, groups=len(weight))
            return F.silu(y.permute(0, 2, 3, 1))

        return differentiable_gradients(plainly, (x, weight, bias), ctx.needs_input_grad, grad)


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of function(*inputs) for the inputs that need one, by operations that can be differentiated again."""
    wanted = [value for value, is_needed in zip(inputs, needed, strict=True) if is_needed and value is not None]
    grads = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(grads) if is_needed else None for is_needed in needed)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias for (M, C) and (C', C), by oneDNN, which is faster than F.linear here; without autograd."""
    if x.dtype not in _packable_dtypes() or not torch.backends.mkldnn.enabled or not x.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


def gelu(h: Tensor) -> Tensor:
    """The exact GELU of a tensor on the CPU; without autograd."""
    return fused.gelu(h) if h.dtype == torch.float32 and _can_fuse(h) else F.gelu(h)


def gelu_backward(grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(h) and the gradient of h, which may take the memory of `grad`; without autograd."""
    if _can_fuse(h):
        return fused.gelu_backward(grad, h, overwrite=True)
    return F.gelu(h), torch.ops.aten.gelu_backward(grad, h)
