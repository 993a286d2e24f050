"""Image classification: head, loss, metrics and recipe, and the two calls that use them, `train` and `validate`.

What is computed is in this file, top to bottom; Lightning runs it on the devices at hand. Pictures, progress and the
run's folder have files of their own.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

import vmamba
from vmamba.data.config import DataConfig
from vmamba.data.loading import EpochLoader, LabelledImages, MemorySamples, Samples, Stream
from vmamba.data.seeding import derive_seed, seed_step
from vmamba.data.sources import PADDING, Split, check_files, check_same_classes, number_of_classes, open_split
from vmamba.data.transforms import AugmentConfig, BatchAugment, Preprocessing, train_transform
from vmamba.errors import DataError, NonFiniteError, RecipeError
from vmamba.files import atomic_write
from vmamba.models.checkpoints import load_checkpoint
from vmamba.tasks.prediction import Classifier, preprocessing_of
from vmamba.tasks.recipe import (
    ModelConfig,
    OptimConfig,
    TrainConfig,
    TrainerConfig,
    ValidateConfig,
    load_recipe,
)
from vmamba.tasks.runs import LATEST, RunFolder, report

try:
    import lightning as L
    from lightning.pytorch.callbacks import LambdaCallback
    from lightning.pytorch.plugins.environments import SLURMEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    from vmamba.tasks import pictures
    from vmamba.tasks.checkpointing import AtomicCheckpointIO, Recorder
    from vmamba.tasks.progress import Progress, ValidationProgress
except ImportError as error:
    raise ImportError(f'training and validation need more packages ({error}): pip install "vmamba[train]"') from error

MakeLoader = Callable[[bool, int, int], EpochLoader]  # (training, rank, world size)


class ClassificationTask(L.LightningModule):
    """A network, how it learns, and how it is judged.

    Args:
        model: maps float images (B, C, H, W) to logits (B, num_classes).
        num_classes: of the head.
        pre: what the network expects of its input.
        make_loader: called with (training, rank, world size) once the devices are known.
        optim: optimiser, schedule, weight average; None for a task that is only validated.
        augment: how batches are varied and mixed, and label smoothing.
        in_memory: whether batches come straight from memory, with no augmentation yet.
        seed: of everything random in a training step.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        pre: Preprocessing,
        make_loader: MakeLoader,
        optim: OptimConfig | None = None,
        augment: AugmentConfig | None = None,
        in_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.pre, self.make_loader, self.optim, self.seed = pre, make_loader, optim, seed
        self.ema = None
        if optim is not None and optim.ema_decay:
            self.ema = ModelEmaV3(model, decay=optim.ema_decay, use_warmup=optim.ema_warmup).requires_grad_(False)
            self.ema.train()  # a formality: the average is only ever evaluated
        augment = augment or AugmentConfig()
        self.augment = BatchAugment(augment, pre, in_memory)
        self.label_smoothing = augment.label_smoothing
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, prob=augment.mixup_prob, switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing, num_classes=num_classes,
            )  # fmt: skip

        known: dict[str, Any] = {"average": "micro", "ignore_index": PADDING, "validate_args": False}
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_top1 = MulticlassAccuracy(num_classes, **known)
        self.val_top5 = MulticlassAccuracy(num_classes, top_k=5, **known) if num_classes > 5 else None
        self.confusion: MulticlassConfusionMatrix | None = None  # `validate` asks for it
        self.results: dict[str, float] = {}
        self.averaged_step = 0

    @property
    def network(self) -> nn.Module:
        """What is validated and saved: the averaged weights where there are any."""
        return self.model if self.ema is None else self.ema.module

    # --- one training step

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """uint8 images (B, C, H, W) and labels (B,) to the loss."""
        seed_step(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank), self.device)
        images, labels = self.augment(batch[0]), batch[1]
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)  # (B, num_classes), smoothed
            loss = F.cross_entropy(self.model(images), targets)
        else:
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            self.train_correct += (logits.detach().argmax(1) == labels).sum()
        self.train_loss += loss.detach()
        self.train_steps += 1
        self.train_images += len(labels)
        self.pending_loss += loss.detach()
        return loss

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.scheduler.step_update(self.global_step)  # the rate depends on the step alone: nothing to save

    @override
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient by its norm, and refuse an update from a loss or a gradient that is not finite."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val or math.inf)
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

    # --- one validation step

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """uint8 images (B, C, H, W) and labels (B,), -1 where the image only fills up the batch, to logits."""
        images, labels = batch
        logits = self.network(self.pre.normalise(images)).float()
        known = labels != PADDING
        self.val_loss.update(F.cross_entropy(logits[known], labels[known], reduction="none"))
        for metric in (self.val_top1, self.val_top5, self.confusion):
            if metric is not None:
                metric.update(logits, labels)
        return logits

    @override
    def on_validation_epoch_end(self) -> None:
        metrics = {"val_loss": self.val_loss, "val_top1": self.val_top1, "val_top5": self.val_top5}
        self.results = {}
        for name, metric in metrics.items():
            if metric is not None:
                self.results[name] = float(metric.compute())
                metric.reset()

    # --- one epoch

    @override
    def on_train_start(self) -> None:
        self.averaged_step = self.global_step

    @override
    def on_train_epoch_start(self) -> None:
        self.train_loader.set_epoch(self.current_epoch)
        self.results = {}
        self.train_steps = self.train_images = 0
        self.train_loss, self.train_correct, self.pending_loss = torch.zeros(3, device=self.device).unbind()

    def epoch_results(self) -> dict[str, float]:
        """Numbers of the epoch that just ended, over all devices. Every process must call it."""
        reduce = self.trainer.strategy.reduce
        results = {"train_loss": float(reduce(self.train_loss, reduce_op="mean")) / self.train_steps}
        if self.mixup is None:  # mixed images have no one class
            results["train_top1"] = float(reduce(self.train_correct, reduce_op="mean")) / self.train_images
        return results | self.results

    # --- what Lightning asks for

    @override
    def setup(self, stage: str) -> None:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self.val_loader = self.make_loader(False, rank, world_size)
        if stage == "fit":
            self.train_loader = self.make_loader(True, rank, world_size)

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
        o = self.optim
        assert o is not None
        accumulate = self.trainer.accumulate_grad_batches
        batch = (self.train_loader.batch_size or 0) * self.trainer.world_size * accumulate
        scale = batch / o.lr_batch if o.lr_batch else 1.0
        betas: dict[str, Any] = {"betas": tuple(o.betas)} if o.betas else {}
        optimizer = create_optimizer_v2(
            self.model, o.optimizer, lr=o.lr * scale, weight_decay=o.weight_decay, layer_decay=o.layer_decay, **betas
        )
        updates = math.ceil(len(self.train_loader) / accumulate)
        warmup = round(o.warmup_epochs * updates)
        self.scheduler, _ = create_scheduler_v2(
            optimizer, o.schedule, num_epochs=o.epochs * updates - warmup, min_lr=o.min_lr * scale,
            warmup_epochs=warmup, warmup_lr=o.warmup_lr * scale, warmup_prefix=True,
            step_on_epochs=False, updates_per_epoch=1,
        )  # fmt: skip
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


