"""What a training run leaves on disk at the end of each epoch, and how it is read back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from typing_extensions import override

from vmamba.errors import RecipeError
from vmamba.files import atomic_write
from vmamba.models.checkpoints import metadata_text, save_checkpoint
from vmamba.tasks.pictures import learning_curve
from vmamba.tasks.runs import RunFolder
from vmamba.tasks.task import Score, Task

_DRAWING_SECONDS = 60  # time between two drawings of the learning curve during a run


class AtomicCheckpointIO(CheckpointIO):
    """Training checkpoints that replace their predecessor in one step, and that run no code when they are read."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors, numbers and texts only, whatever the caller allows.

        Raises:
            RecipeError: the file cannot be read.
        """
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # damaged zip, forbidden pickle, truncated tensor ...
            raise RecipeError(f"{path} cannot be read as a training checkpoint: {error}") from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        os.unlink(path)


class Recorder(L.Callback):
    """At the end of each epoch: the model, the history, and last of all the checkpoint that counts the epoch as done.

    A kill before that last step means that the epoch is trained again, and writes the same once more.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.history: list[dict[str, float]] = []
        self.best: float | None = None  # as `Score.rank` has it
        self.shares: dict[str, int] = {}  # how the work of an epoch is divided
        self.started = self.drawn = time.monotonic()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best, "shares": self.shares}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best = state_dict["history"], state_dict["best"]
        self.shares = state_dict.get("shares", {})

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A training checkpoint says of its network what the model's file says, for commands that are given it."""
        checkpoint["vmamba"] = metadata_text(pl_module.network, self._metadata(pl_module))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse to go on with other devices or another number of images: steps would be counted otherwise."""
        now = {"processes": trainer.world_size, "updates an epoch": pl_module.updates}
        if self.shares and self.shares != now:
            before, after = (", ".join(f"{count} {name}" for name, count in s.items()) for s in (self.shares, now))
            raise RecipeError(
                f"the run in {self.run.path} has had {before}, and would now have {after}, so it cannot be resumed: "
                f"give it the devices and the images it was started with, or another folder with --run"
            )
        self.shares = now

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.started = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        results = pl_module.epoch_results()
        lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        epoch = trainer.current_epoch + 1
        seconds = round(time.monotonic() - self.started, 2)
        self.history.append({"epoch": epoch, "lr": lr, **results, "seconds": seconds})
        if pl_module.recipe.keep == "last" or self._is_best(results, pl_module.score):
            network = pl_module.network_for_saving()
            if network is not None:
                save_checkpoint(network, self.run.model, self._metadata(pl_module) | {"epoch": epoch, **results})
        if trainer.is_global_zero:
            self.run.write_metrics(self.history)
            if time.monotonic() - self.drawn > _DRAWING_SECONDS:
                self._draw(pl_module)
        trainer.save_checkpoint(self.run.checkpoint)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and self.history:
            self._draw(pl_module)

    def _is_best(self, results: dict[str, float], score: Score) -> bool:
        if f"val_{score.name}" not in results:
            return False
        rank = score.rank(results[f"val_{score.name}"])
        if self.best is not None and rank <= self.best:
            return False
        self.best = rank
        return True

    def _metadata(self, task: Task) -> dict[str, Any]:
        """What the model file says of how the network is built and used."""
        assert task.recipe is not None
        model = task.recipe.model
        variant = getattr(task.model, "variant", model.name)
        return {"task": task.name, "variant": variant, "model_kwargs": model.kwargs, **task.metadata()}

    def _draw(self, task: Task) -> None:
        learning_curve(self.history, task.curves, task.score, self.run.curve)
        if task.found:
            task.show(self.run.path)
        self.drawn = time.monotonic()
