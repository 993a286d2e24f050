"""Speed and memory on a GPU: VMamba against timm's Swin, ConvNeXt and DeiT, and against the released way of scanning.

Everything runs under bfloat16 autocast on channels-last images, with the same settings for all models. What is compared
takes turns, one call each a round, after warming up; a figure is a ratio of two medians by the card's own clock. First
the scans are held against the definition in float64: wrong results are not timed.

    python benchmarks/gpu.py                              # everything; most of the time goes into compiling
    python benchmarks/gpu.py --sections inference,latency # a part; the other parts of the results' file stay
    python benchmarks/gpu.py --budget 540                 # leaves out what would start too late
    python benchmarks/gpu.py --quick                      # 224² only, few rounds, nothing compiled, nothing written
    python benchmarks/gpu.py --device cpu                 # tiny models: whether the program works, not how fast
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

import networks
import runner
import torch
from networks import (
    CONVNEXT,
    DEIT,
    DROP_PATH,
    SWIN,
    TINY,
    Contender,
    Entry,
    SharedStand,
    entries_of,
)
from page import Row
from runner import (
    COMPILED,
    EAGER,
    RESULTS,
    Bench,
    Call,
    NotMeasuredError,
    Part,
    Section,
    capture,
    failures_in,
    release,
)
from scan_speed import MINE, RELEASED, check, time_scans
from torch import Tensor, nn
from tuning import tuning
from workers import Workers

from vmamba.nn import SS2D, VSSBlock
from vmamba.ops.backends import ENVIRONMENT_VARIABLE, choose_backend

GB_OF_WORKER, MOST_WORKERS = 5, 24
FULL = runner.Settings(
    device="cuda",
    most=2.0,
    contenders=(MINE, RELEASED, SWIN, CONVNEXT, DEIT),
    scans=(
        (56, 96, (1, 128)), (28, 192, (1, 128)), (14, 384, (1, 128)), (7, 768, (1, 128)), (192, 96, (1, 8)),
        (384, 96, (1, 8)),
    ),
    checks=((2, 9, 7, 48), (1, 14, 14, 384), (2, 31, 40, 96)),
)  # fmt: skip
QUICK = replace(FULL, rounds=5, most=1.0, modes=(EAGER,), sizes=(224,), compiled_sizes=(), scans=FULL.scans[:4])
SMOKE = replace(
    FULL, device="cpu", size=64, batch=2, rounds=1, least=0.0, compiler="eager", sizes=(64, 96), compiled_sizes=(96,),
    profiled=((False, 2, 64), (True, 2, 64)), scans=((8, 32, (1, 2)),), checks=((2, 5, 4, 32),), options=TINY,
)  # fmt: skip
LAYOUT = networks.LAYOUT | {
    "checks": (
        "Scans against the definition in float64: ‖difference‖ / ‖reference‖ of the result and the six gradients",
        "scan;shape;dtype;worst;distance;allowed",
    ),
    "rates": ("Rates of the card", "what;value"),
    "latency": ("Latency of one image", "model;mode;ms"),
    "operators": (
        "SS2D's operator with its projections; “operator” is ours without them, with the bytes that it must move and "
        "their rate as a share of the copy rate",
        "scan;grid;channels;batch;µs;MB;TB/s;share;backward, µs;backward MB;backward TB/s;backward share;timed",
    ),
    "tuning": (
        "Configurations of the scan's kernels, fastest first; the best are for "
        "`vmamba/ops/backends/triton/configurations.py`",
        "pass;grid;channels;configuration;µs",
    ),
}


def our_kernels() -> tuple[str, ...]:
    """Names of the Triton backend's kernels."""
    try:
        from triton.runtime import JITFunction

        from vmamba.ops.backends.triton import kernels
    except ImportError:
        return ()
    return tuple(name for name, value in vars(kernels).items() if isinstance(value, JITFunction))


