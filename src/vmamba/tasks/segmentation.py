"""Semantic segmentation: what is special to it. What all tasks share is in `task` and `training`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image
from typing_extensions import override

from vmamba.data.loading import EpochLoader, Samples
from vmamba.data.masks import MaskedPictures, open_masks
from vmamba.data.sources import check_all
from vmamba.data.transforms import IGNORED, Preprocessing, segmentation_transform
from vmamba.errors import DataError, RecipeError
from vmamba.models.segmentation import UPerNet
from vmamba.tasks import overlays, pictures
from vmamba.tasks.inference import SEVERAL, segment
from vmamba.tasks.prediction import Weights
from vmamba.tasks.runs import BARS, MATRIX, SAMPLES
from vmamba.tasks.segmentation_recipe import (
    SegmentationDataConfig,
    SegmentationTrainConfig,
    SegmentationValidateConfig,
)
from vmamba.tasks.segmenter import Segmenter, best_classes, network_logits, segmentation_preprocessing
from vmamba.tasks.task import Means, Score, Task, build_model, class_table, rounded
from vmamba.tasks.training import is_first_process

_SHOWN = 5  # pictures of the validation split that are drawn


class SegmentationTask(Task):
    """A network for semantic segmentation, how it learns, and how it is judged.

    Args:
        model: the network.
        names: of the classes.
        pre: what the network expects of its input.
        data: how pictures are fed.
        val: the validation split.
        train: the training split; None for a task that is only validated.
        recipe: how the network learns; likewise.
        multi_scale: whether validation is the published test at several scales.
    """

    name = "segmentation"
    score = Score("mIoU", "mIoU")

    def __init__(
        self,
        model: UPerNet,
        names: list[str],
        pre: Preprocessing,
        data: SegmentationDataConfig,
        val: MaskedPictures,
        train: MaskedPictures | None = None,
        recipe: SegmentationTrainConfig | None = None,
        multi_scale: bool = False,
    ) -> None:
        super().__init__(model, recipe)
        self.names, self.pre, self.data, self.multi_scale = names, pre, data, multi_scale
        self.splits = val, train  # by whether it is for training
        if recipe is not None:
            self.transform = segmentation_transform(recipe.augment, pre)

    @classmethod
    @override
    def from_recipe(cls, recipe: SegmentationTrainConfig) -> Self:
        data = recipe.data
        train, val = _open(data, data.train_split), _open(data, data.val_split)
        for split in (train, val):
            if data.check_files and is_first_process():
                check_all(len(split), split.read, split.where, data.workers)
            split.check_labels()
        model = build_model(recipe.model, recipe.seed, num_classes=len(train.class_names))
        if not isinstance(model, UPerNet):
            raise RecipeError(f"{recipe.model.name} is no model for segmentation, as upernet_vmamba_tiny_s1l8 is")
        short, long = sorted(recipe.augment.scale)
        tested = data if data.img_size is not None else replace(data, img_size=(short, long))
        return cls(model, train.class_names, segmentation_preprocessing(model, tested), data, val, train, recipe)

    @classmethod
    @override
    def from_weights(cls, config: SegmentationValidateConfig, weights: Weights) -> Self:
        data, segmenter = config.data, Segmenter.from_weights(weights, config.data)
        split = _open(data, data.val_split)
        names, known = segmenter.class_names, weights.metadata.get("class_names") or segmenter.model.class_names
        if len(split.class_names) != len(names):
            raise DataError(f"{split.where} has {len(split.class_names)} classes, but {segmenter.source} {len(names)}")
        others = [(theirs, ours) for theirs, ours in zip(split.class_names, names, strict=True) if theirs != ours]
        # A few names may be spelt otherwise, as in the several editions of ADE20K's list.
        if known and (len(others) > len(names) / 2 or any(theirs in names for theirs, _ in others)):
            raise DataError(
                f"the classes of {split.where} are not those of {segmenter.source}: {len(others)} differ, such as "
                f"{others[0][0]} for {others[0][1]}"
            )
        if data.check_files and is_first_process():
            check_all(len(split), split.read, split.where, data.workers)
        split.check_labels()
        return cls(segmenter.model, split.class_names, segmenter.pre, data, split, multi_scale=config.multi_scale)

    @override
    def loader(self, training: bool) -> EpochLoader:
        split, seed = self.splits[training], self.recipe.seed if self.recipe else 0
        assert split is not None
        samples = Samples(Pairs(split, self.transform if training else None), seed)
        batch, collate = (self.data.batch_size, None) if training else (1, list)  # whole pictures have any size
        return EpochLoader(samples, batch, training, self.data.workers, seed, collate=collate, **self.place)

    @override
    def configure_model(self) -> None:
        """In training on several accelerators: BatchNorm over all of them, as published. torch has none for CPUs."""
        several = self.trainer.world_size > 1 and self.trainer.strategy.root_device.type != "cpu"
        if self.recipe is not None and several:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        elif self.recipe is not None and self.data.batch_size < 2:
            raise RecipeError(
                "data.batch_size is 1, but the coarsest level of the pyramid is one pixel of each picture, which "
                "BatchNorm needs several of: set it to 2 or more"
            )
        super().configure_model()

    @override
    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Of uint8 pictures (B, C, H, W) and labels (B, H, W): the cross-entropies of both heads."""
        losses: dict[str, Tensor] = self.model(self.pre.normalise(batch[0]), batch[1])
        return losses

    # --- validation

    @override
    def on_validation_epoch_start(self) -> None:
        number = len(self.names)
        self.means = Means(self.device)
        self.counts = torch.zeros(number**2, dtype=torch.int64, device=self.device)
        # Evenly spread: neighbours may be frames of one video.
        self.places, self.seen = {*torch.linspace(0, len(self.val_loader) - 1, _SHOWN).round().int().tolist()}, 0
        self.samples: list[list[Any]] = []

    @override
    def judge(self, batch: list[tuple[Tensor, Tensor]]) -> None:
        """Whole pictures, uint8 (C, H, W), and labels (H, W), all `IGNORED` where the picture only fills up."""
        network: Any = self.network
        for picture, labels in batch:
            labels = labels.long()
            known = labels != IGNORED
            if self.multi_scale:
                found = segment(network, picture, ratios=SEVERAL, flip=True).argmax(0)
            else:
                logits = network_logits(network, self.pre, [picture])
                found = best_classes(logits, labels.shape)
                self._add_loss(logits, labels)
            self.counts += torch.bincount(labels[known] * len(self.names) + found[known], minlength=len(self.counts))
            if self.seen in self.places and known.any():
                self.samples.append([to_pil_image(picture.cpu()), labels.cpu().numpy(), found.cpu().numpy()])
            self.seen += 1

    def _add_loss(self, logits: Tensor, labels: Tensor) -> None:
        """The cross-entropy at the size that the network saw, over the pixels that have a class."""
        targets = F.interpolate(labels[None, None].float(), logits.shape[2:], mode="nearest-exact")[0].long()
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        self.means.add("loss", loss, (targets != IGNORED).sum())

    @override
    def results(self) -> dict[str, float]:
        matrix = self.trainer.strategy.reduce(self.counts, reduce_op="sum")
        self.matrix = matrix.view(len(self.names), -1).cpu().numpy()
        return {**self.means.compute(self.trainer.strategy), **scores(self.matrix)}

    @override
    def details(self) -> dict[str, Any]:
        rows = zip(self.names, *(column.tolist() for column in class_scores(self.matrix)), strict=True)
        return {
            "images": len(self.splits[0]),
            "data": self.splits[0].where,
            "per_class": {
                name: {"IoU": rounded(iou), "accuracy": rounded(accuracy), "share": rounded(share)}
                for name, iou, accuracy, share in rows
            },
        }

    @override
    def summary(self, results: dict[str, Any]) -> str:
        totals = ", ".join(f"{name} {results[name]:.2%}" for name in ("mIoU", "mAcc", "aAcc"))
        loss = f", loss {results['loss']:.4f}" if "loss" in results else ""
        table = class_table(results["per_class"], ("IoU", "accuracy", "of pixels"))
        return "\n".join([f"{results['images']} images: {totals}{loss}", "", *table])

    @override
    def show(self, folder: Path) -> None:
        if self.samples:
            overlays.save(self._sheet(), folder / SAMPLES)
        iou, _, _ = class_scores(self.matrix)
        known = [place for place in np.argsort(-iou) if not np.isnan(iou[place])]  # NaN comes last
        bars = [overlays.Entry(self.colours[i], self.names[i], f"{iou[i]:.1%}") for i in known]
        title = f"IoU of {len(known)} classes, mean {np.nanmean(iou):.2%}"
        overlays.save(overlays.bars(bars, [float(iou[i]) for i in known], title), folder / BARS)
        pictures.confusion_matrix(self.matrix, self.names, folder / MATRIX, "pixels")

    def _sheet(self) -> Image.Image:
        """Some pictures, what is true of them and what was found, side by side, and a legend of what is to be seen."""
        rows, present = [], set[int]()
        for picture, truth, found in self.samples:
            image = overlays.easel(picture)
            rows.append([image, *(overlays.painted(image, labels, self.colours, 0.6) for labels in (truth, found))])
            present |= {*np.unique(truth), *np.unique(found)} - {IGNORED}
        entries = [overlays.Entry(self.colours[index], self.names[index]) for index in sorted(present)]
        return overlays.with_legend(overlays.sheet(rows, ("picture", "truth", "prediction")), entries)

    @property
    def colours(self) -> list[overlays.Colour]:
        """One a class."""
        return overlays.palette(len(self.names))

    @override
    def metadata(self) -> dict[str, Any]:
        return {"num_classes": len(self.names), "class_names": self.names, **self.pre.to_dict()}


