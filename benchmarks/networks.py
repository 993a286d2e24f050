"""Whole models that take turns: VMamba-T, the same with other scans, and timm's Swin-T, ConvNeXt-T and DeiT-S."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from page import Row
from runner import (
    COMPILED,
    EAGER,
    PATIENCE,
    Bench,
    Call,
    NotMeasuredError,
    Part,
    Settings,
    compile_ahead,
    failures_in,
    release,
)  # fmt: skip
from scan_speed import CHAIN, MINE, RELEASED, Scan, distance, replaced_scan, scan_of
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import vmamba

SWIN, CONVNEXT, DEIT, RESNET = "Swin-T", "ConvNeXt-T", "DeiT-S", "ResNet-50"
FOUR = (MINE, SWIN, CONVNEXT, DEIT)
NAMES = dict.fromkeys((MINE, RELEASED, CHAIN), "vmamba_tiny_s1l8") | {
    SWIN: "swin_tiny_patch4_window7_224", CONVNEXT: "convnext_tiny", DEIT: "deit_small_patch16_224",
    RESNET: "resnet50",
}  # fmt: skip
# Small enough to try a program on any machine.
TINY = {
    NAMES[MINE]: {"depths": (1,), "dims": (32,)},
    NAMES[SWIN]: {"depths": (1,), "embed_dim": 24, "num_heads": (1,)},
    NAMES[CONVNEXT]: {"depths": (1, 1, 1, 1), "dims": (16, 16, 16, 16)},
    NAMES[DEIT]: {"depth": 1, "embed_dim": 48, "num_heads": 1},
    NAMES[RESNET]: {"layers": (1,) * 4, "channels": (8,) * 4},
}
LAYOUT = {
    "inference": ("Inference", "model;mode;batch;ms;images/s;peak memory, MB"),
    "training": ("Training step, forward and backward", "model;mode;batch;ms;images/s;peak memory, MB"),
    "resolution": ("Inference by the side of the image", "size;model;mode;batch;ms;images/s;peak memory, MB"),
    "profile": (
        "Where the time goes in our model, and the least that it could be",
        "pass;mode;size;kind;ms;least GB;floor, ms",
    ),
    "kernels": ("The longest kernels, ours", "pass;mode;size;kernel;kind;calls;ms"),
}
KERNELS_SHOWN = 20
MODELS_APART = 0.1  # allowed distance of one model's results, computed in different ways in bfloat16
DROP_PATH = 0.2  # of every model, so that all of them train with the same recipe


def build(name: str, size: int, **options: Any) -> nn.Module:
    """A model in eval mode; those with a fixed image size are built for `size`.

    Its parameters are ordinary ones also where inference mode is on, which is for calls and not for making models.
    """
    torch.manual_seed(0)
    with torch.inference_mode(False):
        if "vmamba" in name:
            return vmamba.create_model(name, **options).eval()
        if name in (NAMES[SWIN], NAMES[DEIT]):
            options = {"img_size": size} | options
        return timm.create_model(name, **options).eval()


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

    def a_pass(self, image: Tensor, target: Tensor, training: bool) -> Call:
        """A step, or inference, to be called."""
        return partial(self.step, image, target) if training else partial(self.infer, image)

    def peak_mb(self, call: Call) -> float | None:
        """Most memory that a call needs beside its arguments, with the parameters, as if no other model were there."""
        if self.bench.settings.device != "cuda":
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
    """Build a contender; raises a NotMeasuredError where what it needs is absent."""
    name, scan = NAMES.get(label, label), scan_of(bench, label)
    options = {"drop_path_rate": DROP_PATH} if training else {}
    model = (
        build(name, size, **options, **bench.settings.options.get(name, {})).to(bench.settings.device).train(training)
    )
    if bench.settings.low:
        model = model.to(memory_format=torch.channels_last)
    if mode == EAGER:
        return Contender(model, model, scan, bench)
    return Contender(model, torch.compile(model, dynamic=False, backend=bench.settings.compiler), scan, bench)


def random_images(bench: Bench, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    image = torch.randn(batch, 3, size, size, device=bench.settings.device)
    image = image.to(memory_format=torch.channels_last) if bench.settings.low else image
    return image, torch.arange(batch, device=bench.settings.device) % 1000


@contextmanager
def compilers_set() -> Iterator[None]:
    """cuDNN chooses by trial; torch.compile keeps the many versions of the code that the layers of a model share."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch._dynamo.config.patch(recompile_limit=256):
        yield


def compile_pass(settings: Settings, label: str, mode: str, batch: int, size: int, training: bool) -> None:
    """One pass of a contender, for what it leaves in the compilers' caches."""
    bench = Bench(settings)
    image, target = random_images(bench, batch, size)
    with compilers_set():
        prepare(bench, label, mode, size, training).a_pass(image, target, training)()


