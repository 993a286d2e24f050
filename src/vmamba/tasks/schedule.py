"""The optimiser of a run, how many updates it makes, and how its learning rate changes over them."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vmamba.errors import RecipeError
from vmamba.tasks.recipe import OptimConfig
from vmamba.tasks.runs import report


class Updates:
    """Updates of the weights in a run, as the recipe and the trainer's own settings limit it.

    Args:
        trainer: Lightning's.
        batches: of an epoch, where the trainer does not leave some out.
        epochs: of the run, where the trainer has no limit of its own.

    Attributes:
        total: in the whole run.
    """

    def __init__(self, trainer: Any, batches: int, epochs: int) -> None:
        limit = trainer.limit_train_batches
        self.batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
        self.accumulate = trainer.accumulate_grad_batches
        callbacks = (c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler))
        self.scheduler = next(callbacks, None)  # of another number of batches for an update in some epochs
        endless, steps = trainer.max_epochs in (None, -1), trainer.max_steps
        if endless and steps != -1:
            self.total = steps
            return
        self.total = self.until(epochs if endless else trainer.max_epochs)
        if steps != -1:
            self.total = min(self.total, steps)

    def until(self, epoch: float) -> int:
        """In the first epochs, of which the last may be a part."""
        if self.scheduler is None:
            return round(epoch * math.ceil(self.batches / self.accumulate))
        whole = math.ceil(epoch)
        each = [math.ceil(self.batches / self.scheduler.get_accumulate_grad_batches(i)) for i in range(whole)]
        return round(sum(each) - (whole - epoch) * each[-1]) if each else 0


def make_optimizer(model: nn.Module, o: OptimConfig, scale: float) -> torch.optim.Optimizer:
    """timm's optimiser of the configured name, whose rates are those configured times ``scale``.

    Raises:
        RecipeError: there is none, or it does not take the settings, or the model does not.
    """
    betas: dict[str, Any] = {"betas": tuple(o.betas)} if o.betas else {}
    if o.layer_decay is not None and not hasattr(model, "group_matcher"):  # timm would cut it up anywhere
        raise RecipeError(f"optim.layer_decay: {type(model).__name__} does not tell the order of its layers")
    try:
        return create_optimizer_v2(
            model, o.optimizer, lr=o.lr * scale, weight_decay=o.weight_decay, layer_decay=o.layer_decay, **betas
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"optim.optimizer {o.optimizer} cannot be made as configured: {error}") from error


def make_scheduler(
    optimizer: torch.optim.Optimizer, o: OptimConfig, scale: float, updates: Updates, trainer: Any
) -> Scheduler:
    """timm's schedule of the configured name, counted in updates.

    Raises:
        RecipeError: the warm-up takes the whole run.
    """
    warmup = updates.until(o.warmup_epochs) if o.warmup_steps is None else o.warmup_steps
    warmup = 0 if trainer.fast_dev_run else warmup  # a run of a step or two
    if warmup >= updates.total:
        raise RecipeError(f"the warm-up of {warmup} updates leaves nothing of the {updates.total} of the whole run")
    above = [f"optim.{name} {getattr(o, name)}" for name in ("min_lr", "warmup_lr") if getattr(o, name) > o.lr]
    if above and trainer.is_global_zero:
        report(f"{' and '.join(above)}: above optim.lr {o.lr}, which is taken instead")
    scheduler, _ = create_scheduler_v2(
        optimizer, o.schedule, num_epochs=updates.total - warmup, min_lr=min(o.min_lr, o.lr) * scale,
        warmup_epochs=warmup, warmup_lr=min(o.warmup_lr, o.lr) * scale, warmup_prefix=True,
        step_on_epochs=False, updates_per_epoch=1,
        decay_rate=1 if o.schedule == "poly" else 0.1,  # which is its power
        # timm counts them from the end of the warm-up, and is early by one.
        decay_milestones=[updates.until(epoch) - warmup + 1 for epoch in o.milestones],
    )  # fmt: skip
    return scheduler