def class_scores(matrix: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """IoU and accuracy of each class, and its share of all pixels, from counts of pixels, (true, found).

    IoU is NaN for a class that is neither true nor found anywhere, accuracy for one that is nowhere true.
    """
    right, true, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        return right / (true + found - right), right / true, true / true.sum()


def scores(matrix: NDArray[np.int64]) -> dict[str, float]:
    """mIoU and mAcc, the means over the classes that have such a number, and aAcc, the share of pixels that are right.

    All as mmsegmentation computes them: over the pixels of all pictures together.
    """
    iou, accuracy, _ = class_scores(matrix)
    right = float(matrix.trace() / max(matrix.sum(), 1))
    return {"mIoU": float(np.nanmean(iou)), "mAcc": float(np.nanmean(accuracy)), "aAcc": right}


def _open(data: SegmentationDataConfig, split: str) -> MaskedPictures:
    if data.root is None:
        raise DataError("data.root is not set: it names the folder with images/, annotations/ and classes.txt")
    return open_masks(data.root, split, ignored=data.ignored)


class Pairs:
    """Pictures and masks of a split, varied for training; fillers are pictures of which no pixel counts."""

    def __init__(self, split: MaskedPictures, transform: v2.Transform | None) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, labels = self.split.read(max(index, 0))
        if self.transform is not None:
            picture, labels = self.transform(picture, labels)
        if index < 0:
            labels = torch.full_like(labels, IGNORED)
        return picture.as_subclass(Tensor), labels.as_subclass(Tensor)