def race(
    bench: Bench, labels: Iterable[str], modes: Iterable[str], batch: int, size: int, training: bool = False
) -> list[Row]:
    """Seconds, images a second and peak memory of every contender in every mode; all of them take turns."""
    image, target = random_images(bench, batch, size)
    rows: dict[tuple[str, str], Row] = {}
    calls = {}
    expected: dict[str, Tensor] = {}  # the first result of every model, which has one set of weights
    torch._dynamo.reset()
    entries = [entry for entry in itertools.product(labels, modes) if entry != (CHAIN, COMPILED)]
    compiled = [(label, mode, batch, size, training) for label, mode in entries if mode == COMPILED or label == MINE]
    compile_ahead(bench, compile_pass, compiled)
    for label, mode in entries:
        row = rows[label, mode] = {"model": label, "mode": mode, "size": size, "batch": batch}
        bench.say(f"  {label}, {mode}, {batch} × {size}²")
        with failures_in(row):
            bench.has_time_for(PATIENCE[mode] * (1 + training))
            contender = prepare(bench, label, mode, size, training)
            call = contender.a_pass(image, target, training)
            output = call()  # compiles
            if output is not None:
                apart = distance(output, expected.setdefault(NAMES.get(label, label), output.double()))
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


# --- sections --------------------------------------------------------------------------------------------------------


def large_batch(bench: Bench, training: bool) -> Iterator[Part]:
    """Forward passes of a large batch, or forward and backward passes, with peak memory."""
    s = bench.settings
    labels = [label for label in s.contenders if label != DEIT]
    yield "training" if training else "inference", race(bench, labels, s.modes, s.batch, s.size, training)


def resolution(bench: Bench) -> Iterator[Part]:
    """Forward passes by the side of the image; the largest first, since figures rest on them."""
    s = bench.settings
    labels = [label for label in FOUR if label in s.contenders]
    eager = sorted(s.sizes, key=lambda size: (size not in s.compiled_sizes, -size))
    for mode, sizes in ((EAGER, eager), (COMPILED, sorted(s.compiled_sizes, reverse=True))):
        for size in sizes:
            rows = race(bench, labels, [m for m in s.modes if m == mode], batch_at(s, size), size)
            if bench.memory:
                rows = [row | {"peak_mb": bench.memory(row["model"], size)} for row in rows]
            yield "resolution", rows
            release()


def batch_at(s: Settings, size: int) -> int:
    """One image on the CPU, else a power of two with about three times the pixels of the batch at `s.size`, or that."""
    return 1 if s.device == "cpu" else min(s.batch, 2 ** int(math.log2(max(1, 3 * s.batch * s.size**2 // size**2))))


Floors = Callable[[Bench, Contender, Tensor, bool], Mapping[str, Row]]


def profiling(bench: Bench, kinds: Mapping[str, tuple[str, ...]], floors: Floors) -> Iterator[Part]:
    """Our model's kernels, and by kind beside the least time that they could take."""
    for (training, batch, size), mode in itertools.product(bench.settings.profiled, bench.settings.modes):
        row: Row = {"pass": "training" if training else "inference", "mode": mode, "size": size}
        found, kernels = [row], []
        bench.say(f"  {row['pass']}, {mode}, {size}²")
        with failures_in(row):
            bench.has_time_for(PATIENCE[mode])
            torch._dynamo.reset()
            image, target = random_images(bench, batch, size)
            contender = prepare(bench, MINE, mode, size, training)
            call = contender.a_pass(image, target, training)
            call()
            call()
            kernels = profile_calls(bench, call, kinds)
            plain = replace(contender, forward=contender.model)
            found = by_kind(kernels, floors(bench, plain, image, training))
        yield "profile", [row | kind for kind in found]
        yield "kernels", [row | kernel for kernel in kernels[:KERNELS_SHOWN]]
        release()


def kind_of(name: str, kinds: Mapping[str, tuple[str, ...]]) -> str:
    """The first of the kinds whose words the name of an operator or kernel contains."""
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), "the rest")


def profile_calls(bench: Bench, call: Call, kinds: Mapping[str, tuple[str, ...]], rounds: int = 3) -> list[Row]:
    """The device's time in each kernel of a call, the longest first; on the CPU in each of torch's operators."""
    on_card = bench.settings.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_card)]) as recorded:
        for _ in range(rounds):
            call()
        if on_card:
            torch.cuda.synchronize()
    rows, device = [], DeviceType.CUDA if on_card else DeviceType.CPU
    for event in recorded.key_averages():
        if event.device_type != device or (on_card and event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if on_card else event.self_cpu_time_total
        rows.append({
            "kernel": event.key[:120], "kind": kind_of(event.key, kinds), "calls": event.count / rounds,
            "seconds": microseconds / 1e6 / rounds,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["seconds"])


def by_kind(kernels: Iterable[Row], floors: Mapping[str, Row]) -> list[Row]:
    """The same added up by kind, and in all, beside the least that each kind must do."""
    seconds: dict[str, float] = defaultdict(float)
    for row in kernels:
        seconds[row["kind"]] += row["seconds"]
    rows = [
        {"kind": kind, "seconds": seconds[kind], **floors.get(kind, {})}
        for kind in sorted(seconds | dict(floors), key=lambda kind: -seconds[kind])
    ]
    total = {key: sum(row.get(key, 0) for row in rows) for key in {key for row in rows for key in row} - {"kind"}}
    return [*rows, {"kind": "all"} | total]
