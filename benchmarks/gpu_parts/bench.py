"""Settings and state of a run on a GPU, and what all sections need: failures that are noted, and CUDA graphs."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from measuring import CONVNEXT, DEIT, OURS, SWIN, interleave

from gpu_parts.report import Row
from gpu_parts.yardsticks import CONTENDERS, NotMeasuredError, Scan

Part = tuple[str, list[Row]]  # a table's name and rows for it

EAGER, COMPILED = "eager", "compiled"
EAGER_SECONDS, COMPILE_SECONDS = 5, 45  # that a model takes before it can be timed, roughly


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what.

    Attributes:
        device: "cuda" or "cpu".
        size, batch: of the images in inference, training and profile.
        rounds: turns of each call; `least` and `most` as in `measuring.interleave`.
        modes: "eager", "compiled" or both; `compiler` is torch.compile's backend.
        sizes, compiled_sizes: of the images for which throughput is drawn, and those measured compiled as well.
        scans: (side of the grid, channels, batches) of the operator's table.
        checks: (batch, height, width, channels) at which the scans are checked.
        options: changes of the models, by name.
    """

    device: str = "cuda"
    size: int = 224
    batch: int = 128
    rounds: int = 20
    least: float = 0.003
    most: float = 4.0
    modes: tuple[str, ...] = (EAGER, COMPILED)
    compiler: str = "inductor"
    sizes: tuple[int, ...] = (224, 384, 512, 768, 1024, 1536)
    compiled_sizes: tuple[int, ...] = (768, 1536)
    scans: tuple[tuple[int, int, tuple[int, ...]], ...] = (
        (56, 96, (1, 128)),
        (28, 192, (1, 128)),
        (14, 384, (1, 128)),
        (7, 768, (1, 128)),
        (192, 96, (1, 8)),
        (384, 96, (1, 8)),
    )
    checks: tuple[tuple[int, int, int, int], ...] = ((2, 9, 7, 48), (1, 14, 14, 384), (2, 31, 40, 96))
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def batch_at(self, size: int) -> int:
        """A power of two that gives about three times the pixels of the batch at `self.size`, and no more than it."""
        return min(self.batch, 2 ** int(math.log2(max(1, 3 * self.batch * self.size**2 // size**2))))


FULL = Settings()
QUICK = replace(FULL, rounds=5, most=1.0, modes=(EAGER,), sizes=(224,), compiled_sizes=(), scans=FULL.scans[:4])
SMOKE = Settings(
    device="cpu",
    size=64,
    batch=2,
    rounds=1,
    least=0.0,
    compiler="eager",
    sizes=(64, 96),
    compiled_sizes=(96,),
    scans=((8, 32, (1, 2)),),
    checks=((2, 5, 4, 32),),
    options={
        OURS: {"depths": (1,), "dims": (32,)},
        SWIN: {"depths": (1,), "embed_dim": 24, "num_heads": (1,)},
        CONVNEXT: {"depths": (1, 1, 1, 1), "dims": (16, 16, 16, 16)},
        DEIT: {"depth": 1, "embed_dim": 48, "num_heads": 1},
    },
)


@dataclass
class Bench:
    """A run: its settings, how long it may take, and what it has found so far."""

    settings: Settings
    budget: float = math.inf
    say: Callable[[str], None] = print
    began: float = field(default_factory=time.perf_counter)
    unfit: dict[str, str] = field(default_factory=dict)  # contenders whose scans failed their check, and why

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.perf_counter() - self.began)

    @property
    def device(self) -> str:
        return self.settings.device

    def interleave(self, calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        s = self.settings
        return interleave(calls, s.rounds, s.device, s.least, s.most)

    def scan_of(self, label: str) -> Scan | None:
        """What a contender's SS2D is built from, None where it is our own.

        Raises:
            NotMeasuredError: it is absent, or its results are wrong.
        """
        if label in self.unfit:
            raise NotMeasuredError(self.unfit[label])
        make = CONTENDERS[label][1]
        return make() if make else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16)

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second of a large copy on the device, those read and those written."""
        size = 2**30 if self.device == "cuda" else 2**22
        source, target = torch.randn(size // 4, device=self.device), torch.empty(size // 4, device=self.device)
        return 2 * size / self.interleave({"copy": lambda: target.copy_(source)})["copy"]

    @cached_property
    def product_rate(self) -> float:
        """Operations a second of a large bfloat16 matrix product."""
        side = 8192 if self.device == "cuda" else 128
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 / self.interleave({"product": lambda: left @ right})["product"]

    def has_time_for(self, seconds: float) -> None:
        """Raise a NotMeasuredError unless so much of the budget is left."""
        if self.left < seconds:
            raise NotMeasuredError(f"{max(0, self.left):.0f} s were left, and it takes about {seconds:.0f} s")


@contextmanager
def failures_in(row: Row) -> Iterator[None]:
    """Whatever goes wrong in the block (out of memory, a compiler's error) is noted in the row, and the run goes on."""
    try:
        yield
    except Exception as error:
        row["error"] = brief(error)


def brief(error: Exception) -> str:
    """An exception in one line of the results."""
    if isinstance(error, NotMeasuredError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def release() -> None:
    """Give memory that nothing holds any more back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Graph:
    """A call as a CUDA graph, whose replay takes only the card's own time.

    It keeps the call, since the graph reads the tensors that the call was given, and the output, which it writes.
    """

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]
    output: object

    def __call__(self) -> object:
        self.graph.replay()
        return self.output


def capture(call: Callable[[], object]) -> Graph:
    """Capture a call that always reads the same tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return Graph(graph, call, output)


def captured(call: Callable[[], object], device: str) -> tuple[Callable[[], object], str]:
    """The call as a graph where that is possible, and how it is launched."""
    if device == "cuda":
        with failures_in({}):
            return capture(call), "graph"
    call()
    return call, "launched"
