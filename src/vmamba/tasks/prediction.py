"""Classifying image files with a trained model: what ``vmamba predict`` does, and what Python code can use."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vmamba.data.config import DataConfig
from vmamba.data.images import read_image
from vmamba.data.transforms import Preprocessing
from vmamba.errors import CheckpointError, ImageError
from vmamba.models.checkpoints import load_checkpoint, load_model
from vmamba.tasks.runs import LATEST, RunFolder


@dataclass(frozen=True)
class Prediction:
    """What became of one file: the most likely classes, best first, or the reason why it could not be classified."""

    file: str
    classes: tuple[ClassScore, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class ClassScore:
    """One class: its name, its index in the logits, and the softmax probability it was given."""

    name: str
    index: int
    confidence: float


def preprocessing_of(model: nn.Module, data: DataConfig, stored: dict[str, Any] | None = None) -> Preprocessing:
    """What a model expects of its input: stored metadata or else its ``pretrained_cfg``, overridden by ``data``."""
    known = dict(stored or getattr(model, "pretrained_cfg", None) or {})
    given = {
        field.name: getattr(data, field.name)
        for field in dataclasses.fields(Preprocessing)
        if getattr(data, field.name) is not None
    }
    if isinstance(given.get("img_size"), int):
        given["img_size"] = (given["img_size"],) * 2
    if "input_size" in known:
        known["img_size"] = known.pop("input_size")[1:]
    known["in_chans"] = given["in_chans"] = getattr(model, "in_chans", None) or data.in_chans or 3
    for name in ("mean", "std"):  # a model for RGB that was given one grey channel
        if name not in given and len(known.get(name, ())) == 3 and known["in_chans"] == 1:
            known[name] = (sum(known[name]) / 3,)
    return Preprocessing.from_dict(known | given)


@dataclass
class Classifier:
    """A trained network with what it takes to use it.

    Attributes:
        model: maps normalised images (B, C, H, W) to logits (B, classes).
        pre: resizing, cropping and normalisation.
        class_names: one a class.
        source: where the weights came from, for messages.
    """

    model: nn.Module
    pre: Preprocessing
    class_names: list[str]
    source: str

    @classmethod
    def load(
        cls, checkpoint: str | None = None, name: str | None = None, ema: bool = False, data: DataConfig | None = None
    ) -> Classifier:
        """From a file, from published weights, or from the newest run.

        Args:
            checkpoint: any file that `vmamba.load_checkpoint` reads.
            name: with no checkpoint: a model whose published weights are downloaded. With neither, the model of
                runs/latest is taken.
            ema: of a file that holds both, take the averaged weights.
            data: settings that replace what the file says of preprocessing.

        Raises:
            CheckpointError: there is no such file, or it holds no classifier.
        """
        data = data or DataConfig()
        if checkpoint is None and name is not None:
            model = timm.create_model(name, pretrained=True)
            return cls(model.eval(), preprocessing_of(model, data), _names([], model), f"{name}, published weights")
        if checkpoint is None:
            checkpoint = str(RunFolder(LATEST).model)
            if not os.path.exists(checkpoint):
                raise CheckpointError(
                    f"no checkpoint was named and {checkpoint} does not exist: train a model first, name a file with "
                    f"--checkpoint, or take published weights with --pretrained NAME"
                )
        model, metadata = load_model(checkpoint)
        if ema:
            load_checkpoint(model, checkpoint, ema=True)
        names = _names(metadata.get("class_names") or [], model)
        if not names:
            raise CheckpointError(f"{checkpoint} holds a backbone without a classifier: it cannot tell classes apart")
        return cls(model.eval(), preprocessing_of(model, data, metadata), names, checkpoint)

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
        loader: DataLoader[Any] = DataLoader(_Files(files, self.pre), batch_size, num_workers=workers, collate_fn=list)
        done = 0
        for batch in loader:
            good = [item for item in batch if isinstance(item, Tensor)]
            scores = iter(self.confidences(torch.stack(good))) if good else iter(())
            for file, item in zip(files[done : done + len(batch)], batch, strict=True):
                yield (
                    self._prediction(file, next(scores), topk)
                    if isinstance(item, Tensor)
                    else Prediction(file, error=item)
                )
            done += len(batch)

    def _prediction(self, file: str, scores: Tensor, topk: int) -> Prediction:
        confidences, indices = scores.topk(min(topk, len(scores)))
        pairs = zip(indices.tolist(), confidences.tolist(), strict=True)
        return Prediction(file, tuple(ClassScore(self.class_names[index], index, value) for index, value in pairs))


class _Files(Dataset[Any]):
    """uint8 images (C, H, W), or a text that says what is wrong with the file."""

    def __init__(self, files: Sequence[str], pre: Preprocessing) -> None:
        self.files, self.pre, self.transform = files, pre, pre.eval_transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.transform(read_image(self.files[index], self.pre.in_chans))
        except ImageError as error:
            return str(error)


def _names(stored: Sequence[str], model: nn.Module) -> list[str]:
    number = int(getattr(model, "num_classes", 0)) or len(stored)
    if len(stored) == number:
        return list(stored)
    if number == 1000:
        return ImageNetInfo().label_descriptions()  # type: ignore[return-value]
    return [f"class {index}" for index in range(number)]


def default_device() -> torch.device:
    """The first accelerator that torch finds, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")
