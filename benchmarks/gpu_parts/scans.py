"""The scan alone: checked against the definition, then timed at the shapes that the models meet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_parts.bench import Bench, Part, captured, failures_in, release
from gpu_parts.report import Row
from gpu_parts.yardsticks import CHAIN, MINE, RELEASED, NotMeasuredError, Scan, released_with
from vmamba.ops import ss2d_scan


@dataclass(frozen=True)
class ScanInputs:
    """Arguments of `ss2d_scan` as SS2D makes them, and a gradient of its result."""

    u: Tensor
    parameters: tuple[Tensor, ...]
    gradient: Tensor

    def run(self, function: Scan, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The result, detached, and the gradients of all arguments; with all of them in `dtype`."""
        arguments = [value.detach().to(dtype or value.dtype).requires_grad_() for value in (self.u, *self.parameters)]
        y = function(*arguments)
        return [y.detach(), *torch.autograd.grad(y, arguments, self.gradient.to(y.dtype))]


def scan_inputs(batch: int, height: int, width: int, channels: int, device: str, dtype: torch.dtype) -> ScanInputs:
    """Random ones, with one state and a rank of channels / 16."""
    rank = max(1, channels // 16)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    parameters = (
        normal(4, rank + 2, channels) * channels**-0.5,
        normal(4, channels, rank) * rank**-0.5,
        normal(4, channels) - 3,
        -torch.rand(4, channels, 1, device=device) - 0.1,
        normal(4, channels),
    )
    u, gradient = (normal(batch, height, width, channels).to(dtype) for _ in range(2))
    return ScanInputs(u, parameters, gradient)


def operator_of(bench: Bench, label: str) -> Scan:
    """A contender's operator, with the arguments of `ss2d_scan`; raises as `Bench.scan_of`."""
    scan = bench.scan_of(label)
    return ss2d_scan if scan is None else released_with(scan)


class _Calls(TorchDispatchMode):
    """Notes the calls of our operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vmamba.ss2d_scan.default:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operator_arguments(inputs: ScanInputs) -> tuple[Any, ...]:
    """What `ss2d_scan` hands to the operator `vmamba::ss2d_scan`, after its projection."""
    with _Calls() as calls:
        ss2d_scan(inputs.u, *inputs.parameters)
    return calls.found[0]


def distance(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖."""
    return ((value.double() - reference).norm() / reference.norm()).item()


def check(bench: Bench) -> Iterator[Part]:
    """Results and gradients of the scans against the definition in float64."""
    names = ("y", "u", "x_proj", "dt_proj", "dt_bias", "A", "D")
    for shape, dtype in itertools.product(bench.settings.checks, (torch.float32, torch.bfloat16)):
        inputs = scan_inputs(*shape, bench.device, dtype)
        expected = inputs.run(partial(ss2d_scan, backend="reference"), torch.float64)
        rows = []
        for label in (MINE, CHAIN, RELEASED):
            row: Row = {"scan": label, "shape": "×".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row)
            with failures_in(row), bench.autocast() if dtype == torch.bfloat16 else nullcontext():
                operator = operator_of(bench, label)
                # The yardsticks round between their steps, and their convolutions may use TF32.
                allowed = (1e-3 if dtype == torch.float32 else 1e-2) * (1 if label == MINE else 5)
                errors = dict(zip(names, map(distance, inputs.run(operator), expected), strict=True))
                worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
                row |= {"worst": worst, "distance": errors[worst], "allowed": allowed}
                if not errors[worst] <= allowed:  # NaN is not
                    raise NotMeasuredError(f"its {worst} is wrong, off by {errors[worst]:.1e}")
        yield "checks", rows


def operators(bench: Bench) -> Iterator[Part]:
    """The scan alone, forward and backward, at the shapes that the models meet."""
    yield (
        "rates",
        [
            {"what": "copy on the device, TB/s", "value": bench.copy_rate / 1e12},
            {"what": "bfloat16 matrix product, TFLOP/s", "value": bench.product_rate / 1e12},
        ],
    )
    for grid, channels, batches in bench.settings.scans:
        for batch in batches:
            bench.say(f"  scans, {batch} × {grid}² × {channels}")
            rows: list[Row] = [{"scan": "all", "grid": grid, "channels": channels, "batch": batch}]
            with failures_in(rows[0]):
                rows = time_scans(bench, batch, grid, channels)
            yield "operators", rows
            release()


def time_scans(bench: Bench, batch: int, grid: int, channels: int) -> list[Row]:
    """Rows for one shape: SS2D's operator in three ways, and ours without its projection."""
    inputs = scan_inputs(batch, grid, grid, channels, bench.device, torch.bfloat16)
    rows: dict[str, Row] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}

    def prepare_calls(label: str, make: Callable[[], Mapping[str, Callable[[], object]]]) -> None:
        row = rows[label] = {"scan": label, "grid": grid, "channels": channels, "batch": batch}
        with failures_in(row), bench.autocast():
            for name, call in make().items():
                calls[label, name], row["timed"] = captured(call, bench.device)

    def whole(label: str) -> Mapping[str, Callable[[], object]]:
        operator = operator_of(bench, label)
        return {"forward": partial(forward_only, inputs, operator), "both": partial(inputs.run, operator)}

    def ours() -> Mapping[str, Callable[[], object]]:
        arguments = operator_arguments(inputs)
        given = sum(value.nbytes for value in arguments[:2])
        # The gradient of u has as many bytes as u, as y has.
        rows["operator"] |= {"bytes": given + inputs.u.nbytes, "backward_bytes": 2 * given + inputs.u.nbytes}
        return {
            "forward": partial(torch.ops.vmamba.ss2d_scan, *arguments),
            "backward": partial(torch.ops.vmamba.ss2d_scan_backward, inputs.gradient, *arguments),
        }

    prepare_calls("operator", ours)
    for label in (MINE, CHAIN, RELEASED):
        prepare_calls(label, partial(whole, label))
    with bench.autocast():
        seconds = bench.interleave(calls)
    for label, row in rows.items():
        if (label, "forward") not in seconds or "error" in row:
            continue
        forward, both = seconds[label, "forward"], seconds.get((label, "both"))
        row |= {"seconds": forward, "backward_seconds": both - forward if both else seconds[label, "backward"]}
        if "bytes" in row:
            row |= {"rate": row["bytes"] / forward, "backward_rate": row["backward_bytes"] / row["backward_seconds"]}
            row |= {"share": row["rate"] / bench.copy_rate, "backward_share": row["backward_rate"] / bench.copy_rate}
    return list(rows.values())


@torch.no_grad()
def forward_only(inputs: ScanInputs, operator: Scan) -> Tensor:
    """The result alone."""
    return operator(inputs.u, *inputs.parameters)
