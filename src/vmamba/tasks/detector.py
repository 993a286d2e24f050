"""Using a trained model for detection and instance segmentation: on files for ``vmamba predict``, and from Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from typing_extensions import override

from vmamba.data.coco import encode_masks
from vmamba.data.images import any_image
from vmamba.errors import CheckpointError, ImageError, RecipeError
from vmamba.files import shown
from vmamba.models import boxes as bx
from vmamba.models.class_names import COCO, COCO_CATEGORY_IDS
from vmamba.models.detection import Detections, MaskRCNN
from vmamba.models.registry import ENTRIES
from vmamba.tasks import overlays
from vmamba.tasks.inference import PUBLISHED_SIDES, detect
from vmamba.tasks.prediction import Outcome, Predictor, Weights, class_names, each_file
from vmamba.tasks.recipe import LEAST, PredictConfig
from vmamba.tasks.segmenter import output_names, window_starts


@dataclass(frozen=True)
class DetectedObject:
    """One object.

    Attributes:
        name: of its class.
        index: of its class among the model's, from 0.
        category_id: of its class in the data that the model learned from.
        score: from 0 to 1.
        box: left, top, right and bottom edge in pixels.
        mask: COCO's compressed run lengths, {"size": [height, width], "counts": text}; None of a model without masks.
    """

    name: str
    index: int
    category_id: int
    score: float
    box: tuple[float, float, float, float]
    mask: dict[str, Any] | None = None

    def to_coco(self, image_id: Any) -> dict[str, Any]:
        """The object as an entry of COCO's results: the box is left, top, width and height."""
        left, top, right, bottom = self.box
        entry = {
            "image_id": image_id, "category_id": self.category_id,
            "bbox": [left, top, right - left, bottom - top], "score": self.score,
        }  # fmt: skip
        return entry if self.mask is None else entry | {"segmentation": self.mask}


@dataclass(frozen=True)
class DetectedFile(Outcome):
    """What became of one file: the objects found, best first, and the picture written; or what went wrong."""

    columns = ("file", "class", "score", "left", "top", "right", "bottom", "overlay")
    right = (2, 3, 4, 5, 6)

    file: str
    objects: tuple[DetectedObject, ...] = ()
    overlay: str | None = None
    error: str | None = None

    @override
    def rows(self, exact: bool) -> list[tuple[Any, ...]]:
        overlay = shown(self.overlay or "")
        if not self.objects and self.error is None and not exact:
            return [(shown(self.file), "nothing found", "", "", "", "", "", overlay)]
        return [
            (shown(self.file) if exact or place == 0 else "", found.name,
             f"{found.score:.6f}" if exact else f"{found.score:.1%}",
             *(f"{edge:.{2 if exact else 0}f}" for edge in found.box), overlay if exact or place == 0 else "")
            for place, found in enumerate(self.objects)
        ]  # fmt: skip

    @override
    def records(self) -> list[dict[str, Any]]:
        """Entries of COCO's results, with the class's name and the file besides.

        As of COCO's own pictures, the image's id is the number that the file is called; else the file's name.
        """
        stem = Path(self.file).stem
        image_id = int(stem) if stem.isascii() and stem.isdigit() else shown(stem)
        about = {"file": shown(self.file)}
        return [about | found.to_coco(image_id) | {"class": found.name} for found in self.objects]


