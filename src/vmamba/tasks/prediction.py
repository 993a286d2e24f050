"""Using a trained model on image files: what ``vmamba predict`` does, and what Python code can use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import timm
import torch
from timm.data import ImageNetInfo
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from vmamba.data.images import read_image
from vmamba.data.transforms import ImageTransform, Preprocessing
from vmamba.errors import CheckpointError, ImageError, RecipeError
from vmamba.files import shown
from vmamba.models.checkpoints import per_channel
from vmamba.models.registry import ENTRIES, create_model, load_model
from vmamba.tasks import parts_of
from vmamba.tasks.recipe import PredictConfig
from vmamba.tasks.runs import LATEST, RunFolder

# ---------------------------------------------------------------------------------------------------------------------
# What all tasks share


class Weights(NamedTuple):
    """A trained network in evaluation mode, what its file says beside the weights, and where they came from."""

    model: nn.Module
    metadata: dict[str, Any]
    source: str

    @property
    def task(self) -> str:
        """What the network was trained to do."""
        return str(self.metadata.get("task") or getattr(self.model, "task", "classification"))


def load_weights(checkpoint: str | None = None, name: str | None = None, ema: bool = False) -> Weights:
    """A trained network from a file, from published weights, or from the newest run.

    Args:
        checkpoint: any file that `vmamba.load_checkpoint` reads.
        name: instead: a model whose published weights are downloaded. With neither, the model of
            runs/latest is taken.
        ema: of a file that holds both, take the averaged weights.

    Raises:
        CheckpointError: there is no such file, or it cannot be read.
        RecipeError: there is no such model, or both are given.
    """
    if checkpoint is not None and name is not None:
        raise RecipeError(f"both a file, {shown(checkpoint)}, and published weights, {name}, were asked for; give one")
    if name is not None:
        return Weights(builder(name)(pretrained=True).eval(), {}, f"{name}, published weights")
    if checkpoint is None:
        checkpoint = str(RunFolder(LATEST).model)
        if not os.path.exists(checkpoint):
            raise CheckpointError(
                f"no checkpoint was named and {checkpoint} does not exist: train a model first, name a file with "
                f"--checkpoint, or take published weights with --pretrained NAME"
            )
    return Weights(*load_model(checkpoint, ema), checkpoint)


def builder(name: str) -> Callable[..., nn.Module]:
    """The constructor of one of our models or timm's.

    Raises:
        RecipeError: there is no model of this name.
    """
    if not (ours := name in ENTRIES) and not timm.is_model(name):
        raise RecipeError(f"there is no model {name!r}; `vmamba models` lists the variants")
    return partial(create_model if ours else timm.create_model, name)


class Outcome:
    """What became of one file. A task's own is a dataclass with the fields that JSON is to hold.

    Attributes:
        columns: of a table or CSV file of outcomes.
        right: the columns that hold numbers.
    """

    columns: ClassVar[tuple[str, ...]]
    right: ClassVar[tuple[int, ...]] = ()
    file: str
    error: str | None

    def rows(self, exact: bool) -> list[tuple[Any, ...]]:
        """Its lines of the table, to be read by people or, if ``exact``, by programs; none for a file in error."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What JSON is to hold."""
        values: dict[str, Any] = asdict(self) | {"file": shown(self.file)}  # type: ignore[call-overload]
        return {name: value for name, value in values.items() if value}

    def records(self) -> list[dict[str, Any]]:
        """What a JSON file of outcomes, a list, holds of it."""
        return [self.to_dict()]


class Predictor:
    """A trained network with what it takes to use it on image files.

    Attributes:
        outcome: the class of what becomes of a file.
    """

    outcome: ClassVar[type[Outcome]]
    model: nn.Module
    source: str

    @classmethod
    def load(
        cls, checkpoint: str | None = None, name: str | None = None, ema: bool = False, settings: Any = None
    ) -> Self:
        """From a file, from published weights, or from the newest run: see `load_weights` and `from_weights`."""
        return cls.from_weights(load_weights(checkpoint, name, ema), settings)

    @classmethod
    def from_weights(cls, weights: Weights, settings: Any = None) -> Self:
        """From a loaded network.

        Args:
            settings: an object whose attributes named like settings of the preprocessing, where they are not None,
                replace what the weights' file says: a `PredictConfig` or a task's data settings.
        """
        raise NotImplementedError

    def outcomes(self, files: Sequence[str], config: PredictConfig) -> Iterator[Outcome]:
        """Treat image files one batch after another, in order. A file that cannot be read is reported, not raised."""
        raise NotImplementedError


