"""The runner of the benchmarks of speed: calls that take turns, sections whose failures are noted, results on disk.

A benchmark (cpu.py, gpu.py) names its sections, each a generator of rows for the tables of its page; here is what it
takes to run them, to keep what they find, and to set figures beside what is wanted of them.
"""

from __future__ import annotations

import datetime
import functools
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from page import Layout, Row, curves, page, sentence
from workers import NotMeasuredError, Workers, brief

RESULTS = Path(__file__).parent / "results"
EAGER, COMPILED = "eager", "compiled"
PATIENCE = {EAGER: 5, COMPILED: 45}  # seconds that a model takes before it can be timed, roughly

Tables = Mapping[str, list[Row]]
Part = tuple[str, list[Row]]  # a table's name and rows for it
Call = Callable[[], object]
Turn = Callable[[int], float]  # so many calls in a row: seconds of one


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what.

    Attributes:
        device: "cuda" or "cpu".
        size, batch: of the images in inference, training and profile.
        rounds: turns of each call; `least` and `most` as in `interleave`.
        modes: "eager", "compiled" or both; `compiler` is torch.compile's backend.
        low: whether models run under bfloat16 autocast on channels-last images, or in float32 on ordinary ones.
        contenders: models, by their labels.
        sizes, compiled_sizes: of the images for which throughput is drawn, and those measured compiled as well.
        profiled: (training, batch, size) of the passes whose time is divided among kernels.
        scans: (side of the grid, channels, batches) of the operator.
        checks: (batch, height, width, channels) at which the scans are checked.
        options: changes of the models, by name.
    """

    device: str
    size: int = 224
    batch: int = 128
    rounds: int = 20
    least: float = 0.003
    most: float = 4.0
    modes: tuple[str, ...] = (EAGER, COMPILED)
    compiler: str = "inductor"
    low: bool = True
    contenders: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (224, 384, 512, 768, 1024, 1536)
    compiled_sizes: tuple[int, ...] = (768, 1536)
    profiled: tuple[tuple[bool, int, int], ...] = ((False, 128, 224), (True, 128, 224))
    scans: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    checks: tuple[tuple[int, int, int, int], ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass
class Bench:
    """A run: its settings, how long it may take, where peak memory comes from, and what it has found so far."""

    settings: Settings
    budget: float = math.inf
    workers: Workers | None = None  # where models stand ready; None: each race makes its own in this process
    memory: Callable[[str, int], float] | None = None  # MB by contender and image size; None: the device knows
    say: Callable[[str], None] = print
    began: float = field(default_factory=time.perf_counter)
    unfit: dict[str, str] = field(default_factory=dict)  # contenders whose scans failed their check, and why
    clock: Callable[[], float] = time.perf_counter  # on the CPU

    def interleave(self, calls: Mapping[Any, Call]) -> dict[Any, float]:
        s = self.settings
        return interleave(calls, s.rounds, s.device, s.least, s.most, self.clock)

    def take_turns(self, turns: Mapping[Any, Turn], rows: Mapping[Any, Row]) -> dict[Any, float]:
        s = self.settings
        return take_turns(turns, s.rounds, s.least, s.most, rows)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.settings.device, dtype=torch.bfloat16, enabled=self.settings.low)

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes a second of a large copy on the device, those read and those written."""
        device = self.settings.device
        size = 2**30 if device == "cuda" else 2**22
        source, target = torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)
        return 2 * size / self.interleave({"copy": lambda: target.copy_(source)})["copy"]

    @functools.cached_property
    def product_rate(self) -> float:
        """Operations a second of a large matrix product, in bfloat16 where models run in it."""
        device, dtype = self.settings.device, torch.bfloat16 if self.settings.low else torch.float32
        side = 8192 if device == "cuda" else 1024
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / self.interleave({"product": lambda: left @ right})["product"]

    @property
    def seconds_left(self) -> float:
        """Of the budget."""
        return max(0.0, self.budget - (time.perf_counter() - self.began))

    def has_time_for(self, seconds: float) -> None:
        """Raise a NotMeasuredError unless so much of the budget is left."""
        if (left := self.seconds_left) < seconds:
            raise NotMeasuredError(f"{left:.0f} s were left, and it takes about {seconds:.0f} s")


# --- timing ----------------------------------------------------------------------------------------------------------


