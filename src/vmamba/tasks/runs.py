"""The folder of a training run: what it holds, how it is written so that a kill at any moment leaves it whole."""

from __future__ import annotations

import csv
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vmamba.errors import RecipeError
from vmamba.files import atomic_write, shown
from vmamba.tasks.recipe import differences, load_recipe

LATEST = Path("runs/latest")
# What `vmamba validate` and the tasks write of a model.
METRICS, PREDICTIONS, SAMPLES, MATRIX = "metrics.json", "predictions.png", "samples.png", "confusion_matrix.png"
BARS, BARS_OF = "per_class.png", {kind: f"per_class_{kind}.png" for kind in ("box", "mask")}


def report(message: str) -> None:
    """Tell the person at the terminal, leaving stdout to results."""
    print("\n".join(map(shown, message.splitlines())), file=sys.stderr, flush=True)


def span(seconds: float) -> str:
    """A length of time in words, with about two digits."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {name}"
    return f"{seconds:.0f} s"


class RunFolder:
    """Names inside a run's folder.

    Attributes:
        config: every setting of the run, as YAML that ``vmamba train --config`` reads.
        checkpoint: everything training goes on from, as of the end of the last epoch.
        model: the trained weights, with all that `vmamba predict` needs beside them.
        metrics: the numbers of each epoch.
        curve: the same as a picture.
        results: of any task's model, of which a new run has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoint = path / "checkpoints" / "last.ckpt"
        self.model = path / "model.safetensors"
        self.metrics = path / "metrics.csv"
        self.curve = path / "learning_curve.png"
        self.results = [path / name for name in (METRICS, PREDICTIONS, SAMPLES, MATRIX, BARS, *BARS_OF.values())]

    def decide(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, or None to start afresh. Changes nothing, so every process can ask.

        Raises:
            RecipeError: the folder holds a run and neither resume nor overwrite is asked for, or the run to be resumed
                was started with other settings, or the link to the latest run cannot be made.
        """
        if LATEST.exists() and not LATEST.is_symlink():
            raise RecipeError(f"{LATEST} is to be a link to the latest run, but is a folder or file: rename it")
        if self.path.absolute() == LATEST.absolute() and not LATEST.exists():
            raise RecipeError(f"{LATEST} is a link to the latest run, and there is none yet: name a folder with --run")
        if not self.checkpoint.exists() or overwrite:
            return None
        if not resume:
            raise RecipeError(
                f"{self.path} already holds a run. Give --resume true to go on with it, --overwrite true to replace "
                f"it, or another folder with --run"
            )
        if not self.config.exists():
            raise RecipeError(f"{self.checkpoint} cannot be resumed: {self.config}, which belongs to it, is missing")
        if changed := differences(load_recipe(self.config), settings):
            raise RecipeError(
                f"the run in {self.path} was started with other settings, so it cannot be resumed:\n  "
                + "\n  ".join(changed)
                + "\nGive the settings it was started with, or another folder with --run"
            )
        return self.checkpoint

    def prepare(self, settings: dict[str, Any], fresh: bool) -> None:
        """Make the folder ready; for one process only. A fresh run removes what an earlier one left under its names."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoint.parent):
            for leftover in folder.glob(".*.partial"):  # of a process that was killed while writing
                leftover.unlink()
        if fresh:
            for path in (self.checkpoint, self.model, self.metrics, self.curve, *self.results):
                path.unlink(missing_ok=True)
        with atomic_write(self.config) as file:
            once = {"resume": False, "overwrite": False}  # asked of this call, not of others with the same settings
            file.write(yaml.safe_dump(settings | once, sort_keys=False, allow_unicode=True).encode())
        self._link()

    def _link(self) -> None:
        """Point runs/latest here, where the file system has links."""
        LATEST.parent.mkdir(parents=True, exist_ok=True)
        target = self.path.resolve()
        inside = target.parent == LATEST.parent.resolve()
        temporary = LATEST.with_name(f".latest.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # Windows gives not everybody the right to make one
            temporary.symlink_to(target.name if inside else target)
            os.replace(temporary, LATEST)

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """One row an epoch; a column is empty where an epoch has no such number."""
        columns = list(dict.fromkeys(name for row in history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        with atomic_write(self.metrics) as file:
            file.write(text.getvalue().encode())
