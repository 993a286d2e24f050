"""How well different kinds of backbone learn to segment and to detect: one recipe, one head, one budget for each.

Our small VMamba against a ResNet-18-, a ConvNeXt- and a Swin-type of timm's, all of the same number of parameters
(within 15 %), from scratch: streets by UPerNet, blood cells by Faster R-CNN. The budget is in minutes of the process's
own time on one core, whatever else the machine does; data sets and seeds are learned at once, each on a core.

    python benchmarks/dense.py --camvid PATH --bccd PATH    # the committed tables, plots and pictures
    python benchmarks/dense.py --bccd PATH --seeds 0 1 2    # means over seeds, and the spread
    python benchmarks/dense.py --camvid PATH --split held-out    # to choose between designs: part of the training split

PATH of the streets holds images/{train,val}, annotations/{train,val} (index masks) and classes.txt; that of the blood
cells train.json, val.json (COCO's format) and images/.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from page import Row
from PIL import Image
from runner import RESULTS
from side_by_side import Page, Recipe, learn_in_turns
from torch import Tensor, nn

from vmamba.data.coco import ObjectDataset, open_objects
from vmamba.data.config import DetectionAugmentConfig, SegmentationAugmentConfig
from vmamba.data.images import read_image
from vmamba.data.loading import EpochLoader, Samples
from vmamba.data.masks import MaskedPictures, open_masks
from vmamba.data.transforms import IGNORED, Preprocessing, detection_transform, segmentation_transform
from vmamba.errors import DataError
from vmamba.models.detection import MaskRCNN
from vmamba.models.segmentation import UPerNet
from vmamba.tasks import overlays
from vmamba.tasks.detection import TrainingPictures, evaluate
from vmamba.tasks.detector import Detector, drawn, fitted_sides
from vmamba.tasks.inference import padded
from vmamba.tasks.segmentation import Pairs, scores
from vmamba.tasks.segmenter import Segmenter

PRE = Preprocessing()
TURN = 60.0  # seconds in a row at most, after which a network is judged
SHOWN, SURE = 4, 0.5  # pictures in a sheet, and the lowest score there

# Name and arguments, for timm, of backbones with four maps, all shallow: the budget is short. ResNet's end with a norm.
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "VMamba": ("vmamba_nano", {"depths": (1, 1, 2, 1), "dims": (40, 80, 160, 320), "drop_path_rate": 0.0}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 2, 2, 2), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "strict_img_size": False},
    ),
    "ConvNeXt": ("convnext_tiny", {"depths": (1, 1, 3, 1), "dims": (44, 88, 176, 352)}),
    "ResNet": ("resnet18", {"channels": (30, 60, 120, 240), "out_indices": (1, 2, 3, 4)}),
}


def backbone(name: str) -> nn.Module:
    """A feature extractor with fresh weights."""
    model, arguments = BACKBONES[name]
    extractor: nn.Module = timm.create_model(model, features_only=True, **arguments)
    return extractor


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Attributes:
        minutes: of training, for a network on a data set.
        split: what networks are judged by, "val" or "held-out".
        tiny: whether pictures are small, to see whether it runs.
        networks: which.
        seeds: of weights and batches, a run each.
        output: the folder of the results.
    """

    minutes: float
    split: str
    tiny: bool
    networks: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path