# The first kind whose words a kernel's name contains is its own. torch.compile names its kernels triton_poi (pointwise)
# or triton_per and triton_red (with sums), and then after all the layers that it fused.
KINDS = {
    "scan": ("vmamba::", *our_kernels()),
    "copies": ("copy_kernel", "Memcpy", "Memset", "CatArray", "::copy_", "::_to_copy", "::clone"),
    "elementwise": ("triton_poi", "elementwise", "gelu", "silu"),
    "normalisation": ("triton_per", "triton_red", "norm", "Norm", "GammaBeta"),
    "convolutions": ("conv", "fprop", "dgrad", "wgrad", "nchw", "nhwc", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "gemv", "splitK", "::mm", "::addmm", "linear"),
    "sums": ("reduce", "softmax", "SoftMax"),
}


def captured(bench: Bench, call: Call) -> tuple[Call, str]:
    """The call as a graph where that is possible, and how it is launched."""
    if bench.settings.device == "cuda":
        with failures_in({}):
            return capture(call), "graph"
    call()
    return call, "launched"


# --- sections --------------------------------------------------------------------------------------------------------


def scan_shapes(s: runner.Settings) -> list[tuple[int, int, int, int]]:
    """Those of the operator."""
    return [(batch, grid, grid, channels) for grid, channels, batches in s.scans for batch in batches]


def operators(bench: Bench) -> Iterator[Part]:
    """The scan alone, forward and backward, at the shapes that the models meet."""
    rates = {"copy on the device, TB/s": bench.copy_rate, "bfloat16 matrix product, TFLOP/s": bench.product_rate}
    yield "rates", [{"what": what, "value": rate / 1e12} for what, rate in rates.items()]
    for batch, grid, _, channels in scan_shapes(bench.settings):
        bench.say(f"  scans, {batch} × {grid}² × {channels}")
        rows: list[Row] = [{"scan": "all", "grid": grid, "channels": channels, "batch": batch}]
        with failures_in(rows[0]):
            rows = time_scans(bench, batch, grid, channels, partial(captured, bench))
        yield "operators", rows
        release()


def latency_entries(s: runner.Settings) -> list[Entry]:
    """One image."""
    return entries_of((MINE, SWIN, CONVNEXT), s.modes, 1, s.size)


def latency(bench: Bench) -> Iterator[Part]:
    """One image, as it comes and as a CUDA graph, which no launching from Python slows down."""
    yield "latency", networks.race(bench, latency_entries(bench.settings), graphs=True)


