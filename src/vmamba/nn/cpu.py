"""How the layers (`vmamba.nn.layers`) use the fused kernels of the CPU, and when a module may work by stretches.

A layer computes from the parameters that it has at the time of the call. No number of theirs is kept between calls, so
none could differ from the layer's; what a block has told its kernel, sizes and addresses, is told again as long as
`state_of` the block is the same. Everything unusual (tracing but by torch.compile, transforms, tensor subclasses, other
dtypes and devices: `vmamba.ops.layers.applies`) is left to torch's own layer.

Memory is what costs: a large tensor takes longer to obtain than to fill, since the operating system has to clear its
pages first. Where pixels do not mix, modules that are exactly `as_built` therefore work by `stretches` of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from operator import attrgetter, itemgetter
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vmamba.ops.exporting import keeps_layers

# Values of a layer that are computed at a time, 8 MB in float32.
_STRETCH = 2**21


# --- modules as they were built --------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound=type[nn.Module])


class _Written(NamedTuple):
    """How a class was written: its methods that compute, in it and in all that it inherits from, and its children."""

    names: tuple[str, ...]
    methods: tuple[tuple[Mapping[str, Any], str, Any], ...]  # where one would be, its name, and it or None
    parts: dict[str, tuple[type[nn.Module], ...]]  # the classes that each child may have
    condition: Callable[[Any], bool] | None  # of a module's settings
    settings: tuple[str, ...]  # that decide what it computes, beside its parameters and parts
    parameters: tuple[str, ...]


_KNOWN: dict[type[nn.Module], _Written] = {}
_METHODS = ("forward", "_conv_forward", "_call_impl", "__call__")  # that compute, of every class
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl

# Of torch's and timm's classes, as ours name them in SETTINGS and PARAMETERS.
_AFFINE = ("weight", "bias")
_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels")
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: ("normalized_shape", "eps"), nn.GELU: ("approximate",), nn.Conv2d: _CONVOLUTION,
}  # fmt: skip
_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys((nn.Linear, nn.LayerNorm, nn.Conv2d), _AFFINE)

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
    `STEPS` names methods that compute beside `forward`, `SETTINGS` the attributes that they look at, and `PARAMETERS`
    the module's own.
    """

    def told(name: str, of_bases: Mapping[type[nn.Module], tuple[str, ...]]) -> tuple[str, ...]:
        inherited = next((names for base, names in of_bases.items() if issubclass(kind, base)), ())
        return getattr(kind, name, inherited)

    names = (*_METHODS, *getattr(kind, "STEPS", ()))
    places = [vars(base) for base in kind.__mro__[: kind.__mro__.index(nn.Module)]]
    methods = tuple((place, name, place.get(name)) for place in places for name in names)
    condition = next((condition for base, condition in _CONDITIONS.items() if issubclass(kind, base)), None)
    settings, parameters = told("SETTINGS", _SETTINGS), told("PARAMETERS", _PARAMETERS)
    given = getattr(kind, "PARTS", {}).items()
    parts = {name: kinds if isinstance(kinds, tuple) else (kinds,) for name, kinds in given}
    _KNOWN[kind] = _Written(names, methods, parts, condition, settings, parameters)
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
    return type(module) is kind and not module._compiled_call_impl and as_built(module)


def as_built(module: nn.Module) -> bool:
    """Whether a module and all in it do what their classes were written to do, deterministically, and nothing else.

    It is false where anything is hooked, replaced by a module of another class, parametrised or patched, also on its
    class, and where dropout or drop path is active.
    """
    return not _calls_are_changed() and _is_as_built(module, set())


def _calls_are_changed() -> bool:
    """Whether every module is hooked, or called by another function than torch's."""
    if nn.Module.__call__ is not _CALL or nn.Module._call_impl is not _CALL_IMPL:
        return not keeps_layers()  # torch.export puts its own there
    return _has_any_global_hook()


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
        is_part = type(child) in written.parts.get(name, ()) and not child._compiled_call_impl
        if not is_part or not _is_as_built(child, unpatched):
            return False
    for name in written.parts:  # noqa: SIM110  (every module of every block comes by here)
        if own.get(name) is not None:  # a function in a child's place
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


# --- what a module was the last time ---------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """What there is to look at in modules of certain classes, put together in a certain way."""

    methods: tuple[tuple[Mapping[str, Any], str, Any], ...]  # as in _Written, of all classes
    not_own: tuple[tuple[str, ...], ...]  # of each module, what it must not have for itself
    conditions: tuple[tuple[int, Callable[[Any], bool]], ...]  # on which of the modules
    settings: tuple[tuple[int, Callable[[Any], Any]], ...]  # of which, and how they are read from its dictionary
    parameters: tuple[tuple[int, list[str]], ...]  # of which, and their names
    missing: tuple[tuple[int, tuple[str, ...]], ...]  # which of them have none of these children