@dataclass(frozen=True)
class Objects:
    """The objects that were found in a picture, best first.

    Attributes:
        boxes: float32 (n, 4), x and y of two corners in pixels.
        scores: float32 (n,).
        labels: int64 (n,), indices into ``class_names``.
        masks: bool (n, H, W); None of a model without masks.
        class_names, category_ids: one a class.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_] | None
    class_names: Sequence[str]
    category_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def objects(self) -> tuple[DetectedObject, ...]:
        """The same one by one, with masks as run lengths."""
        masks = [None] * len(self) if self.masks is None else encode_masks(self.masks)
        rows = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), masks, strict=True)
        return tuple(
            DetectedObject(self.class_names[i], i, self.category_ids[i], score, tuple(box), mask)
            for i, score, box, mask in rows
        )


@dataclass(frozen=True)
class FoundObjects(Objects):
    """The same with the picture, RGB."""

    picture: Image.Image

    def overlay(self) -> Image.Image:
        """The picture with boxes, names, scores, masks and a legend, at a size that is good to look at."""
        image = drawn(self.picture, self.boxes, self.labels, self.masks, self.class_names, self.scores)
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        colours = overlays.palette(len(self.class_names))
        return overlays.with_legend(
            image, [overlays.Entry(colours[i], self.class_names[i], str(counts[i])) for i in order]
        )


def drawn(
    picture: Image.Image,
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: NDArray[np.bool_] | None,
    names: Sequence[str],
    scores: NDArray[np.float32] | None = None,
) -> Image.Image:
    """A picture with objects, without a legend; see `FoundObjects`. Without scores they are the true ones."""
    colours = overlays.palette(len(names))
    texts = [overlays.name_of(names[label]) for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}" for text, score in zip(texts, scores, strict=True)]
    return overlays.boxed(overlays.easel(picture), picture.size, boxes, [colours[i] for i in labels], texts, masks)


@dataclass
class Detector(Predictor):
    """A trained network for detection or instance segmentation with what it takes to use it.

    Attributes:
        model: `MaskRCNN`, with or without masks.
        sides: the short and the long side that pictures are fitted into.
        class_names: one a class.
        category_ids: of each class, its id in the data that the model learned from.
        source: where the weights came from, for messages.
        named: whether the class names are known, not made up.
    """

    outcome = DetectedFile

    model: MaskRCNN
    sides: tuple[int, int]
    class_names: list[str]
    category_ids: list[int]
    source: str
    named: bool = True

    @classmethod
    @override
    def from_weights(cls, weights: Weights, settings: Any = None) -> Self:
        """See `Predictor.from_weights`; ``img_size`` is the short side, or the short and the long one.

        Raises:
            CheckpointError: the network has another task, or takes other pictures than RGB.
        """
        model, metadata, source = weights
        if not isinstance(model, MaskRCNN):
            raise CheckpointError(f"{source} is a model for {weights.task}, not for detection")
        if model.in_chans != 3:
            raise CheckpointError(f"the model takes images of {model.in_chans} channels; pictures are read in RGB")
        known = list(metadata.get("class_names") or model.class_names or [])
        names = class_names(known, model)
        of_coco = COCO_CATEGORY_IDS if tuple(names) == COCO else range(1, len(names) + 1)
        ids = metadata.get("category_ids") or of_coco
        sides = fitted_sides(getattr(settings, "img_size", None) or metadata.get("sides") or sides_of(model))
        return cls(model, sides, names, list(ids), source, bool(known))

    @torch.inference_mode()
    def objects_together(
        self, pictures: Sequence[Tensor], threshold: float = 0.3, window: int | None = None
    ) -> Iterator[Objects]:
        """The objects in several pictures, one after another, with one forward pass for all whole pictures.

        Args:
            pictures: uint8 (3, H, W), RGB. Where they are not of one size once they are fitted into `sides`, what the
                smaller ones are filled up with has a say in what is found.
            threshold, window: see `detect`.
        """
        if window is not None and window < LEAST:
            raise RecipeError(f"windows of {window} pixels are too small: give {LEAST} or more")
        pictures = [picture.to(next(self.model.parameters()).device) for picture in pictures]
        found = detect(self.model, pictures, self.sides, least_score=threshold)
        for picture, whole in zip(pictures, found, strict=True):
            each = whole if window is None else _with_windows(self.model, picture, window, whole, threshold)
            parts: dict[str, Any] = {name: values.cpu().numpy() for name, values in each.items()}
            yield Objects(**{"masks": None, **parts}, class_names=self.class_names, category_ids=self.category_ids)

    def detect(
        self,
        image: str | os.PathLike[str] | Image.Image | NDArray[np.uint8],
        threshold: float = 0.3,
        window: int | None = None,
    ) -> FoundObjects:
        """Find objects in one picture.

        Args:
            image: see `any_image`.
            threshold: objects with a lower score are left out.
            window: side of overlapping squares that are looked at besides the whole picture, at its own size, so that
                nothing small in a large picture is lost.

        Raises:
            ImageError: the file cannot be used.
            RecipeError: the window is too small.
            TypeError: an array of another dtype or shape.
        """
        return self._found(pil_to_tensor(any_image(image)), threshold, window)

    def _found(self, picture: Tensor, threshold: float, window: int | None) -> FoundObjects:
        (objects,) = self.objects_together([picture], threshold, window)
        return FoundObjects(**vars(objects), picture=to_pil_image(picture))

    @override
    def outcomes(self, files: Sequence[str], config: PredictConfig) -> Iterator[DetectedFile]:
        """See `Predictor.outcomes`; writes ``overlays/NAME.png`` into ``config.pictures``."""
        names = iter(output_names(files))

        def infer(samples: list[Tensor]) -> list[FoundObjects]:
            return [self._found(sample, config.threshold, config.window) for sample in samples]

        # One at a time: what a smaller picture is filled up with would have a say in what is found.
        for file, found in each_file(files, 3, pil_to_tensor, infer, 1, config.workers):
            path = Path(config.pictures) / "overlays" / next(names)
            if isinstance(found, ImageError):
                yield DetectedFile(file, error=str(found))
                continue
            overlays.save(found.overlay(), path)
            yield DetectedFile(file, found.objects, str(path))


def sides_of(model: MaskRCNN) -> tuple[int, int]:
    """The short and the long side that a detector's pictures are fitted into, as it says itself."""
    # By default it names the size that the published costs are for.
    return PUBLISHED_SIDES if model.img_size == ENTRIES["maskrcnn"].img_size else fitted_sides(model.img_size)