def least_bytes(bench: Bench, contender: Contender, image: Tensor, training: bool) -> dict[str, Row]:
    """Bytes that each kind of our model's layers must move, and how long it takes to copy as many.

    They are what goes in, what comes out and weights, two a number. In training also what the gradients need: a
    product's and a convolution's inputs, weights and gradients twice more, of the others the input and the gradients of
    input and output.
    """
    moved: dict[str, float] = defaultdict(float)

    def add(kind: str, forward: int, backward: int) -> None:
        moved[kind] += 2 * (forward + backward * training)

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0].numel()
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            values = given + module.weight.numel() + output.numel()
            add("matrix products" if isinstance(module, nn.Linear) else "convolutions", values, 2 * values)
        elif isinstance(module, nn.LayerNorm):
            add("normalisation", 2 * given, 3 * given)
        elif isinstance(module, nn.GELU):
            add("elementwise", 2 * given, 3 * given)
        elif isinstance(module, VSSBlock):
            branches = 1 if module.mlp is None else 2
            add("elementwise", 3 * given * branches, 3 * given * branches)
        elif isinstance(module, SS2D):
            pixels = given // inputs[0].shape[-1]
            u, projected = pixels * module.D.shape[1], pixels * module.x_proj_weight.shape[:2].numel()
            values = u + module.x_proj_weight.numel() + projected
            add("elementwise", 2 * u, 3 * u)
            add("matrix products", values, 2 * values)
            add("scan", 2 * u + projected, 3 * u + 2 * projected)

    hooks = [module.register_forward_hook(note) for module in contender.model.modules()]
    try:
        contender.infer(image)
    finally:
        for hook in hooks:
            hook.remove()
    return {kind: {"bytes": count, "floor_seconds": count / bench.copy_rate} for kind, count in moved.items()}


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(tables: runner.Tables, settings: runner.Settings) -> list[Row]:
    """What is wanted of the backend; images a second are those of each model's better mode."""
    found, size, large = runner.Figures(tables), settings.size, settings.compiled_sizes
    at = f"{size}², batch {settings.batch}"

    def speed(table: str, other: str, side: int) -> Callable[[], tuple[float, str]]:
        return partial(found.ratio, table, other, MINE, size=side)

    for table, name, *bounds in (("inference", "inference", 2, 1.2, 1), ("training", "training step", 2, 1, 0.9)):
        for other, bound in zip((RELEASED, SWIN, CONVNEXT), bounds, strict=True):
            what = f"{name}, {at}: images/s, ours / {other.removeprefix(MINE + ', ')}"
            found.add(what, bound, speed(table, other, size), more=True)
    for side in large:
        found.add(f"inference, {side}²: images/s, ours / {SWIN}", 1.2, speed("resolution", SWIN, side), more=True)
    if large:
        last = large[-1]
        found.add(f"inference, {last}²: images/s, ours / {DEIT}", 4, speed("resolution", DEIT, last), more=True)
        growth = partial(found.growth, MINE, size, last, "resolution")
        found.add(f"time a pixel, ours, {last}² / {size}²", 1.2, growth)

    def bandwidth() -> tuple[float, str]:
        rows = [row for row in tables.get("operators", []) if row["scan"] == "operator"]
        if not rows:
            raise NotMeasuredError("no run has measured it")
        grid, channels = rows[0]["grid"], rows[0]["channels"]
        batch = max(row["batch"] for row in rows if (row["grid"], row["channels"]) == (grid, channels))
        row = found.find("operators", scan="operator", grid=grid, channels=channels, batch=batch)
        return row["share"], f"{grid}² × {channels}, batch {batch}, {row['timed']}"

    def one_image() -> tuple[float, str]:
        rows = [row for row in tables.get("latency", []) if row["mode"] != EAGER]
        theirs = runner.Figures({"latency": rows}).find("latency", model=SWIN)
        ours = found.find("latency", model=MINE, mode=theirs["mode"])
        return ours["seconds"] / theirs["seconds"], theirs["mode"]

    found.add("scan, stage 1: bytes of u, projections and y a second / copy rate", 0.40, bandwidth, more=True)
    memory = partial(found.ratio, "training", MINE, SWIN, "peak_mb", size=size)
    found.add(f"peak training memory, {at}: ours / {SWIN}", 1, memory)
    found.add(f"latency, batch 1, {size}²: ours / {SWIN}, same mode", 1, one_image)
    return found.records


def notes(settings: runner.Settings) -> list[str]:
    """What holds for all numbers, in sentences."""
    return [
        "bfloat16 autocast, channels-last images, cuDNN chooses its algorithms by trial, stochastic depth of "
        f"{DROP_PATH} in all training steps",
        f"Medians of up to {settings.rounds} rounds in which all calls take turns; compiled is `torch.compile(model, "
        'dynamic=False)`, graph the same calls replayed as a CUDA graph, as `mode="reduce-overhead"` does; a figure '
        "takes the best mode of each model",
        "With other scans VMamba-T is timed in eager mode only, since mamba-ssm's extension breaks the graph of "
        "torch.compile; the chain of torch's operators, thousands of steps long, is timed as a scan alone",
        "Peak memory is that of one model alone: parameters, gradients and activations",
        "The scan's share of the copy rate is that of the operator after its projection, as `ss2d_scan` calls it: what "
        "it must read and write once over its time",
    ]


