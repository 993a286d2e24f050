"""Whole models that take turns: VMamba-T, the same with other scans, and timm's Swin-T, ConvNeXt-T and DeiT-S."""

from __future__ import annotations

import fcntl
import itertools
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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
    capture,
    failures_in,
    release,
    seconds_of,
)
from scan_speed import CHAIN, MINE, RELEASED, Scan, compile_scans, distance, replaced_scan, scan_of
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from workers import Group, Workers

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
PROFILED = 3  # calls of which the kernels are timed
MODELS_APART = 0.1  # allowed distance of one model's results, computed in different ways in bfloat16
KEPT = 2e9  # bytes of the card that a process may keep between its turns
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between attempts of a process to find memory
LACKS_MEMORY = re.compile("out of memory|ALLOC_FAILED|NOT_INITIALIZED|unable to find an engine")
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", COMPILE_THREADS: "1"}  # of a process among many
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
    """Images, the same ones each time, and classes."""
    device = bench.settings.device
    image = torch.randn(batch, 3, size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    image = image.to(memory_format=torch.channels_last) if bench.settings.low else image
    return image, torch.arange(batch, device=device) % 1000


@contextmanager
def compilers_set(alone: bool = True) -> Iterator[None]:
    """cuDNN chooses by trial; torch.compile keeps the many versions of the code that the layers of a model share.

    Beside other processes trials would tell nothing, so there are none. torch keeps what cuDNN chose, for convolutions
    that must be deterministic apart from the others: thus it chooses again when this process is alone.
    """
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=alone, deterministic=not alone)
    with cudnn, torch._dynamo.config.patch(recompile_limit=256):
        yield


# --- contenders that stand ready -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What takes part in a race: a model in a mode, and the images that it gets."""

    label: str
    mode: str
    batch: int
    size: int
    training: bool = False

    def __str__(self) -> str:
        return f"{self.label}, {self.mode}, {self.batch} × {self.size}²" + ", training" * self.training

    @property
    def row(self) -> Row:
        """What the tables say of it."""
        return {"model": self.label, "mode": self.mode, "size": self.size, "batch": self.batch}

    @property
    def as_graph(self) -> str:
        """Its mode as a CUDA graph."""
        return "graph" if self.mode == EAGER else f"{self.mode}, graph"

    @property
    def seconds(self) -> float:
        """Until it is ready, roughly."""
        return PATIENCE[self.mode] * (1 + self.training)


class Stand:
    """Contenders that are ready to be called in this process."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.contenders: dict[Entry, tuple[Contender, Call]] = {}
        self.graphs: dict[Entry, Call] = {}
        torch._dynamo.reset()

    def prepare(self, entry: Entry) -> np.ndarray | None:
        """Build one, unless it is there, compile it and call it twice; returns its logits, unless it trains."""
        if entry not in self.contenders:
            contender = prepare(self.bench, entry.label, entry.mode, entry.size, entry.training)
            images = random_images(self.bench, entry.batch, entry.size)
            self.contenders[entry] = contender, contender.a_pass(*images, entry.training)
        _, call = self.contenders[entry]
        output = call()  # compiles
        call()
        return output.float().cpu().numpy() if isinstance(output, Tensor) else None

    def ready(self, entry: Entry) -> np.ndarray | None:
        """As `prepare`; raises a NotMeasuredError where too little of the budget is left."""
        self.bench.has_time_for(entry.seconds)
        self.bench.say(f"  {entry}")
        try:
            return self.prepare(entry)
        except Exception:
            self.contenders.pop(entry, None)  # and its memory
            raise

    def ask(self, wanted: str, entry: Entry, *given: Any) -> Any:
        """One of the methods below, as `Workers.ask` has it done in another process."""
        return getattr(self, wanted)(entry, *given)

    def peak_mb(self, entry: Entry) -> float | None:
        """As `Contender.peak_mb`."""
        contender, call = self.contenders[entry]
        return contender.peak_mb(call)

    def capture(self, entry: Entry) -> None:
        """Make a CUDA graph of it; raises a NotMeasuredError on the CPU."""
        if self.bench.settings.device != "cuda":
            raise NotMeasuredError("there are no graphs on the CPU")
        self.graphs[entry] = capture(self.contenders[entry][1])

    def forget_graph(self, entry: Entry) -> None:
        """Give its memory back, as much as a call needs, which a graph keeps for as long as it is there."""
        self.contenders[entry][0].model.zero_grad(set_to_none=True)  # what was captured last lies in it
        self.graphs.pop(entry, None)
        release()

    def turn(self, entry: Entry, as_graph: bool, repeats: int) -> float:
        """Seconds of one call, the mean of so many in a row."""
        call = self.graphs[entry] if as_graph else self.contenders[entry][1]
        return seconds_of(call, self.bench.settings.device, repeats, self.bench.clock)

    def profile(self, entry: Entry, kinds: Mapping[str, tuple[str, ...]]) -> list[Row]:
        """As `profile_calls`."""
        return profile_calls(self.bench, self.contenders[entry][1], kinds)


@dataclass(frozen=True)
class Scans:
    """Shapes and types of scans, to be compiled for what that leaves in the caches on the disk."""

    cases: tuple[tuple[tuple[int, int, int, int], torch.dtype], ...]
    seconds: float = 25.0

    def __str__(self) -> str:
        return f"{len(self.cases)} scans"


class SharedStand(Stand):
    """A stand in one of many processes, which leave the card's memory to the one that is asked.

    Args:
        settings: of the run.
        lock: a file that a process locks while it makes ready what found too little memory beside the others.
    """

    def __init__(self, settings: Settings, lock: str) -> None:
        super().__init__(Bench(settings))
        self.lock = lock

    def ask(self, wanted: str, entry: Any, *given: Any) -> Any:
        """As the base class. Afterwards, also after a failure, only a little of the card's memory is kept."""
        trouble: Row = {}
        answer = None
        with compilers_set(alone=wanted != "prepare"), failures_in(trouble):
            answer = super().ask(wanted, entry, *given)
        if trouble and wanted == "prepare":
            self.contenders.pop(entry, None)
        if wanted == "prepare" and (compilers := sys.modules.get("torch._inductor.async_compile")):
            with failures_in({}):
                compilers.shutdown_compile_workers()  # processes that would go on to hold memory
        if trouble or wanted == "prepare":
            release()
        elif self.bench.settings.device == "cuda" and torch.cuda.memory_reserved() > KEPT:
            torch.cuda.empty_cache()
        if trouble:
            raise NotMeasuredError(trouble["error"])
        return answer

    def prepare(self, entry: Entry | Scans) -> np.ndarray | None:
        """As the base class, and again where memory was too little; or compile scans."""
        if isinstance(entry, Scans):
            for case in entry.cases:
                with failures_in({}):  # it will fail again where it is timed
                    compile_scans(self.bench.settings, *case)
            return None
        with ExitStack() as stack:
            for pause in (0, *PAUSES):
                time.sleep(pause)
                try:
                    return super().prepare(entry)
                except Exception as error:
                    if not LACKS_MEMORY.search(str(error)):
                        raise
                release()  # of what was built and compiled nothing is lost
                if not pause:
                    fcntl.flock(stack.enter_context(open(self.lock)), fcntl.LOCK_EX)
            return super().prepare(entry)

    def peak_mb(self, entry: Entry) -> float | None:
        """As the base class, after a call in which cuDNN makes its trials."""
        super().turn(entry, False, 1)
        return super().peak_mb(entry)

    def turn(self, entry: Entry, as_graph: bool, repeats: int) -> float:
        """As the base class, after a call that is not timed, since this process had no memory and was idle."""
        super().turn(entry, as_graph, 1)
        return super().turn(entry, as_graph, repeats)