# ---------------------------------------------------------------------------------------------------------------------
# Building the parts from a recipe


def build_model(config: ModelConfig, num_classes: int, in_chans: int | None = None) -> nn.Module:
    """A classifier with the initial weights that the configuration names."""
    vmamba.list_models()  # registers the variants with timm
    arguments: dict[str, Any] = {"num_classes": num_classes, "pretrained": config.pretrained, **config.kwargs}
    if in_chans is not None:
        arguments["in_chans"] = in_chans
    if config.drop_path_rate is not None:
        arguments["drop_path_rate"] = config.drop_path_rate
    if not timm.is_model(config.name):
        raise RecipeError(f"there is no model {config.name!r}; `vmamba models` lists the variants")
    model: Any = timm.create_model(config.name, **arguments)
    if config.checkpoint:
        load_checkpoint(model, config.checkpoint, ema=config.ema_weights, reset_head=True)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def loader_factory(
    data: DataConfig,
    train: Split | None,
    val: Split,
    pre: Preprocessing,
    num_classes: int,
    augment: AugmentConfig,
    seed: int,
    pin_memory: bool,
) -> MakeLoader:
    """How each process makes its loaders. Streams are opened anew, for they divide the work when they are opened."""

    def make(training: bool, rank: int, world_size: int) -> EpochLoader:
        split = train if training else val
        assert split is not None
        transform = train_transform(augment, pre) if training else pre.eval_transform()
        samples: Samples | MemorySamples | Stream
        if split.is_stream:
            split = open_split(data, training, seed=seed)
            samples = Stream(split, transform, pre.in_chans, num_classes, max(data.workers, 1))
        elif data.in_memory:
            samples = MemorySamples(split, pre, num_classes)
        else:
            samples = Samples(LabelledImages(split, transform, pre.in_chans, num_classes), seed)
        batch = data.batch_size if training else data.val_batch_size or data.batch_size
        loader = EpochLoader(samples, batch, training, data.workers, seed, rank, world_size, pin_memory)
        if not len(loader):
            raise DataError(
                f"{split.where} has {len(split)} images, fewer than one batch of {batch} on each of {world_size} "
                f"device(s): lower data.batch_size"
            )
        return loader

    return make


