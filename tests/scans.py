"""Random arguments for the scans, and the comparison that every backend has to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vmamba.ops.backends import BACKENDS, triton

FAST_BACKENDS = [name for name, backend in BACKENDS.items() if name != "reference"]


def ss2d_arguments(
    batch: int, height: int, width: int, channels: int, states: int, rank: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """u, x_proj_weight, dt_proj_weight, dt_proj_bias, A and D in the ranges that a trained model has."""
    shapes = [
        (batch, height, width, channels), (4, rank + 2 * states, channels), (4, channels, rank), (4, channels),
        (4, channels, states), (4, channels),
    ]  # fmt: skip
    u, x_proj, dt_proj, bias, A, D = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    values = [u, x_proj / channels**0.5, dt_proj / rank**0.5, bias - 2, -(A.abs() + 0.1), D]
    return [value.to(dtype) for value in values]


def few_states(backend: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape for `ss2d_arguments`; smaller with Triton, which is interpreted: one image, 40 channels, 3 states."""
    _, *size, channels, states, rank = shape
    return (1, *size, min(channels, 40), min(states, 3), rank) if backend == "triton" else shape


def scan_arguments(
    batch: int, channels: int, length: int, states: int, groups: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All arguments of `selective_scan`, B and C grouped."""
    shapes = {
        "u": (batch, channels, length), "delta": (batch, channels, length), "A": (channels, states),
        "B": (batch, groups, states, length), "C": (batch, groups, states, length), "D": (channels,),
        "z": (batch, channels, length), "delta_bias": (channels,),
    }  # fmt: skip
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    values["A"] = -(values["A"].abs() + 0.1)
    return {name: value.to(dtype) for name, value in values.items()}


def gradients(function: Callable[..., Any], arguments: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a function, and gradients of a fixed weighted sum of them for every argument."""
    leaves = [value.detach().clone().requires_grad_() for value in arguments]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y) for y in outputs]
    total = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return [y.detach() for y in outputs], list(torch.autograd.grad(total, leaves))


def assert_matches(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Largest difference against the largest entry, tensor by tensor."""
    for i, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        assert value.shape == reference.shape
        error = (value.double() - reference.double()).abs().max() if value.numel() else torch.tensor(0.0)
        scale = reference.abs().max().clamp(min=1e-3) if value.numel() else torch.tensor(1.0)
        assert error <= tolerance * scale, f"tensor {i}: {error:.2e} of {scale:.2e}"


def launches_of(function: Callable[[], object]) -> list[str]:
    """Names of the kernels that a function launches on a GPU."""
    one = torch.ones(1, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one.add_(1)
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no launches here")
    return names[1:]


@torch.no_grad()
def assert_captured(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A layer's call on a GPU can be captured as a graph, which computes from what is in `x` when it is replayed."""
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))


def _combine_by_row(operation: Any, given: list[Any]) -> list[np.ndarray]:
    """All partial results of a scan or reduction in Triton's interpreter, along the first axis."""
    rows = zip(*(np.moveaxis(value.handle.data, operation.axis, 0) for value in given), strict=True)
    total, results = None, []
    for row in rows:
        row = tuple(operation.to_tensor(part, value.dtype) for part, value in zip(row, given, strict=True))
        total = row if total is None else operation.combine_fn.fn(*total, *row)
        total = total if isinstance(total, tuple) else (total,)
        results.append([value.handle.data.copy() for value in total])
    return [np.stack(column) for column in zip(*results, strict=True)]


def _scan(self: Any, given: list[Any]) -> list[Any]:
    results = _combine_by_row(self, given)
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), v.dtype) for x, v in zip(results, given, strict=True)]


def _reduce(self: Any, given: list[Any]) -> list[Any]:
    results = [x[-1] for x in _combine_by_row(self, given)]
    results = [np.expand_dims(x, self.axis) if self.keep_dims else x for x in results]
    return [self.to_tensor(x, v.dtype) for x, v in zip(results, given, strict=True)]


if triton.INTERPRETED and triton.unavailable(torch.device("cpu")) is None:
    # The interpreter combines element by element, a hundred times slower than by row. Large tiles make few programs.
    from triton.runtime import interpreter

    large = triton.Configuration(run=16, block=128, warps=4)
    triton.configurations.TABLES[""] = ((float("inf"), triton.Configurations(large, large)),)

    interpreter.ScanOps.generic_scan = _scan
    interpreter.ReduceOps.generic_reduce = _reduce
