"""Object detection and instance segmentation: what is special to them. What all tasks share is in `task`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from typing_extensions import override

from vmamba.data.coco import ObjectDataset, decode_mask, encode_masks, open_objects
from vmamba.data.loading import EpochLoader, Samples
from vmamba.data.sources import check_all
from vmamba.data.transforms import Preprocessing, detection_transform
from vmamba.errors import DataError, RecipeError, needing
from vmamba.files import shown
from vmamba.models.detection import Losses, MaskRCNN, Target
from vmamba.tasks import overlays
from vmamba.tasks.detection_recipe import DetectionDataConfig, DetectionTrainConfig, DetectionValidateConfig
from vmamba.tasks.detector import Detector, drawn, fitted_sides
from vmamba.tasks.inference import detect, padded
from vmamba.tasks.prediction import Weights
from vmamba.tasks.runs import BARS_OF, SAMPLES, report
from vmamba.tasks.task import LOSS, Score, Task, build_model, class_table, rounded
from vmamba.tasks.training import is_first_process

# COCO's twelve numbers, in its order: average precision over overlaps of 0.50 to 0.95, at two overlaps, and of small
# (up to 32² pixels), medium and large objects (from 96²); average recall with 1, 10 and 100 detections a picture.
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
           "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # fmt: skip
_KINDS = {"box": "bbox", "mask": "segm"}
_SHOWN, _SURE = 6, 0.3  # pictures in samples.png, and the lowest score there
_LAYOUTS = (
    ("annotations/instances_{}2017.json", "{}2017"),
    ("annotations/instances_{}.json", "{}"),
    ("{}.json", "images"),
)


class DetectionTask(Task):
    """A detector, how it learns, and how it is judged. With masks it segments instances.

    Args:
        model: see `MaskRCNN`.
        sides: the short and the long side that pictures are fitted into when it is judged.
        data: how pictures are fed.
        val: the validation split.
        train: the training split; None for a task that is only validated.
        recipe: how the network learns; likewise.
    """

    name = "detection"
    score = Score("box_AP", "box AP")
    model: MaskRCNN

    def __init__(
        self,
        model: MaskRCNN,
        sides: tuple[int, int],
        data: DetectionDataConfig,
        val: ObjectDataset,
        train: ObjectDataset | None = None,
        recipe: DetectionTrainConfig | None = None,
    ) -> None:
        super().__init__(model, recipe)
        self.sides, self.data, self.val, self.train_split = sides, data, val, train
        self.pre = Preprocessing.from_dict(dict(model.pretrained_cfg))
        self.has_masks = model.roi_head.mask_head is not None
        self.kinds = ["box", "mask"] if self.has_masks and val.has_masks else ["box"]
        if self.has_masks and not val.has_masks and is_first_process():
            report(f"{val.where}: {val.maskless}: the model's masks are not measured")
        if recipe is not None:
            self.transform = detection_transform(recipe.augment, self.pre)

    @classmethod
    @override
    def from_recipe(cls, recipe: DetectionTrainConfig) -> Self:
        data = recipe.data
        train = _opened(data, training=True)
        val = _opened(data, training=False, class_names=train.class_names)
        masks = train.has_masks if data.masks is None else data.masks
        if masks and not train.has_masks:
            raise DataError(f"data.masks asks for masks, but in {train.where} {train.maskless}")
        if data.masks is None and train.some_masks and is_first_process():
            report(f"{train.where}: {train.maskless}: boxes alone are learned")
        model = build_model(recipe.model, recipe.seed, num_classes=len(train.class_names), masks=masks)
        if not isinstance(model, MaskRCNN):
            raise RecipeError(f"{recipe.model.name} is no detector: choose maskrcnn, or maskrcnn_ and a variant's name")
        return cls(model, fitted_sides(data.img_size), data, val, train, recipe)

    @classmethod
    @override
    def from_weights(cls, config: DetectionValidateConfig, weights: Weights) -> Self:
        detector = Detector.from_weights(weights, config.data)
        val = _opened(config.data, training=False, class_names=detector.class_names if detector.named else None)
        if len(val.class_names) != detector.model.num_classes:
            number = detector.model.num_classes
            raise DataError(f"{val.where} has {len(val.class_names)} classes, but {detector.source} has {number}")
        return cls(detector.model, detector.sides, config.data, val)

    @override
    def loader(self, training: bool) -> EpochLoader:
        seed = self.recipe.seed if self.recipe else 0
        batch = self.data.batch_size if training else self.data.val_batch_size
        items: TrainingPictures | WholePictures = WholePictures(self.val)
        upright = None
        if training:
            items = TrainingPictures(self.train_split, self.transform)
            upright = items.upright()  # a batch is as high as its highest picture and as wide as its widest
        return EpochLoader(
            Samples(items, seed), batch, training, self.data.workers, seed, collate=list, groups=upright, **self.place
        )

    @override
    def loss(self, batch: list[tuple[Tensor, Target]]) -> Losses:
        """Of uint8 pictures (3, H, W) of any sizes, and their objects; see `MaskRCNN` for both."""
        images, sizes = padded([picture for picture, _ in batch], self.pre)
        losses: Losses = self.model(images, [target for _, target in batch], sizes=sizes)
        if (head := self.model.roi_head.mask_head) is not None and "mask" not in losses:
            # No object is left in these pictures: but several devices wait for the same losses and gradients.
            losses["mask"] = 0 * torch.stack([parameter.sum() for parameter in head.parameters()]).sum()
        return losses

    # --- validation

    @override
    def on_validation_epoch_start(self) -> None:
        self.entries: list[dict[str, Any]] = []  # COCO's results of this process; later, in the first one, of all

    @override
    def judge(self, batch: list[tuple[Tensor, int]]) -> None:
        """Whole pictures, uint8 (3, H, W), with their numbers; -1 where one only fills up the batch."""
        known = [(picture, number) for picture, number in batch if number >= 0]
        # Where none counts, one is looked at all the same: the devices of a network in shards compute together.
        shown = known or batch[:1]
        found = detect(self.network, [picture for picture, _ in shown], self.sides)  # type: ignore[arg-type]
        for (_, number), objects in zip(known, found, strict=False):
            self.entries += self._entries(number, {name: values.cpu() for name, values in objects.items()})

    def _entries(self, number: int, found: Target) -> list[dict[str, Any]]:
        """COCO's results of one picture."""
        image_id = self.val.pictures[number]["id"]
        boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
        entries = [
            {"image_id": image_id, "category_id": self.val.category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(
                found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), strict=True
            )
        ]
        if "mask" in self.kinds:
            for entry, mask in zip(entries, encode_masks(found["masks"].numpy()), strict=True):
                entry["segmentation"] = mask
        return entries

    @override
    def results(self) -> dict[str, float]:
        first, world = self.trainer.is_global_zero, self.trainer.world_size
        if world > 1:
            parts: list[Any] | None = [None] * world if first else None
            torch.distributed.gather_object(self.entries, parts)
            self.entries = [entry for part in parts for entry in part] if parts else []
        measured = {kind: evaluate(self.val, self.entries, kind) for kind in self.kinds} if first else {}
        self.measured: dict[str, Measured] = self.trainer.strategy.broadcast(measured)
        return {
            f"{kind}_{name}": float(value)
            for kind, found in self.measured.items()
            for name, value in zip(NUMBERS[:3], found.numbers, strict=False)
        }

    @override
    def details(self) -> dict[str, Any]:
        aps = {f"{kind}_AP": [*map(rounded, found.per_class)] for kind, found in self.measured.items()}
        classes = zip(self.val.class_names, self._counts(), *aps.values(), strict=True)
        return {
            "images": len(self.val),
            "data": self.val.where,
            **{
                kind: dict(zip(NUMBERS, map(rounded, found.numbers), strict=True))
                for kind, found in self.measured.items()
            },
            "per_class": {name: dict(zip(("objects", *aps), values, strict=True)) for name, *values in classes},
        }

    def _counts(self) -> list[int]:
        """How many objects of each class the validation split has, crowds apart."""
        known = Counter(a["category_id"] for a in self.val.ground_truth()["annotations"] if not a["iscrowd"])
        return [known[category] for category in self.val.category_ids]

    @override
    def summary(self, results: dict[str, Any]) -> str:
        totals = [
            ", ".join(f"{kind} {name} {results[f'{kind}_{name}']:.2%}" for name in NUMBERS[:3]) for kind in self.kinds
        ]
        table = class_table(results["per_class"], ("objects", *(f"{kind} AP" for kind in self.kinds)))
        return "\n".join([f"{results['images']} images: {'; '.join(totals)}", "", *table])

    @override
    def show(self, folder: Path) -> None:
        overlays.save(self._sheet(), folder / SAMPLES)
        colours, names = overlays.palette(len(self.val.class_names)), self.val.class_names
        for kind, found in self.measured.items():
            order = [i for i in np.argsort(-found.per_class, kind="stable") if found.per_class[i] >= 0]
            bars = [overlays.Entry(colours[i], names[i], f"{found.per_class[i]:.1%}") for i in order]
            title = f"{kind} AP of {len(order)} classes, mean {found.numbers[0]:.2%}"
            values = [float(found.per_class[i]) for i in order]
            overlays.save(overlays.bars(bars, values, title), folder / BARS_OF[kind])

    def _sheet(self) -> Image.Image:
        """Some pictures with their true objects and those found."""
        label = {category: i for i, category in enumerate(self.val.category_ids)}
        cells, present = list[Image.Image](), set[int]()
        for index in torch.randperm(len(self.val), generator=torch.Generator().manual_seed(0))[:_SHOWN].tolist():
            image, target = self.val.read(index)
            picture, about = to_pil_image(image), self.val.pictures[index]
            mine = [e for e in self.entries if e["image_id"] == about["id"] and e["score"] >= _SURE]
            boxes = np.array([e["bbox"] for e in mine], np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = np.array([label[e["category_id"]] for e in mine], np.int64)
            scores = np.array([e["score"] for e in mine], np.float32)
            size = about["height"], about["width"]
            masks = true_masks = None
            if "mask" in self.kinds:
                runs = [decode_mask(e["segmentation"], *size) for e in mine]
                masks = np.array(runs, bool).reshape(-1, *size)
                true_masks = target["masks"].numpy().astype(bool)
            truth = target["boxes"].numpy(), target["labels"].numpy(), true_masks
            cells.append(drawn(picture, *truth, self.val.class_names))
            cells.append(drawn(picture, boxes, labels, masks, self.val.class_names, scores))
            present |= {*truth[1].tolist(), *labels.tolist()}
        rows = [cells[start : start + 4] for start in range(0, len(cells), 4)]
        titles = ("truth", f"prediction, of a score of {_SURE:.0%} or more") * min(len(cells) // 2, 2)
        colours = overlays.palette(len(self.val.class_names))
        entries = [overlays.Entry(colours[index], self.val.class_names[index]) for index in sorted(present)]
        return overlays.with_legend(overlays.sheet(rows, titles, width=560), entries)

    @property
    @override
    def curves(self) -> tuple[Score, ...]:
        return (LOSS, *(Score(f"{kind}_AP", f"{kind} AP") for kind in self.kinds))

    @override
    def metadata(self) -> dict[str, Any]:
        assert self.recipe is not None
        assert self.train_split is not None
        # The file has the weights: it needs none of those that training started from.
        kwargs = {name: value for name, value in self.recipe.model.kwargs.items() if "pretrained" not in name}
        return {
            "model_kwargs": kwargs | {"masks": self.has_masks},
            "class_names": self.train_split.class_names,
            "category_ids": self.train_split.category_ids,
            "sides": list(self.sides),
            "img_size": list(self.sides),
        }


class TrainingPictures:
    """The pictures of a split that show objects, uint8 (3, H, W), and their objects, augmented."""

    def __init__(self, objects: ObjectDataset | None, transform: Callable[..., Any]) -> None:
        assert objects is not None
        self.objects, self.transform = objects, transform
        self.indices = objects.with_objects()

    def __len__(self) -> int:
        return len(self.indices)

    def upright(self) -> list[bool]:
        """Of each picture, whether it is higher than wide."""
        pictures = [self.objects.pictures[i] for i in self.indices]
        return [picture["height"] > picture["width"] for picture in pictures]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        picture, target = self.transform(*self.objects.read(self.indices[index]))
        return picture.as_subclass(Tensor), {name: values.as_subclass(Tensor) for name, values in target.items()}


class WholePictures:
    """All pictures of a split, uint8 (3, H, W), and their numbers in it; that of a filler is -1."""

    def __init__(self, objects: ObjectDataset) -> None:
        self.objects = objects

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.objects.read(max(index, 0))[0].as_subclass(Tensor), index


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _opened(data: DetectionDataConfig, training: bool, class_names: Sequence[str] | None = None) -> ObjectDataset:
    """Open and check one split, and say what of it is left out."""
    objects = open_objects(*_places(data, training), class_names)
    if not objects.with_objects():
        raise DataError(f"{objects.where} has no objects: there is nothing to {'learn' if training else 'find'}")
    if is_first_process():
        if objects.dropped:
            left_out = ", ".join(f"{count} {reason}" for reason, count in objects.dropped.items())
            report(f"{objects.where}: {left_out}")
        if data.check_files:
            check_all(len(objects), objects.read, objects.where, data.workers)
    return objects


def _places(data: DetectionDataConfig, training: bool) -> tuple[str, str]:
    """The annotations of one split, and the folder of its pictures."""
    if data.root is None:
        raise DataError("data.root is not set: name a folder with pictures and their annotations")
    split = "train" if training else "val"
    file = data.train_annotations if training else data.val_annotations
    folder = data.train_images if training else data.val_images
    layouts = [tuple(os.path.join(data.root, part.format(split)) for part in layout) for layout in _LAYOUTS]
    found = next((layout for layout in layouts if os.path.exists(layout[0])), None)
    if found is None and file is None:
        places = " or ".join(layout[0].format(split) for layout in _LAYOUTS)
        raise DataError(
            f"{shown(data.root)} has no {places}: name the file, or the folder of Pascal VOC's files, with "
            f"data.{split}_annotations, and the folder of the pictures with data.{split}_images"
        )
    known_file, known_folder = found or ("", data.root)
    return (
        known_file if file is None else os.path.join(data.root, file),
        known_folder if folder is None else os.path.join(data.root, folder),
    )


# ---------------------------------------------------------------------------------------------------------------------
# COCO's metric


@dataclass(frozen=True)
class Measured:
    """COCO's evaluation of boxes or masks.

    Attributes:
        numbers: in the order of `NUMBERS`; -1 where there is no such object.
        per_class: AP of each class; likewise.
    """

    numbers: NDArray[np.float64]
    per_class: NDArray[np.float64]


def evaluate(truth: ObjectDataset, entries: Sequence[dict[str, Any]], kind: str) -> Measured:
    """Compare what was found in the pictures of a data set to what is in them.

    Args:
        truth: the data set.
        entries: COCO's results, with "segmentation" for masks.
        kind: "box" or "mask".
    """
    with needing("dense", "COCO's metric needs one more package"):
        from faster_coco_eval import COCO, COCOeval_faster
    # By its mask, not by its box, a mask is small or large: without a box, the area is that of the mask.
    left_out = "bbox" if kind == "mask" else "segmentation"
    found = [{name: value for name, value in entry.items() if name != left_out} for entry in entries]
    known = COCO(truth.ground_truth())
    evaluation = COCOeval_faster(known, known.loadRes(found), _KINDS[kind], print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (overlap, recall, class)
    known_classes = precision[0, 0] > -1
    return Measured(np.asarray(evaluation.stats[:12]), np.where(known_classes, precision.mean((0, 1)), -1.0))
