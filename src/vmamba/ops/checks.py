"""Argument checks of the public operators: a message names the argument, what it had and what it should have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def real_and_together(tensors: Mapping[str, Tensor | None]) -> None:
    """Require real floating-point tensors that all live on one device."""
    first_name, first = next((name, value) for name, value in tensors.items() if value is not None)
    for name, value in tensors.items():
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(
                f"{name} has dtype {value.dtype}; expected a real floating-point dtype"
                " (float16, bfloat16, float32 or float64)"
            )
        if value.device != first.device:
            raise ValueError(
                f"{name} is on {value.device} but {first_name} is on {first.device}; move them to one device"
            )


def grid(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor, routes: int
) -> None:
    """Require the shapes of a backend's `ss2d_scan` over K routes."""
    ndim("u", u, 4, "(B, H, W, D)")
    ndim("A", A, 3, "(4, D, N)")
    ndim("dt_proj_weight", dt_proj_weight, 3, "(4, D, R)")
    channels, N, R = u.shape[3], A.shape[2], dt_proj_weight.shape[2]
    shape("projected", projected, (*u.shape[:3], routes, R + 2 * N), "(B, H, W, 4, R + 2N)")
    shape("dt_proj_weight", dt_proj_weight, (routes, channels, R), "(4, D, R)")
    shape("dt_proj_bias", dt_proj_bias, (routes, channels), "(4, D)")
    shape("A", A, (routes, channels, N), "(4, D, N)")
    shape("D", D, (routes, channels), "(4, D)")


def sequence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    """Require the shapes of a backend's `selective_scan`."""
    ndim("u", u, 3, "(batch, D, L)")
    ndim("A", A, 2, "(D, N)")
    ndim("B", B, 4, "(batch, G, N, L)")
    (batch, channels, length), N, groups = u.shape, A.shape[1], B.shape[1]
    shape("delta", delta, (batch, channels, length), "(batch, D, L)")
    shape("A", A, (channels, N), "(D, N)")
    shape("B", B, (batch, groups, N, length), "(batch, G, N, L)")
    shape("C", C, (batch, groups, N, length), "(batch, G, N, L), G as in B")
    if not groups or channels % groups:
        raise ValueError(f"B has {groups} groups; expected a divisor of the {channels} channels of u")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            shape(name, vector, (channels,), "(D,)")
