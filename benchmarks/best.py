"""The best that each network gets from any runtime on the CPU: VMamba-T against Swin-T, ConvNeXt-T, DeiT-S, ResNet-50.

The sections of `cpu.py` whose page is cpu_best.md. Every network runs in eager PyTorch, compiled, in ONNX Runtime and
in OpenVINO, in the processes of `runtimes.py`; what counts is the fastest of them. Beside the fastest of ours stands
what it could be: its matrix products and convolutions alone, as fast as oneDNN computes them from packed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from networks import CONVNEXT, DEIT, NAMES, RESNET, SWIN, TINY
from page import Row, curves, page, sentence
from runner import Bench, Benchmark, Figures, NotMeasuredError, Part, Results, Section, Settings, Tables
from runtimes import (
    AOTI,
    BFLOAT16,
    CAST,
    COMPILED,
    EAGER,
    FLOAT32,
    INT8,
    OPEN,
    OPENVINO,
    ORT,
    PRODUCTS,
    STEP,
    Shelf,
    Subject,
    WorkerError,
    alone,
    peak_mb,
    race,
)
from scan_speed import MINE, scan_inputs
from torch.utils.flop_counter import FlopCounterMode

ALIKE = (SWIN, CONVNEXT, DEIT)  # as many operations and about the accuracy of ours; ResNet-50 has fewer
GOAL = 1.15  # our best over the products alone
APART = 0.25  # share by which operations of models that are compared may differ
# Ours, and timm's whose pictures have the side, a multiple of eight, at which they take as many operations.
SMALL = (("vmamba_nano", 224), ("vmamba_pico_s2", 64), ("vmamba_femto_s2", 32), ("vmamba_femto", 28))
SMALL_PEERS = ("mobilenetv4_conv_small", "resnet10t", "convnext_atto")
HEADERS = "model;eager, ms;eager, cast, ms;compiled, ms;ONNX Runtime, ms;OpenVINO, ms;OpenVINO, any size, ms"
HEADERS += ";AOTInductor, ms;products alone, ms;best"


@dataclass(frozen=True)
class Case:
    """Networks that are compared.

    Attributes:
        size, batch, precision: of the images and of the products.
        bound: what the time of our best over that of the others' best may be.
        compiled: whether any is compiled, which takes minutes and at 224² was nobody's best.
    """

    size: int
    batch: int
    precision: str
    bound: float
    compiled: bool = True

    @property
    def section(self) -> str:
        """How the command line calls it."""
        start = "best" if self.precision == FLOAT32 else self.precision
        return f"{start}-{self.size}" + f"x{self.batch}" * (self.batch > 1)

    @property
    def title(self) -> str:
        images = "One image" if self.batch == 1 else f"{self.batch} images"
        return f"{images} of {self.size}², {self.precision}"


CASES = (
    Case(224, 1, FLOAT32, 1.00), Case(768, 1, FLOAT32, 0.90, compiled=False),
    Case(1024, 1, FLOAT32, 0.80, compiled=False), Case(224, 8, FLOAT32, 1.00, compiled=False),
    Case(224, 1, BFLOAT16, 1.00),
    Case(768, 1, BFLOAT16, 0.90, compiled=False), Case(224, 1, INT8, 1.00),
)  # fmt: skip


@dataclass(frozen=True)
class BestSettings(Settings):
    """Also the cases, the runtimes, the sides of large pictures, and those of the grids on which scans are timed."""

    cases: tuple[Case, ...] = CASES
    runtimes: tuple[str, ...] = (EAGER, COMPILED, ORT, OPENVINO, CAST, OPEN, AOTI)
    large: tuple[int, ...] = (224, 512, 1024, 1536, 2048)
    grids: tuple[int, ...] = (56, 128, 256, 384, 512)
    channels: int = 96
    small: tuple[tuple[str, int], ...] = SMALL


FULL = BestSettings("cpu", batch=8, rounds=11, least=0.1, most=6, low=False, contenders=(MINE, *ALIKE, RESNET))
SMOKE = replace(
    FULL, size=64, batch=2, rounds=1, least=0, contenders=(MINE, RESNET, SWIN), runtimes=(EAGER, ORT, OPENVINO),
    cases=(Case(64, 1, FLOAT32, 1.00), Case(64, 1, INT8, 1.00)), large=(64, 96), grids=(8, 16), channels=32,
    small=(("vmamba_femto", 28),), options=TINY,
)  # fmt: skip


def modes(settings: BestSettings, label: str, precision: str) -> Iterator[str]:
    """The runtimes of a network: ours has more, and not every precision is in all of them."""
    known = {
        FLOAT32: (EAGER, COMPILED, ORT, OPENVINO, OPEN, AOTI),
        BFLOAT16: (EAGER, CAST, COMPILED, OPENVINO, OPEN),
        INT8: (COMPILED, ORT, OPENVINO, OPEN),
    }[precision]
    of_ours = (OPEN, AOTI, *[COMPILED] * (precision == INT8))
    yield from (mode for mode in settings.runtimes if mode in known and (label == MINE or mode not in of_ours))


def subjects_of(settings: BestSettings, case: Case) -> list[Subject]:
    """Every network in every runtime, and the products of ours alone."""
    found = [
        Subject(label, NAMES[label], mode, case.size, case.batch, case.precision)
        for label in settings.contenders
        for mode in modes(settings, label, case.precision)
        if case.compiled or mode != COMPILED
    ]
    if case.precision != INT8:
        found.append(Subject(MINE, NAMES[MINE], PRODUCTS, case.size, case.batch, case.precision))
    return found


def measured(bench: Bench, shelf: Shelf, subjects: Iterable[Subject]) -> list[Row]:
    """Rows of subjects that take turns."""
    s = bench.settings
    return race(shelf, subjects, torch.get_num_threads(), s.rounds, s.least, s.most, bench.say)


def by_model(rows: Sequence[Row], *keys: str) -> list[Row]:
    """A row for each network: times by runtime, and the fastest runtime."""
    found: dict[Any, Row] = {}
    for row in rows:
        line = found.setdefault(row["model"], {key: row[key] for key in ("model", *keys)})
        if "error" in row:
            line["error"] = "; ".join(filter(None, [line.get("error"), f"{row['mode']}: {row['error']}"]))
            continue
        line[f"{row['mode']}, ms"] = f"{row['seconds'] * 1e3:,.2f}"
    for model, line in found.items():
        timed = [row for row in rows if row["model"] == model and "seconds" in row and row["mode"] != PRODUCTS]
        if timed:
            line["best"] = min(timed, key=lambda row: row["seconds"])["mode"]
    for line in found.values():
        for header in HEADERS.split(";"):
            if header.endswith(", ms") and any(header in other for other in found.values()):
                line.setdefault(header, "–")
    return list(found.values())


# --- sections --------------------------------------------------------------------------------------------------------


def best(bench: Bench, settings: BestSettings, shelf: Shelf, case: Case) -> Iterator[Part]:
    """One case."""
    rows = measured(bench, shelf, subjects_of(settings, case))
    yield f"rows {case.section}", rows
    yield case.section, by_model(rows)


def training(bench: Bench, settings: BestSettings, shelf: Shelf) -> Iterator[Part]:
    """Steps of ours in two precisions and of Swin-T, with the memory of a fresh process that makes one step."""
    subjects = [
        Subject(label, NAMES[label], STEP, settings.size, settings.batch, precision)
        for label, precision in ((MINE, FLOAT32), (SWIN, FLOAT32), (MINE, BFLOAT16), (SWIN, BFLOAT16))
    ]
    rows = measured(bench, shelf, subjects)
    for row, subject in zip(rows, subjects, strict=True):
        row |= memory(shelf, subject)
    yield "steps", rows


def memory(shelf: Shelf, subject: Subject) -> Row:
    """Peak memory of a fresh process, or why it is not known."""
    try:
        return {"peak_mb": peak_mb(shelf, subject, torch.get_num_threads())}
    except WorkerError as error:
        return {"error": str(error)}


def large(bench: Bench, settings: BestSettings, shelf: Shelf) -> Iterator[Part]:
    """Eager mode by the side of the picture, and our scan by the side of the grid."""
    subjects = [Subject(MINE, NAMES[MINE], EAGER, size) for size in settings.large]
    subjects.append(Subject(SWIN, NAMES[SWIN], EAGER, settings.large[0]))
    rows = measured(bench, shelf, subjects)
    for row, subject in zip(rows, subjects, strict=True):
        row |= memory(shelf, subject)
        if "seconds" in row and "peak_mb" in row:
            pixels = subject.size**2
            row |= {"pixel": row["seconds"] / pixels, "ns a pixel": f"{row['seconds'] / pixels * 1e9:.0f}"}
            row |= {"bytes_a_pixel": row["peak_mb"] * 2**20 / pixels}
            row |= {"bytes a pixel": f"{row['bytes_a_pixel']:,.0f}"}
    yield "large", rows
    calls = {
        grid: scan_inputs(1, grid, grid, settings.channels, "cpu", torch.float32).operators()[0]
        for grid in settings.grids
    }
    with alone():
        seconds = bench.interleave(calls)
    yield "grids", [
        {"grid": grid, "channels": settings.channels, "seconds": found, "pixel": found / grid**2,
         "ns a pixel": f"{found / grid**2 * 1e9:.1f}"}
        for grid, found in seconds.items()
    ]  # fmt: skip


def operations(subject: Subject, options: dict[str, Any]) -> int:
    """Multiply-accumulates of products and convolutions for one image."""
    from runtimes import network

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(subject, options)(torch.zeros(1, *subject.shape[1:]))
    return counter.get_total_flops() // 2


def equals(name: str, size: int, settings: BestSettings) -> Iterator[tuple[Subject, int]]:
    """One of ours and the others, each with its operations."""
    ours = Subject(name, name, EAGER, size)
    wanted = operations(ours, {})
    yield ours, wanted
    for peer in SMALL_PEERS:
        known: dict[int, int] = {}

        def count(side: int, peer: str = peer, known: dict[int, int] = known) -> int:
            if side not in known:
                known[side] = operations(Subject(peer, peer, EAGER, side), {})
            return known[side]

        side = 32
        while count(side) < wanted and side < 1024:
            side += 8
        side = min((side - 8, side) if side > 32 else (side,), key=lambda each: abs(count(each) - wanted))
        if abs(known[side] / wanted - 1) <= APART:
            yield Subject(peer, peer, EAGER, side), known[side]


def small(bench: Bench, settings: BestSettings, shelf: Shelf) -> Iterator[Part]:
    """The small models, each with the others of as many operations, one image at a time."""
    groups = {name: list(equals(name, size, settings)) for name, size in settings.small}
    counts = {(name, subject.model): count for name, group in groups.items() for subject, count in group}
    runtimes = [mode for mode in settings.runtimes if mode in (EAGER, COMPILED, ORT, OPENVINO, AOTI)]
    for name, group in groups.items():
        rows = measured(bench, shelf, [replace(subject, mode=mode) for subject, _ in group for mode in runtimes])
        rows = [row | {"group": name, "operations": counts[name, row["model"]]} for row in rows]
        yield "rows small", rows
        lines = by_model(rows, "size")
        yield "small", [line | {"M FLOPs": f"{counts[name, line['model']] / 1e6:,.0f}"} for line in lines]


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(tables: Tables, settings: Settings) -> list[Row]:
    """What is wanted, of what has been measured."""
    assert isinstance(settings, BestSettings)
    found = Figures(tables)

    def fastest(table: str, of: Callable[[Row], bool]) -> Row:
        rows = [row for row in tables.get(table, []) if of(row)]
        if timed := [row for row in rows if "seconds" in row]:
            return min(timed, key=lambda row: row["seconds"])
        raise NotMeasuredError(next((row["error"] for row in rows if "error" in row), "no run has measured it"))

    def is_ours(row: Row) -> bool:
        return row["model"] == MINE and row["mode"] != PRODUCTS

    def against(table: str, others: Sequence[str]) -> tuple[float, str]:
        ours, other = fastest(table, is_ours), fastest(table, lambda row: row["model"] in others)
        return ours["seconds"] / other["seconds"], f"ours {ours['mode']}; {other['model']} {other['mode']}"

    def against_products(table: str) -> tuple[float, str]:
        least = fastest(table, lambda row: row["mode"] == PRODUCTS)
        return fastest(table, is_ours)["seconds"] / least["seconds"], ""

    for case in settings.cases:
        table = f"rows {case.section}"
        for name, others in ((f"the best of {', '.join(ALIKE)}", ALIKE), (f"{RESNET}'s best", (RESNET,))):
            found.add(f"{case.title}: our best / {name}", case.bound, partial(against, table, others))
        if case.precision == FLOAT32:
            found.add(f"{case.title}: our best / products alone", GOAL, partial(against_products, table))

    def row(table: str, key: str, **wanted: object) -> float:
        return found.find(table, key=key, **wanted)[key]

    def ratio(table: str, key: str, one: Row, other: Row) -> tuple[float, str]:
        return row(table, key, **one) / row(table, key, **other), ""

    ours: Row = {"model": MINE, "precision": FLOAT32}
    swin, low = ours | {"model": SWIN}, ours | {"precision": BFLOAT16}
    step = f"training step, batch {settings.batch}, {settings.size}²"
    found.add(f"{step}: ours / {SWIN}", 0.80, partial(ratio, "steps", "seconds", ours, swin))
    found.add(f"{step}: ours, bfloat16 / float32", 0.60, partial(ratio, "steps", "seconds", low, ours))
    found.add(f"{step}: peak memory, ours / {SWIN}", 1.00, partial(ratio, "steps", "peak_mb", ours, swin))
    near, *others = settings.large
    at_near = {"size": near}
    found.add(
        f"peak memory, {near}²: ours / {SWIN}", 1.30,
        partial(ratio, "large", "peak_mb", {"model": MINE} | at_near, {"model": SWIN} | at_near),
    )  # fmt: skip
    for size in [size for size in others if size > 1024] or others:
        mine, first = {"model": MINE, "size": size}, {"model": MINE} | at_near
        found.add(f"ours, time a pixel at {size}² / at {near}²", 1.10, partial(ratio, "large", "pixel", mine, first))
        before = {"model": MINE, "size": max(other for other in settings.large if other < size)}
        found.add(
            f"ours, memory a pixel at {size}² / at {before['size']}²", 1.00,
            partial(ratio, "large", "bytes_a_pixel", mine, before),
        )  # fmt: skip
    near, far = settings.grids[0], settings.grids[-1]
    found.add(
        f"scan, time a pixel on a grid of {far}² / of {near}²", 1.10,
        partial(ratio, "grids", "pixel", {"grid": far}, {"grid": near}),
    )  # fmt: skip

    def small_ratio(name: str, is_eager: bool) -> tuple[float, str]:
        def of(is_mine: bool) -> Row:
            return fastest(
                "rows small",
                lambda row: (
                    row["group"] == name
                    and (row["model"] == name) == is_mine
                    and (not is_eager or row["mode"] == EAGER)
                ),
            )

        ours, other = of(True), of(False)
        note = f"{other['model']}" if is_eager else f"ours {ours['mode']}; {other['model']} {other['mode']}"
        return ours["seconds"] / other["seconds"], note

    for name, size in settings.small:
        for is_eager in (True, False):
            which = "eager" if is_eager else "best"
            found.add(f"{name}, {size}²: ours / the fastest other, {which}", 1.00, partial(small_ratio, name, is_eager))
    return found.records


def notes(settings: Settings) -> list[str]:
    """What holds for all numbers, in sentences."""
    import onnxruntime
    import openvino

    return [
        "Medians of rounds in which everything in a table takes turns; each runtime in a process of its own, which "
        "computes only when it is asked to; eager PyTorch in inference mode, compiled by torch.compile with freezing, "
        "ONNX Runtime without spinning threads",
        "Every result was compared with eager PyTorch's in float32 (1e-4 of the largest in float32), and OpenVINO was "
        "asked which precision and how many threads it took",
        "bfloat16: eager under autocast, the others with all layers in it; int8: static, QDQ, as `vmamba quantize` "
        "writes it for all networks; ours also as a torch program, compiled",
        "Products alone: the matrix products and convolutions of our model, with weights packed by oneDNN",
        "Random weights; peak memory is that of a fresh process beside the libraries; operations of small models are "
        f"those of products and convolutions, and within {APART:.0%} of ours",
        f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__.split('-')[0]}",
    ]  # fmt: skip


def benchmark(settings: BestSettings, shelf: Shelf) -> Benchmark:
    """With all that its sections need."""
    given: dict[str, Any] = {"settings": settings, "shelf": shelf}
    sections = {
        case.section: Section(partial(best, case=case, **given), (f"rows {case.section}", case.section))
        for case in settings.cases
    }
    sections["steps"] = Section(partial(training, **given), ("steps",))
    sections["large"] = Section(partial(large, **given), ("large", "grids"))
    sections["small"] = Section(partial(small, **given), ("rows small", "small"))
    layout = {case.section: (case.title, HEADERS) for case in settings.cases} | {
        "steps": ("Training step, forward and backward, eager", "model;precision;batch;ms;images/s;peak memory, MB"),
        "large": ("Large pictures, eager", "size;model;ms;ns a pixel;peak memory, MB;bytes a pixel"),
        "grids": ("Our scan by the side of the grid", "grid;channels;ms;ns a pixel"),
        "small": ("Small models, one image", HEADERS.replace("model;", "model;size;M FLOPs;")),
    }
    return Benchmark("cpu_best", "The best of every runtime on the CPU", layout, sections, figures, "", notes)


class BestResults(Results):
    """With a picture of the best of every network by the side of the image."""

    @property
    def page(self) -> str:
        return page(self.benchmark.title, "cpu.py --sections NAME ...", self.data, self.benchmark.layout)

    def draw(self) -> None:
        """Draw it."""
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        assert isinstance(self.settings, BestSettings)
        for case in self.settings.cases:
            if case.batch > 1 or case.precision != FLOAT32:
                continue
            rows = [row for row in self.data["tables"].get(f"rows {case.section}", []) if "seconds" in row]
            for label, wanted in (("seconds an image, eager", (EAGER,)), ("seconds an image, best runtime", None)):
                for model in dict.fromkeys(row["model"] for row in rows):
                    mine = [row for row in rows if row["model"] == model and row["mode"] != PRODUCTS]
                    times = [row["seconds"] for row in mine if wanted is None or row["mode"] in wanted]
                    if times:
                        panels.setdefault(label, {}).setdefault(model, []).append((case.size, min(times)))
                for row in rows:
                    if row["mode"] == PRODUCTS:
                        panels.setdefault(label, {}).setdefault(PRODUCTS, []).append((case.size, row["seconds"]))
        if self.folder and panels:
            path = self.folder / f"{self.benchmark.name}.png"
            curves(path, "", "side of the image, pixels", panels, sentence(self.data["environment"]))
