"""SS2D's operator alone: ours, and as the released models compute it, which is what ours is checked and timed against.

The released way: four copies of the image, projections of each, one selective scan, a merge. The selective scan itself
is an argument: mamba-ssm's CUDA kernel, or plain torch.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from page import Row
from runner import Bench, Call, NotMeasuredError, Part, Settings, failures_in
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vmamba.nn.ss2d
from vmamba.ops import selective_scan, ss2d_scan

Scan = Callable[..., Tensor]

plain_scan: Scan = partial(selective_scan, backend="eager")


def mamba_scan() -> Scan:
    """mamba-ssm's `selective_scan_fn`; raises a NotMeasuredError where it cannot be imported."""
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except (ImportError, OSError) as error:
        is_absent = (getattr(error, "name", None) or "").startswith("mamba_ssm")
        raise NotMeasuredError(f"mamba-ssm {'is absent' if is_absent else f'cannot be imported: {error}'}") from None


# What makes the scan that SS2D is built from, None where that is our own.
MINE, RELEASED, CHAIN = "VMamba-T", "VMamba-T, mamba-ssm's scan", "VMamba-T, torch chain"
SCANS: dict[str, Callable[[], Scan] | None] = {MINE: None, RELEASED: mamba_scan, CHAIN: lambda: plain_scan}


def scan_of(bench: Bench, label: str) -> Scan | None:
    """What a contender's SS2D is built from; raises a NotMeasuredError if that is absent or its results are wrong."""
    if label in bench.unfit:
        raise NotMeasuredError(bench.unfit[label])
    make = SCANS.get(label)
    return make() if make else None


def _linear(function: Scan, adjoint: Scan) -> Scan:
    """A linear map of sequences over an H×W grid that autograd differentiates by its adjoint."""

    class Map(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, height: int, width: int) -> Tensor:
            ctx.size = height, width
            return function(x, height, width)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            return adjoint(grad, *ctx.size), None, None

    return Map.apply


def _scan_grid(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, L) to four sequences (B, 4, C, L), which are written once each."""
    sequences = x.new_empty((x.shape[0], 4, *x.shape[1:]))
    sequences[:, 0] = x
    sequences[:, 1] = x.unflatten(-1, (height, width)).transpose(2, 3).flatten(2)
    sequences[:, 2:] = sequences[:, :2].flip(-1)
    return sequences


def _merge_sequences(ys: Tensor, height: int, width: int) -> Tensor:
    """Four sequences (B, 4, C, L) back on the grid and added: (B, C, L)."""
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    return ys[:, 0] + ys[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)


cross_scan, cross_merge = _linear(_scan_grid, _merge_sequences), _linear(_merge_sequences, _scan_grid)


def released_ss2d(
    u: Tensor, x_proj_weight: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor,
    pattern: str = "cross", *, scan: Scan,
) -> Tensor:  # fmt: skip
    """`vmamba.ops.ss2d_scan` step by step; `scan` has the arguments of mamba-ssm's `selective_scan_fn`."""
    assert pattern == "cross"
    batch, height, width, channels = u.shape
    R, N, length = dt_proj_weight.shape[2], A.shape[2], height * width
    sequences = cross_scan(u.flatten(1, 2).transpose(1, 2), height, width)
    projected = F.conv1d(sequences.flatten(1, 2), x_proj_weight.flatten(0, 1).unsqueeze(-1), groups=4)
    low, B, C = projected.view(batch, 4, -1, length).split([R, N, N], dim=2)
    delta = F.conv1d(low.flatten(1, 2), dt_proj_weight.flatten(0, 1).unsqueeze(-1), groups=4)
    y = scan(
        sequences.view(batch, 4 * channels, length), delta.to(u.dtype), A.flatten(0, 1), B.contiguous().to(u.dtype),
        C.contiguous().to(u.dtype), D.flatten(), delta_bias=dt_proj_bias.flatten(), delta_softplus=True,
    )  # fmt: skip
    merged = cross_merge(y.reshape(batch, 4, channels, length), height, width)
    return merged.transpose(1, 2).unflatten(1, (height, width))


@functools.cache
def released_with(scan: Scan) -> Scan:
    """`released_ss2d` with this scan; the same object each time, since compiled code depends on which it is."""
    return partial(released_ss2d, scan=scan)


