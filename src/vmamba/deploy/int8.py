"""Which layers of a network compute in 8 bits, whatever the format."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

_CHANNELS = 8
_DETECTORS = ("rpn_cls", "rpn_reg", "fc_cls", "fc_reg")  # the layers that give scores and boxes


def computes_in_int8(layer: str, kind: str, weight: Sequence[int], exclude: Sequence[str] = ()) -> bool:
    """Whether a product or convolution with constant weights is quantised.

    Four kinds are not, since int8 gains no time there and costs accuracy: depthwise convolutions and those that read
    the picture, which have little to multiply; what `SS2D` multiplies itself, the projection to Δ, B and C, whose
    outputs are few and go through an exponential in each step of the scan; and what gives a detector's scores and
    boxes, which are few as well, and by which thousands of proposals are put in order.

    Args:
        layer: the path of the module whose product it is, as in `named_modules`.
        kind: that module's class, with or without its package.
        weight: the shape of the weights, (out, in), (in, out) or (out, in / groups, height, width).
        exclude: patterns of paths, as of file names, that stay in float32 as well.
    """
    if len(weight) > 2 and weight[1] < _CHANNELS:
        return False
    if kind.rpartition(".")[2] == "SS2D" or layer.rpartition(".")[2] in _DETECTORS:
        return False
    return not any(fnmatchcase(layer, pattern) for pattern in exclude)
