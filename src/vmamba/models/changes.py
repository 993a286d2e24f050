"""What has been changed in a network since it was built, which no tensor shows."""

from __future__ import annotations

import re

import timm.layers
from torch import nn

import vmamba.nn as parts
from vmamba.models.released_names import without_wrappers

# These do nothing in inference.
_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd, timm.layers.DropPath)
# These compute what others do.
_SAME: dict[type[nn.Module], type[nn.Module]] = {
    parts.Linear: nn.Linear,
    parts.LayerNorm: nn.LayerNorm,
    parts.GELU: nn.GELU,
    parts.Conv2d: nn.Conv2d,
    nn.SyncBatchNorm: nn.BatchNorm2d,
}


def changed_parts(model: nn.Module, built: nn.Module) -> list[str]:
    """Where the modules of a network differ, in class or settings, from those of one that was built anew.

    The patterns of scans are left out, which files hold.
    """
    own, expected = _parts(model), _parts(built)
    return [
        f"{name} is {own.get(name, 'missing')}, built as {expected.get(name, 'nothing')}"
        for name in {**own, **expected}
        if own.get(name) != expected.get(name)
    ]


def _parts(model: nn.Module) -> dict[str, str]:
    """Class and settings of every module that computes, by its name without what wraps it."""
    # A wrapper has the name of what it wraps, which comes after it.
    return {
        without_wrappers(f"{name}.").rstrip("."): _text(part)
        for name, part in model.named_modules()
        if not isinstance(part, _IDLE)
    }


def _text(part: nn.Module) -> str:
    settings = "" if isinstance(part, parts.SS2D) else re.sub(" at 0x[0-9a-f]+", "", part.extra_repr())
    return f"{_SAME.get(type(part), type(part)).__name__}({settings})"
