"""`vmamba batch` beside `vmamba predict` on the same files and cores, and the memory of a job over many images.

    python benchmarks/batch.py                     # speed: about three minutes
    python benchmarks/batch.py --only memory       # 10,000 and 100,000 small images; about two minutes

Speed is wall-clock time, in turns, so the machine should have nothing else to do. That of `batch` is counted from the
first parts that are written to the last, that of `predict` from the first image: what it takes to start is told apart.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from page import Row
from PIL import Image
from runner import RESULTS, Bench, Benchmark, Figures, NotMeasuredError, Part, Results, Section, Settings, Tables

import vmamba
from vmamba.models.checkpoints import save_checkpoint

LAYOUT = {
    "speed": ("Throughput", "images;model;command;images/s;start, s"),
    "memory": ("Memory of a job", "images;process;peak memory, MB"),
}
PREDICT, BATCH = "vmamba predict", "vmamba batch"
COMMAND, WORKER, SERVICES = "the command", "a worker", "Ray's own, together"
PROCESSES = {COMMAND: max, WORKER: max, SERVICES: sum}
# What `vmamba predict` does between reading its arguments and printing, with the time that it takes.
PREDICTING = """
import json, sys, time
from vmamba.data.images import find_images
from vmamba.tasks.prediction import load_predictor
from vmamba.tasks.recipe import PredictConfig
config = PredictConfig(checkpoint=sys.argv[1])
predictor, (files, _) = load_predictor(config), find_images([sys.argv[2]])
began = time.perf_counter()
outcomes = list(predictor.outcomes(files, config))
print(json.dumps([len(outcomes), time.perf_counter() - began]))
"""


@dataclass(frozen=True)
class Kind:
    """Images of one kind, and the model that they are shown to."""

    name: str
    model: str
    images: int
    size: tuple[int, int]
    part: int


KINDS = (
    Kind("photographs, 400×300", "vmamba_tiny_s1l8", 512, (400, 300), 32),
    Kind("small, 64×64", "vmamba_femto_s2", 16_384, (64, 64), 512),
)


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """Clouds of colour, which compress about as photographs do."""
    rough = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 2, size[0] // 8 + 2, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def weights_of(model: str, folder: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(vmamba.create_model(model), path := folder / f"{model}.safetensors")
    return path


def predict(weights: Path, pictures: Path) -> Row:
    began = time.perf_counter()
    command = [sys.executable, "-c", PREDICTING, str(weights), str(pictures)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    images, seconds = json.loads(done.stdout)
    return {"images_per_second": images / seconds, "start": time.perf_counter() - began - seconds}


def batch(weights: Path, source: Path, folder: Path, part: int, peaks: dict[psutil.Process, Row] | None = None) -> Row:
    """A job of two workers; ``peaks`` gets what its processes are and their most resident memory, in MB."""
    command = [sys.executable, "-m", "vmamba.cli", "batch", str(source), "--output", str(folder)]
    began = time.time()
    job = psutil.Popen(
        [*command, "--checkpoint", str(weights), "--overwrite", "true", "--actors", "2", "--part_size", str(part)]
    )
    while job.poll() is None:
        if peaks is not None:
            for process in [job, *job.children(recursive=True)]:
                try:
                    size, words = process.memory_info().rss / 1e6, process.cmdline()
                except psutil.Error:
                    continue
                seen = peaks.setdefault(process, {"process": SERVICES, "peak_mb": 0.0})
                seen["peak_mb"] = max(seen["peak_mb"], size)
                if process == job:
                    seen["process"] = COMMAND
                elif words and words[0].startswith("ray::Worker"):
                    seen["process"] = WORKER
        time.sleep(0.25)
    if job.returncode:
        raise NotMeasuredError("the job failed")
    parts = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in folder.glob("part-*.parquet"))
    # Counted from when each worker has written its first part, for both have worked on theirs at the same time.
    (first, _), (last, _) = parts[1], parts[-1]
    rate = sum(rows for _, rows in parts[2:]) / (last - first)
    return {"images_per_second": rate, "start": first - began - sum(rows for _, rows in parts[:2]) / rate}


def speed(bench: Bench) -> Iterator[Part]:
    """Both commands in turns."""
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder, pictures = Path(name), Path(name, "pictures")
            pictures.mkdir()
            for seed in range(kind.images):
                (pictures / f"{seed:06}.jpg").write_bytes(jpeg(seed, kind.size))
            weights = weights_of(kind.model, folder)
            found: dict[str, list[Row]] = {PREDICT: [], BATCH: []}
            for _ in range(bench.settings.rounds):
                found[PREDICT].append(predict(weights, pictures))
                found[BATCH].append(batch(weights, pictures, folder / "results", kind.part))
            rows: list[Row] = []
            for command, each in found.items():
                values = {key: statistics.median(row[key] for row in each) for key in each[0]}
                start = f"{values.pop('start'):.1f}"
                rows.append({"images": kind.name, "model": kind.model, "command": command, "start, s": start} | values)
            yield "speed", rows


def memory(bench: Bench) -> Iterator[Part]:
    """Small images in ten shards: a tenth of them, and all."""
    for number in (bench.settings.batch // 10, bench.settings.batch):
        with tempfile.TemporaryDirectory() as name:
            folder, shards = Path(name), Path(name, "shards")
            shards.mkdir()
            contents = [jpeg(seed, (32, 32)) for seed in range(500)]
            for shard in range(10):
                with tarfile.open(shards / f"{shard}.tar", "w") as tar:
                    for index in range(number // 10):
                        member = tarfile.TarInfo(f"{shard}/{index:06}.jpg")
                        content = contents[index % len(contents)]
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            peaks: dict[psutil.Process, Row] = {}
            batch(weights_of("vmamba_femto", folder), shards, folder / "results", 1024, peaks)
            written = sum(pq.read_metadata(path).num_rows for path in (folder / "results").glob("part-*.parquet"))
            rows: list[Row] = []
            for process, combine in PROCESSES.items():
                size = combine(seen["peak_mb"] for seen in peaks.values() if seen["process"] == process)
                rows.append({"images": f"{written:,}", "process": process, "peak_mb": size})
            yield "memory", rows


def figures(tables: Tables, settings: Settings) -> list[Row]:
    found = Figures(tables)

    def ratio(kind: Kind) -> tuple[float, str]:
        mine, other = (
            found.find("speed", key="images_per_second", images=kind.name, command=command)["images_per_second"]
            for command in (BATCH, PREDICT)
        )
        return mine / other, "images a second"

    def growth() -> tuple[float, str]:
        names = [f"{number:,}" for number in (settings.batch, settings.batch // 10)]
        many, few = (
            sum(found.find("memory", key="peak_mb", images=name, process=process)["peak_mb"] for process in PROCESSES)
            for name in names
        )
        return many / few, "the command, a worker and Ray's own"

    found.add(f"memory, {settings.batch:,} images / {settings.batch // 10:,}", 1.1, growth)
    for kind in KINDS:
        found.add(f"batch / predict, {kind.name}", 0.9, lambda kind=kind: ratio(kind), more=True)  # type: ignore[misc]
    return found.records


def notes(settings: Settings) -> list[str]:
    return [
        "float32, two cores; predict computes on two threads, batch in two workers of one thread each",
        "Memory is resident, libraries that processes share counted in each",
    ]


BENCHMARK = Benchmark(
    "batch", "Many images", LAYOUT,
    {"speed": Section(speed, ("speed",)), "memory": Section(memory, ("memory",))}, figures, "none", notes,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*BENCHMARK.sections], default="speed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=100_000, help="of the job whose memory is measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    settings = replace(Settings("cpu"), rounds=options.rounds, batch=options.images)
    results = Results(BENCHMARK, settings, options.output)
    results.run(Bench(settings), [options.only])
    print(results.page)


if __name__ == "__main__":
    main()
