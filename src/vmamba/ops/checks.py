"""Argument checks of the public operators: a message names the argument, what it had and what it should have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ndim(name: str, value: Tensor, expected: int, meaning: str) -> None:
    """Require a tensor of `expected` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of shape {meaning}")
    if value.ndim != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected} dimensions {meaning}")


def shape(name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Require a shape; None stands for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of shape {meaning}")
    if value.shape == expected:
        return
    fits = value.ndim == len(expected) and all(
        want is None or have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {meaning} = ({wanted})")


def groups(name: str, count: int, channels: int) -> None:
    """Require that channels can be split into so many groups."""
    if count == 0 or channels % count:
        raise ValueError(f"{name} has {count} groups; expected a divisor of the {channels} channels of u")


def real_on_one_device(**tensors: Tensor | None) -> None:
    """Require real floating-point tensors that all live on one device."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first_name, first = next(iter(given.items()))
    for name, value in given.items():
        if not value.is_floating_point():
            raise TypeError(
                f"{name} has dtype {value.dtype}; expected a real floating-point dtype"
                " (float16, bfloat16, float32 or float64)"
            )
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device} but {first_name} is on {first.device}; move them to one device"
            )
