"""Inference on the CPU with weights that stay in the layout of oneDNN's kernels, and activations fused into products.

torch brings a layer's weight into its kernels' layout again at every call, which for one image takes longer than some
of the products themselves. Here that is done once, and the copy is kept for as long as the layer lives, as
torch.compile does when it freezes a model.

A copy is used only where it is known to be right: in evaluation without gradients, for plain layers without hooks,
outside of every kind of tracing, and while the weight is at the same address and version and has the same values at
some places (a write through `weight.data` leaves the version as it was). Everything else calls the layer. Under
`torch.backends.mkldnn.flags(enabled=False)` no copy is made or used.
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
from vmamba.ops.registration import runs_eagerly

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "gelu": F.gelu, "swish": F.silu}
_PLACES = 64


class Caller(Protocol):
    """Calls a layer and then an activation: "none", "gelu" or "swish"."""

    def __call__(self, layer: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
        """activation(layer(x))"""


def caller(module: nn.Module, x: Tensor) -> Caller:
    """How the layers of `module`, Linear and GridConv2d, are best called in a forward pass with the input `x`."""
    if torch.is_grad_enabled() or module.training or not runs_eagerly(x) or x.device.type != "cpu" or not x.numel():
        return call
    dtype = autocast_dtype(x)
    if dtype not in _packable_dtypes() or not torch.backends.mkldnn.enabled:
        return call
    return functools.partial(_call_packed, dtype, torch.is_autocast_enabled("cpu"))


def call(layer: nn.Module, x: Tensor, activation: str = "none") -> Tensor:
    """The layer as it is, then the activation."""
    return _ACTIVATIONS[activation](layer(x))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias for (M, C) and (C', C) on the CPU, by oneDNN, whose products are faster; without autograd."""
    if x.dtype not in _packable_dtypes() or not torch.backends.mkldnn.enabled or not x.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes with `x` on the CPU."""
    is_cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether calling `layer` does what the class `kind` does and nothing else: no subclass, no hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and not _has_any_global_hook()


def _call_packed(dtype: torch.dtype, casts: bool, layer: Any, x: Tensor, activation: str = "none") -> Tensor:
    """The layer in `dtype` with a packed weight where it is a plain one; `casts` says that autocast is on."""
    is_linear = is_plain(layer, nn.Linear)
    if not is_linear and not is_plain(layer, GridConv2d):
        return call(layer, x, activation)
    weight, channels = layer.weight, layer.in_features if is_linear else layer.in_channels
    if type(weight) is not nn.Parameter or weight.is_inference() or weight.device.type != "cpu":
        return call(layer, x, activation)
    if x.shape[-1] != channels or not (casts or weight.dtype == dtype):
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


@functools.cache
def _packable_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


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
