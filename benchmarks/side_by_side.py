"""Networks that learn the same thing side by side: one recipe, one budget each, in short turns.

The networks take turns, so that a machine which slows down slows all of them; the learning rate follows the share of
the budget that a network has used, so each gets the whole schedule. Judged are the averaged weights, off the clock.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from page import COLUMNS, Row, curves, page, sentence
from runner import describe
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

_NO_NUMBERS = ("network", "curve")  # of a contender's row


@dataclass(frozen=True)
class Recipe:
    """How every network learns.

    Attributes:
        batch: pictures of a step.
        rate: the learning rate at its peak; it rises linearly and falls to 0 along a cosine.
        optimizer: any of timm's.
        warm_up: share of the budget in which the rate rises.
        weight_decay: of matrices.
        averaging: share that the average keeps in a step, once it has forgotten the beginning.
        clip: norm that gradients are cut to.
    """

    batch: int
    rate: float
    optimizer: str = "muon"
    warm_up: float = 0.1
    weight_decay: float = 0.05
    averaging: float = 0.99
    clip: float = 5.0

    def rate_at(self, share: float) -> float:
        """The learning rate after a share of the budget."""
        if share < self.warm_up:
            return self.rate * share / self.warm_up
        return self.rate * (1 + math.cos(math.pi * (share - self.warm_up) / (1 - self.warm_up))) / 2


class Lesson(Protocol):
    """What is to be learned, and how it is judged.

    Attributes:
        recipe: of every network.
        epoch: pictures of one.
    """

    recipe: Recipe

    @property
    def epoch(self) -> int: ...

    def batches(self) -> Iterator[Any]:
        """Batches without end, prepared for training."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of a network in training on a batch."""
        ...

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Scores by name, from 0 to 1, of an evaluated network; the first is what counts."""
        ...


@dataclass
class Contender:
    """One network on its way through its budget.

    Attributes:
        budget, used: in seconds of the clock.
        average: the averaged weights.
        curve: seconds and the score that counts.
        scores: the last ones.
    """

    name: str
    model: nn.Module
    lesson: Lesson
    budget: float
    clock: Callable[[], float]
    used: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.lesson.recipe
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.batches = self.lesson.batches()
        self.optimizer = create_optimizer_v2(
            self.model, recipe.optimizer, lr=recipe.rate, weight_decay=recipe.weight_decay
        )

    @property
    def images(self) -> int:
        """How many it has seen."""
        return self.steps * self.lesson.recipe.batch

    def learn(self, seconds: float) -> None:
        """Train for so long, or to the end of the budget."""
        self.model.train()
        stop = min(self.used + seconds, self.budget)
        while self.used < stop:
            start = self.clock()
            self._step()
            self.used += self.clock() - start

    def _step(self) -> None:
        recipe = self.lesson.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.used / self.budget)
        loss = self.lesson.loss(self.model, next(self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.steps += 1
        # The average forgets quickly at first, so that it is of use from the start.
        decay = min(recipe.averaging, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
            for mine, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

    @torch.inference_mode()
    def judge(self) -> None:
        """Note the scores of the averaged weights; this time is not counted."""
        self.scores = self.lesson.judge(self.average)
        self.curve.append((round(self.used, 1), next(iter(self.scores.values()))))

    def row(self) -> Row:
        """Of the table."""
        return {
            "network": self.name,
            "params": sum(p.numel() for p in self.model.parameters()),
            **{name: round(score, 4) for name, score in self.scores.items()},
            "images_per_second": self.images / self.used,
            "epochs": self.images / self.lesson.epoch,
            "curve": self.curve,
        }


def learn_in_turns(
    networks: Mapping[str, Callable[[], nn.Module]],
    lesson: Lesson,
    budget: float,
    turn: float,
    seed: int,
    clock: Callable[[], float],
) -> list[Contender]:
    """Train networks side by side.

    Args:
        networks: what builds each, by name.
        lesson: what they learn.
        budget, turn: seconds of each network, in all and in a row.
        seed: of the initial weights.
        clock: what the seconds are told by.
    """
    contenders = []
    for name, build in networks.items():
        torch.manual_seed(seed)
        contenders.append(Contender(name, build(), lesson, budget, clock))
    while any(contender.used < budget for contender in contenders):
        for contender in contenders:
            contender.learn(turn)
            contender.judge()
            scores = ", ".join(f"{name} {score:.2%}" for name, score in contender.scores.items())
            print(f"{contender.name:10}{contender.used:5.0f} of {budget:.0f} s  {scores}", flush=True)
    return contenders


def mean_rows(runs: Sequence[Row], score: str) -> list[Row]:
    """A row for each network, the best first: means over its runs, and of the score that counts also the spread.

    With several runs a row has "spread", the standard deviation between them, and "seeds", their scores.
    """
    named: dict[str, list[Row]] = {}
    for run in runs:
        named.setdefault(run["network"], []).append(run)
    rows = []
    for name, mine in named.items():
        row = {"network": name} | {k: statistics.mean(run[k] for run in mine) for k in mine[0] if k not in _NO_NUMBERS}
        curves = zip(*(run["curve"] for run in mine), strict=True)
        row["curve"] = [tuple(map(statistics.fmean, zip(*points, strict=True))) for points in curves]
        if len(mine) > 1:
            scores = [run[score] for run in mine]
            row |= {"spread": statistics.stdev(scores), "seeds": scores}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["curve"][-1][1])


@dataclass(frozen=True)
class Page:
    """What the results of a lesson are shown as.

    Attributes:
        name: of its files.
        program: that writes them.
        title: of the page and the plot.
        headers: of the table's columns, see `page.COLUMNS`.
        label, seconds: of the plot's axes: the score that counts, a column of the table, and what the budget is.
        settings: what holds for all numbers, as plain values.
        notes: the same in sentences.
    """

    name: str
    program: str
    title: str
    headers: str
    label: str
    seconds: str
    settings: Mapping[str, Any]
    notes: Sequence[str]

    def write(self, runs: Sequence[Row], folder: Path) -> str:
        """Write NAME.json, NAME.md and NAME.png, the learning curves, into a folder; returns the page.

        Runs are contenders' rows; those of one name are of one network from several seeds.
        """
        rows = mean_rows(runs, COLUMNS[self.label][0])
        environment = describe()
        found = {
            "environment": environment, "settings": dict(self.settings), "notes": list(self.notes), "figures": [],
            "skipped": {}, "tables": {"learning": rows},
        }  # fmt: skip
        text = page(self.title, self.program, found, {"learning": ("Results", self.headers)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(text)
        points = {row["network"]: [(x, 100 * y) for x, y in row["curve"]] for row in rows}
        foot = sentence(environment)
        curves(folder / f"{self.name}.png", self.title, self.seconds, {self.label: points}, foot, logarithmic=False)
        return text
