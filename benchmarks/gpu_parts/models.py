"""Whole models that take turns: inference, training, one image, large images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from measuring import build
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_parts.bench import COMPILE_SECONDS, EAGER, EAGER_SECONDS, Bench, Part, capture, failures_in, release
from gpu_parts.report import FOUR, Row
from gpu_parts.scans import distance
from gpu_parts.yardsticks import (
    CHAIN,
    CONTENDERS,
    CONVNEXT_T,
    MINE,
    RELEASED,
    SWIN_T,
    NotMeasuredError,
    Scan,
    replaced_scan,
)

MODELS_APART = 0.1  # allowed distance of one model's results, computed in different ways in bfloat16
DROP_PATH = 0.2  # of every model, so that all of them train with the same recipe


@dataclass(eq=False)
class Contender:
    """A model in a mode on the device, ready to be called with images."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    scan: Scan | None
    bench: Bench

    def __call__(self, image: Tensor) -> Tensor:
        with replaced_scan(self.scan), self.bench.autocast():
            return self.forward(image)

    @torch.inference_mode()
    def infer(self, image: Tensor) -> Tensor:
        return self(image)

    def step(self, image: Tensor, target: Tensor) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        with replaced_scan(self.scan):
            F.cross_entropy(self(image).float(), target).backward()

    def peak_mb(self, call: Callable[[], object]) -> float | None:
        """Most memory that a call needs beside its arguments, with the parameters, as if no other model were there."""
        if self.bench.device != "cuda":
            return None
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        own = sum(value.nbytes for value in itertools.chain(self.model.parameters(), self.model.buffers()))
        return (torch.cuda.max_memory_allocated() - before + own) / 2**20


def prepare(bench: Bench, label: str, mode: str, size: int, training: bool = False) -> Contender:
    """Build a contender.

    Raises:
        NotMeasuredError: what it needs is absent.
    """
    name, scan = CONTENDERS[label][0], bench.scan_of(label)
    options = {"drop_path_rate": DROP_PATH} if training else {}
    model = build(name, size, **options, **bench.settings.options.get(name, {}))
    model = model.to(bench.device, memory_format=torch.channels_last).train(training)
    if mode == EAGER:
        return Contender(model, model, scan, bench)
    return Contender(model, torch.compile(model, dynamic=False, backend=bench.settings.compiler), scan, bench)


def random_images(bench: Bench, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    image = torch.randn(batch, 3, size, size, device=bench.device)
    return image.to(memory_format=torch.channels_last), torch.arange(batch, device=bench.device) % 1000


def race(
    bench: Bench, labels: Iterable[str], modes: Iterable[str], batch: int, size: int, training: bool = False
) -> list[Row]:
    """Seconds, images a second and peak memory of every contender in every mode; all of them take turns."""
    image, target = random_images(bench, batch, size)
    rows: dict[tuple[str, str], Row] = {}
    calls = {}
    expected: dict[str, Tensor] = {}  # the first result of every model, which has one set of weights
    torch._dynamo.reset()
    for label, mode in itertools.product(labels, modes):
        if label == CHAIN and mode != EAGER:
            continue
        row = rows[label, mode] = {"model": label, "mode": mode, "size": size, "batch": batch}
        bench.say(f"  {label}, {mode}, {batch} × {size}²")
        with failures_in(row):
            bench.has_time_for(EAGER_SECONDS if mode == EAGER else COMPILE_SECONDS * (2 if training else 1))
            contender = prepare(bench, label, mode, size, training)
            call = partial(contender.step, image, target) if training else partial(contender.infer, image)
            output = call()  # compiles
            if output is not None:
                apart = distance(output, expected.setdefault(CONTENDERS[label][0], output.double()))
                if not apart <= MODELS_APART:
                    raise NotMeasuredError(f"its result is wrong, off by {apart:.1e}")
            call()
            if (peak := contender.peak_mb(call)) is not None:
                row["peak_mb"] = peak
            calls[label, mode] = call
        if "error" in row:
            release()
    trouble: Row = {}
    with failures_in(trouble):
        for key, seconds in bench.interleave(calls).items():
            rows[key] |= {"seconds": seconds, "images_per_second": batch / seconds}
    return [trouble | row for row in rows.values()]


def inference(bench: Bench) -> Iterator[Part]:
    """Forward passes of a large batch."""
    s = bench.settings
    yield "inference", race(bench, (MINE, RELEASED, CHAIN, SWIN_T, CONVNEXT_T), s.modes, s.batch, s.size)


def training(bench: Bench) -> Iterator[Part]:
    """Forward and backward passes of a large batch, with peak memory."""
    s = bench.settings
    yield "training", race(bench, (MINE, RELEASED, CHAIN, SWIN_T, CONVNEXT_T), s.modes, s.batch, s.size, training=True)


def latency(bench: Bench) -> Iterator[Part]:
    """One image, as it comes and as a CUDA graph, which no launching from Python slows down."""
    size = bench.settings.size
    image, _ = random_images(bench, 1, size)
    rows: dict[tuple[str, str], Row] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    torch._dynamo.reset()
    for label, mode in itertools.product((MINE, SWIN_T, CONVNEXT_T), bench.settings.modes):
        bench.say(f"  {label}, {mode}, 1 × {size}²")
        plain, graph = (label, mode), (label, "graph" if mode == EAGER else f"{mode}, graph")
        rows |= {key: {"model": label, "mode": key[1], "size": size, "batch": 1} for key in (plain, graph)}
        with failures_in(rows[plain]):
            bench.has_time_for(EAGER_SECONDS if mode == EAGER else COMPILE_SECONDS)
            call = partial(prepare(bench, label, mode, size).infer, image)
            call()  # compiles
            calls[plain] = call
        with failures_in(rows[graph]):
            if plain not in calls:
                raise NotMeasuredError(rows[plain]["error"])
            if bench.device != "cuda":
                raise NotMeasuredError("there are no graphs on the CPU")
            calls[graph] = capture(calls[plain])
    for key, seconds in bench.interleave(calls).items():
        rows[key] |= {"seconds": seconds, "images_per_second": 1 / seconds}
    yield "latency", list(rows.values())


def resolution(bench: Bench) -> Iterator[Part]:
    """Forward passes by the side of the image; the largest first, since figures rest on them."""
    s = bench.settings
    for size in sorted(s.sizes, key=lambda size: (size not in s.compiled_sizes, -size)):
        yield "resolution", race(bench, FOUR, [m for m in s.modes if m == EAGER], s.batch_at(size), size)
        release()
    for size in sorted(s.compiled_sizes, reverse=True):
        yield "resolution", race(bench, FOUR, [m for m in s.modes if m != EAGER], s.batch_at(size), size)
        release()
