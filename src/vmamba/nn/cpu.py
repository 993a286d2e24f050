"""How the layers (`vmamba.nn.layers`) use the fused kernels of the CPU, and when a module may work by stretches.

A layer computes from the parameters that it has at the time of the call: nothing is kept between calls, so there is
nothing that could differ from the layer. Everything unusual (tracing but by torch.compile, transforms, tensor
subclasses, other dtypes and devices: `vmamba.ops.layers.applies`) is left to torch's own layer.

Memory is what costs: a large tensor takes longer to obtain than to fill, since the operating system has to clear its
pages first. Where pixels do not mix, modules that are exactly `as_built` therefore work by `stretches` of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# Values of a layer that are computed at a time, 8 MB in float32.
_STRETCH = 2**21


# --- modules as they were built --------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound=type[nn.Module])


class _Written(NamedTuple):
    """How a class was written: its methods that compute, in it and in all that it inherits from, and its children."""

    names: tuple[str, ...]
    methods: tuple[tuple[Mapping[str, Any], str, Any], ...]  # where one would be, its name, and it or None
    parts: dict[str, Any]
    condition: Callable[[Any], bool] | None  # of a module's settings


_KNOWN: dict[type[nn.Module], _Written] = {}
_METHODS = ("forward", "_conv_forward")  # that compute, of every class

# What modules of these classes, which have no children, must be like.
_CONDITIONS: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.Dropout: lambda module: not (module.training and module.p),
    DropPath: lambda module: not (module.training and module.drop_prob),
    nn.LayerNorm: lambda module: len(module.normalized_shape) == 1,
    nn.GELU: lambda module: module.approximate == "none",
}


def known(kind: Kind) -> Kind:
    """Declare a class, as it stands now, one whose modules can be `as_built`.

    A class with `PARTS`, the class or classes of each of its children, is so only with these children and no others.
    `STEPS` names methods that compute beside `forward`.
    """
    names = (*_METHODS, *getattr(kind, "STEPS", ()))
    places = [vars(base) for base in kind.__mro__[: kind.__mro__.index(nn.Module)]]
    methods = tuple((place, name, place.get(name)) for place in places for name in names)
    condition = next((condition for base, condition in _CONDITIONS.items() if issubclass(kind, base)), None)
    _KNOWN[kind] = _Written(names, methods, getattr(kind, "PARTS", {}), condition)
    return kind


for _kind in (nn.Dropout, nn.Identity, nn.Conv2d, DropPath):
    known(_kind)


def is_unpatched(kind: type[nn.Module]) -> bool:
    """Whether the class is known, and nobody has since replaced a method of it, or of a class it inherits from."""
    written = _KNOWN.get(kind)
    if written is None:
        return False
    for place, name, method in written.methods:  # noqa: SIM110  (every module of every block comes by here)
        if place.get(name) is not method:
            return False
    return True


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module without children is one of exactly this class, with nothing hooked to it or replaced in it.

    It is asked in such a way that torch.compile, which traces it, notices what is hooked or replaced later.
    """
    own = vars(module)
    return (
        type(module) is kind
        and is_unpatched(kind)
        and not _has_any_global_hook()
        and not any(own[name] for name in _HOOKS)
        and not _has_own(module, _METHODS)
        and not module._compiled_call_impl
    )


def as_built(module: nn.Module) -> bool:
    """Whether a module and all in it do what their classes were written to do, deterministically, and nothing else.

    It is false where anything is hooked, replaced by a module of another class, parametrised or patched, also on its
    class, and where dropout or drop path is active.
    """
    return not _has_any_global_hook() and _is_as_built(module, set())


def _is_as_built(module: nn.Module, unpatched: set[type[nn.Module]]) -> bool:
    """The same without hooks on all modules, and with the classes that have been found to be unpatched."""
    kind, own = type(module), vars(module)
    if kind not in unpatched:
        if not is_unpatched(kind):
            return False
        unpatched.add(kind)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    written = _KNOWN[kind]
    if _has_own(module, written.names):
        return False
    if written.condition:
        return written.condition(module)
    for name, child in own["_modules"].items():
        if child is None:
            continue
        is_part = isinstance(child, written.parts.get(name, ())) and not child._compiled_call_impl
        if not is_part or not _is_as_built(child, unpatched):
            return False
    return True


def _has_own(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether one of these methods is replaced in the module itself; torch.compile notices what is replaced later."""
    own = vars(module)
    if not torch.compiler.is_compiling():
        return not own.keys().isdisjoint(names)  # every module of every block comes by here
    for name in names:
        getattr(module, name, None)  # what is looked up is watched, what is found missing in a dictionary is not
        if name in own:
            return True
    return False


# --- stretches -------------------------------------------------------------------------------------------------------


def stretches(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Rows (M, C) in as few equal parts as keep a layer of `width` values a row to `_STRETCH` values."""
    return rows.tensor_split(max(1, -(-len(rows) * width // _STRETCH)))


def in_stretches(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """function(x) for a function of single pixels, stretch by stretch; without autograd.

    Args:
        function: from (..., C) to (..., C').
        x: (..., C).
        width: how many values of a pixel the widest layer in the function has.
    """
    rows = stretches(x.flatten(0, -2), width)
    if len(rows) == 1:
        return function(x)
    part = function(rows[0])
    y = part.new_empty((*x.shape[:-1], part.shape[-1]))
    results = stretches(y.view(-1, part.shape[-1]), width)
    results[0].copy_(part)
    for row, result in zip(rows[1:], results[1:], strict=True):
        result.copy_(function(row))
    return y


# --- convolutions ----------------------------------------------------------------------------------------------------


def is_patchwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution is one that `convolution` and `conv_stem` know: 3×3, padding 1, one stride both ways."""
    geometry = (layer.kernel_size, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), 1, "zeros") and layer.stride[0] == layer.stride[1]


def is_depthwise_silu(layer: nn.Conv2d, channels: int) -> bool:
    """Whether a convolution of (B, H, W, channels) is the one that `depthwise_silu` knows."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    is_small = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros")
    return is_small and layer.groups == layer.in_channels == layer.out_channels == channels
