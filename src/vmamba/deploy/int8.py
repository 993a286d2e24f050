"""Which layers of a network compute in 8 bits, whatever the format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from vmamba.errors import ExportError

_CHANNELS = 8
_DETECTORS = ("rpn_cls", "rpn_reg", "fc_cls", "fc_reg")  # the layers that give scores and boxes


def computes_in_int8(layer: str, kind: str, weight: Sequence[int]) -> bool:
    """Whether a product or convolution with constant weights is quantised, unless somebody excludes it.

    Four kinds are not, since int8 gains no time there and costs accuracy: depthwise convolutions and those that read
    the picture, which have little to multiply; what `SS2D` multiplies itself, the projection to Δ, B and C, whose
    outputs are few and go through an exponential in each step of the scan; and what gives a detector's scores and
    boxes, which are few as well, and by which thousands of proposals are put in order.

    Args:
        layer: the path of the module whose product it is, as in `named_modules`.
        kind: that module's class, with or without its package.
        weight: the shape of the weights, (out, in), (in, out) or (out, in / groups, height, width).
    """
    if len(weight) > 2 and weight[1] < _CHANNELS:
        return False
    return kind.rpartition(".")[2] != "SS2D" and layer.rpartition(".")[2] not in _DETECTORS


def is_excluded(layer: str, exclude: Iterable[str]) -> bool:
    """Whether a layer's path fits one of the patterns, which are like those of file names."""
    return any(fnmatchcase(layer, pattern) for pattern in exclude)


def check_patterns(exclude: Iterable[str], layers: Collection[str]) -> None:
    """Refuse patterns that exclude nothing.

    Raises:
        ExportError: no layer that would compute in int8 fits one of them.
    """
    unknown = [pattern for pattern in exclude if not any(is_excluded(layer, [pattern]) for layer in layers)]
    if unknown:
        some = ", ".join(sorted(set(layers))[:8])
        raise ExportError(f"no layer that int8 is for fits exclude={unknown}; they are called {some}, ...")