@dataclass
class Streets:
    """Semantic segmentation: what is each pixel of a street."""

    known: MaskedPictures
    judged: MaskedPictures
    seed: int
    augment: SegmentationAugmentConfig
    recipe = Recipe(batch=8, rate=1e-2)

    usual = SegmentationAugmentConfig(scale=(240, 180), ratio=(0.5, 1.5), crop=(112, 112), photometric=False)
    tiny = SegmentationAugmentConfig(scale=(60, 44), crop=(32, 32), photometric=False)

    @classmethod
    def open(cls, root: Path, settings: Settings, seed: int) -> Streets:
        """The training and the validation split, or two parts of the former."""
        known = open_masks(root, "train")
        if settings.split == "val":
            judged = open_masks(root, "val")
        else:
            known, judged = (
                replace(known, pictures=known.pictures[part], masks=known.masks[part]) for part in parts(len(known))
            )
        return cls(known, judged, seed, cls.tiny if settings.tiny else cls.usual)

    @property
    def epoch(self) -> int:
        return len(self.known)

    def network(self, name: str) -> nn.Module:
        """UPerNet, whose head is narrow."""
        classes = len(self.known.class_names)
        return UPerNet(backbone(name), classes, channels=64, auxiliary_channels=64, out_norm=name != "ResNet")

    def batches(self) -> Iterator[Any]:
        pairs = Samples(Pairs(self.known, segmentation_transform(self.augment, PRE)), self.seed)
        return endless(EpochLoader(pairs, self.recipe.batch, training=True, seed=self.seed))

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return torch.stack([*model(PRE.normalise(images), labels).values()]).sum()

    def _segmenter(self, model: Any) -> Segmenter:
        long, short = self.augment.scale
        return Segmenter(model, replace(PRE, img_size=(short, long)), self.known.class_names, "")

    def judge(self, model: Any) -> dict[str, float]:
        number, segmenter = len(self.known.class_names), self._segmenter(model)
        counts = torch.zeros(number**2, dtype=torch.int64)
        for index in range(len(self.judged)):
            picture, labels = self.judged.read(index)
            at = labels != IGNORED
            pairs = labels[at].long() * number + segmenter.labels(picture.as_subclass(Tensor))[at]
            counts += torch.bincount(pairs, minlength=len(counts))
        found = scores(counts.view(number, number).numpy())
        return {name: found[name] for name in ("mIoU", "mAcc")}

    def sheet(self, models: Mapping[str, Any]) -> Image.Image:
        """The same pictures as each network segments them."""
        names = self.known.class_names
        colours, segmenters, rows = overlays.palette(len(names)), [*map(self._segmenter, models.values())], []
        for index in spread(len(self.judged)):
            image = overlays.easel(read_image(self.judged.name(index)))
            truth = self.judged.read(index)[1].numpy()
            found = [segmenter.segment(self.judged.name(index)).labels for segmenter in segmenters]
            rows.append([image, *(overlays.painted(image, labels, colours, 0.6) for labels in (truth, *found))])
        entries = [overlays.Entry(*entry) for entry in zip(colours, names, strict=True)]
        return overlays.with_legend(overlays.sheet(rows, ("picture", "truth", *models)), entries)


