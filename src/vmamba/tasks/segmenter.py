"""Using a trained model for semantic segmentation: on files for ``vmamba predict``, and from Python."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from typing_extensions import override

from vmamba.data.images import any_image
from vmamba.data.transforms import Preprocessing, resize_bilinear_uint8
from vmamba.errors import CheckpointError, ImageError, RecipeError
from vmamba.files import shown
from vmamba.models.segmentation import UPerNet, resized
from vmamba.tasks import overlays
from vmamba.tasks.inference import seen_size
from vmamba.tasks.prediction import Outcome, Predictor, Weights, class_names, each_file, preprocessing_of
from vmamba.tasks.recipe import LEAST, PredictConfig

_CHUNK = 16  # classes whose logits are enlarged at once


@dataclass(frozen=True)
class ClassShare:
    """One class: its name, its index in the mask, and its share of the picture's pixels."""

    name: str
    index: int
    share: float


@dataclass(frozen=True)
class SegmentedFile(Outcome):
    """What became of one file: the classes found, the largest first, and the pictures written; or what went wrong."""

    columns = ("file", "class", "index", "share", "overlay", "mask")
    right = (2, 3)

    file: str
    classes: tuple[ClassShare, ...] = ()
    overlay: str | None = None
    mask: str | None = None
    error: str | None = None

    @override
    def rows(self, exact: bool) -> list[tuple[Any, ...]]:
        file, overlay, mask = (shown(text or "") for text in (self.file, self.overlay, self.mask))
        digits = ".6f" if exact else ".2%"
        lines = [(file, found.name, found.index, f"{found.share:{digits}}", overlay, mask) for found in self.classes]
        return lines if exact else [*lines[:1], *(("", *line[1:4], "", "") for line in lines[1:])]


@dataclass(frozen=True)
class Segmentation:
    """A picture with the class of each of its pixels.

    Attributes:
        picture: RGB.
        labels: integers (H, W), indices into ``class_names``.
        class_names: one a class.
    """

    picture: Image.Image
    labels: NDArray[np.integer]
    class_names: Sequence[str]

    @property
    def shares(self) -> tuple[ClassShare, ...]:
        """The classes that are there, the largest first."""
        return class_shares(self.labels, self.class_names)

    def overlay(self) -> Image.Image:
        """The picture with tinted regions, outlines and a legend, at a size that is good to look at."""
        colours = overlays.palette(len(self.class_names))
        image = overlays.painted(overlays.easel(self.picture), self.labels, colours)
        overlays.named(image, self.labels, self.class_names)
        entries = [overlays.Entry(colours[c.index], c.name, f"{c.share:.1%}") for c in self.shares]
        return overlays.with_legend(image, entries)

    def mask(self) -> Image.Image:
        """The labels as a grey picture of 8 bits, or of 16 where there are more than 256 classes."""
        deep = len(self.class_names) > 256
        return Image.fromarray(self.labels.astype(np.uint16 if deep else np.uint8))


@dataclass
class Segmenter(Predictor):
    """A trained network for semantic segmentation with what it takes to use it.

    Attributes:
        model: maps normalised images (B, C, H, W) to logits (B, classes, H, W).
        pre: the short and long side that pictures are fitted into (`Preprocessing.img_size`), and normalisation.
        class_names: one a class.
        source: where the weights came from, for messages.
    """

    outcome = SegmentedFile

    model: UPerNet
    pre: Preprocessing
    class_names: list[str]
    source: str

    @classmethod
    @override
    def from_weights(cls, weights: Weights, settings: Any = None) -> Self:
        """See `Predictor.from_weights`; ``img_size`` is the short side, or the short and the long one.

        Raises:
            CheckpointError: the network has another task.
        """
        model, metadata, source = weights
        if not isinstance(model, UPerNet):
            raise CheckpointError(f"{source} is a model for {weights.task}, not for segmentation")
        pre = segmentation_preprocessing(model, settings, metadata)
        return cls(model, pre, class_names(metadata.get("class_names") or model.class_names or [], model), source)

    @torch.inference_mode()
    def labels(self, picture: Tensor, window: int | None = None) -> Tensor:
        """The class of each pixel.

        Args:
            picture: uint8 (C, H, W), of any size.
            window: side of the squares that a large picture is taken apart into, at its own size, so that nothing small
                is lost; they overlap by a third, and their logits are added. None for the whole picture, fitted into
                what the model was tested at.

        Returns:
            int64 (H, W), on the CPU.

        Raises:
            RecipeError: the window is too small.
        """
        if window is not None and window < LEAST:
            raise RecipeError(f"windows of {window} pixels are too small: the model needs {LEAST} or more")
        if window is not None and min(picture.shape[1:]) >= LEAST:
            return _by_window(self.model, self.pre, picture.to(next(self.model.parameters()).device), window).cpu()
        return next(self.labels_together([picture]))

    @torch.inference_mode()
    def labels_together(self, pictures: Sequence[Tensor]) -> Iterator[Tensor]:
        """`labels` of several whole pictures, one after another, in one forward pass.

        Args:
            pictures: which the network sees at one size, see `vmamba.tasks.inference.seen_size`.
        """
        device = next(self.model.parameters()).device
        logits = network_logits(self.model, self.pre, [picture.to(device) for picture in pictures])
        for place, picture in enumerate(pictures):
            yield best_classes(logits[place : place + 1], picture.shape[1:]).cpu()

    def segment(
        self, image: str | os.PathLike[str] | Image.Image | NDArray[np.uint8], window: int | None = None
    ) -> Segmentation:
        """Segment one picture.

        Args:
            image: see `any_image`.
            window: see `labels`.

        Raises:
            ImageError: the file cannot be used.
            TypeError: an array of another dtype or shape.
        """
        return self._found(pil_to_tensor(any_image(image, self.pre.in_chans)), window)

    def _found(self, picture: Tensor, window: int | None) -> Segmentation:
        labels = self.labels(picture, window).numpy()
        return Segmentation(to_pil_image(picture).convert("RGB"), labels, self.class_names)

    @override
    def outcomes(self, files: Sequence[str], config: PredictConfig) -> Iterator[SegmentedFile]:
        """See `Predictor.outcomes`; writes ``overlays/NAME.png`` and ``masks/NAME.png`` into ``config.pictures``."""

        def infer(samples: list[Tensor]) -> list[Segmentation]:
            return [self._found(sample, config.window) for sample in samples]

        # One at a time: pictures of different sizes share no forward pass, and may be large.
        results = each_file(files, self.pre.in_chans, pil_to_tensor, infer, 1, config.workers)
        for (file, found), name in zip(results, output_names(files), strict=True):
            if isinstance(found, ImageError):
                yield SegmentedFile(file, error=str(found))
                continue
            paths = [Path(config.pictures, kind, name) for kind in ("overlays", "masks")]
            overlays.save(found.overlay(), paths[0])
            overlays.save(found.mask(), paths[1])
            yield SegmentedFile(file, found.shares, *map(str, paths))


