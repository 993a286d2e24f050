"""Graphs that other programs translate: while one is traced, the scans can stay whole in it, as operators.

`torch.export` writes the scans in torch's own functions, for its graphs stand without this package. A format with loops
of its own has something better for them, and finds them as `torch.ops.vmamba.ss2d_scan` and `.recurrence`. One that
brings the CPU's kernels along can have all that they compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_kept: ContextVar[frozenset[str]] = ContextVar("vmamba_operators_kept", default=frozenset())


@contextmanager
def operators_kept(layers: bool = False) -> Iterator[None]:
    """Graphs that are traced in the `with` block (of this thread or task) have the scans as operators.

    Args:
        layers: whether they also have all other operators that torch.compile is given (`vmamba.ops.layers`, `.fused`).
    """
    token = _kept.set(frozenset(["scans", "layers"] if layers else ["scans"]))
    try:
        yield
    finally:
        _kept.reset(token)


@torch.compiler.assume_constant_result  # torch.compile of torch 2.11 cannot read a context variable
def keeps_scans() -> bool:
    """Whether scans stay whole in the graph that is traced."""
    return "scans" in _kept.get()


@torch.compiler.assume_constant_result
def keeps_layers() -> bool:
    """Whether layers do too."""
    return "layers" in _kept.get()


@torch.library.custom_op("vmamba::recurrence", mutates_args=())
def recurrence(a: Tensor, b: Tensor, backwards: bool) -> Tensor:
    """`backends.eager.linear_recurrence` for (batch, L, F), as an operator."""
    states = torch.empty_like(b, memory_format=torch.contiguous_format)
    state = b.new_zeros(b.shape[0], b.shape[2])
    for t in reversed(range(b.shape[1])) if backwards else range(b.shape[1]):
        state = torch.addcmul(b[:, t], a[:, t], state)
        states[:, t] = state
    return states


@recurrence.register_fake
def _(a: Tensor, b: Tensor, backwards: bool) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)
