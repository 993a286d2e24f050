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
from vmamba.models.checkpoints import save_checkpoint
from vmamba.tasks.pictures import learning_curve
from vmamba.tasks.runs import RunFolder

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

    def __init__(self, run: RunFolder, keep: str, metadata: dict[str, Any]) -> None:
        self.run, self.keep, self.metadata = run, keep, metadata
        self.history: list[dict[str, float]] = []
        self.best = -1.0
        self.started = self.drawn = time.monotonic()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best = state_dict["history"], state_dict["best"]

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
        top1 = results.get("val_top1", -1.0)
        if self.keep == "last" or top1 > self.best:
            self.best = max(self.best, top1)
            network = pl_module.network_for_saving()
            if network is not None:
                save_checkpoint(network, self.run.model, self.metadata | {"epoch": epoch, **results})
        if trainer.is_global_zero:
            self.run.write_metrics(self.history)
            if time.monotonic() - self.drawn > _DRAWING_SECONDS:
                learning_curve(self.history, self.run.curve)
                self.drawn = time.monotonic()
        trainer.save_checkpoint(self.run.checkpoint)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and self.history:
            learning_curve(self.history, self.run.curve)