def segmentation_preprocessing(
    model: UPerNet, settings: Any = None, stored: dict[str, Any] | None = None
) -> Preprocessing:
    """`preprocessing_of` with an ``img_size`` of two sides, into the shorter and longer of which pictures are fitted.

    One side alone is the short one; the long one is four times that, as in the published test.
    """
    side = getattr(settings, "img_size", None)
    pre = preprocessing_of(model, settings, stored)
    return Preprocessing(**{**vars(pre), "img_size": (side, 4 * side)}) if isinstance(side, int) else pre


def class_shares(labels: NDArray[np.integer], class_names: Sequence[str]) -> tuple[ClassShare, ...]:
    """The classes that are among the labels of a picture, the largest first."""
    counts = np.bincount(labels.ravel())
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    return tuple(ClassShare(class_names[i], i, float(counts[i] / labels.size)) for i in order)


def network_logits(model: torch.nn.Module, pre: Preprocessing, pictures: Sequence[Tensor]) -> Tensor:
    """Whole pictures, uint8 (C, H, W), that are seen at one size, to float32 logits (B, classes, h, w) of that size."""
    seen = torch.stack([resize_bilinear_uint8(picture, seen_size(picture, pre.img_size)) for picture in pictures])
    logits: Tensor = model(pre.normalise(seen))
    return logits.float()


def best_classes(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The class with the highest logit at each pixel of a larger or smaller picture, without holding all its logits.

    Args:
        logits: (1, classes, h, w).
        size: height and width of the picture.

    Returns:
        int64 (H, W): ``resized(logits, size)[0].argmax(0)``.
    """
    best = torch.full(tuple(size), -torch.inf, device=logits.device)
    classes = torch.zeros(tuple(size), dtype=torch.int64, device=logits.device)
    for first in range(0, logits.shape[1], _CHUNK):
        value, index = resized(logits[:, first : first + _CHUNK], size)[0].max(0)
        better = value > best
        best, classes = torch.where(better, value, best), torch.where(better, index + first, classes)
    return classes


def _by_window(model: UPerNet, pre: Preprocessing, picture: Tensor, window: int) -> Tensor:
    """The classes by overlapping windows, one row of them after another, so that only one row's logits are held."""
    _, height, width = picture.shape
    labels = torch.empty(height, width, dtype=torch.int64, device=picture.device)
    carried = torch.zeros(model.num_classes, 0, width, device=picture.device)
    lefts = window_starts(width, window)
    for top, following in pairwise([*window_starts(height, window), height]):
        strip = picture[:, top : top + window]
        logits = torch.zeros(model.num_classes, strip.shape[1], width, device=picture.device)
        logits[:, : carried.shape[1]] = carried
        for left in lefts:
            part = pre.normalise(strip[None, :, :, left : left + window])
            logits[:, :, left : left + window] += model(part)[0].float()
        labels[top:following] = logits[:, : following - top].argmax(0)
        carried = logits[:, following - top :]
    return labels


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin that overlap by a third or more and cover the length, the last one ending with it."""
    last = max(length - window, 0)
    return [*range(0, last, max(window * 2 // 3, 1)), last]


def output_names(files: Sequence[str]) -> list[str]:
    """A name ending in .png for each file: its path below what all have in common.

    The file's own ending stays in it where two differ in nothing else.
    """
    places = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(place) for place in places]) if places else ""
    inside = [os.path.relpath(place, common) for place in places]
    times = Counter(os.path.splitext(name)[0] for name in inside)
    return [f"{stem if times[stem := os.path.splitext(name)[0]] == 1 else name}.png" for name in inside]
