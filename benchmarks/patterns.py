"""Does the order in which the scans visit the grid matter? One network, one recipe, another scan pattern each time.

vmamba_femto on Fashion-MNIST, judged by 10,000 training images held out. For each seed all patterns learn from the same
number of images, in turns; those whose steps take longer are then trained once more, on as many images as the time of
"cross" allows. Time is that of the processor, so that other work on the machine does not count.

    python benchmarks/patterns.py    # the committed table and plot: a quarter of an hour on one core
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from learning import SMALL, Classes, fashion_mnist
from page import Row, curves, page, sentence
from runner import RESULTS, describe
from side_by_side import Contender

import vmamba

PATTERNS = ("cross", "unidirectional", "bidirectional", "diagonal", "hilbert")
TURNS = 4  # in which a budget is spent, each followed by a look at the accuracy
SLOWER = 1.05  # times cross's seconds a step, from which on equal time is not equal images
TITLE = "Scan patterns: vmamba_femto on Fashion-MNIST"
HEADERS = "pattern;accuracy, %;by seed;images/s;accuracy in the same time, %"


@dataclass
class Tally:
    """What is known of a pattern.

    Attributes:
        accuracies: after the same number of images, seed by seed.
        timely: after the same processor time, likewise.
        seconds, images: of the processor, and learned from, in all.
        curve: images and accuracy with the first seed.
    """

    accuracies: list[float] = field(default_factory=list)
    timely: list[float] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)

    def row(self, pattern: str) -> Row:
        """Of the table."""
        return {
            "pattern": pattern,
            "accuracy": round(statistics.mean(self.accuracies), 4),
            "by seed": ", ".join(f"{100 * accuracy:.2f}" for accuracy in self.accuracies),
            "images_per_second": self.images / self.seconds,
            "accuracy in the same time, %": f"{100 * statistics.mean(self.timely):.2f}" if self.timely else None,
            "curve": self.curve,
            **asdict(self),
        }


def learn(lesson: Classes, steps: dict[str, int], seed: int) -> dict[str, tuple[Contender, float]]:
    """Train one network for each pattern, in turns, for so many steps; the networks, and processor seconds of each."""
    contenders, seconds = {}, defaultdict(float)
    for pattern, count in steps.items():
        torch.manual_seed(seed)
        model = vmamba.create_model("vmamba_femto", pattern=pattern, **SMALL)
        # The clock counts its readings, two a step, so that the budget is in steps.
        contenders[pattern] = Contender(pattern, model, lesson, count, itertools.count().__next__)
    for turn in range(1, TURNS + 1):
        for pattern, contender in contenders.items():
            start = time.process_time()
            contender.learn(round(contender.budget * turn / TURNS) - contender.used)
            seconds[pattern] += time.process_time() - start
            contender.judge()
            print(f"seed {seed}  {pattern:16}{contender.images:7,} images  {contender.curve[-1][1]:.2%}", flush=True)
    return {pattern: (contender, seconds[pattern]) for pattern, contender in contenders.items()}


def add_seed(tallies: dict[str, Tally], lesson: Classes, steps: int, seed: int) -> None:
    """Train every pattern with a seed on as many images as the others."""
    for pattern, (contender, seconds) in learn(lesson, dict.fromkeys(tallies, steps), seed).items():
        tally = tallies[pattern]
        tally.accuracies.append(contender.curve[-1][1])
        tally.seconds += seconds
        tally.images += contender.images
        tally.curve = tally.curve or [(used * lesson.recipe.batch, score) for used, score in contender.curve]


def add_same_time(tallies: dict[str, Tally], lesson: Classes, steps: int, seed: int) -> None:
    """Train with that seed those whose steps take longer than the first one's, for as long as that."""
    least = next(iter(tallies.values())).seconds
    slower = {p: round(steps * least / t.seconds) for p, t in tallies.items() if t.seconds > SLOWER * least}
    again = learn(lesson, slower, seed)
    for pattern, tally in tallies.items():
        contender = again[pattern][0] if pattern in again else None
        tally.timely.append(contender.curve[-1][1] if contender else tally.accuracies[-1])


def write(tallies: dict[str, Tally], lesson: Classes, steps: int, folder: Path) -> str:
    """Write patterns.json, patterns.md and patterns.png; returns the page."""
    seeds = len(next(iter(tallies.values())).accuracies)
    rows = [tally.row(pattern) for pattern, tally in tallies.items()]
    images, environment = steps * lesson.recipe.batch, describe()
    notes = [
        f"{images:,} images each, {images / lesson.epoch:.1f} epochs, one recipe, seeds 0 to {seeds - 1}; judged by"
        f" {len(lesson.judged[1]):,} training images held out",
        "Images a second are of the processor's time, in training",
        f"In the same time: as long as {rows[0]['pattern']} takes for its images; trained anew, on fewer of them, where"
        f" a step takes over {SLOWER - 1:.0%} longer",
    ]
    if 0 < (done := len(tallies[rows[0]["pattern"]].timely)) < seeds:
        notes.append(f"The last column is of {done} of {seeds} seeds")
    found = {
        "environment": environment, "notes": notes, "figures": [], "skipped": {}, "tables": {"patterns": rows},
        "settings": {"steps": steps, "seeds": seeds, "judged_by": "held-out", **asdict(lesson.recipe)},
    }  # fmt: skip
    text = page(TITLE, "patterns.py", found, {"patterns": ("Results", HEADERS)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "patterns.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "patterns.md").write_text(text)
    points = {row["pattern"]: [(x, 100 * y) for x, y in row["curve"]] for row in rows}
    panels = {"accuracy, %": points}
    curves(folder / "patterns.png", TITLE, "images learned from", panels, sentence(environment), logarithmic=False)
    return text


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=480, help="of 128 images, for each pattern")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 on")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="registered names; the first sets the time")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    lesson = fashion_mnist("held-out").lesson
    tallies = {pattern: Tally() for pattern in arguments.patterns}
    for seed in range(arguments.seeds):
        for learn_more in (add_seed, add_same_time):
            learn_more(tallies, lesson, arguments.steps, seed)
            text = write(tallies, lesson, arguments.steps, arguments.output)  # now: what follows takes minutes
    print(text)


if __name__ == "__main__":
    main()
