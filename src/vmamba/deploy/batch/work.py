"""What is done with each image, task by task: the package's predictors, and the columns that hold what they find."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from typing_extensions import override

from vmamba.data.coco import encode_masks
from vmamba.deploy.batch.config import BatchConfig
from vmamba.errors import BatchError, CheckpointError
from vmamba.tasks import parts_of
from vmamba.tasks.detector import Detector, Objects
from vmamba.tasks.inference import seen_size
from vmamba.tasks.prediction import Classifier, Weights, moved, preprocessing_of
from vmamba.tasks.segmenter import Segmenter, class_shares

_BATCH = 32  # images in one forward pass of a classifier
_DENSE_BATCH = 8  # pictures in one of segmentation and detection, on a GPU
_DENSE_PIXELS = 1 << 25  # of the pictures in it, as they are in their files: there may be a hundred masks of that size
_RUN_LENGTHS = pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])


class Work:
    """A trained network and what is done with it.

    Attributes:
        task: what the network is used for.
        source: where its weights came from.
        in_chans: channels of the images that it takes.
        batch_size: images in one forward pass, at most.
        part_size: images in one file of results, if nobody says otherwise.
        settings: those of `BatchConfig` that the results depend on, beside the ones that every task has.
        columns: of the results, beside those of every task.
    """

    task: ClassVar[str]
    part_size: ClassVar[int] = 1024
    settings: ClassVar[tuple[str, ...]] = ()
    columns: tuple[tuple[str, pa.DataType], ...]
    model: nn.Module
    source: str
    in_chans: int = 3
    batch_size: int = 1

    def sample(self, image: Image.Image) -> Any:
        """What the network is to see of a decoded image; runs in threads."""
        return image

    def kind(self, sample: Any) -> Hashable:
        """Samples of one kind can share a forward pass."""
        return None

    def is_full(self, samples: Sequence[Any], batches: int = 1) -> bool:
        """Whether samples are as many as so many forward passes take."""
        return len(samples) >= batches * self.batch_size

    def rows(self, samples: Sequence[Any]) -> list[dict[str, Any]]:
        """The results of one forward pass over samples of one kind, by column."""
        raise NotImplementedError

    def to(self, device: str) -> None:
        """Move the network."""
        moved(self.model, device)

    def about(self) -> dict[str, Any]:
        """What the results depend on, beside the weights."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of the weights and of what else the network is used with."""
        found = hashlib.sha256(json.dumps(self.about(), sort_keys=True).encode())
        for name, value in sorted(self.model.state_dict().items()):
            if isinstance(value, Tensor):
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def fits(self) -> None:
        """Try it on an image.

        Raises:
            BatchError: the network cannot be used so.
        """
        try:
            self.rows([self.sample(Image.new("RGB" if self.in_chans == 3 else "L", (64, 64)))])
        except (RuntimeError, AssertionError, ValueError, AttributeError) as error:
            raise BatchError(f"{self.source} cannot be used for {self.task} with these settings: {error}") from error


