"""What the benchmarks of speed share: the models, calls that take turns, and figures beside what they should be."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import nn

import vmamba

OURS = "vmamba_tiny_s1l8"
SWIN, CONVNEXT, DEIT = "swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224"
MODELS = (OURS, SWIN, CONVNEXT, DEIT)


@dataclass
class Figure:
    """One measured number beside what it should be at most (at least, where `more` is better).

    A number that could not be measured is None, and `note` says why.
    """

    name: str
    value: float | None
    bound: float
    more: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.more else self.value <= self.bound

    def record(self) -> dict[str, Any]:
        """For the results' file; `note` only where there is one."""
        fields = {name: value for name, value in asdict(self).items() if name != "note" or value}
        return fields | {"met": self.is_met}


def figure_cells(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name, measured and wanted, for a table."""
    wanted = f"{'≥' if record['more'] else '≤'} {record['bound']:g}"
    if record["value"] is None:
        return record["name"], "–", wanted
    return record["name"], f"{record['value']:.2f}", wanted + ("" if record["met"] else "  not met")


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def build(name: str, size: int, **options: Any) -> nn.Module:
    """A model in eval mode; those with a fixed image size are built for `size`.

    Its parameters are ordinary ones also where inference mode is on, which is for calls and not for making models.
    """
    torch.manual_seed(0)
    with torch.inference_mode(False):
        if "vmamba" in name:
            return vmamba.create_model(name, **options).eval()
        if name != CONVNEXT:
            options = {"img_size": size} | options
        return timm.create_model(name, **options).eval()


def seconds_of(call: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` in a row; on a GPU by its own clock."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    least: float = 0.0,
    most: float = math.inf,
) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, after one round that is not counted.

    Args:
        calls: what to measure, by name.
        rounds: turns of each.
        device: "cpu" or "cuda".
        least: seconds that a turn takes at least: a shorter call is repeated within it.
        most: seconds after which a call has no more turns, once it has had three.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {name: max(1, math.ceil(least / max(seconds_of(call, device), 1e-7))) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            if len(times[name]) < 3 or sum(times[name]) * repeats[name] < most:
                times[name].append(seconds_of(call, device, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def kind_of(name: str, kinds: Mapping[str, tuple[str, ...]], rest: str = "the rest") -> str:
    """The first of the kinds whose words the name of an operator or kernel contains."""
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), rest)