def fitted_sides(img_size: int | Sequence[int] | None) -> tuple[int, int]:
    """The short and the long side that pictures are fitted into; one alone is the short one."""
    if img_size is None:
        return PUBLISHED_SIDES
    if isinstance(img_size, int):
        return img_size, round(img_size * PUBLISHED_SIDES[1] / PUBLISHED_SIDES[0])
    return min(img_size), max(img_size)


def _with_windows(model: MaskRCNN, picture: Tensor, window: int, whole: Detections, least_score: float) -> Detections:
    """What was found in a whole picture, and in overlapping windows of it that no object is cut off by."""
    _, height, width = picture.shape
    found, corners = [whole], [(0, 0)]
    for top in window_starts(height, window):
        for left in window_starts(width, window):
            part = picture[:, top : top + window, left : left + window]
            rows, columns = part.shape[1:]
            here = detect(model, [part], (min(rows, columns), max(rows, columns)), least_score=least_score)[0]
            edges = here["boxes"].new_tensor([
                *(1 if start > 0 else -1 for start in (left, top)),
                *(size - 1 if end < most else size + 1
                  for size, end, most in ((columns, left + columns, width), (rows, top + rows, height))),
            ])  # fmt: skip
            kept = (here["boxes"][:, :2] > edges[:2]).all(1) & (here["boxes"][:, 2:] < edges[2:]).all(1)
            here = {name: values[kept] for name, values in here.items()}
            here["boxes"] = here["boxes"] + here["boxes"].new_tensor([left, top, left, top])
            found.append(here)
            corners.append((left, top))
    together = {name: torch.cat([each[name] for each in found]) for name in whole if name != "masks"}
    kept = bx.suppress(together["boxes"], together["scores"], together["labels"], model.nms_iou)[: model.max_per_img]
    result = {name: values[kept] for name, values in together.items()}
    if "masks" in whole:  # as large as the picture only now: there may be many windows
        places = [(mask, *corner) for each, corner in zip(found, corners, strict=True) for mask in each["masks"]]
        result["masks"] = whole["masks"].new_zeros(len(kept), height, width)
        for pasted, index in zip(result["masks"], kept.tolist(), strict=True):
            mask, left, top = places[index]
            pasted[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return result