@contextmanager
def replaced_scan(scan: Scan | None) -> Iterator[None]:
    """Every SS2D computes `released_ss2d` with this scan in the `with` block; None leaves it as it is."""
    original = vmamba.nn.ss2d.ss2d_scan
    vmamba.nn.ss2d.ss2d_scan = original if scan is None else released_with(scan)
    try:
        yield
    finally:
        vmamba.nn.ss2d.ss2d_scan = original


# --- calls -----------------------------------------------------------------------------------------------------------


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

    def operators(self) -> list[Call]:
        """Calls of our registered operator and of its gradient's, without the projection before them."""
        with _Calls() as calls:
            self.run(ss2d_scan)
        return calls.found

    @torch.no_grad()
    def forward(self, function: Scan) -> Tensor:
        """The result alone."""
        return function(self.u, *self.parameters)


class _Calls(TorchDispatchMode):
    """Notes the calls of our operators, forward and backward in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "vmamba":
            self.found.append(partial(func, *(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)))
        return func(*args, **(kwargs or {}))


def scan_inputs(batch: int, height: int, width: int, channels: int, device: str, dtype: torch.dtype) -> ScanInputs:
    """Random ones, with one state and a rank of channels / 16."""
    rank = max(1, channels // 16)
    normal = partial(torch.randn, device=device)
    parameters = (
        normal(4, rank + 2, channels) * channels**-0.5,
        normal(4, channels, rank) * rank**-0.5,
        normal(4, channels) - 3,
        -torch.rand(4, channels, 1, device=device) - 0.1,
        normal(4, channels),
    )
    u, gradient = (normal(batch, height, width, channels).to(dtype) for _ in range(2))
    return ScanInputs(u, parameters, gradient)


def compile_scans(settings: Settings, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Our operator forward and backward, for what it leaves in the compilers' caches."""
    scan_inputs(*shape, settings.device, dtype).run(ss2d_scan)


def operator_of(bench: Bench, label: str) -> Scan:
    """A contender's operator, with the arguments of `ss2d_scan`; raises as `scan_of`."""
    scan = scan_of(bench, label)
    return ss2d_scan if scan is None else released_with(scan)


def distance(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()


def check(bench: Bench) -> Iterator[Part]:
    """Results and gradients of the scans against the definition in float64."""
    names = ("y", "u", "x_proj", "dt_proj", "dt_bias", "A", "D")
    cases = list(itertools.product(bench.settings.checks, (torch.float32, torch.bfloat16)))
    for shape, dtype in cases:
        inputs = scan_inputs(*shape, bench.settings.device, dtype)
        expected = inputs.run(partial(ss2d_scan, backend="reference"), torch.float64)
        rows = []
        for label in SCANS:
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
            if "error" in row:
                bench.unfit[label] = row["error"]
        yield "checks", rows


def time_scans(
    bench: Bench, batch: int, grid: int, channels: int, prepare: Callable[[Call], tuple[Call, str]]
) -> list[Row]:
    """Rows for one shape: SS2D's operator in three ways, and ours without its projection.

    `prepare` makes of a call what is to be timed, and says how that is launched.
    """
    inputs = scan_inputs(batch, grid, grid, channels, bench.settings.device, torch.bfloat16)
    rows: dict[str, Row] = {}
    calls: dict[tuple[str, str], Call] = {}

    def add(label: str, make: Callable[[], Mapping[str, Call]]) -> None:
        row = rows[label] = {"scan": label, "grid": grid, "channels": channels, "batch": batch}
        with failures_in(row), bench.autocast():
            for name, call in make().items():
                calls[label, name], row["timed"] = prepare(call)

    def whole(label: str) -> Mapping[str, Call]:
        operator = operator_of(bench, label)
        return {"forward": partial(inputs.forward, operator), "both": partial(inputs.run, operator)}

    def ours() -> Mapping[str, Call]:
        forward, backward = inputs.operators()
        given = sum(value.nbytes for value in forward.args[:2])
        # The gradient of u has as many bytes as u, as y has.
        rows["operator"] |= {"bytes": given + inputs.u.nbytes, "backward_bytes": 2 * given + inputs.u.nbytes}
        return {"forward": forward, "backward": backward}

    add("operator", ours)
    for label in SCANS:
        add(label, partial(whole, label))
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
