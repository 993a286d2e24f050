"""Speed and memory on the CPU: VMamba against timm's Swin, ConvNeXt and DeiT, and its scan against the definition.

Models take turns, one call each a round, so that a machine which slows down slows all of them; a figure is a median
over the rounds, or a ratio of two such medians. Peak memory is that of a fresh process.

    python benchmarks/cpu.py                    # the committed table, profile and plot: about ten minutes on two cores
    python benchmarks/cpu.py --quick            # 224² only, few rounds, nothing written: a minute or two
    python benchmarks/cpu.py --sections best-224 best-768 steps --files FOLDER
                                                # these parts of cpu_best.md (best.py): every network in every runtime;
                                                # exported files are kept in FOLDER; other parts of the page stay
    python benchmarks/cpu.py --against SRC      # every time and memory of ours over that of another checkout's src,
                                                # which has its _native.so in it or beside it
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import best
import networks
import torch
from networks import CONVNEXT, DEIT, FOUR, SWIN, TINY, Contender, prepare, random_images
from page import Row, columns
from runner import EAGER, RESULTS, Bench, Benchmark, Call, Figures, Part, Results, Section, Settings, Tables
from runtimes import Shelf, resident_mb
from scan_speed import MINE, scan_inputs
from torch import Tensor
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

import vmamba
from vmamba.ops import available_backends, ss2d_scan, use_backend
from vmamba.ops.backends.native.products import linear

VANILLA = "vanilla_vmamba_tiny"
# One batch for each scan of a 224² image.
FULL = Settings(
    "cpu", batch=8, rounds=66, least=0, most=10, modes=(EAGER,), low=False, contenders=FOUR,
    sizes=(224, 384, 512, 768, 1024), compiled_sizes=(), profiled=((False, 1, 224), (False, 1, 1024)),
    scans=((56, 96, (1,) * 2), (28, 192, (1,) * 2), (14, 384, (1,) * 8), (7, 768, (1,) * 2)),
)  # fmt: skip
QUICK = replace(FULL, rounds=30, most=2, sizes=(224,), profiled=((False, 1, 224),))
SMOKE = replace(
    QUICK, size=64, batch=2, rounds=1, sizes=(64,), profiled=((False, 1, 64),), scans=((8, 32, (1, 1)),),
    options=TINY | {VANILLA: {"depths": (1,), "dims": (32,)}},
)  # fmt: skip
LAYOUT = networks.LAYOUT | {"scans": ("Scans, and models for the sake of their scans", "what;ms")}
# An operator belongs to the first kind whose words its name contains.
KINDS = {
    "whole blocks": ("_call_block",),
    "scan": ("scan",),
    "normalisation": ("norm",),
    "activations": ("gelu", "silu_"),
    "convolutions": ("conv", "depthwise"),
    "matrix products": ("mm", "linear", "product"),
    "copies": ("copy_", "::cat", "clone", "contiguous"),
}


def scans(bench: Bench) -> Iterator[Part]:
    """The operator, models with it in two precisions and with sixteen states, and the definition, a loop."""
    s = bench.settings
    inputs = [scan_inputs(1, g, g, channels, "cpu", torch.float32) for g, channels, each in s.scans for _ in each]
    operators = [each.operators()[0] for each in inputs]
    image, _ = random_images(bench, 1, s.size)
    low = replace(bench, settings=replace(s, low=True))
    ours, ours_low, vanilla = (
        partial(prepare(each, label, EAGER, s.size).infer, image)
        for each, label in ((bench, MINE), (low, MINE), (bench, VANILLA))
    )
    groups: list[dict[str, Call]] = [
        {"all scans of an image": lambda: [call() for call in operators]},
        {"first scan": operators[0]},
        {"float32": ours, "bfloat16": ours_low},
        {VANILLA: vanilla},
    ]
    if len(s.contenders) > 1:  # the definition is the same in every tree
        groups.append({"first scan, definition": partial(inputs[0].forward, partial(ss2d_scan, backend="reference"))})
        groups.append({f"{VANILLA}, definition": use_backend("reference")(vanilla)})
    for calls in groups:
        yield "scans", [{"what": name, "seconds": seconds} for name, seconds in bench.interleave(calls).items()]


def profiling(bench: Bench) -> Iterator[Part]:
    """As `networks.profiling`, with our C++ functions under their names; the profiler sees only torch's dispatcher."""

    def named(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            with record_function(name):
                return function(*arguments)

        return call

    package = importlib.import_module("vmamba.ops.backends.native")
    with ExitStack() as stack:
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            for name, value in list(vars(module).items()):
                if name.startswith("_call_"):
                    stack.enter_context(mock.patch.object(module, name, named(name, value)))
        yield from networks.profiling(bench, KINDS, product_time)


def product_rate(bench: Bench) -> float:
    """Operations a second of a large product: torch's or our kernel's, whichever is faster at the moment."""
    left, right = (torch.randn(1024, 1024) for _ in range(2))
    calls = {"torch": lambda: left @ right, "ours": lambda: linear(left, right)}
    return 2 * 1024**3 / min(bench.interleave(calls).values())


def product_time(bench: Bench, contender: Contender, image: Tensor, training: bool) -> dict[str, Row]:
    """The time of matrix products and convolutions at the rate of a large product."""
    rate = product_rate(bench)
    with FlopCounterMode(display=False) as counter:
        contender.infer(image)
    seconds = {"matrix products": 0.0, "convolutions": 0.0}
    for name, flops in counter.get_flop_counts()["Global"].items():
        seconds["convolutions" if "conv" in str(name) else "matrix products"] += flops / rate
    return {kind: {"floor_seconds": value} for kind, value in seconds.items()}


def figures(tables: Tables, settings: Settings) -> list[Row]:
    """What is wanted; a run that leaves sizes out leaves their figures out."""
    found, near, far = Figures(tables), settings.size, max(settings.sizes)

    def image(model: str, size: int = near) -> Callable[[], Row]:
        return partial(found.find, "resolution", model=model, size=size)

    def scan(what: str) -> Callable[[], Row]:
        return partial(found.find, "scans", what=what)

    def add(name: str, bound: float, one: Callable[[], Row], other: Callable[[], Row], key: str = "seconds") -> None:
        found.add(name, bound, lambda: (one()[key] / other()[key], ""), more=name.startswith("definition"))

    for other, bounds in ((SWIN, (0.90, 0.85, 0.85)), (CONVNEXT, (1.00, 1.00)), (DEIT, (None, None, 0.40))):
        for size, bound in zip((near, 768, 1024), bounds, strict=False):
            if bound and size in settings.sizes:
                add(f"ours / {other}, {size}²", bound, image(MINE, size), image(other, size))
    if far > near:
        found.add(
            f"ours, time a pixel at {far}² / at {near}²", 1.25, partial(found.growth, MINE, near, far, "resolution")
        )
    add(f"peak memory, ours / {SWIN}, {far}²", 1.00, image(MINE, far), image(SWIN, far), key="peak_mb")
    for name, bound in (("inference", 0.90), ("training", 1.00)):
        what = f"{name}, ours / {SWIN}, batch {settings.batch}, {near}²"
        found.add(what, bound, partial(found.ratio, name, MINE, SWIN))
    add(f"all scans of an image / {SWIN}'s forward pass, {near}²", 0.12, scan("all scans of an image"), image(SWIN))
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    add(f"ours, bfloat16 / float32, {near}²", 0.70 if has_bfloat16 else 1.00, scan("bfloat16"), scan("float32"))
    add("definition / native, scan of stage 1", 50, scan("first scan, definition"), scan("first scan"))
    add(f"definition / native, {VANILLA}, {near}²", 15, scan(f"{VANILLA}, definition"), scan(VANILLA))
    return found.records


def notes(settings: Settings) -> list[str]:
    """What holds for all numbers, in sentences."""
    return ["float32; medians of rounds in which all models take turns; peak memory is that of a fresh process; the "
            "least time of products and convolutions is that at the rate of a 1024² product, the faster of torch's and "
            "ours"]  # fmt: skip


CPU = Benchmark(
    "cpu", "On the CPU", LAYOUT,
    {
        "resolution": Section(networks.resolution, ("resolution",)),
        "inference": Section(partial(networks.large_batch, training=False), ("inference",)),
        "training": Section(partial(networks.large_batch, training=True), ("training",)),
        "scans": Section(scans, ("scans",)),
        "profile": Section(profiling, ("profile", "kernels")),
    },
    figures, "resolution", notes,
)  # fmt: skip


# --- fresh processes -------------------------------------------------------------------------------------------------


def fresh(*arguments: str, tree: tuple[str, str] | None = None, program: str = __file__) -> Any:
    """What a program prints last in a process of its own, as JSON; with a tree's package and library."""
    environment = dict(os.environ)
    if tree:
        environment["PYTHONPATH"] = os.pathsep.join([tree[0], *sys.path])
        environment["VMAMBA_NATIVE_LIBRARY"] = tree[1]
    # -S: no .pth files, among them that of an editable install, which would come before the tree.
    command = [sys.executable, *["-S"] * (tree is not None or sys.flags.no_site), program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(bench: Bench, label: str, size: int) -> float:
    """Most resident MB of this process while it builds a model and runs it once, less what it held before."""
    before = resident_mb("VmRSS")
    image, _ = random_images(bench, 1, size)
    prepare(bench, label, EAGER, size).infer(image)
    return resident_mb("VmHWM") - before


def measure_ours(bench: Bench) -> dict[str, float]:
    """Seconds and peak memory of everything of ours, by name."""
    results = Results(CPU, replace(bench.settings, contenders=(MINE,), most=2), None)
    results.run(replace(bench, settings=results.settings), ["resolution", "inference", "training", "scans"])
    rows = [row for rows in results.data["tables"].values() for row in rows]
    if errors := [*results.data["skipped"].values(), *(row["error"] for row in rows if "error" in row)]:
        sys.exit("; ".join(errors))
    return {
        f"{table}, {row.get('what') or row['size']}, {key}": row[key]
        for table, rows in results.data["tables"].items()
        for row in rows
        for key in ("seconds", "peak_mb")
        if key in row
    }


def compare(other: Path, flags: list[str], rounds: int) -> list[Row]:
    """Every number of ours and the other tree's, each the median of fresh processes that take turns."""
    mine = os.environ.get("VMAMBA_NATIVE_LIBRARY") or importlib.util.find_spec("vmamba.ops.backends._native").origin
    places = (other / "vmamba/ops/backends/_native.so", other.parent / "_native.so")
    theirs = next((str(place.resolve()) for place in places if place.exists()), None)
    if theirs is None:
        sys.exit(f"the other tree's library is missing; expected {places[0]} or {places[1]}")
    trees = ((str(Path(vmamba.__file__).parents[1]), mine), (str(other.resolve()), theirs))
    runs = [[fresh("--ours", *flags, tree=tree) for tree in trees] for _ in range(rounds)]
    rows = []
    for name in runs[0][0]:
        mine, theirs = (statistics.median(run[i][name] for run in runs) for i in (0, 1))
        ratios = sorted(run[0][name] / run[1][name] for run in runs)
        rows.append({"what": name, "ours": f"{mine:.4g}", "other": f"{theirs:.4g}", "ratio": mine / theirs,
                     "of single rounds": f"{ratios[0]:.3f} to {ratios[-1]:.3f}"})  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="224² only, few rounds; written only to --output")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether the program works, not how fast")
    names = ", ".join([*CPU.sections, *best.benchmark(best.FULL, Shelf(Path())).sections])
    parser.add_argument("--sections", nargs="+", metavar="NAME", help=f"of {names}")
    parser.add_argument("--files", type=Path, help="folder of exported files, kept between runs")
    parser.add_argument("--output", type=Path, help=f"folder of the results; {RESULTS} for a full run")
    parser.add_argument("--against", type=Path, metavar="SRC", help="compare with the package in this folder")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each tree with --against")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = SMOKE if options.tiny else QUICK if options.quick else FULL
    flags = ["--threads", str(options.threads), *["--tiny"] * options.tiny, *["--quick"] * options.quick]
    bench = Bench(settings, memory=lambda label, size: fresh("--memory-of", label, "--size", str(size), *flags))
    if options.memory_of:
        print(measure_memory(bench, options.memory_of, options.size))
        return
    if reason := available_backends()["native"]:
        sys.exit(f"benchmarks/cpu.py measures the native backend, which cannot run here: {reason}")
    if options.ours:
        print(json.dumps(measure_ours(bench)))
        return
    if options.against:
        rows = compare(options.against, flags, options.rounds)
        print("\n".join(columns(rows, ["what", "ours", "other", "ratio", "of single rounds"])))
        return

    with ExitStack() as stack:
        folder = options.files or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        measure(settings, bench, options.sections, options.output, folder)


def measure(settings: Settings, bench: Bench, chosen: list[str] | None, output: Path | None, files: Path) -> None:
    """Fill the pages that the chosen sections belong to; without a choice, this program's own page anew."""
    kernels = importlib.import_module("vmamba.ops.backends.native").kernels()
    output = output or (RESULTS if settings is FULL else None)
    best_settings = best.SMOKE if settings is SMOKE else best.FULL
    best_of = best.benchmark(best_settings, Shelf.new(files, best_settings.options))
    known = [*CPU.sections, *best_of.sections]
    if unknown := [name for name in chosen or () if name not in known]:
        sys.exit(f"there is no section {unknown[0]}; there are {', '.join(known)}")
    found: list[Results] = []
    if not chosen or set(chosen) & CPU.sections.keys():
        found.append(Results(CPU, settings, output, kernels=kernels))
        if not chosen:
            found[0].data |= {"tables": {}, "skipped": {}, "dates": {}}
        found[0].run(bench, [name for name in CPU.sections if not chosen or name in chosen])
    if chosen and (names := [name for name in best_of.sections if name in chosen]):
        found.append(best.BestResults(best_of, best_settings, output, kernels=kernels))
        found[-1].run(replace(bench, settings=best_settings), names)
    for results in found:
        print(results.page)
        if results.folder:
            names = sorted(path.name for path in results.folder.glob(f"{results.benchmark.name}.*"))
            print(f"{results.folder} now has {', '.join(names)}")


if __name__ == "__main__":
    main()