GPU = runner.Benchmark(
    "gpu", "VMamba on a GPU", LAYOUT,
    {
        "check": Section(check, ("checks",), 0, lambda s: itertools.product(s.checks, (torch.float32, torch.bfloat16))),
        "operators": Section(
            operators, ("rates", "operators"), 30, lambda s: [(shape, torch.bfloat16) for shape in scan_shapes(s)]
        ),
        "inference": Section(
            partial(networks.large_batch, training=False), ("inference",), 25,
            partial(networks.large_batch_entries, training=False),
        ),
        "training": Section(
            partial(networks.large_batch, training=True), ("training",), 50,
            partial(networks.large_batch_entries, training=True),
        ),
        "latency": Section(latency, ("latency",), 10, latency_entries),
        "profile": Section(
            partial(networks.profiling, kinds=KINDS, floors=least_bytes), ("profile", "kernels"), 30,
            networks.profile_entries,
        ),
        "resolution": Section(
            networks.resolution, ("resolution",), 30, lambda s: itertools.chain(*networks.resolution_races(s))
        ),
        "tune": Section(partial(tuning, prepare=capture), ("tuning",), 180),
    },
    figures, "resolution", notes,
)  # fmt: skip
CHOICE = [name for name in GPU.sections if name != "check"]


# --- processes -------------------------------------------------------------------------------------------------------


def room_for_workers() -> int:
    """Processes that this machine has room for, with GB_OF_WORKER of memory and half a core each."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return max(1, min(MOST_WORKERS, int(memory / 1e9 / GB_OF_WORKER), 2 * len(os.sched_getaffinity(0))))


@contextmanager
def ready_workers(bench: Bench, sections: Iterable[str], limit: int) -> Iterator[Workers]:
    """Processes in which everything that the sections measure has been built, compiled and called.

    Compiling takes most of the time of a run, so all of it is done side by side; what is ready then waits for its turn.
    Time for the turns is left of the budget.
    """
    chosen = [GPU.sections[name] for name in sections]
    ahead = [one for section in chosen for one in section.ahead(bench.settings)]
    groups, reserve = networks.groups_of(bench.settings, ahead), sum(section.seconds for section in chosen)
    with NamedTemporaryFile() as lock, Workers(SharedStand, bench.settings, lock.name, limit=limit) as workers:
        bench.say(f"{len(groups)} groups of contenders and scans are made ready in at most {limit} processes")
        workers.prepare(groups, lambda: bench.seconds_left - reserve, bench.say)
        yield workers


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(CHOICE[:-1]), help=f"some of {','.join(CHOICE)}")
    parser.add_argument("--modes", default=f"{EAGER},{COMPILED}", help="eager, compiled or both")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; what would start too late is left out")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing compiled; written only to --output")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes in which models stand ready; 0: models are made one after the other in this",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny models, for tests")
    parser.add_argument("--output", type=Path, help=f"folder of the results; {RESULTS} for a full run")
    options = parser.parse_args(arguments)
    sections, modes = options.sections.split(","), options.modes.split(",")
    if unknown := {*sections, *modes} - {*CHOICE, EAGER, COMPILED}:
        parser.error(f"there are no sections or modes of these names: {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a GPU, and torch finds none (--device cpu tries the program with tiny models)"
        )

    if options.workers is None:
        options.workers = room_for_workers() if options.device == "cuda" else 0
    settings = SMOKE if options.device == "cpu" else QUICK if options.quick else FULL
    settings = replace(settings, modes=tuple(mode for mode in settings.modes if mode in modes))
    is_full = settings.device == "cuda" and not options.quick
    if settings.device == "cuda":
        os.environ.setdefault(ENVIRONMENT_VARIABLE, "triton")
    backend = choose_backend(None, torch.device(settings.device)).name
    results = runner.Results(GPU, settings, options.output or (RESULTS if is_full else None), backend=backend)
    bench = Bench(settings, options.budget)
    chosen = [name for name in sections if name != "tune"]
    workers = ready_workers(bench, ["check", *chosen], options.workers) if options.workers else nullcontext()
    with networks.compilers_set():
        with workers as bench.workers:
            results.run(bench, ["check"])
            is_right = MINE not in bench.unfit and "check" not in results.data["skipped"]
            results.run(bench, chosen if is_right else [])
        bench.workers = None
        results.run(bench, ["tune"] if is_right and "tune" in sections else [])  # which has processes of its own
    print(results.page)
    if results.folder:
        print(f"written: {results.folder / 'gpu.json'}, gpu.md and gpu.png")
    if reason := bench.unfit.get(MINE) or results.data["skipped"].get("check"):
        sys.exit(f"nothing was timed, since our scan fails its check: {reason}")


if __name__ == "__main__":
    main()