class Classification(Work):
    """The most likely classes of each image."""

    task = "classification"
    settings = ("topk",)
    columns = (
        ("label", pa.string()), ("index", pa.int32()), ("confidence", pa.float32()),
        ("scores", pa.list_(pa.struct([("label", pa.string()), ("index", pa.int32()), ("confidence", pa.float32())]))),
    )  # fmt: skip

    def __init__(self, weights: Weights, config: BatchConfig) -> None:
        self.classifier = Classifier.from_weights(weights, config)
        self.model, self.source, self.in_chans = self.classifier.model, weights.source, self.classifier.pre.in_chans
        self.batch_size, self.topk = config.batch_size or _BATCH, config.topk
        self.transform = self.classifier.pre.eval_transform()

    @override
    def sample(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    @override
    def rows(self, samples: Sequence[Tensor]) -> list[dict[str, Any]]:
        found = [self.classifier.best(each, self.topk) for each in self.classifier.confidences(torch.stack([*samples]))]
        entries = [[{"label": c.name, "index": c.index, "confidence": c.confidence} for c in each] for each in found]
        return [{**each[0], "scores": each} for each in entries]

    @override
    def about(self) -> dict[str, Any]:
        return {"class_names": self.classifier.class_names, **asdict(self.classifier.pre)}


class Features(Work):
    """The vector of each image that a classifier tells its classes apart by (timm's ``pre_logits``)."""

    task = "features"

    def __init__(self, weights: Weights, config: BatchConfig) -> None:
        model, metadata, self.source = weights
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise CheckpointError(f"{self.source}, a model for {weights.task}, has no features of a whole image")
        self.model, self.batch_size = model, config.batch_size or _BATCH
        self.pre = preprocessing_of(model, config, metadata)
        self.in_chans = self.pre.in_chans
        self.transform = self.pre.eval_transform()
        width = len(self.rows([torch.zeros(self.in_chans, *self.pre.img_size, dtype=torch.uint8)])[0]["features"])
        self.columns = (("features", pa.list_(pa.float32(), width)),)

    @override
    def sample(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    @override
    @torch.inference_mode()
    def rows(self, samples: Sequence[Tensor]) -> list[dict[str, Any]]:
        model: Any = self.model
        images = self.pre.normalise(torch.stack([*samples]).to(next(model.parameters()).device))
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        return [{"features": row} for row in features.float().flatten(1).cpu().numpy()]

    @override
    def about(self) -> dict[str, Any]:
        return asdict(self.pre)


class _Dense(Work):
    """What is done with whole pictures, uint8 (C, H, W). Those that the network sees at one size share a forward pass.

    None does with windows, of which each picture has enough.
    """

    part_size = 128

    def __init__(self, config: BatchConfig) -> None:
        self.window = config.window
        self.is_free = config.batch_size is None and config.window is None  # to choose the batch size
        self.batch_size = 1 if config.window is not None else config.batch_size or 1

    @override
    def to(self, device: str) -> None:
        super().to(device)
        if self.is_free and next(self.model.parameters()).device.type != "cpu":
            self.batch_size = _DENSE_BATCH

    @override
    def sample(self, image: Image.Image) -> Tensor:
        return pil_to_tensor(image)

    @override
    def is_full(self, samples: Sequence[Tensor], batches: int = 1) -> bool:
        pixels = sum(picture.shape[1] * picture.shape[2] for picture in samples)
        return super().is_full(samples, batches) or pixels >= batches * _DENSE_PIXELS


class Segmentation(_Dense):
    """The regions of each image: classes, their shares of its pixels, and their masks."""

    task = "segmentation"
    settings = ("window",)
    columns = (
        ("label", pa.string()), ("index", pa.int32()), ("height", pa.int32()), ("width", pa.int32()),
        ("regions", pa.list_(pa.struct([
            ("label", pa.string()), ("index", pa.int32()), ("share", pa.float32()), ("mask", _RUN_LENGTHS),
        ]))),
    )  # fmt: skip

    def __init__(self, weights: Weights, config: BatchConfig) -> None:
        super().__init__(config)
        self.segmenter = Segmenter.from_weights(weights, config)
        self.model, self.source, self.in_chans = self.segmenter.model, weights.source, self.segmenter.pre.in_chans

    @override
    def kind(self, sample: Tensor) -> Hashable:
        return seen_size(sample, self.segmenter.pre.img_size)

    @override
    def rows(self, samples: Sequence[Tensor]) -> list[dict[str, Any]]:
        if self.window is None:
            return [self._row(labels.numpy()) for labels in self.segmenter.labels_together(samples)]
        return [self._row(self.segmenter.labels(picture, self.window).numpy()) for picture in samples]

    def _row(self, labels: NDArray[np.integer]) -> dict[str, Any]:
        regions = [
            {"label": region.name, "index": region.index, "share": region.share,
             "mask": encode_masks(labels[None] == region.index)[0]}
            for region in class_shares(labels, self.segmenter.class_names)
        ]  # fmt: skip
        height, width = labels.shape
        first = {name: regions[0][name] for name in ("label", "index")}
        return {**first, "height": height, "width": width, "regions": regions}

    @override
    def about(self) -> dict[str, Any]:
        return {"class_names": self.segmenter.class_names, **asdict(self.segmenter.pre)}


class Detection(_Dense):
    """The objects in each image, best first: classes, scores, boxes in pixels, and masks where the model has them."""

    task = "detection"
    settings = ("threshold", "window")
    columns = (
        ("height", pa.int32()), ("width", pa.int32()),
        ("objects", pa.list_(pa.struct([
            ("label", pa.string()), ("index", pa.int32()), ("category_id", pa.int64()), ("score", pa.float32()),
            ("box", pa.list_(pa.float32(), 4)), ("mask", _RUN_LENGTHS),
        ]))),
    )  # fmt: skip

    def __init__(self, weights: Weights, config: BatchConfig) -> None:
        super().__init__(config)
        self.detector = Detector.from_weights(weights, config)
        self.model, self.source, self.threshold = self.detector.model, weights.source, config.threshold

    @override
    def kind(self, sample: Tensor) -> Hashable:
        return seen_size(sample, self.detector.sides, least=1)

    @override
    def rows(self, samples: Sequence[Tensor]) -> list[dict[str, Any]]:
        found = self.detector.objects_together(samples, self.threshold, self.window)
        return [self._row(picture, objects) for picture, objects in zip(samples, found, strict=True)]

    def _row(self, picture: Tensor, found: Objects) -> dict[str, Any]:
        objects = [
            {"label": o.name, "index": o.index, "category_id": o.category_id, "score": o.score,
             "box": np.array(o.box, np.float32), "mask": o.mask}
            for o in found.objects
        ]  # fmt: skip
        return {"height": picture.shape[1], "width": picture.shape[2], "objects": objects}

    @override
    def about(self) -> dict[str, Any]:
        detector = self.detector
        names = {"class_names": detector.class_names, "category_ids": detector.category_ids}
        return {**names, "sides": detector.sides}


_WORKS: dict[str, type[Work]] = {kind.task: kind for kind in (Classification, Features, Segmentation, Detection)}


def work_for(weights: Weights, config: BatchConfig) -> Work:
    """What the settings ask for, tried on an image.

    Raises:
        CheckpointError: the network was trained for something else.
        BatchError: it cannot be used so.
        RecipeError: there is no such task; a setting is wrong.
        ImportError: masks need another package.
    """
    task = config.task or weights.task
    if task not in _WORKS:
        parts_of(task)
    kind: Any = _WORKS[task]
    work: Work = kind(weights, config)
    if kind in (Segmentation, Detection):
        encode_masks(np.ones((1, 1, 1), bool))  # if its package is missing, it is missing now
    work.fits()
    return work
