"""The arguments of the two operators, as backends take them: said once.

Tensors come first, None where one is left out, and then the one option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.precision import state_dtype
from vmamba.ops.routes import count_routes


class ScanArguments(NamedTuple):
    """Of `selective_scan`.

    Attributes:
        u, delta: (batch, D, L).
        A: (D, N).
        B, C: (batch, G, N, L), each group shared by D / G neighbouring channels.
        D, delta_bias: (D,) or None.
        z: (batch, D, L) or None.
        delta_softplus: whether the step is softplus(delta + delta_bias).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    def check(self) -> None:
        """Require shapes that belong together."""
        checks.ndim("u", self.u, 3, "(batch, D, L)")
        checks.ndim("A", self.A, 2, "(D, N)")
        checks.ndim("B", self.B, 4, "(batch, G, N, L)")
        (batch, channels, length), N, groups = self.u.shape, self.A.shape[1], self.B.shape[1]
        checks.shape("delta", self.delta, (batch, channels, length), "(batch, D, L)")
        checks.shape("A", self.A, (channels, N), "(D, N)")
        checks.shape("B", self.B, (batch, groups, N, length), "(batch, G, N, L)")
        checks.shape("C", self.C, (batch, groups, N, length), "(batch, G, N, L), G as in B")
        checks.groups("B", groups, channels)
        for name, vector in (("D", self.D), ("delta_bias", self.delta_bias)):
            if vector is not None:
                checks.shape(name, vector, (channels,), "(D,)")
        if self.z is not None:
            checks.shape("z", self.z, (batch, channels, length), "(batch, D, L)")

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Memory for y and for the last state, (batch, D, N) in the dtype of the recurrence."""
        dtype, N = state_dtype(*self[:-1]), self.A.shape[1]
        return _empty(self.u), self.u.new_empty((*self.u.shape[:2], N), dtype=dtype)


class SS2DArguments(NamedTuple):
    """Of `ss2d_scan` over K routes, after its first projection.

    Attributes:
        u: (batch, H, W, D).
        projected: (batch, H, W, K, R + 2N), x_proj applied to every pixel: dt_low, B and C of each route.
        dt_proj_weight: (K, D, R).
        dt_proj_bias: (K, D).
        A: (K, D, N).
        D: (K, D).
        pattern: a key of `PATTERNS`.
    """

    u: Tensor
    projected: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor
    A: Tensor
    D: Tensor
    pattern: str

    def check(self) -> None:
        """Require shapes that belong together, and a known pattern."""
        routes, size = self.check_parameters()
        checks.shape("projected", self.projected, (*self.u.shape[:3], routes, size), "(B, H, W, K, R + 2N)")

    def check_parameters(self) -> tuple[int, int]:
        """Require the same of all but `projected`; K and R + 2N."""
        u, _, weight, bias, A, D, pattern = self
        checks.ndim("u", u, 4, "(B, H, W, D)")
        checks.ndim("A", A, 3, "(K, D, N)")
        checks.ndim("dt_proj_weight", weight, 3, "(K, D, R)")
        K, channels, R, N = count_routes(pattern), u.shape[3], weight.shape[2], A.shape[2]
        checks.shape("dt_proj_weight", weight, (K, channels, R), "(K, D, R)")
        checks.shape("dt_proj_bias", bias, (K, channels), "(K, D)")
        checks.shape("A", A, (K, channels, N), "(K, D, N)")
        checks.shape("D", D, (K, channels), "(K, D)")
        return K, R + 2 * N

    def empty_results(self) -> Tensor:
        """Memory for y."""
        return _empty(self.u)


Arguments = TypeVar("Arguments", ScanArguments, SS2DArguments)


def in_state_dtype(arguments: Arguments) -> Arguments:
    """The arguments with every tensor in the dtype of the recurrence."""
    dtype = state_dtype(*arguments[:-1])
    # Asked first, so that graphs have no nodes that change nothing.
    return type(arguments)._make(v.to(dtype) if isinstance(v, Tensor) and v.dtype != dtype else v for v in arguments)


def as_gradients(
    values: Sequence[Tensor | None], arguments: ScanArguments | SS2DArguments, own: bool = False
) -> tuple[Tensor, ...]:
    """One gradient for each tensor of `arguments`, in the shape and dtype of that, dense; of None an empty one.

    With `own` a piece of a larger tensor is copied, since operators must not return such.
    """

    def gradient(value: Tensor | None, like: Tensor | None) -> Tensor:
        if value is None or like is None:
            return arguments.u.new_empty(0)
        value = value.reshape(like.shape).to(like.dtype).contiguous()
        return value.clone() if own and value.untyped_storage().nbytes() != value.nbytes else value

    return tuple(map(gradient, values, arguments[:-1]))


def empty_gradients(arguments: ScanArguments | SS2DArguments) -> tuple[Tensor, ...]:
    """Memory for what `as_gradients` returns."""
    return tuple(arguments.u.new_empty(0) if v is None else _empty(v) for v in arguments[:-1])


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
