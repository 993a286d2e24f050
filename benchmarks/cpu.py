"""Speed and memory on the CPU: VMamba against timm's Swin, ConvNeXt and DeiT, and its scan against the definition.

Models take turns, one call each a round, so that a machine which slows down slows all of them; a figure is a median
over the rounds, or a ratio of two such medians. Peak memory is that of a fresh process.

    python benchmarks/cpu.py                    # the committed table, profile and plot: about ten minutes on two cores
    python benchmarks/cpu.py --quick            # 224² only, few rounds: a minute or two
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from environment import RESULTS, describe, sentence
from measuring import (
    CONVNEXT,
    DEIT,
    MODELS,
    OURS,
    SWIN,
    Figure,
    build,
    figure_cells,
    interleave,
    kind_of,
    markdown_table,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from vmamba.ops import available_backends, use_backend
from vmamba.ops.backends import native
from vmamba.ops.backends.native import layers as fused

VANILLA = "vanilla_vmamba_tiny"
SIZES = (224, 384, 512, 768, 1024)
# (grid, channels, calls) of the scans of one 224² image.
SCANS = ((56, 96, 2), (28, 192, 2), (14, 384, 8), (7, 768, 2))
# An operator belongs to the first kind whose words its name contains.
KINDS = {
    "matrix products": ("mm", "linear_pointwise", "mkl_linear"),
    "convolutions": ("conv", "depthwise"),
    "scan": ("ss2d_scan",),
    "normalisation": ("norm",),
    "activations": ("gelu", "silu"),
    "copies": ("copy_", "::cat", "clone", "contiguous"),
}


@torch.inference_mode()
def time_forward(names: tuple[str, ...], batch: int, size: int, rounds: int) -> dict[str, float]:
    """Median seconds of a forward pass."""
    image = torch.randn(batch, 3, size, size)
    models = {name: build(name, size) for name in names}
    return interleave({name: lambda model=model: model(image) for name, model in models.items()}, rounds)


def time_training(names: tuple[str, ...], batch: int, size: int, rounds: int) -> dict[str, float]:
    """Median seconds of a forward and a backward pass."""
    image, target = torch.randn(batch, 3, size, size), torch.arange(batch)
    models = {name: build(name, size).train() for name in names}

    def step(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(image), target).backward()

    return interleave({name: lambda model=model: step(model) for name, model in models.items()}, rounds)


@torch.inference_mode()
def time_precisions(size: int, rounds: int) -> dict[str, float]:
    """Median seconds of our forward pass in float32 and under bfloat16 autocast."""
    model, image = build(OURS, size), torch.randn(1, 3, size, size)

    def low() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(image)

    return interleave({"float32": lambda: model(image), "bfloat16": low}, rounds)


def _scan_arguments(size: int, channels: int) -> tuple[Tensor, ...]:
    rank = channels // 16
    u, projected = torch.randn(1, size, size, channels), torch.randn(1, size, size, 4, rank + 2)
    weight, bias = torch.randn(4, channels, rank) * 0.1, torch.randn(4, channels)
    return u, projected, weight, bias, -torch.rand(4, channels, 1) - 0.1, torch.ones(4, channels)


@torch.inference_mode()
def time_scans(rounds: int) -> dict[str, float]:
    """Median seconds of the fourteen scans of a 224² image, and of the first of them in the definition."""
    arguments = [(_scan_arguments(size, channels), calls) for size, channels, calls in SCANS]

    def fourteen() -> None:
        for values, calls in arguments:
            for _ in range(calls):
                torch.ops.vmamba.ss2d_scan(*values, "cross", "native")

    first = arguments[0][0]
    times = interleave({"fourteen": fourteen}, rounds)
    one = {"native": lambda: torch.ops.vmamba.ss2d_scan(*first, "cross", "native")}
    times |= interleave(one, rounds)
    return times | interleave(
        {"reference": lambda: torch.ops.vmamba.ss2d_scan(*first, "cross", "reference")}, min(rounds, 3)
    )


@torch.inference_mode()
def time_vanilla(rounds: int) -> dict[str, float]:
    """Median seconds of a model with sixteen states, with the kernel and with the definition."""
    model, image = build(VANILLA, 224), torch.randn(1, 3, 224, 224)
    times = interleave({"native": lambda: model(image)}, rounds)
    with use_backend("reference"):
        return times | interleave({"reference": lambda: model(image)}, 1)


def peak_memory(name: str, size: int, threads: int) -> float:
    """Peak resident MB of a process that builds a model and runs it once, less what it held before."""
    command = [sys.executable, __file__, "--memory-of", name, "--size", str(size), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _measure_memory(name: str, size: int) -> float:
    def status(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field))

    before = status("VmRSS")
    model, image = build(name, size), torch.randn(1, 3, size, size)
    with torch.inference_mode():
        model(image)
    return (status("VmHWM") - before) / 1024


@torch.inference_mode()
def profile_kinds(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of our forward pass by kind of layer; for matrix products also at the machine's measured rate."""
    model, image = build(OURS, size), torch.randn(1, 3, size, size)
    model(image)
    with _our_kernels_named(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(rounds):
            model(image)
    kinds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        kinds[kind_of(event.key, KINDS)] += event.self_cpu_time_total / 1e3 / rounds
    with FlopCounterMode(display=False) as counter:
        model(image)
    flops = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    rate = 2 * 1024**3 / interleave({"product": lambda: left @ right}, 9)["product"]
    floor = {
        "matrix products": sum(count for name, count in flops.items() if "mm" in name) / rate * 1e3,
        "convolutions": sum(count for name, count in flops.items() if "conv" in name) / rate * 1e3,
    }
    return {kind: {"ms": value, "floor_ms": floor.get(kind, 0.0)} for kind, value in kinds.items()}


@contextmanager
def _our_kernels_named() -> Iterator[None]:
    """Our C++ kernels are called past torch's dispatcher, and so past its profiler; here they appear by name."""

    def named(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            with record_function(function.__name__):
                return function(*arguments, **options)

        return call

    places = [(native, "ss2d_scan"), *((fused, name) for name in ("layer_norm", "depthwise_silu", "gelu"))]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, named(getattr(module, name))))
        yield


