"""Speed and memory on a GPU: VMamba against timm's Swin, ConvNeXt and DeiT, and against the released way of scanning.

Everything runs under bfloat16 autocast on channels-last images, with the same settings for all models. What is compared
takes turns, one call each a round, after warming up; a figure is a ratio of two medians by the card's own clock. First
the scans are held against the definition in float64: wrong results are not timed.

    python benchmarks/gpu.py                              # everything: about twenty minutes
    python benchmarks/gpu.py --sections inference,latency # a part; the other parts of the results' file stay
    python benchmarks/gpu.py --budget 540                 # leaves out what would start too late
    python benchmarks/gpu.py --quick                      # 224² only, few rounds, nothing compiled, nothing written
    python benchmarks/gpu.py --device cpu                 # tiny models: whether the program works, not how fast
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, describe
from gpu_parts.bench import COMPILED, EAGER, FULL, QUICK, SMOKE, Bench, Part, Settings, failures_in, release
from gpu_parts.models import DROP_PATH, inference, latency, resolution, training
from gpu_parts.profiling import profiling
from gpu_parts.report import Row, figures, markdown, plot
from gpu_parts.scans import check, operators
from gpu_parts.tuning import tuning
from gpu_parts.yardsticks import MINE
from measuring import figure_cells

from vmamba.files import replacing
from vmamba.ops.backends import ENVIRONMENT_VARIABLE, choose_backend


@dataclass(frozen=True)
class Section:
    """A part of a run: what it does, the tables it fills, and about how many seconds it takes."""

    run: Callable[[Bench], Iterator[Part]]
    tables: tuple[str, ...]
    seconds: float


SECTIONS = {
    "operators": Section(operators, ("rates", "operators"), 60),
    "inference": Section(inference, ("inference",), 60),
    "training": Section(training, ("training",), 60),
    "latency": Section(latency, ("latency",), 30),
    "profile": Section(profiling, ("profile", "kernels"), 30),
    "resolution": Section(resolution, ("resolution",), 60),
    "tune": Section(tuning, ("tuning",), 180),
}
DEFAULT_SECTIONS = [name for name in SECTIONS if name != "tune"]


class Results:
    """What has been found, in memory and, given a folder, on the disk after every part of a section."""

    def __init__(self, settings: Settings, folder: Path | None) -> None:
        self.settings, self.folder = settings, folder
        environment = describe(settings.device)
        environment["backend"] = choose_backend(None, torch.device(settings.device)).name
        self.data: dict[str, Any] = {
            "environment": environment,
            "settings": json.loads(json.dumps(asdict(settings))),
            "notes": notes(settings),
            "figures": [],
            "skipped": {},
            "tables": {},
        }
        if folder and (folder / "gpu.json").exists():
            self._take_over(json.loads((folder / "gpu.json").read_text()))

    def _take_over(self, former: Mapping[str, Any]) -> None:
        """The tables of a former run, if it was on the same card with the same programs and settings."""

        def circumstances(data: Mapping[str, Any]) -> object:
            environment = {key: value for key, value in data["environment"].items() if key not in ("date", "threads")}
            return environment, {key: value for key, value in data["settings"].items() if key != "modes"}

        if circumstances(former) == circumstances(self.data):
            self.data |= {"tables": former["tables"], "skipped": former["skipped"]}

    def begin(self, section: str, tables: Iterable[str]) -> None:
        """Forget what a former run of the section has found."""
        self.data["skipped"].pop(section, None)
        for table in tables:
            self.data["tables"][table] = []

    def add(self, part: Part) -> None:
        """Take rows, and write everything."""
        self.data["tables"].setdefault(part[0], []).extend(part[1])
        self.write()

    def write(self) -> None:
        """Write gpu.json and gpu.md, each at once."""
        s = self.settings
        found = figures(self.data["tables"], s.size, s.batch, s.compiled_sizes)
        self.data["figures"] = [figure.record() for figure in found]
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, text in (("gpu.json", json.dumps(self.data, indent=1) + "\n"), ("gpu.md", markdown(self.data))):
                with replacing(self.folder / name) as path:
                    path.write_text(text)

    def draw(self) -> None:
        """Write gpu.png."""
        if self.folder and self.data["tables"].get("resolution"):
            plot(self.data, self.folder / "gpu.png")


def notes(settings: Settings) -> list[str]:
    """What holds for all numbers, in sentences."""
    return [
        "bfloat16 autocast, channels-last images, cuDNN chooses its algorithms by trial, stochastic depth of "
        f"{DROP_PATH} in all training steps",
        f"Medians of up to {settings.rounds} rounds in which all calls take turns; compiled is `torch.compile(model, "
        "dynamic=False)`, and a figure takes the better mode of each model",
        "Peak memory is that of one model alone: parameters, gradients and activations",
        "The scan's share of the copy rate is that of the operator after its projection, as `ss2d_scan` calls it: what "
        "it must read and write once over its time",
    ]


def run(bench: Bench, sections: Iterable[str], results: Results) -> bool:
    """Check, then measure section by section; returns whether our results are right."""
    results.begin("check", ["checks"])
    bench.say("check")
    for part in check(bench):
        results.add(part)
        bench.unfit |= {row["scan"]: row["error"] for row in part[1] if "error" in row}
        if MINE in bench.unfit:
            return False
    for name in sections:
        section = SECTIONS[name]
        bench.say(f"{name}, {time.perf_counter() - bench.began:.0f} s after the start")
        trouble: Row = {}
        with failures_in(trouble):
            bench.has_time_for(section.seconds)
            results.begin(name, section.tables)
            for part in section.run(bench):
                results.add(part)
        if trouble:
            results.data["skipped"][name] = trouble["error"]
            bench.say(f"  {trouble['error']}")
        results.write()
        results.draw()
        release()
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(DEFAULT_SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--modes", default=f"{EAGER},{COMPILED}", help="eager, compiled or both")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; what would start too late is left out")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing compiled; written only to --output")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny models, for tests")
    parser.add_argument("--output", type=Path, help=f"folder of the results; {RESULTS} for a full run")
    options = parser.parse_args(arguments)
    sections, modes = options.sections.split(","), options.modes.split(",")
    if unknown := {*sections, *modes} - {*SECTIONS, EAGER, COMPILED}:
        parser.error(f"there are no sections or modes of these names: {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a GPU, and torch finds none (--device cpu tries the program with tiny models)"
        )

    settings = SMOKE if options.device == "cpu" else QUICK if options.quick else FULL
    settings = replace(settings, modes=tuple(mode for mode in settings.modes if mode in modes))
    is_full = settings.device == "cuda" and not options.quick
    if settings.device == "cuda":
        os.environ.setdefault(ENVIRONMENT_VARIABLE, "triton")
    results = Results(settings, options.output or (RESULTS if is_full else None))
    bench = Bench(settings, options.budget, partial(print, flush=True))
    # The layers of a model share their code, of which the compiler then keeps many versions.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch._dynamo.config.patch(recompile_limit=256):
        is_right = run(bench, sections, results)
    print(markdown(results.data))
    for figure in results.data["figures"]:
        print("   ".join((*figure_cells(figure), figure.get("note", ""))))
    if results.folder:
        print(f"written: {results.folder / 'gpu.json'}, gpu.md and gpu.png")
    if not is_right:
        sys.exit(f"nothing was timed, since our scan fails its check: {bench.unfit[MINE]}")


if __name__ == "__main__":
    main()