def groups_of(settings: Settings, ahead: Iterable[Any]) -> list[Group]:
    """Entries and cases of scans, divided among processes.

    A compiled contender has one of its own. Eager ones of a model share one, and so do scans.
    """
    shared: dict[Any, dict[Entry, None]] = {}
    cases: dict[Any, None] = {}
    for one in ahead:
        if isinstance(one, Entry):
            key = one if one.mode == COMPILED else (one.label, one.training, one.size == settings.size)
            shared.setdefault(key, {})[one] = None
        else:
            cases[one] = None
    groups = []
    for entries in map(tuple, shared.values()):
        first, seconds = entries[0], sum(entry.seconds for entry in entries)
        environment, nice = ENVIRONMENT, 10 if first.size == settings.size else 15
        if first.training and first.mode == COMPILED:
            # It takes longest, so it comes before all others, and four processes compile its kernels.
            environment, nice = ENVIRONMENT | {COMPILE_THREADS: "4"}, 0
        groups.append(Group(entries, seconds, environment, nice))
    parts = [Scans(tuple(cases)[part::4]) for part in range(min(4, len(cases)))]
    return groups + [Group((part,), part.seconds, ENVIRONMENT, 10) for part in parts]


def stand_of(bench: Bench) -> Stand | Workers:
    """Where contenders are made ready, and asked for turns."""
    return bench.workers or Stand(bench)


def race(bench: Bench, entries: Iterable[Entry], graphs: bool = False) -> list[Row]:
    """Seconds, images a second and peak memory of every contender; all of them take turns.

    With `graphs` each takes part as a CUDA graph too, which no launching from Python slows down.
    """
    rows = {(entry, as_graph): entry.row for entry in entries for as_graph in (False, True)[: 1 + graphs]}
    stand, turns = stand_of(bench), {}
    expected: dict[str, Tensor] = {}  # the first logits of every model, which has one set of weights
    for (entry, as_graph), row in rows.items():
        if as_graph:
            row["mode"] = entry.as_graph
            with failures_in(row):
                if (entry, False) not in turns:
                    raise NotMeasuredError(rows[entry, False]["error"])
                stand.ask("capture", entry)
                turns[entry, True] = partial(stand.ask, "turn", entry, True)
            continue
        with failures_in(row):
            if entry.label in bench.unfit:
                raise NotMeasuredError(bench.unfit[entry.label])
            if (found := stand.ready(entry)) is not None:
                logits = torch.from_numpy(found)
                apart = distance(logits, expected.setdefault(NAMES.get(entry.label, entry.label), logits))
                if not apart <= MODELS_APART:
                    raise NotMeasuredError(f"its result is wrong, off by {apart:.1e}")
            if (peak := stand.ask("peak_mb", entry)) is not None:
                row["peak_mb"] = peak
            turns[entry, False] = partial(stand.ask, "turn", entry, False)
        if "error" in row:
            release()
    for key, seconds in bench.take_turns(turns, rows).items():
        rows[key] |= {"seconds": seconds, "images_per_second": key[0].batch / seconds}
    for entry, as_graph in turns:
        if as_graph:
            with failures_in({}):
                stand.ask("forget_graph", entry)
    return list(rows.values())


