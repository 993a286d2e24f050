"""A data set and a recipe for semantic segmentation, small enough to train in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

from vmamba.data.config import SegmentationAugmentConfig
from vmamba.tasks.recipe import ModelConfig, OptimConfig, TrainerConfig
from vmamba.tasks.segmentation_recipe import SegmentationDataConfig, SegmentationTrainConfig

NAMES = ["ground", "sky", "disc"]
COLOURS = np.array([[90, 160, 60], [60, 90, 190], [210, 60, 60]])


def make_landscapes(root: Path, train: int = 12, val: int = 5) -> Path:
    """Noisy landscapes of 44 × 60 pixels with a disc, and their masks; a border belongs to no class."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:44, :60]
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = (rows < generator.integers(12, 32)).astype(np.uint8)
            y, x, radius = generator.integers((10, 10, 6), (34, 50, 10))
            mask[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = 2
            pixels = COLOURS[mask] + generator.integers(-40, 40, (44, 60, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{split}/{number}.png")
            mask[:, -2:] = 255
            Image.fromarray(mask).save(root / f"annotations/{split}/{number}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def landscape_recipe(pictures: Path, run: Path | str, **optim) -> SegmentationTrainConfig:
    """Every source of randomness is on: shuffling, augmentation, dropout, drop path."""
    small = {"channels": 8, "auxiliary_channels": 8, "depths": [1, 1, 1], "dims": [8, 12, 16]}
    return SegmentationTrainConfig(
        model=ModelConfig("upernet_vmamba_femto_s2", drop_path_rate=0.1, kwargs=small),
        data=SegmentationDataConfig(root=str(pictures), batch_size=2, workers=0),
        augment=SegmentationAugmentConfig(scale=(60, 44), crop=(32, 48)),
        optim=OptimConfig(**{"epochs": 3, "warmup_epochs": 1, "lr_batch": 0, "lr": 0.01, "ema_decay": 0.5} | optim),
        trainer=TrainerConfig(accelerator="cpu", accumulate=2, progress=False),
        run=str(run),
    )