@dataclass
class BloodCells:
    """Detection: where are which cells."""

    known: ObjectDataset
    judged: ObjectDataset
    seed: int
    augment: DetectionAugmentConfig
    recipe = Recipe(batch=4, rate=5e-3)

    usual = DetectionAugmentConfig(short_sides=(168, 192, 216), longest=360, photometric=True)
    tiny = DetectionAugmentConfig(short_sides=(64,), longest=96)

    @classmethod
    def open(cls, root: Path, settings: Settings, seed: int) -> BloodCells:
        """The training and the validation split, or two parts of the former."""
        known = open_objects(root / "train.json", root / "images")
        if settings.split == "val":
            judged = open_objects(root / "val.json", root / "images", known.class_names)
        else:
            known, judged = (
                replace(known, pictures=known.pictures[part], annotations=known.annotations[part])
                for part in parts(len(known))
            )
        return cls(known, judged, seed, cls.tiny if settings.tiny else cls.usual)

    @property
    def epoch(self) -> int:
        return len(self.known.with_objects())

    def network(self, name: str) -> nn.Module:
        """Faster R-CNN, whose pyramid and head are narrow."""
        return MaskRCNN(
            backbone(name), len(self.known.class_names), channels=64, hidden=256, masks=False, regions=128,
            out_norm=name != "ResNet",
        )  # fmt: skip

    def batches(self) -> Iterator[Any]:
        pictures = Samples(TrainingPictures(self.known, detection_transform(self.augment, PRE)), self.seed)
        return endless(EpochLoader(pictures, self.recipe.batch, training=True, seed=self.seed, collate=list))

    def loss(self, model: Any, batch: list[tuple[Tensor, Any]]) -> Tensor:
        images, sizes = padded([picture for picture, _ in batch], PRE)
        return torch.stack([*model(images, [target for _, target in batch], sizes=sizes).values()]).sum()

    def _detector(self, model: Any) -> Detector:
        sides = fitted_sides(sorted(self.augment.short_sides)[len(self.augment.short_sides) // 2])
        return Detector(model, sides, self.known.class_names, self.known.category_ids, "")

    def judge(self, model: Any) -> dict[str, float]:
        detector = self._detector(model)
        entries = [
            found.to_coco(picture["id"])
            for index, picture in enumerate(self.judged.pictures)
            for found in detector.detect(self.judged.name(index), threshold=0.0).objects
        ]
        numbers = evaluate(self.judged, entries, "box").numbers
        return {"AP": float(numbers[0]), "AP50": float(numbers[1])}

    def sheet(self, models: Mapping[str, Any]) -> Image.Image:
        """The same pictures with what each network finds in them."""
        names, detectors, rows = self.known.class_names, [*map(self._detector, models.values())], []
        for index in spread(len(self.judged)):
            picture, true = read_image(self.judged.name(index)), self.judged.read(index)[1]
            cells = [drawn(picture, true["boxes"].numpy(), true["labels"].numpy(), None, names)]
            for detector in detectors:
                found = detector.detect(picture, SURE)
                cells.append(drawn(picture, found.boxes, found.labels, None, names, found.scores))
            rows.append(cells)
        entries = [overlays.Entry(*entry) for entry in zip(overlays.palette(len(names)), names, strict=True)]
        return overlays.with_legend(overlays.sheet(rows, ("truth", *models)), entries)


def parts(length: int) -> tuple[slice, slice]:
    """To learn from, and to be judged by: the last fifth, since neighbours may be frames of one video."""
    return slice(length - length // 5), slice(length - length // 5, length)


def spread(length: int) -> list[int]:
    """Numbers of a few pictures that are far from each other."""
    return sorted({*torch.linspace(0, length - 1, SHOWN + 2)[1:-1].round().int().tolist()})


def endless(loader: EpochLoader) -> Iterator[Any]:
    """Batches of one epoch after another; the same for every network."""
    if not len(loader):
        raise DataError(f"there are {len(loader.dataset)} pictures to learn from, fewer than a batch")  # type: ignore[arg-type]
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


# By the name of their files: what is learned, the title of its page, and the columns of its scores.
LESSONS: dict[str, tuple[type[Streets | BloodCells], str, str]] = {
    "dense_streets": (Streets, "streets segmented by UPerNet", "mIoU, %;mAcc, %"),
    "dense_blood_cells": (BloodCells, "blood cells detected by Faster R-CNN", "box AP, %;box AP50, %"),
}


def learn(name: str, root: Path, settings: Settings, seed: int) -> list[Row]:
    """Train all networks on one data set; returns a row for each, and of the first seed writes the pictures."""
    torch.set_num_threads(1)
    lesson = LESSONS[name][0].open(root, settings, seed)
    budget = 60 * settings.minutes
    networks = {network: partial(lesson.network, network) for network in settings.networks}
    contenders = learn_in_turns(networks, lesson, budget, min(TURN, budget / 3), seed, time.process_time)
    if seed == settings.seeds[0]:
        with torch.inference_mode():
            sheet = lesson.sheet({contender.name: contender.average for contender in contenders})
        overlays.save(sheet, settings.output / f"{name}_pictures.png")
    return [contender.row() for contender in contenders]


def write(name: str, root: Path, settings: Settings, runs: Sequence[Row]) -> str:
    """Write the table and the plot of one data set; returns the page."""
    kind, title, columns = LESSONS[name]
    lesson = kind.open(root, settings, settings.seeds[0])
    score, others = columns.split(";", 1)
    seeds = ", ".join(map(str, settings.seeds))
    seeds = f"seed {seeds}" if len(settings.seeds) == 1 else f"seeds {seeds} (mean, and standard deviation)"
    of = "the val split" if settings.split == "val" else "the training pictures, kept apart"
    return Page(
        name=name,
        program="dense.py",
        title=f"How well it learns: {title}",
        headers=f"network;parameters, M;{score};± points;{others};images/s;epochs",
        label=score,
        seconds="seconds of training on one core",
        settings={
            "minutes": settings.minutes, "judged_by": settings.split, "seeds": settings.seeds,
            **asdict(lesson.recipe), "augment": asdict(lesson.augment),
            "backbones": {network: BACKBONES[network] for network in settings.networks},
        },
        notes=[
            f"{settings.minutes:g} minutes of training each, of the process's own time on one core",
            f"From scratch, one recipe, one narrow head, {seeds}",
            "A LayerNorm follows each map of every backbone but ResNet, whose maps end with a norm already",
            f"{len(lesson.known)} pictures to learn from, judged by {len(lesson.judged)} of {of}",
        ],
    ).write(runs, settings.output)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, metavar="PATH", help="folder of the streets")
    parser.add_argument("--bccd", type=Path, metavar="PATH", help="folder of the blood cells")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for a network on a data set")
    parser.add_argument("--split", choices=["val", "held-out"], default="val", help="what to judge by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches, a run each")
    parser.add_argument("--only", nargs="+", choices=list(BACKBONES), default=list(BACKBONES), help="some networks")
    parser.add_argument("--tiny", action="store_true", help="small pictures, to see whether it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    settings = Settings(
        given.minutes, given.split, given.tiny, tuple(given.only), tuple(dict.fromkeys(given.seeds)), given.output
    )
    places = {}
    for name, place in zip(LESSONS, (given.camvid, given.bccd), strict=True):
        if place is not None and place.is_dir():
            places[name] = place
        else:
            print(f"{name} is left out: {f'there is no folder {place}' if place else 'its folder was not named'}")
    runs = [(name, place, settings, seed) for seed in settings.seeds for name, place in places.items()]
    try:
        if len(runs) < 2:
            rows = [learn(*run) for run in runs]
        else:
            workers = min(len(runs), os.cpu_count() or 1)
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as processes:
                rows = [*processes.map(learn, *zip(*runs, strict=True))]
        for name, place in places.items():
            mine = [row for run, its in zip(runs, rows, strict=True) if run[0] == name for row in its]
            print(write(name, place, settings, mine))
    except DataError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
