"""What every task is: a network, how it learns and how it is judged; and the training step that all tasks share.

A task adds what is special to it: `Task.loss`, `Task.judge`, `Task.results`, its data and its pictures.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from typing_extensions import override

from vmamba.data.loading import EpochLoader
from vmamba.data.seeding import derive_seed, seed_step
from vmamba.errors import DataError, NonFiniteError, RecipeError
from vmamba.models.checkpoints import identify_checkpoint, load_checkpoint
from vmamba.models.feature_maps import DenseModel
from vmamba.tasks.prediction import Weights, builder
from vmamba.tasks.recipe import BaseTrainConfig, ModelConfig
from vmamba.tasks.runs import report
from vmamba.tasks.schedule import Updates, make_optimizer, make_scheduler


@dataclass(frozen=True)
class Score:
    """A number that tells how good a model is.

    Attributes:
        name: its key among the results; ``train_NAME`` and ``val_NAME`` in metrics.csv.
        label: what a person calls it.
        higher_is_better: whether the best value is the highest.
        percent: whether it is a share from 0 to 1, shown in percent.
    """

    name: str
    label: str
    higher_is_better: bool = True
    percent: bool = True

    def text(self, value: float) -> str:
        """The value as a person reads it."""
        return f"{value:.2%}" if self.percent else f"{value:.4f}"

    def rank(self, value: float) -> float:
        """The higher the better; what is no number is worst of all."""
        return -math.inf if math.isnan(value) else value if self.higher_is_better else -value


def class_table(rows: dict[str, dict[str, Any]], titles: Sequence[str]) -> list[str]:
    """Lines with numbers of each class: counts, and shares in percent; a dash for None."""
    width = max(map(len, ("class", *rows)))
    lines = [f"{'class':{width}}" + "".join(f"{title:>11}" for title in titles)]
    for name, row in rows.items():
        texts = ("–" if v is None else f"{v:.2%}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append(f"{name:{width}}" + "".join(f"{text:>11}" for text in texts))
    return lines


def rounded(value: float) -> float | None:
    """A share for JSON: null where there is nothing that it could be of, which is NaN or below 0."""
    return round(float(value), 5) if value >= 0 else None


_REMEMBERED = 0.1  # share of the initial weights in the final average, above which it is of no use

LOSS = Score("loss", "loss", higher_is_better=False, percent=False)


class Means:
    """Averages over one epoch and all devices: of each name a sum and a count, kept where the model lives."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.sums = device, {}  # type: tuple[torch.device, dict[str, Tensor]]

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add ``count`` values whose sum is ``total``."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(2, device=self.device)
        self.sums[name][0] += total
        self.sums[name][1] += count

    def local(self, name: str) -> float:
        """The average on this device alone."""
        total, count = self.sums[name].tolist()
        return total / max(count, 1)

    def compute(self, strategy: Any) -> dict[str, float]:
        """The averages over all devices. Every process must call it, having added the same names."""
        if not self.sums:
            return {}
        sums = strategy.reduce(torch.stack(list(self.sums.values())), reduce_op="sum").tolist()
        return {name: total / max(count, 1) for name, (total, count) in zip(self.sums, sums, strict=True)}