def load_predictor(config: PredictConfig) -> Predictor:
    """The model that the settings name, on the device they name, ready for its own task.

    Raises:
        CheckpointError: there is no such file, or it is of no use for its task.
        RecipeError: the device cannot be used.
    """
    weights = load_weights(config.checkpoint, config.pretrained, config.ema)
    predictor: Predictor = parts_of(weights.task).load("predictor").from_weights(weights, config)
    moved(predictor.model, config.device)
    return predictor


def moved(model: nn.Module, device: str) -> nn.Module:
    """The model on a device: "auto" for the first accelerator that torch finds, or the CPU.

    Raises:
        RecipeError: the device cannot be used.
    """
    try:
        return model.to(default_device() if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {device!r} cannot be used: {error}") from error


def default_device() -> torch.device:
    """The first accelerator that torch finds, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def each_file(
    files: Sequence[str],
    in_chans: int,
    transform: Callable[[Any], Any],
    infer: Callable[[list[Any]], Iterable[Any]],
    batch_size: int = 32,
    workers: int = 0,
) -> Iterator[tuple[str, Any]]:
    """Each file with what the model makes of it, or with the `ImageError` that says why it cannot be used.

    Args:
        files: paths of images of any size and kind that `read_image` reads.
        in_chans: 1 to read them in grey, 3 in RGB.
        transform: from PIL image to sample; runs in the workers.
        infer: from the samples of a batch to one result each.
        batch_size: samples in one forward pass.
        workers: processes that read images; 0 to read them in this one.
    """
    samples = _Samples(files, in_chans, transform)
    names = iter(files)
    for batch in DataLoader(samples, batch_size, num_workers=workers, collate_fn=list):
        good = [sample for sample in batch if not isinstance(sample, ImageError)]
        results = iter(infer(good) if good else ())
        for sample in batch:
            yield next(names), sample if isinstance(sample, ImageError) else next(results)


class _Samples(Dataset[Any]):
    def __init__(self, files: Sequence[str], in_chans: int, transform: Callable[[Any], Any]) -> None:
        self.files, self.in_chans, self.transform = files, in_chans, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.transform(read_image(self.files[index], self.in_chans))
        except ImageError as error:
            return error


# ---------------------------------------------------------------------------------------------------------------------
# Classification


@dataclass(frozen=True)
class ClassScore:
    """One class: its name, its index in the logits, and the softmax probability it was given."""

    name: str
    index: int
    confidence: float


@dataclass(frozen=True)
class Prediction(Outcome):
    """What became of one file: the most likely classes, best first, or the reason why it could not be classified."""

    columns = ("file", "rank", "class", "index", "confidence")
    right = (1, 3, 4)

    file: str
    classes: tuple[ClassScore, ...] = ()
    error: str | None = None

    @override
    def rows(self, exact: bool) -> list[tuple[Any, ...]]:
        return [
            (shown(self.file) if exact or rank == 1 else "", rank, score.name, score.index,
             f"{score.confidence:.6f}" if exact else f"{score.confidence:.2%}")
            for rank, score in enumerate(self.classes, start=1)
        ]  # fmt: skip


def preprocessing_of(model: nn.Module, settings: Any = None, stored: dict[str, Any] | None = None) -> Preprocessing:
    """What a classifier expects of its input.

    Args:
        model: the size that it was made for, and its ``pretrained_cfg``, count where nothing else says so.
        settings: an object whose attributes, where they are not None, come first.
        stored: metadata of the model's file, which comes second.

    Raises:
        CheckpointError: the model takes images of other than 1 or 3 channels.
    """
    known = dict(stored or getattr(model, "pretrained_cfg", None) or {})
    names = [field.name for field in fields(Preprocessing)]
    given = {name: getattr(settings, name) for name in names if getattr(settings, name, None) is not None}
    if "img_size" in given:
        given["img_size"] = to_2tuple(given["img_size"])
    if "input_size" in known:
        known["img_size"] = known.pop("input_size")[1:]
    embed = getattr(model, "patch_embed", None)
    if not stored and (own := getattr(model, "img_size", None) or getattr(embed, "img_size", None)):
        known["img_size"] = to_2tuple(own)  # timm's configuration may name another
    channels = getattr(model, "in_chans", None) or known.get("in_chans") or given.get("in_chans") or 3
    if channels not in (1, 3):
        raise CheckpointError(
            f"the model takes images of {channels} channels; image files are read with 1 (grey) or 3 (RGB)"
        )
    known["in_chans"] = given["in_chans"] = channels
    known |= {name: per_channel(known[name], channels) for name in ("mean", "std") if name in known}
    try:
        pre = Preprocessing.from_dict(known | given)
    except ValueError as error:
        raise RecipeError(f"the preprocessing that the model or the settings name is wrong: {error}") from error
    if min(pre.img_size) < (least := getattr(model, "total_stride", 1)):
        raise RecipeError(f"img_size is {'×'.join(map(str, pre.img_size))}; the model needs at least {least} a side")
    return pre


@dataclass
class Classifier(Predictor):
    """A trained classifier with what it takes to use it.

    Attributes:
        model: maps normalised images (B, C, H, W) to logits (B, classes).
        pre: resizing, cropping and normalisation.
        class_names: one a class.
        source: where the weights came from, for messages.
    """

    outcome = Prediction

    model: nn.Module
    pre: Preprocessing
    class_names: list[str]
    source: str

    @classmethod
    @override
    def from_weights(cls, weights: Weights, settings: Any = None) -> Self:
        """See `Predictor.from_weights`.

        Raises:
            CheckpointError: the network has another task, or tells no classes apart.
        """
        model, metadata, source = weights
        if weights.task != "classification":
            raise CheckpointError(f"{source} is a model for {weights.task}, not for classification")
        names = class_names(metadata.get("class_names") or [], model)
        if len(names) < 2:
            what = f"knows a single class, {names[0]}" if names else "holds a backbone without a classifier"
            raise CheckpointError(f"{source} {what}: it cannot tell classes apart")
        return cls(model, preprocessing_of(model, settings, metadata), names, source)

    @property
    def num_classes(self) -> int:
        """Size of the head."""
        return len(self.class_names)

    @torch.inference_mode()
    def confidences(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W), resized and cropped, to the probability of each class, float32 (B, classes)."""
        device = next(self.model.parameters()).device
        return self.model(self.pre.normalise(images.to(device))).float().softmax(1).cpu()

    def predict(
        self, files: Sequence[str], topk: int = 5, batch_size: int = 32, workers: int = 0
    ) -> Iterator[Prediction]:
        """Classify image files one batch after another, in order. A file that cannot be read is reported, not raised.

        Args:
            files: paths of images of any size and kind that `read_image` reads.
            topk: classes to report for each.
            batch_size: images in one forward pass.
            workers: processes that read images; 0 to read them in this one.
        """
        transform: ImageTransform = self.pre.eval_transform()
        for file, found in each_file(files, self.pre.in_chans, transform, self._scores, batch_size, workers):
            if isinstance(found, ImageError):
                yield Prediction(file, error=str(found))
                continue
            yield Prediction(file, self.best(found, topk))

    def best(self, confidences: Tensor, topk: int) -> tuple[ClassScore, ...]:
        """Of one image's confidences (classes,), the highest, best first."""
        values, indices = confidences.topk(min(topk, len(confidences)))
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        return tuple(ClassScore(self.class_names[index], index, value) for index, value in pairs)

    def _scores(self, samples: list[Tensor]) -> Tensor:
        return self.confidences(torch.stack(samples))

    @override
    def outcomes(self, files: Sequence[str], config: PredictConfig) -> Iterator[Prediction]:
        return self.predict(files, config.topk, config.batch_size, config.workers)


def class_names(stored: Sequence[str], model: nn.Module) -> list[str]:
    """One name for each output of a classifier: those stored, or else ImageNet's, or else numbers."""
    number = int(getattr(model, "num_classes", 0)) or len(stored)
    if len(stored) == number:
        return list(stored)
    if number == 1000:
        return ImageNetInfo().label_descriptions()  # type: ignore[return-value]
    return [f"class {index}" for index in range(number)]