_LAYOUTS: dict[Hashable, _Layout] = {}
_hooks = [itemgetter(name) for name in _HOOKS]
_own = attrgetter("__dict__")
_dtype, _shape, _layout, _is_cpu = map(attrgetter, ("dtype", "shape", "layout", "is_cpu"))
_PLAIN, _STRIDED = {Tensor, nn.Parameter, type(None)}, {torch.strided}


def state_of(module: nn.Module) -> tuple[Any, ...] | None:
    """All that decides what a module `as_built` computes, but for the numbers in its parameters; None of any other.

    That is classes, settings, and of each parameter where it is and how it lies there. Whoever finds a state equal to
    an earlier one of the same module can tell a kernel again what it was told then. It is asked before every call, so
    it goes through all modules at once in C where it can. Not for what torch.compile traces.
    """
    if _calls_are_changed():
        return None
    modules, names = [module], []
    for part in modules:  # which grows
        if part is None:
            return None
        if children := part.__dict__["_modules"]:
            modules += children.values()
            names += children
        names.append(None)
    kinds = tuple(map(type, modules))
    layout = _LAYOUTS.get((kinds, *names)) or _lay_out(kinds, names)
    if layout is None:
        return None
    for place, name, method in layout.methods:
        if place.get(name) is not method:
            return None
    owns = [*map(_own, modules)]
    if any(any(map(hooks, owns)) for hooks in _hooks):
        return None
    for own, not_own in zip(owns, layout.not_own, strict=True):
        if not own.keys().isdisjoint(not_own):
            return None
    for i, missing in layout.missing:
        if any(owns[i].get(name) is not None for name in missing):  # a function in a child's place
            return None
    for i, condition in layout.conditions:
        if not condition(modules[i]):
            return None
    parameters: list[Tensor | None] = []
    for i, expected in layout.parameters:
        own = owns[i]["_parameters"]
        if [*own] != expected:
            return None
        parameters += own.values()
    kinds_of_parameters = [*map(type, parameters)]
    tensors = [value for value in parameters if value is not None]
    if not _PLAIN.issuperset(kinds_of_parameters) or not _STRIDED.issuperset(map(_layout, tensors)):
        return None
    if not all(map(_is_cpu, tensors)):
        return None
    return (
        kinds, names, [choose(owns[i]) for i, choose in layout.settings], kinds_of_parameters,
        [*map(Tensor.data_ptr, tensors)], [*map(_dtype, tensors)], [*map(_shape, tensors)],
        [*map(Tensor.is_contiguous, tensors)],
    )  # fmt: skip


def _lay_out(kinds: tuple[type[nn.Module], ...], names: list[str | None]) -> _Layout | None:
    """How to look at modules of these classes; None where not all are known, or one is not where it belongs.

    Args:
        kinds: of a module, its children, theirs, and so on.
        names: of the children of each, and None behind them.
    """
    if not all(kind in _KNOWN for kind in kinds):
        return None
    parents = iter(kinds)
    parent, child = next(parents), 0
    missing = [{*_KNOWN[parent].parts}]
    for name in names:
        if name is None:
            parent = next(parents, nn.Module)
            missing.append({*_KNOWN[parent].parts} if parent in _KNOWN else set())
            continue
        child += 1
        missing[-1].discard(name)
        if kinds[child] not in _KNOWN[parent].parts.get(name, ()):
            return None
    written = [_KNOWN[kind] for kind in kinds]
    methods = {(id(place), name): (place, name, method) for each in written for place, name, method in each.methods}
    layout = _LAYOUTS[kinds, *names] = _Layout(
        tuple(methods.values()),
        tuple((*w.names, *w.parameters, *["_compiled_call_impl"] * (i > 0)) for i, w in enumerate(written)),
        tuple((i, w.condition) for i, w in enumerate(written) if w.condition),
        tuple((i, itemgetter(*w.settings)) for i, w in enumerate(written) if w.settings),
        tuple((i, [*w.parameters]) for i, w in enumerate(written) if w.parameters),
        tuple((i, tuple(lacking)) for i, lacking in enumerate(missing) if lacking),
    )
    return layout


Value = TypeVar("Value")


class Memory(Generic[Value]):
    """What there was of each module, together with its state and whatever else it was of."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[Any, Value]] = WeakKeyDictionary()

    def get(self, module: nn.Module, state: Any) -> Value | None:
        """Of a module whose state is as it was then; None otherwise."""
        before, value = self._known.get(module, (None, None))
        return value if before == state else None

    def put(self, module: nn.Module, state: Any, value: Value) -> None:
        """Keep it in place of what there was."""
        self._known[module] = state, value


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
    rows = stretches(x.reshape(-1, x.shape[-1]), width)
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
    stride: Any = layer.stride  # an int where somebody has set one
    is_even = isinstance(stride, tuple) and stride[0] == stride[1]
    return is_even and geometry == ((3, 3), (1, 1), (1, 1), 1, "zeros")


def is_depthwise_silu(layer: nn.Conv2d, channels: int) -> bool:
    """Whether a convolution of (B, H, W, channels) is the one that `depthwise_silu` knows."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    is_small = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), "zeros")
    return is_small and layer.groups == layer.in_channels == layer.out_channels == channels