class Task(L.LightningModule):
    """A network, how it learns, and how it is judged.

    Args:
        model: the network.
        recipe: how it learns; None for a task that is only validated.

    Attributes:
        score: what the model is judged by: progress, learning curve and "best" show it.
        curves: the numbers whose course over the epochs is drawn, by default the loss and the score.
        detailed: whether a validation also gathers what only its report needs, as `vmamba validate` asks.
        found: results of the validation that ended last; empty where an epoch had none.
    """

    name: ClassVar[str]
    score: Score

    def __init__(self, model: nn.Module, recipe: BaseTrainConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.ema = None
        if recipe is not None and recipe.optim.ema_decay:
            self.ema = ModelEmaV3(model, decay=recipe.optim.ema_decay, use_warmup=bool(recipe.optim.ema_warmup))
            self.ema.requires_grad_(False).train()  # a formality: the average is only ever evaluated
        self.detailed = False
        self.found: dict[str, float] = {}
        self.averaged_step = 0

    # --- what each task says for itself

    @classmethod
    def from_recipe(cls, recipe: Any) -> Self:
        """Open and check the data and build the network, refusing what is wrong with either before any work."""
        raise NotImplementedError

    @classmethod
    def from_weights(cls, config: Any, weights: Weights) -> Self:
        """The task that measures a trained network on the validation split."""
        raise NotImplementedError

    def loader(self, training: bool) -> EpochLoader:
        """The batches of one split for this process, which `place` tells apart from the others."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """What training lowers: a number, or several by name whose sum it is and whose course is shown.

        The network is ``self.model``. More averages of the epoch go to ``self.trained.add(name, total, count)``.
        """
        raise NotImplementedError

    def judge(self, batch: Any) -> None:
        """Compare what ``self.network`` makes of a validation batch to the truth, and remember the outcome."""
        raise NotImplementedError

    def results(self) -> dict[str, float]:
        """The score and other numbers of the validation that just ended, over all devices, on each of which it runs."""
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """What metrics.json holds beside the results of a ``detailed`` validation, as plain values."""
        return {}

    def summary(self, results: dict[str, Any]) -> str:
        """A validation in one line; below it more, if there is more to tell."""
        return ", ".join(f"{s.label} {s.text(results[s.name])}" for s in (self.score, LOSS) if s.name in results)

    def show(self, folder: Path) -> None:
        """Draw what the last validation saw into the folder. Only the first process is asked."""

    def metadata(self) -> dict[str, Any]:
        """What the model file says beside the weights: all that prediction needs, as plain values."""
        return {}

    @property
    def curves(self) -> tuple[Score, ...]:
        """One panel each in the learning curve."""
        return (LOSS, self.score)

    # --- what they can use

    @property
    def network(self) -> nn.Module:
        """What is validated and saved: the averaged weights where there are any."""
        return self.model if self.ema is None else self.ema.module

    @property
    def place(self) -> dict[str, Any]:
        """Which part of the data this process handles: arguments of `EpochLoader`."""
        trainer = self.trainer
        pin_memory = trainer.strategy.root_device.type == "cuda"
        return {"rank": trainer.global_rank, "world_size": trainer.world_size, "pin_memory": pin_memory}

    @property
    def updates(self) -> int:
        """Updates of the weights in one epoch."""
        return Updates(self.trainer, len(self.train_loader), 1).until(1)

    # --- one training step

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.recipe is not None
        seed_step(derive_seed(self.recipe.seed, self.current_epoch, batch_idx, self.global_rank), self.device)
        losses = self.loss(batch)
        parts, loss = (losses, torch.stack([*losses.values()]).sum()) if isinstance(losses, dict) else ({}, losses)
        for name, value in {"loss": loss, **parts}.items():
            self.trained.add(name, value.detach(), 1)
        self.pending_loss += loss.detach()
        return loss

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.scheduler.step_update(self.global_step)  # the rate depends on the step alone: nothing to save

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient, by its norm or by value, and refuse an update from a loss or a gradient that is not
        finite."""
        by_value = gradient_clip_algorithm == "value"
        largest = math.inf if by_value else gradient_clip_val or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        if by_value and gradient_clip_val:
            nn.utils.clip_grad_value_(self.model.parameters(), gradient_clip_val)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss, norm_value = torch.stack([self.pending_loss, norm.float()]).tolist()  # the one wait for the device
        self.pending_loss.zero_()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # With a scaler a gradient may overflow: it then skips the update and lowers the scale.
        if math.isfinite(loss) and (math.isfinite(norm_value) or scaler is not None):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm_value}"
        scale = "" if scaler is None else f", loss scale {scaler.get_scale():g}"
        raise NonFiniteError(
            f"{what} in epoch {self.current_epoch + 1}, step {self.trainer.fit_loop.batch_idx + 1} (update "
            f"{self.global_step + 1} of the run; learning rate {optimizer.param_groups[0]['lr']:.3g}{scale}). "
            f"No weights were updated with it. Common causes are a learning rate that is too high, a warm-up that is "
            f"too short, and 16-mixed precision: try bf16-mixed or 32-true"
        )

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema is not None and self.global_step != self.averaged_step:
            self.ema.update(self.model, step=self.global_step)
        self.averaged_step = self.global_step

    # --- one epoch

    @override
    def on_train_start(self) -> None:
        self.averaged_step = self.global_step

    @override
    def on_train_epoch_start(self) -> None:
        self.train_loader.set_epoch(self.current_epoch)
        self.found = {}
        self.trained = Means(self.device)
        self.trained.add("loss", 0, 0)  # the first column
        self.pending_loss = torch.zeros((), device=self.device)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.judge(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.found = self.results()
        self._log("val", self.found)

    @override
    def on_train_epoch_end(self) -> None:
        self._log("train", self.trained.compute(self.trainer.strategy))

    def _log(self, split: str, results: dict[str, float]) -> None:
        """For callbacks that watch a number, under the name that it has in metrics.csv."""
        self.log_dict({f"{split}_{name}": value for name, value in results.items()}, sync_dist=True, batch_size=1)

    def epoch_results(self) -> dict[str, float]:
        """Numbers of the epoch that just ended, over all devices. Every process must call it."""
        trained = self.trained.compute(self.trainer.strategy)
        splits = {"train": trained, "val": self.found}
        return {f"{split}_{name}": value for split, found in splits.items() for name, value in found.items()}

    # --- what Lightning asks for

    @override
    def setup(self, stage: str) -> None:
        self.val_loader = self._loader(training=False)
        if stage == "fit":
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise RecipeError(
                    "the trainer's overfit_batches asks for the same batches in each epoch, but what is in a batch "
                    "follows from seed and epoch: train on a small data set instead"
                )
            self.train_loader = self._loader(training=True)
            assert self.recipe is not None
            if self.recipe.optim.steps is not None:
                every = self.recipe.validated_every
                times = self.recipe.optim.steps / max(self.updates, 1) / every
                self.trainer.fit_loop.max_epochs = max(round(times), 1) * every

    def _loader(self, training: bool) -> EpochLoader:
        loader = self.loader(training)
        if not len(loader):
            raise DataError(
                f"the {'training' if training else 'validation'} split has {len(loader.dataset)} images, fewer than "  # type: ignore[arg-type]
                f"one batch of {loader.batch_size} on each of {self.trainer.world_size} device(s): lower "
                f"data.batch_size"
            )
        return loader

    @override
    def train_dataloader(self) -> EpochLoader:
        # Of a resumed run, the loop already knows the epoch; `current_epoch` follows later.
        self.train_loader.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self.train_loader

    @override
    def val_dataloader(self) -> EpochLoader:
        return self.val_loader

    @override
    def configure_model(self) -> None:
        """Under fsdp: shard each block, then the rest."""
        if self.device_mesh is None or hasattr(self, "unsharded"):
            return
        from torch.distributed.fsdp import fully_shard

        self.unsharded = [copy.deepcopy(self.model)]  # in a list, so that it is no part of this module
        mesh = self.device_mesh["data_parallel"]
        for name, module in self.model.named_modules():
            if re.search(r"blocks\.\d+$", name):
                fully_shard(module, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.recipe is not None
        o, trainer = self.recipe.optim, self.trainer
        batch = (self.train_loader.batch_size or 0) * trainer.world_size * trainer.accumulate_grad_batches
        scale = batch / o.lr_batch if o.lr_batch else 1.0
        optimizer = make_optimizer(self.model, o, scale)
        updates = Updates(trainer, len(self.train_loader), o.epochs)
        self.scheduler = make_scheduler(optimizer, o, scale, updates, trainer)
        share = o.ema_decay**updates.total  # of the initial weights in the average at the end
        if self.ema is not None and o.ema_warmup is None and share > _REMEMBERED:
            self.ema.use_warmup = True
            if trainer.is_global_zero:
                report(
                    f"after {updates.total} updates an average with optim.ema_decay {o.ema_decay} would still hold "
                    f"{share:.0%} of the initial weights: it starts short and lengthens, as optim.ema_warmup asks for"
                )
        return optimizer

    def network_for_saving(self) -> nn.Module | None:
        """The network with whole tensors. Every process must call it; only the first gets a network."""
        if self.device_mesh is None:
            return self.network if self.global_rank == 0 else None
        state = self.trainer.strategy.lightning_module_state_dict()
        if self.global_rank != 0:
            return None
        whole = copy.deepcopy(self.unsharded[0])
        whole.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        return whole


def build_model(config: ModelConfig, seed: int = 0, **arguments: Any) -> nn.Module:
    """A network with the initial weights that the configuration names, or weights that follow from the seed.

    Args:
        config: name, weights and arguments of the network.
        seed: of the weights that are drawn.
        arguments: what else the constructor is to be given, such as ``num_classes``.

    Raises:
        RecipeError: there is no such model, or it does not take the arguments.
    """
    build = builder(config.name)
    if config.drop_path_rate is not None:
        arguments["drop_path_rate"] = config.drop_path_rate
    torch.manual_seed(seed)
    try:
        model: Any = build(pretrained=config.pretrained, **arguments, **config.kwargs)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{config.name} cannot be built as configured under model: {error}") from error
    if config.checkpoint:
        other = isinstance(model, DenseModel) and identify_checkpoint(config.checkpoint).task != model.task
        target = model.backbone.extractor if other else model  # what models for different tasks share
        load_checkpoint(target, config.checkpoint, ema=config.ema_weights, reset_head=True)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model