@dataclass(frozen=True)
class _Machines:
    """How many devices and machines take part: as configured, or as torchrun or SLURM started processes."""

    devices: int | str
    nodes: int

    @classmethod
    def find(cls, config: TrainerConfig) -> _Machines:
        local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
        devices: int | str = config.devices
        nodes = config.num_nodes
        if local and world:  # torchrun
            devices = int(local) if devices == "auto" else devices
            nodes = int(world) // int(local) if nodes == "auto" else nodes
        elif SLURMEnvironment.detect():
            tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
            devices = int(tasks) if devices == "auto" and tasks else devices
            nodes = int(os.environ.get("SLURM_NNODES", 1)) if nodes == "auto" else nodes
        if devices == "auto" and config.strategy == "fsdp":
            devices = max(torch.cuda.device_count(), 1)
        return cls(devices, 1 if nodes == "auto" else nodes)


def is_first_process() -> bool:
    """Whether this is the one process, of all that take part, that checks files and tells results."""
    return getattr(rank_zero_only, "rank", 0) == 0


def make_trainer(config: TrainerConfig, **arguments: Any) -> L.Trainer:
    """Lightning's trainer for the configured devices, without the features that this package brings itself."""
    machines = _Machines.find(config)
    strategy: str | Strategy = config.strategy
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(int(machines.devices) * machines.nodes, 1, save_distributed_checkpoint=False)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():  # its own requeueing would save, and later prefer, checkpoints in mid-epoch
        plugins.append(SLURMEnvironment(auto_requeue=False))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's advice to raise num_workers: where images lie in memory, more workers would only cost time.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Of a depthwise weight's gradient two strides are equally right; DDP warns when it meets the other one.
    warnings.filterwarnings("ignore", ".*Grad strides do not match.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # of torch, about Lightning
    try:
        return L.Trainer(
            accelerator=config.accelerator, devices=machines.devices, num_nodes=machines.nodes, strategy=strategy,
            precision=config.precision, plugins=plugins, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            num_sanity_val_steps=0, deterministic=config.deterministic or None, **arguments,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise RecipeError(f"trainer: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The two calls


def train(config: TrainConfig) -> Path:
    """Train a classifier, or go on training one.

    The run's folder then holds ``config.yaml``, ``metrics.csv``, ``learning_curve.png``, ``checkpoints/last.ckpt`` and
    ``model.safetensors``.

    Returns:
        The run's folder.

    Raises:
        RecipeError: settings that are wrong or contradict each other, or a folder that holds another run.
        DataError: images or classes are missing or do not fit together.
        ImageError: a file turned out to be unusable in mid-training; the message names it.
        NonFiniteError: the loss or gradient is not finite; the last good checkpoint is kept.
    """
    config.check()
    settings = config.to_dict()
    run = RunFolder(config.folder)
    checkpoint = run.decide(settings, config.resume, config.overwrite)

    train_split = open_split(config.data, training=True, seed=config.seed)
    val_split = open_split(config.data, training=False)
    check_same_classes(train_split, val_split)
    num_classes = number_of_classes(config.data, train_split)
    number_of_classes(config.data, val_split)
    if config.data.check_files and is_first_process():
        for split in (train_split, val_split):
            check_files(split, in_chans=3, workers=config.data.workers)

    torch.manual_seed(config.seed)
    model = build_model(config.model, num_classes, config.data.in_chans)
    pre = preprocessing_of(model, config.data)
    recorder = Recorder(run, config.keep, {
        "variant": getattr(model, "variant", config.model.name),
        "model_kwargs": config.model.kwargs,
        "num_classes": num_classes,
        "class_names": train_split.class_names or [],
        **pre.to_dict(),
    })  # fmt: skip

    def prepare(trainer: L.Trainer, task: Any) -> None:  # by now loaders and devices exist: nothing old is lost in vain
        if trainer.is_global_zero:
            run.prepare(settings, fresh=checkpoint is None)
            if checkpoint is not None:
                report(f"going on from {checkpoint}")

    callbacks: list[Any] = [recorder, LambdaCallback(on_fit_start=prepare)]
    if config.trainer.progress:
        callbacks.append(Progress(recorder))
    trainer = make_trainer(
        config.trainer, callbacks=callbacks, max_epochs=config.optim.epochs, default_root_dir=run.path,
        accumulate_grad_batches=config.trainer.accumulate, gradient_clip_val=config.optim.clip_grad,
        check_val_every_n_epoch=config.trainer.validate_every,
    )  # fmt: skip
    make_loader = loader_factory(
        config.data, train_split, val_split, pre, num_classes, config.augment, config.seed,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )  # fmt: skip
    task = ClassificationTask(
        model, num_classes, pre, make_loader, config.optim, config.augment, config.data.in_memory, config.seed
    )
    if config.model.compile:
        model.compile()
    trainer.fit(task, ckpt_path=checkpoint, weights_only=True)
    return run.path


def validate(config: ValidateConfig) -> dict[str, Any]:
    """Measure a classifier on the validation split.

    Writes ``metrics.json``, ``confusion_matrix.png`` and ``predictions.png`` to the output folder.

    Returns:
        What metrics.json holds: "loss", "top1", "top5" (0 to 1), "images", and "per_class" accuracy by class name.

    Raises:
        CheckpointError: the weights cannot be read.
        DataError: images are missing, or their classes are not the model's.
        ImageError: a file cannot be used; the message names it.
    """
    data = _data_of_run(config)
    classifier = Classifier.load(config.checkpoint, config.pretrained, config.ema, data)
    # Folders are labelled in the order of the model's classes; published weights know ImageNet's by number only.
    names = classifier.class_names if config.pretrained is None and not data.dataset else None
    split = open_split(data, training=False, class_names=names)
    if (number := number_of_classes(data, split)) != classifier.num_classes:
        raise DataError(f"{split.where} has {number} classes, but {classifier.source} has {classifier.num_classes}")
    if names is None and classifier.num_classes != 1000 and split.class_names not in (None, classifier.class_names):
        raise DataError(f"the classes of {split.where}, {split.class_names}, are not those of {classifier.source}")
    if data.check_files and is_first_process():
        check_files(split, classifier.pre.in_chans, data.workers)

    gallery = _Gallery(len(split))
    trainer = make_trainer(
        config.trainer, callbacks=[gallery, ValidationProgress()] if config.trainer.progress else [gallery]
    )
    make_loader = loader_factory(
        data, None, split, classifier.pre, classifier.num_classes, AugmentConfig(), 0,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )  # fmt: skip
    task = ClassificationTask(classifier.model, classifier.num_classes, classifier.pre, make_loader)
    task.confusion = MulticlassConfusionMatrix(classifier.num_classes, ignore_index=PADDING, validate_args=False)
    trainer.validate(task, verbose=False)
    matrix = task.confusion.compute().cpu().numpy()

    if config.output:
        output = Path(config.output)
    else:
        output = Path(f"runs/{config.pretrained}") if config.pretrained else Path(classifier.source).parent
    totals = matrix.sum(1)
    results: dict[str, Any] = {
        **{name.removeprefix("val_"): value for name, value in task.results.items()},
        "images": int(matrix.sum()),
        "weights": classifier.source,
        "data": split.where,
        "per_class": {
            name: round(float(matrix[i, i] / totals[i]), 4)
            for i, name in enumerate(classifier.class_names)
            if totals[i]
        },
    }
    if trainer.is_global_zero:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / "metrics.json") as file:
            file.write(json.dumps(results, indent=2, ensure_ascii=False).encode())
        pictures.confusion_matrix(matrix, classifier.class_names, output / "confusion_matrix.png")
        samples, mistakes = gallery.samples(classifier.class_names)
        pictures.predictions(samples, mistakes, output / "predictions.png")
    return {**results, "output": str(output)}


def _data_of_run(config: ValidateConfig) -> DataConfig:
    """The configured data; where no place is given, that of the run whose folder the checkpoint lies in."""
    if config.data.root is not None or config.data.dataset or config.pretrained:
        return config.data
    folder = Path(config.checkpoint).parent if config.checkpoint else LATEST
    settings = next((f for f in (folder, folder.parent) if RunFolder(f).config.exists()), None)
    if settings is None:
        return config.data
    stored = load_recipe(RunFolder(settings).config)["data"]
    default = asdict(DataConfig())
    return DataConfig(**stored | {k: v for k, v in asdict(config.data).items() if v != default[k]})


class _Gallery(L.Callback):
    """Keeps some images that a validation meets: a random sample, and the mistakes it was most confident in."""

    def __init__(self, length: int, random_ones: int = 24, mistakes: int = 8) -> None:
        chosen = torch.randperm(max(length, 1), generator=torch.Generator().manual_seed(0))[:random_ones]
        self.chosen = set(chosen.tolist())
        self.kept: list[tuple[Tensor, int, int, float]] = []
        self.worst: list[tuple[Tensor, int, int, float]] = []
        self.most, self.seen = mistakes, 0

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.is_global_zero:
            return
        confidences, predicted = outputs.softmax(1).max(1)
        rows = list(zip(batch[0], batch[1].tolist(), predicted.tolist(), confidences.tolist(), strict=True))
        first = self.seen
        self.kept += [row for i, row in enumerate(rows) if (first + i) * trainer.world_size in self.chosen]
        wrong = [row for row in rows if row[1] not in (row[2], PADDING)]
        self.worst = sorted(self.worst + wrong, key=lambda row: -row[3])[: self.most]
        self.seen += len(rows)

    def samples(self, names: list[str]) -> tuple[list[pictures.Sample], list[pictures.Sample]]:
        def sample(row: tuple[Tensor, int, int, float]) -> pictures.Sample:
            image, true, predicted, confidence = row
            return pictures.Sample(image.permute(1, 2, 0).cpu().numpy(), names[true], names[predicted], confidence)

        return [sample(row) for row in self.kept], [sample(row) for row in self.worst]