def seconds_of(
    call: Call, device: str = "cpu", repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call, the mean of `repeats` in a row; on a GPU by its own clock."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def capture(call: Call) -> Call:
    """A call that always reads the same tensors as a CUDA graph, whose replay takes only the card's own time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay(keep: object = call) -> object:  # the graph reads the tensors that the call was given
        graph.replay()
        return output

    return replay


def interleave(
    calls: Mapping[Any, Call],
    rounds: int,
    device: str = "cpu",
    least: float = 0.0,
    most: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, float]:
    """Median seconds of each call; the calls take turns, after one round that is not counted.

    Args:
        calls: what to measure, by name.
        rounds: turns of each.
        device: "cpu" or "cuda".
        least: seconds that a turn takes at least: a shorter call is repeated within it.
        most: seconds after which a call has no more turns, once it has had three.
        clock: what tells seconds on the CPU.
    """
    turns = {name: partial(seconds_of, call, device, clock=clock) for name, call in calls.items()}
    return take_turns(turns, rounds, least, most)


def take_turns(
    turns: Mapping[Any, Turn], rounds: int, least: float, most: float, rows: Mapping[Any, Row] | None = None
) -> dict[Any, float]:
    """As `interleave`, of what takes its turns itself.

    With `rows`, what goes wrong with one is noted in its row and the others go on; without, it is raised.
    """
    racing, times = dict(turns), {name: list[float]() for name in turns}
    repeats = dict.fromkeys(turns, 1)

    def seconds(name: Any) -> float:
        with nullcontext() if rows is None else failures_in(rows[name]):
            return racing[name](repeats[name])
        del racing[name]
        return math.inf

    for name in turns:
        repeats[name] = max(1, math.ceil(least / max(seconds(name), 1e-7)))
    for _ in range(rounds):
        for name in list(racing):
            if len(times[name]) < 3 or sum(times[name]) * repeats[name] < most:
                times[name].append(seconds(name))
    return {name: statistics.median(times[name]) for name in racing}


@contextmanager
def failures_in(row: Row) -> Iterator[None]:
    """Whatever goes wrong in the block (out of memory, a compiler's error) is noted in the row, and the run goes on."""
    try:
        yield
    except Exception as error:
        row["error"] = brief(error)


COMPILERS = max(1, (os.cpu_count() or 1) - 2)  # processes


def release() -> None:
    """Give memory that nothing holds any more back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- figures ---------------------------------------------------------------------------------------------------------


class Figures:
    """Measured numbers beside what they should be at most, or at least where `more` is better."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.records = tables, []

    def add(self, name: str, bound: float, compute: Callable[[], tuple[float, str]], more: bool = False) -> None:
        """Add a number and a note; of one that could not be measured the note says why."""
        record: Row = {"name": name, "value": None, "bound": bound, "more": more, "met": False}
        try:
            value, note = compute()
            record |= {"value": value, "met": value >= bound if more else value <= bound}
        except NotMeasuredError as reason:
            note = f"not measured: {reason}"
        self.records.append(record | ({"note": note} if note else {}))

    def find(self, *names: str, key: str = "seconds", **wanted: object) -> Row:
        """The row of these tables with the smallest `key` among those with the wanted fields.

        Raises:
            NotMeasuredError: there is none; the message is the rows' own error, if they have one.
        """
        rows = [row for name in names for row in self.tables.get(name, [])]
        rows = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
        if measured := [row for row in rows if row.get(key) is not None]:
            return min(measured, key=lambda row: row[key])
        raise NotMeasuredError(next((row["error"] for row in rows if "error" in row), "no run has measured it"))

    def ratio(self, table: str, one: str, other: str, key: str = "seconds", **wanted: object) -> tuple[float, str]:
        """One model over another, each in the mode that suits it better."""
        first, second = (self.find(table, key=key, model=model, **wanted) for model in (one, other))
        modes = [row["mode"] for row in (first, second)]
        note = modes[0] if modes[0] == modes[1] else f"{one} {modes[0]}; {other} {modes[1]}"
        return first[key] / second[key], note

    def growth(self, model: str, near: int, far: int, table: str) -> tuple[float, str]:
        """Time a pixel at images of side `far` over that at side `near`, in the best mode that both have."""
        rows = [row for row in self.tables.get(table, []) if row["model"] == model and "seconds" in row]
        modes = {row["mode"] for row in rows if row["size"] == near}
        pixel = {
            (row["mode"], row["size"]): row["seconds"] / row["batch"] / row["size"] ** 2
            for row in rows if row["mode"] in modes and row["size"] in (near, far)
        }  # fmt: skip
        mode = min((mode for mode, size in pixel if size == far), key=lambda mode: pixel[mode, far], default=None)
        if mode is None:
            raise NotMeasuredError("no run has measured it")
        return pixel[mode, far] / pixel[mode, near], mode


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of a run.

    Attributes:
        run: what it does.
        tables: those it fills.
        seconds: that it takes, roughly.
        ahead: what of it workers make ready before anything is timed.
    """

    run: Callable[[Bench], Iterator[Part]]
    tables: tuple[str, ...]
    seconds: float = 0
    ahead: Callable[[Settings], Iterable[Any]] = lambda settings: ()


@dataclass(frozen=True)
class Benchmark:
    """What a program measures.

    Attributes:
        name: of its program, and of the files of its results.
        title, layout: of its page.
        sections: by name.
        figures: what is wanted of the tables.
        drawn: the table whose seconds and peak memory an image are drawn by the side of the image.
        notes: what holds for all numbers, in sentences.
    """

    name: str
    title: str
    layout: Layout
    sections: Mapping[str, Section]
    figures: Callable[[Tables, Settings], list[Row]]
    drawn: str
    notes: Callable[[Settings], list[str]]


class Results:
    """What has been found, in memory and, given a folder, on the disk after every part of a section."""

    def __init__(self, benchmark: Benchmark, settings: Settings, folder: Path | None, **environment: str) -> None:
        self.benchmark, self.settings, self.folder = benchmark, settings, folder
        self.data: dict[str, Any] = {
            "environment": describe(settings.device) | environment,
            "settings": json.loads(json.dumps(asdict(settings))),
            "notes": benchmark.notes(settings),
            "figures": [],
            "skipped": {},
            "tables": {},
            "dates": {},  # of the tables
        }
        if folder and (former := folder / f"{benchmark.name}.json").exists():
            self._take_over(json.loads(former.read_text()))

    def _take_over(self, former: Mapping[str, Any]) -> None:
        """The tables of a former run, if it was on the same device with the same programs and settings."""

        def circumstances(data: Mapping[str, Any]) -> object:
            environment = {key: value for key, value in data["environment"].items() if key not in ("date", "threads")}
            return environment, {key: value for key, value in data["settings"].items() if key != "modes"}

        if circumstances(former) == circumstances(self.data):
            day = former["environment"]["date"]
            dates = former.get("dates") or dict.fromkeys(former["tables"], f"{day} or before")
            self.data |= {"tables": former["tables"], "skipped": former["skipped"], "dates": dates}

    def run(self, bench: Bench, sections: Iterable[str]) -> None:
        """Measure section by section, and write after each part."""
        for name in sections:
            section, trouble = self.benchmark.sections[name], {}
            bench.say(f"{name}, {time.perf_counter() - bench.began:.0f} s after the start")
            with failures_in(trouble):
                bench.has_time_for(section.seconds)
                self.data["skipped"].pop(name, None)
                self.data["tables"] |= {table: [] for table in section.tables}
                self.data["dates"] |= dict.fromkeys(section.tables, self.data["environment"]["date"])
                for table, rows in section.run(bench):
                    self.data["tables"][table].extend(rows)
                    self.write()
            if trouble:
                self.data["skipped"][name] = trouble["error"]
                bench.say(f"  {trouble['error']}")
            self.write()
            self.draw()
            release()

    @property
    def page(self) -> str:
        return page(self.benchmark.title, f"{self.benchmark.name}.py", self.data, self.benchmark.layout)

    def write(self) -> None:
        """Write the results and the page, each at once."""
        self.data["figures"] = self.benchmark.figures(self.data["tables"], self.settings)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for ending, text in (("json", json.dumps(self.data, indent=1) + "\n"), ("md", self.page)):
            partial = self.folder / f".{self.benchmark.name}.partial"
            partial.write_text(text)
            os.replace(partial, self.folder / f"{self.benchmark.name}.{ending}")

    def draw(self) -> None:
        """Draw the picture."""
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in sorted(self.data["tables"].get(self.benchmark.drawn, []), key=lambda row: row["size"]):
            for label, key in (("seconds an image", "seconds"), ("peak memory an image, MB", "peak_mb")):
                if row.get(key) and row["mode"] == EAGER:  # as all sizes are measured
                    curve = panels.setdefault(label, {}).setdefault(row["model"], [])
                    curve.append((row["size"], row[key] / row["batch"]))
        if self.folder and panels:
            path = self.folder / f"{self.benchmark.name}.png"
            curves(path, "", "side of the image, pixels", panels, sentence(self.data["environment"]))


# --- the machine -----------------------------------------------------------------------------------------------------


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Device, threads, versions and date; of a GPU also its memory and driver."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("vmamba", "torch", "torchvision", "timm", "triton")},
        **(_graphics() if device == "cuda" else {}),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source tree" if package == "vmamba" else "absent"


def _graphics() -> dict[str, str | int]:
    """Of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
        "driver": driver,
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "mamba_ssm": _version("mamba_ssm"),
    }


def _processor() -> str:
    """The model name of the processor, with what decides its speed here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = fields.get("flags", "").split()
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([fields.get("model name", platform.processor() or platform.machine()), *wanted])
