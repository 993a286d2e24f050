"""How far a training run is: one live bar for the whole run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from typing_extensions import override

from vmamba.tasks.checkpointing import Recorder
from vmamba.tasks.runs import span
from vmamba.tasks.task import LOSS

_QUIET_SECONDS = 60  # elsewhere than on a terminal: time between two lines within an epoch


class Progress(L.Callback):
    """Shows the first process's progress on stderr: where training stands, the loss, and the time left."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.console = Console(stderr=True, highlight=False)
        self.bar: Bar | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.shown = trainer.is_global_zero
        if not self.shown:
            return
        self.began = self.spoke = time.monotonic()
        self.steps = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
        self.skipped = self.step = int(trainer.num_training_batches) * trainer.current_epoch
        if self.console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("training", total=self.steps, completed=self.step)
            self.bar.start()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.shown:
            return
        self.step += 1
        now = time.monotonic()
        if now - self.spoke < (0.5 if self.bar else _QUIET_SECONDS):
            return
        self.spoke = now
        loss = pl_module.trained.local("loss")
        where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if self.bar:
            self.bar.update(self.task, completed=self.step, description=f"{where}  loss {loss:.4f}")
        else:
            batches = f"step {batch_idx + 1}/{trainer.num_training_batches}"
            self.console.print(f"{where}  {batches}  loss {loss:.4f}  {self._left()}")

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=self.step, description=f"epoch {trainer.current_epoch + 1} validating")

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.shown:
            return
        row = self.recorder.history[-1]
        parts = [f"epoch {row['epoch']:>3}/{trainer.max_epochs}"]
        for split, name in (("train", "training"), ("val", "| validation")):
            numbers = [(score, row.get(f"{split}_{score.name}")) for score in (LOSS, pl_module.score)]
            found = [f"{score.label} {score.text(value)}" for score, value in numbers if value is not None]
            parts += [f"{name} {'  '.join(found)}"] if found else []
        parts += [f"| lr {row['lr']:.2e}", f"{row['seconds']:.0f} s", "" if self.bar else self._left()]
        self.console.print("  ".join(filter(None, parts)), soft_wrap=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar:
            self.bar.update(self.task, completed=self.step)
            self.bar.stop()
            self.bar = None

    def _left(self) -> str:
        done = self.step - self.skipped
        seconds = (time.monotonic() - self.began) / max(done, 1) * (self.steps - self.step)
        return f"about {span(seconds)} left" if seconds >= 1 else ""


class ValidationProgress(L.Callback):
    """A bar over the validation images, on a terminal only."""

    bar: Bar | None = None

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        console = Console(stderr=True)
        if trainer.is_global_zero and console.is_terminal:
            self.bar = Bar(console=console)
            self.bar.add_task("validating", total=len(pl_module.val_loader))
            self.bar.start()

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self.bar:
            self.bar.advance(self.bar.task_ids[0])

    @override
    def on_validation_end(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    @override
    def on_exception(self, *_: Any) -> None:
        self.on_validation_end()