# --- sections --------------------------------------------------------------------------------------------------------


def entries_of(
    labels: Iterable[str], modes: Iterable[str], batch: int, size: int, training: bool = False
) -> list[Entry]:
    """Every label in every mode; the yardsticks with other scans are nothing for torch.compile."""
    found = (Entry(label, mode, batch, size, training) for label, mode in itertools.product(labels, modes))
    return [entry for entry in found if entry.mode == EAGER or entry.label not in (RELEASED, CHAIN)]


def large_batch_entries(s: Settings, training: bool) -> list[Entry]:
    """All contenders but DeiT, which is measured by the side of the image."""
    return entries_of([label for label in s.contenders if label != DEIT], s.modes, s.batch, s.size, training)


def large_batch(bench: Bench, training: bool) -> Iterator[Part]:
    """Forward passes of a large batch, or forward and backward passes, with peak memory."""
    rows = race(bench, large_batch_entries(bench.settings, training), graphs=bench.settings.device == "cuda")
    yield "training" if training else "inference", rows


def resolution_races(s: Settings) -> list[list[Entry]]:
    """Those of one mode and size each; the largest sizes first, since figures rest on them."""
    labels = [label for label in FOUR if label in s.contenders]
    eager = sorted(s.sizes, key=lambda size: (size not in s.compiled_sizes, -size))
    order = {EAGER: eager, COMPILED: sorted(s.compiled_sizes, reverse=True)}
    return [
        entries_of(labels, [mode], batch_at(s, size), size)
        for mode, sizes in order.items()
        for size in sizes
        if mode in s.modes
    ]


def resolution(bench: Bench) -> Iterator[Part]:
    """Forward passes by the side of the image."""
    for entries in resolution_races(bench.settings):
        rows = race(bench, entries)
        if bench.memory:
            rows = [row | {"peak_mb": bench.memory(row["model"], row["size"])} for row in rows]
        yield "resolution", rows
        release()


def batch_at(s: Settings, size: int) -> int:
    """One image on the CPU, else a power of two with about three times the pixels of the batch at `s.size`, or that."""
    return 1 if s.device == "cpu" else min(s.batch, 2 ** int(math.log2(max(1, 3 * s.batch * s.size**2 // size**2))))


Floors = Callable[[Bench, Contender, Tensor, bool], Mapping[str, Row]]


def profile_entries(s: Settings) -> list[Entry]:
    """Our model's passes."""
    return [
        Entry(MINE, mode, batch, size, training)
        for (training, batch, size), mode in itertools.product(s.profiled, s.modes)
    ]


def profiling(bench: Bench, kinds: Mapping[str, tuple[str, ...]], floors: Floors) -> Iterator[Part]:
    """Our model's kernels, and by kind beside the least time that they could take."""
    for entry in profile_entries(bench.settings):
        training, size = entry.training, entry.size
        row: Row = {"pass": "training" if training else "inference", "mode": entry.mode, "size": size}
        found, kernels = [row], []
        with failures_in(row):
            stand = stand_of(bench)
            stand.ready(entry)
            kernels = stand.ask("profile", entry, kinds)
            plain = prepare(bench, MINE, EAGER, size, training)
            image, _ = random_images(bench, entry.batch, size)
            found = by_kind(kernels, floors(bench, plain, image, training))
        yield "profile", [row | kind for kind in found]
        yield "kernels", [row | kernel for kernel in kernels[:KERNELS_SHOWN]]
        release()


def kind_of(name: str, kinds: Mapping[str, tuple[str, ...]]) -> str:
    """The first of the kinds whose words the name of an operator or kernel contains."""
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), "the rest")


def profile_calls(bench: Bench, call: Call, kinds: Mapping[str, tuple[str, ...]]) -> list[Row]:
    """The device's time in each kernel of a call, the longest first; on the CPU in each of torch's operators."""
    on_card = bench.settings.device == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_card)]) as recorded:
        for _ in range(PROFILED):
            call()
        if on_card:
            torch.cuda.synchronize()
    rows, device = [], DeviceType.CUDA if on_card else DeviceType.CPU
    for event in recorded.key_averages():
        if event.device_type != device or (on_card and event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if on_card else event.self_cpu_time_total
        rows.append({
            "kernel": event.key[:120], "kind": kind_of(event.key, kinds), "calls": event.count / PROFILED,
            "seconds": microseconds / 1e6 / PROFILED,
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
