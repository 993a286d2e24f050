"""Configurations of the Triton kernels, for the table that is committed with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from page import Row
from runner import COMPILERS, Bench, Call, NotMeasuredError, Part, brief, failures_in, release
from scan_speed import scan_inputs

from vmamba.ops.backends.triton import Configuration, Configurations, use_configurations


@dataclass(frozen=True)
class Trial:
    """One configuration for one of the two passes at one shape."""

    kernel: str  # a field of `Configurations`
    configuration: Configuration
    grid: int
    channels: int

    @property
    def row(self) -> Row:
        return {
            "pass": self.kernel, "grid": self.grid, "channels": self.channels,
            "configuration": repr(self.configuration),
        }  # fmt: skip

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with use_configurations(Configurations(self.configuration, self.configuration)):
            yield

    def call(self, batch: int) -> Call:
        """What is to be timed, to be called under `in_use()`."""
        inputs = scan_inputs(batch, self.grid, self.grid, self.channels, "cuda", torch.bfloat16)
        return inputs.operators()[self.kernel == "gradient"]


SECONDS_OF_TRIAL = 1.5  # with so many of them, roughly


def trials(scans: Iterable[tuple[int, int, tuple[int, ...]]]) -> list[Trial]:
    """Those in which every thread has two channels of a segment, and blocks are full."""
    found = []
    for (grid, channels, _), kernel in itertools.product(scans, ("scan", "gradient")):
        for run, block, segment in itertools.product((4, 8, 16), (16, 32, 64, 128), (32, 64, 128)):
            if channels % block == 0 and (kernel == "scan" or run <= 8):
                for registers in (None,) if kernel == "scan" else (None, 168):
                    configuration = Configuration(run, block, block // 16, segment, registers)
                    found.append(Trial(kernel, configuration, grid, channels))
    return found


def compile_trial(trial: Trial) -> str | None:
    """Compile in a process of its own, for Triton's cache on the disk; returns what went wrong."""
    try:
        call = trial.call(1)
        with trial.in_use():
            call()
            torch.cuda.synchronize()
    except Exception as error:
        return brief(error)
    return None


def tuning(bench: Bench, prepare: Callable[[Call], Call]) -> Iterator[Part]:
    """Every sensible shape of the kernels' tiles at the stages of a large batch; `prepare` makes a CUDA graph."""
    if bench.settings.device != "cuda":
        raise NotMeasuredError("the kernels can be tuned on a GPU only")
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        for _, group in itertools.groupby(trials(bench.settings.scans[:4]), lambda trial: (trial.grid, trial.kernel)):
            members = list(group)
            bench.has_time_for(SECONDS_OF_TRIAL * len(members))
            bench.say(f"  {members[0].kernel}, {members[0].grid}², {len(members)} configurations")
            rows = {trial: trial.row for trial in members}
            calls = {}
            call = members[0].call(bench.settings.batch)
            for trial, error in zip(members, pool.map(compile_trial, members), strict=True):
                with failures_in(rows[trial]):
                    if error:
                        raise NotMeasuredError(error)
                    with trial.in_use():
                        calls[trial] = prepare(call)
            for trial, seconds in bench.interleave(calls).items():
                rows[trial]["seconds"] = seconds
            yield "tuning", sorted(rows.values(), key=lambda row: row.get("seconds", math.inf))
            del calls, call
            release()
