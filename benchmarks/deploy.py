"""Exported models beside Swin-T's: nodes, time of the export, and time in ONNX Runtime and OpenVINO.

    python benchmarks/deploy.py

Two threads, and wall clock on a machine that does nothing else; all models take turns. Between two calls is a pause,
since the threads of the one before go on looking for work for a while.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from page import Row, curves, sentence
from runner import RESULTS, Bench, Benchmark, Figures, Part, Results, Section, Settings, Tables

import vmamba
from vmamba.deploy import export_onnx, onnx_runtime

MINE, SWIN = "VMamba-T", "Swin-T"
ORT, OPENVINO, FIXED = "ONNX Runtime", "OpenVINO", "OpenVINO, fixed size"
LAYOUT = {
    "files": ("Files", "model;size;nodes;export, s;MB;difference"),
    "runtimes": ("One image", "size;model;mode;ms"),
}
THREADS, PAUSE = 2, 0.05  # s
FOLDER = tempfile.TemporaryDirectory()


def file(model: str, size: int) -> Path:
    """Swin takes images of one size alone: a file for each."""
    return Path(FOLDER.name) / (f"{model}.onnx" if model == MINE else f"{model}-{size}.onnx")


def files(bench: Bench) -> Iterator[Part]:
    """Both models as ONNX files."""
    for model, size in ((MINE, 224), *((SWIN, size) for size in bench.settings.sizes)):
        torch.manual_seed(0)
        if model == MINE:
            network, sizes = vmamba.create_model("vmamba_tiny_s1l8"), "open"
        else:
            overlay = {"input_size": (3, size, size)}
            network = timm.create_model("swin_tiny_patch4_window7_224", img_size=size, pretrained_cfg_overlay=overlay)
            sizes = "batch"
        start = time.perf_counter()
        written = export_onnx(network, file(model, size), sizes=sizes)
        row: Row = {"model": model, "size": size, "nodes": str(written.nodes), "bytes": written.path.stat().st_size}
        row["export, s"] = f"{time.perf_counter() - start:.1f}"
        yield "files", [row | {"difference": f"{max(written.differences.values()):.0e}"}]


def runner(mode: str, model: str, size: int) -> Callable[[], object]:
    """A call of one image through a file, in float32."""
    image = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    path = str(file(model, size))
    if mode == ORT:
        run = onnx_runtime.runner(path, THREADS)
        return lambda: run(image)
    core = openvino.Core()
    graph = core.read_model(path)
    if mode == FIXED:
        graph.reshape(list(image.shape))
    settings = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    return lambda: request.infer([image])


def runtimes(bench: Bench) -> Iterator[Part]:
    """Both models in every runtime, in turns."""
    for size in bench.settings.sizes:
        for mode in (ORT, OPENVINO, FIXED):
            calls = {model: runner(mode, model, size) for model in (MINE, SWIN)}
            times: dict[str, list[float]] = {model: [] for model in calls}
            for _ in range(bench.settings.rounds):
                for model, call in calls.items():
                    time.sleep(PAUSE)
                    start = time.perf_counter()
                    call()
                    times[model].append(time.perf_counter() - start)
            rows: list[Row] = [
                {"size": size, "model": model, "mode": mode, "batch": 1, "seconds": statistics.median(found[1:])}
                for model, found in times.items()
            ]
            yield "runtimes", rows


def figures(tables: Tables, settings: Settings) -> list[Row]:
    found = Figures(tables)

    def ratio(mode: str, size: int) -> tuple[float, str]:
        mine, swin = (found.find("runtimes", model=model, mode=mode, size=size) for model in (MINE, SWIN))
        return mine["seconds"] / swin["seconds"], ""

    def of_files(key: str, model: str) -> float:
        return float(found.find("files", key=key, model=model, size=224)[key])

    found.add("export of VMamba-T, s", 20, lambda: (of_files("export, s", MINE), "checks included"))
    found.add(
        "nodes, ours / Swin-T", 1.5, lambda: (of_files("nodes", MINE) / of_files("nodes", SWIN), "bodies counted")
    )
    bounds: dict[tuple[str, int], float] = {(ORT, 768): 1.0}
    for size in settings.sizes:
        for mode in (ORT, OPENVINO, FIXED):
            found.add(f"{mode}, {size}², ours / Swin-T", bounds.get((mode, size), 1.2), partial(ratio, mode, size))
    return found.records


def notes(settings: Settings) -> list[str]:
    versions: dict[str, Any] = {"ONNX Runtime": onnxruntime.__version__, "OpenVINO": openvino.__version__.split("-")[0]}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [f"float32, {THREADS} threads, medians of calls in turns; {said}"]


DEPLOY = Benchmark(
    "deploy", "Exported models", LAYOUT,
    {"files": Section(files, ("files",)), "runtimes": Section(runtimes, ("runtimes",))},
    figures, "none", notes,
)  # fmt: skip


def draw(results: Results, path: Path) -> None:
    """Times against the side of the image, a panel for each runtime."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(results.data["tables"]["runtimes"], key=lambda row: row["size"]):
        lines = panels.setdefault(f"{row['mode']}: ms an image", {})
        lines.setdefault(row["model"], []).append((row["size"], 1e3 * row["seconds"]))
    if panels:
        curves(path, "", "side of the image, pixels", panels, sentence(results.data["environment"]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 768])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    settings = Settings("cpu", rounds=options.rounds, sizes=tuple(options.sizes))
    results = Results(DEPLOY, settings, options.output)
    results.run(Bench(settings), DEPLOY.sections)
    draw(results, options.output / "deploy.png")
    print(results.page)


if __name__ == "__main__":
    main()