def measure(quick: bool, threads: int, say: Callable[[str], None]) -> dict:
    """Everything; see the module's docstring."""
    rounds, sizes = (5, SIZES[:1]) if quick else (11, SIZES)
    turns = {224: 6 * rounds, 384: 2 * rounds, 512: 2 * rounds}
    figures, seconds, memory = [], {}, {}
    for size in sizes:
        say(f"forward, {size}²")
        seconds[size] = time_forward(MODELS, 1, size, turns.get(size, 7))
        memory[size] = {name: peak_memory(name, size, threads) for name in MODELS}
    small = seconds[224]
    for size, bound in ((224, 0.90), (768, 0.85), (1024, 0.85)):
        if size in seconds:
            figures.append(Figure(f"ours / Swin-T, {size}²", seconds[size][OURS] / seconds[size][SWIN], bound))
    for size in (224, 768):
        if size in seconds:
            figures.append(Figure(f"ours / ConvNeXt-T, {size}²", seconds[size][OURS] / seconds[size][CONVNEXT], 1.00))
    if 1024 in seconds:
        large = seconds[1024]
        figures.append(Figure("ours / DeiT-S, 1024²", large[OURS] / large[DEIT], 0.40))
        growth = large[OURS] / 1024**2 / (small[OURS] / 224**2)
        figures.append(Figure("ours, time a pixel at 1024² / at 224²", growth, 1.25))
        figures.append(Figure("peak memory, ours / Swin-T, 1024²", memory[1024][OURS] / memory[1024][SWIN], 1.00))
    say("batch 8, forward and training")
    batch = time_forward((OURS, SWIN), 8, 224, max(3, rounds // 2))
    figures.append(Figure("ours / Swin-T, batch 8, 224²", batch[OURS] / batch[SWIN], 0.90))
    train = time_training((OURS, SWIN), 8, 224, max(3, rounds // 2 + 2))
    figures.append(Figure("training step, ours / Swin-T, batch 8, 224²", train[OURS] / train[SWIN], 1.00))
    say("scans and precisions")
    scans = time_scans(rounds)
    figures.append(Figure("14 scans / Swin-T's forward pass, 224²", scans["fourteen"] / small[SWIN], 0.12))
    figures.append(Figure("scan, definition / native, stage 1", scans["reference"] / scans["native"], 50, more=True))
    precisions = time_precisions(224, rounds)
    bound = 0.70 if _has_bfloat16() else 1.00
    figures.append(Figure("ours, bfloat16 / float32, 224²", precisions["bfloat16"] / precisions["float32"], bound))
    if not quick:
        say("sixteen states against the definition")
        vanilla = time_vanilla(5)
        name = f"{VANILLA}, definition / native, 224²"
        figures.append(Figure(name, vanilla["reference"] / vanilla["native"], 15, more=True))
    return {
        "environment": describe() | {"threads": threads, "kernels": native.kernels() or "none"},
        "figures": [figure.record() for figure in figures],
        "forward_seconds": seconds,
        "peak_memory_mb": memory,
        "batch_8_seconds": batch,
        "training_step_seconds": train,
        "scan_seconds": scans,
        "precision_seconds": precisions,
        "profile": {size: profile_kinds(size, 5) for size in sizes if size in (224, 1024)},
    }


def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tables(results: dict) -> list[tuple[str, list[str], list[tuple[str, ...]]]]:
    """Title, headers and rows: the figures, every model at every size, and where our time goes."""
    figures = [figure_cells(figure) for figure in results["figures"]]
    models = [
        (f"{size}²", name, f"{value * 1e3:.0f}", f"{results['peak_memory_mb'][size][name]:.0f}")
        for size, times in results["forward_seconds"].items()
        for name, value in times.items()
    ]
    made = [
        ("Figures", ["figure", "measured", "wanted"], figures),
        ("Forward pass of one image", ["image", "model", "ms", "peak memory, MB"], models),
    ]
    for size, kinds in results["profile"].items():
        rows = [
            (kind, f"{row['ms']:.1f}", f"{row['floor_ms']:.1f}" if row["floor_ms"] else "")
            for kind, row in sorted(kinds.items(), key=lambda item: -item[1]["ms"])
        ]
        title = f"Where the time of {OURS} goes, {size}²"
        made.append((title, ["layers", "ms", "at the rate of a 1024² product, ms"], rows))
    return made


def show(results: dict, console: Console) -> None:
    """The tables in the terminal."""
    console.print(sentence(results["environment"]))
    for title, headers, rows in tables(results):
        table = Table(*headers, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(results: dict) -> str:
    """The tables as a page."""
    lines = ["# On the CPU", "", sentence(results["environment"]) + ". Written by `benchmarks/cpu.py`.", ""]
    for title, headers, rows in tables(results):
        lines += [f"## {title}", "", *markdown_table(headers, rows), ""]
    return "\n".join(lines)


def plot(results: dict) -> None:
    """Time and memory against the side of the image."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    halves = (
        ("forward_seconds", "seconds an image", (0.1, 0.2, 0.5, 1, 2)),
        ("peak_memory_mb", "peak memory, MB", (100, 200, 300, 500)),
    )
    for axis, (key, label, ticks) in zip(axes, halves, strict=True):
        for name in MODELS:
            sizes = list(results[key])
            axis.plot(sizes, [results[key][size][name] for size in sizes], marker="o", label=name)
        axis.set(xlabel="side of the image, pixels", ylabel=label, xscale="log", yscale="log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(sentence(results["environment"]), fontsize=8)
    figure.savefig(RESULTS / "cpu.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="224² only, few rounds, nothing written")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=224, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(_measure_memory(options.memory_of, options.size))
        return
    if reason := available_backends()["native"]:
        sys.exit(f"benchmarks/cpu.py measures the native backend, which cannot run here: {reason}")
    console = Console()
    results = measure(options.quick, options.threads, lambda step: console.print(f"[dim]{step}"))
    show(results, console)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "cpu.md").write_text(markdown(results))
        plot(results)
        console.print(f"written: {RESULTS / 'cpu.json'}, cpu.md and cpu.png")


if __name__ == "__main__":
    main()
