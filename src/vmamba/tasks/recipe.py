"""A training run as data: typed groups of settings that flags and YAML files fill alike.

The defaults are the recipe of the published ImageNet results. Nothing here imports torch or Lightning, so that
``vmamba --help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from typing_extensions import override

from vmamba.data.config import INTERPOLATIONS, STREAMS, AugmentConfig, DataConfig
from vmamba.errors import RecipeError
from vmamba.files import shown

LEAST = 32  # pixels a side that every network for segmentation or detection takes


@dataclass
class ModelConfig:
    """The model to train and the weights it starts from."""

    name: str = "vmamba_tiny_s1l8"
    """A variant that `vmamba models` lists, or any model of timm."""
    pretrained: bool = False
    """Start from the published weights; the head is new when the number of classes differs."""
    checkpoint: str | None = None
    """Start from the weights in this file, with a new classifier; of a model for another task, from those of its
    backbone."""
    ema_weights: bool = False
    """Of the checkpoint, take the averaged weights."""
    drop_path_rate: float | None = None
    """Stochastic depth, rising linearly over the blocks; null for the variant's published rate."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments for the model's constructor."""


@dataclass
class OptimConfig:
    """Optimiser, schedule and weight averaging."""

    epochs: int = 300
    """Passes over the training images, warm-up included."""
    steps: int | None = None
    """Instead: updates of the weights; the run takes the whole number of epochs that comes nearest."""
    optimizer: str = "adamw"
    """Any optimiser of timm, by its name."""
    lr: float = 1e-3
    """Peak learning rate for a global batch of lr_batch images."""
    lr_batch: int = 1024
    """Every learning rate is scaled by global batch / lr_batch, where the global batch counts all devices and
    accumulated steps; 0 to use the rates as they are."""
    min_lr: float = 1e-5
    """Learning rate at the end of the schedule; no more than lr."""
    warmup_epochs: float = 20
    """Epochs over which the learning rate climbs from warmup_lr to lr."""
    warmup_steps: int | None = None
    """Instead: updates over which it does."""
    warmup_lr: float = 1e-6
    """Learning rate at the first step; no more than lr."""
    schedule: Literal["cosine", "poly", "tanh", "constant", "multistep"] = "cosine"
    """How the learning rate falls after the warm-up; poly: in a straight line; multistep: to a tenth at each of the
    milestones."""
    milestones: tuple[float, ...] = ()
    """For multistep: the epochs, counted from the start, after which the learning rate falls."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms and what the model lists in no_weight_decay() have none."""
    betas: tuple[float, float] | None = (0.9, 0.999)
    """The two momenta of Adam-type optimisers; null for others."""
    clip_grad: float | None = 5.0
    """Largest norm of the gradient; null for no clipping."""
    layer_decay: float | None = None
    """For fine-tuning: each layer learns at this factor of the rate of the layer above it."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the weights, which is what is validated and saved; 0 for none."""
    ema_warmup: bool | None = None
    """Start with a short average that lengthens up to ema_decay; null to do so in a run that is too short for its
    average to forget the initial weights."""


@dataclass
class TrainerConfig:
    """Where and how the run is computed."""

    accelerator: str = "auto"
    """auto, cpu, gpu or mps."""
    devices: int | Literal["auto"] = "auto"
    """Devices on each machine. auto: all GPUs, or as many as torchrun or SLURM started processes."""
    num_nodes: int | Literal["auto"] = "auto"
    """Machines. auto: what torchrun or SLURM says, else 1."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices share the work: ddp keeps a whole model on each, fsdp shards it. auto: ddp if several."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Numbers in the forward and backward pass; weights and optimiser state stay float32."""
    accumulate: int = 1
    """Steps whose gradients are added up before an update."""
    validate_every: int = 1
    """Validate after every so many epochs; a divisor of optim.epochs, or more: then after the last alone."""
    deterministic: bool = False
    """On GPUs: use only operations whose results do not vary from run to run."""
    progress: bool = True
    """Show progress: a live bar on a terminal, plain lines elsewhere."""


