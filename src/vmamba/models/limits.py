"""What a file or a folder that describes a model may ask for: a network, and of bounded size."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vmamba.errors import listed

# As in `vmamba.data.config`, which is above this room; a test holds them together.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
CROP_MODES = ("center", "squash", "border")
_LARGEST = 1 << 22  # sum of all numbers among a model's arguments that a file may ask for
_LARGEST_IMAGE = 1 << 26  # pixels, likewise


def check_arguments(options: Mapping[str, Any]) -> None:
    """Check the arguments that a file or a folder gives for its model.

    Raises:
        ValueError: they ask for more than a network.
    """
    # Options that timm's builders have names for are about everything but the network.
    others = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    others |= {"device", "dtype", "checkpoint", "features_only", "pruned"}
    found = list(_keys_and_numbers(options))
    if refused := [key for key in found if isinstance(key, str) and (key in others or "pretrained" in key)]:
        raise ValueError(f"model_kwargs has {listed(refused)}")
    backbone = options.get("backbone")  # which could name a place to fetch it from, too
    if backbone is not None and not (isinstance(backbone, str) and timm.is_model(backbone)):
        raise ValueError(f"its backbone is {repr(backbone)[:100]}, which is no model's name")
    if not sum(abs(number) for number in found if not isinstance(number, str)) <= _LARGEST:
        raise ValueError(f"the numbers in its model_kwargs are beyond {_LARGEST:,}")


def check_metadata(stored: Mapping[str, Any]) -> None:
    """Check what a file says about images and classes, on which prediction relies.

    Raises:
        ValueError: it is of another kind, or beyond reason.
    """
    size = "a side or height and width, in pixels"
    sound: dict[str, tuple[Callable[[Any], bool], str]] = {
        "mean": (lambda values: all(math.isfinite(value) for value in values), "numbers"),
        "std": (lambda values: all(math.isfinite(value) and value > 0 for value in values), "numbers above 0"),
        "interpolation": (lambda name: name in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
        "crop_mode": (lambda name: name in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
        "crop_pct": (lambda share: 0.01 <= share <= 1, "a share from 0.01 to 1"),
        "img_size": (_is_size, size),
        "sides": (_is_size, size),
        "class_names": (
            lambda names: names is None or (type(names) is list and all(isinstance(name, str) for name in names)),
            "a list of names",
        ),
    }
    for name, (is_sound, expected) in sound.items():
        value = stored.get(name)
        try:
            passes = name not in stored or is_sound(value)
        except (TypeError, ValueError):
            passes = False
        if not passes:
            raise ValueError(f"its metadata has {name} {repr(value)[:100]}; expected {expected}")


def _is_size(size: Any) -> bool:
    height, width = to_2tuple(1 if size is None else size)
    return type(height) is type(width) is int and min(height, width) > 0 and height * width <= _LARGEST_IMAGE


def _keys_and_numbers(value: object) -> Iterator[str | float]:
    """Every key and every number in nested dictionaries and lists."""
    if isinstance(value, Mapping):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys_and_numbers(item)
    elif isinstance(value, int | float):
        yield value


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Stop building a model, in this thread, once it has far more parameters than so many tensors could fill."""
    count, limit, builder = 0, 2 * tensors + 1024, threading.get_ident()

    def note(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == builder
        if count > limit:
            raise ValueError("it has far more parameters than the file has tensors")

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