@dataclass
class BaseTrainConfig:
    """What the recipe of every task holds. A task's own has its dataclass of data settings, with a ``batch_size``,
    and one of augmentation if it likes."""

    task: str = ""
    """What the model learns; it decides which settings there are."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model and initial weights"""
    data: Any = None
    augment: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimisation"""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Hardware and precision"""
    run: str | None = None
    """Folder of the run; null for runs/<model name>."""
    seed: int = 0
    """Everything random follows from it: initial weights, order of images, augmentation."""
    resume: bool = False
    """Go on from the run folder's last checkpoint, if it has one, to exactly where an unbroken run would have led."""
    overwrite: bool = False
    """Start afresh in a run folder that already holds a run."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights model.safetensors holds: those with the best validation score, or the last."""

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.run or f"runs/{self.model.name}")

    @property
    def validated_every(self) -> int:
        """Epochs from one validation to the next: the last is validated."""
        every = self.trainer.validate_every
        return every if self.optim.steps is not None else min(every, self.optim.epochs)

    def check(self) -> None:
        """Refuse settings that contradict each other, before any work.

        Raises:
            RecipeError: naming the settings.
        """
        m, o, t = self.model, self.optim, self.trainer
        positive = {
            "optim.epochs": o.epochs,
            "optim.steps": o.steps,
            "optim.lr": o.lr,
            "optim.layer_decay": o.layer_decay,
            "trainer.accumulate": t.accumulate,
            "trainer.validate_every": t.validate_every,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise RecipeError(f"{name} is {value}; it must be above 0")
        check_data(self.data)
        check_ranges("optim", o, 0, None, "lr_batch", "min_lr", "warmup_epochs", "warmup_steps", "warmup_lr")
        check_ranges("optim", o, 0, None, "weight_decay", "clip_grad")
        check_ranges("optim", o, 0, 1, "layer_decay")
        check_ranges("model", m, 0, 1, "drop_path_rate")
        if not -(2**63) <= self.seed < 2**63:
            raise RecipeError(f"seed is {self.seed}; expected a number of no more than 64 bits")
        if self.resume and self.overwrite:
            raise RecipeError("resume continues the run in the folder and overwrite deletes it: ask for one of them")
        if o.warmup_epochs >= o.epochs and o.steps is None and o.warmup_steps is None:
            raise RecipeError(f"optim.warmup_epochs {o.warmup_epochs} leaves nothing of optim.epochs {o.epochs}")
        if bool(o.milestones) != (o.schedule == "multistep"):
            raise RecipeError(f"optim.milestones {plain(o.milestones)} do not go with optim.schedule {o.schedule}")
        if not 0 <= o.ema_decay < 1:
            raise RecipeError(f"optim.ema_decay is {o.ema_decay}; expected 0 (none) or a value below 1, such as 0.9999")
        if o.epochs % self.validated_every and o.steps is None:
            raise RecipeError(f"trainer.validate_every {t.validate_every} does not divide optim.epochs {o.epochs}")
        if m.pretrained and m.checkpoint:
            raise RecipeError("model.pretrained and model.checkpoint both name initial weights: give one of them")
        elsewhere = {"num_classes": "data", "in_chans": "data", "drop_path_rate": "model", "pretrained": "model"}
        for name in elsewhere.keys() & m.kwargs.keys():
            raise RecipeError(f"model.kwargs holds {name}, which has a setting of its own: {elsewhere[name]}.{name}")
        if t.strategy == "fsdp" and o.ema_decay:
            raise RecipeError(
                "optim.ema_decay cannot be combined with trainer.strategy fsdp: the average would have to be sharded "
                "like the model. Set optim.ema_decay to 0, or use ddp"
            )
        if t.strategy == "fsdp" and m.compile:
            raise RecipeError("model.compile cannot be combined with trainer.strategy fsdp; use ddp, or do not compile")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain values."""
        return plain(asdict(self))


@dataclass
class TrainConfig(BaseTrainConfig):
    """Train a classifier."""

    task: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    """Images"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation"""

    @override
    def check(self) -> None:
        super().check()
        d, a = self.data, self.augment
        check_ranges("augment", a, 0, 1, "hflip", "vflip", "random_erasing", "mixup_prob", "switch_prob")
        check_ranges("augment", a, 0, 1, "label_smoothing", "scale")
        check_ranges("augment", a, 0, None, "ratio", "color_jitter", "crop_padding", "mixup", "cutmix")
        check_order("augment", a, "scale", "ratio")
        if a.interpolation not in INTERPOLATIONS:
            raise RecipeError(
                f"augment.interpolation is {a.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}"
            )
        if d.in_chans not in (None, 1, 3):
            raise RecipeError(f"data.in_chans is {d.in_chans}; image files are read with 1 (grey) or 3 (RGB) channels")
        if (a.mixup or a.cutmix) and d.batch_size % 2:
            raise RecipeError(f"mixup and cutmix mix pairs, but data.batch_size is {d.batch_size}: make it even")
        if a.crop_padding and not d.in_memory:
            raise RecipeError(
                "augment.crop_padding is for images held in memory: set data.in_memory, or use augment.scale"
            )
        if d.in_memory:
            off = {"scale": (1, 1), "vflip": 0, "rand_augment": None, "color_jitter": 0}
            on = [name for name, value in off.items() if plain(getattr(a, name)) != plain(value)]
            if on:
                raise RecipeError(
                    f"images held in memory are only cropped and flipped, but augment.{', augment.'.join(on)} ask for "
                    f"more: set {', '.join(f'augment.{name} to {plain(off[name])}' for name in on)}"
                )


@dataclass
class BaseValidateConfig:
    """What measuring a model needs, whatever its task."""

    task: str = ""
    """What the model does, as its file says; it decides which settings there are."""
    checkpoint: str | None = None
    """File with the weights; null, with no pretrained name either, for the model of the newest run."""
    pretrained: str | None = None
    """Instead of a file: the variant whose published weights to take."""
    ema: bool = False
    """Of a checkpoint that holds both, take the averaged weights."""
    data: Any = None
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Hardware and precision"""
    output: str | None = None
    """Folder for metrics.json and pictures; null for the checkpoint's folder."""

    def check(self) -> None:
        """Refuse impossible settings, before any work.

        Raises:
            RecipeError: naming the setting.
        """
        check_data(self.data)


@dataclass
class ValidateConfig(BaseValidateConfig):
    """Measure a classifier on images with known classes."""

    task: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    """Images; where neither root nor dataset is given, those the run was validated on"""


@dataclass
class PredictConfig:
    """Use a model on image files."""

    checkpoint: str | None = None
    """File with the weights; null, with no pretrained name either, for the model of the newest run."""
    pretrained: str | None = None
    """Instead of a file: the variant whose published weights to take."""
    ema: bool = False
    """Of a checkpoint that holds both, take the averaged weights."""
    topk: int = 5
    """For classification: how many classes to report for each image."""
    threshold: float = 0.3
    """For detection: objects with a lower score are left out."""
    pictures: str = "runs/predictions"
    """For segmentation and detection: folder for the pictures that show what was found, and for masks."""
    window: int | None = None
    """For segmentation and detection: side of the overlapping squares, in pixels, that large pictures are taken apart
    into, at their own size; null to fit whole pictures into what the model was tested at."""
    format: Literal["table", "json", "csv"] = "table"
    """How results are printed."""
    output: str | None = None
    """File for the results; null for standard output."""
    img_size: int | tuple[int, int] | None = None
    """Side, or height and width, that the network sees, or for segmentation and detection the short side, or the short
    and the long one; null for the size it was trained at."""
    batch_size: int = 32
    """Images in one forward pass."""
    workers: int = 0
    """Processes that read images; 0 to read them in the main one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ..."""


@dataclass
class InfoConfig:
    """Show what a model consists of and what it costs."""

    img_size: int | tuple[int, int] | None = None
    """Side, or height and width, of the image to count for; null for what the model is meant for."""
    layers: bool = False
    """List every layer."""
    format: Literal["table", "json"] = "table"
    """How results are printed."""


@dataclass
class ModelsConfig:
    """List the models."""

    format: Literal["table", "json"] = "table"
    """How results are printed."""


def check_ranges(group: str, settings: Any, least: float, most: float | None, *names: str) -> None:
    """Refuse settings that are outside of a range, or of which a part is. None is never.

    The group is empty for settings that stand by themselves.

    Raises:
        RecipeError: naming the setting.
    """
    for name in names:
        value = getattr(settings, name, None)
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if part is not None and not (least <= part and (most is None or part <= most)):
                expected = f"{least} or more" if most is None else f"{least} to {most}"
                full_name = f"{group}.{name}" if group else name
                raise RecipeError(f"{full_name} is {plain(value)}; expected {expected}")


def check_order(group: str, settings: Any, *names: str) -> None:
    """Refuse pairs, from and to, that are not in this order or not above 0.

    Raises:
        RecipeError: naming the setting.
    """
    for name in names:
        low, high = getattr(settings, name)
        if not 0 < low <= high:
            raise RecipeError(f"{group}.{name} is {low} to {high}; expected the smaller number first, above 0")


def check_data(data: Any) -> None:
    """Refuse impossible numbers of samples and processes.

    Raises:
        RecipeError: naming the setting.
    """
    check_ranges("data", data, 1, None, "batch_size", "val_batch_size")
    check_ranges("data", data, 0, None, "workers")


def check_prediction(settings: Any) -> None:
    """Refuse impossible settings of `PredictConfig` or of `vmamba.deploy.batch.BatchConfig`.

    Raises:
        RecipeError: naming the setting.
    """
    check_ranges("", settings, 1, None, "topk", "batch_size", "part_size", "actors", "cpus")
    check_ranges("", settings, 0, None, "workers", "gpus")
    check_ranges("", settings, 0, 1, "threshold")
    check_ranges("", settings, LEAST, None, "window")


def plain(value: Any) -> Any:
    """The same value made of dicts, lists, numbers, strings and None only, as YAML and safe checkpoints hold them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


# What may change between the start of a run and its resumption without changing what it computes.
_FREE = {"resume", "overwrite", "run", "data.root", "data.val_root", "data.workers", "data.check_files",
         "data.val_batch_size", "data.download", "trainer.progress", "model.checkpoint"}  # fmt: skip


def differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = "", free: Collection[str] = _FREE
) -> list[str]:
    """The settings, as ``name: before -> now``, that keep a run from being resumed exactly."""
    found: list[str] = []
    if not prefix and str(now["data"].get("dataset")).startswith(STREAMS):  # whose parts the workers share among them
        free = _FREE - {"data.workers"}
    for key in sorted(before.keys() | now.keys()):
        name, a, b = prefix + key, before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, name + ".", free)
        elif a != b and name not in free:
            found.append(f"{name}: {a} -> {b}")
    return found


def load_recipe(path: Path) -> Any:
    """The settings in a YAML file, such as the config.yaml in a run's folder.

    Raises:
        RecipeError: it is no YAML.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise RecipeError(f"{shown(path)} cannot be read as YAML: {error}") from error
