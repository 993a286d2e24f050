"""Settings of semantic segmentation, as dataclasses that flags and YAML files fill; quick to import."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from vmamba.data.config import SegmentationAugmentConfig
from vmamba.tasks.recipe import BaseTrainConfig, BaseValidateConfig, ModelConfig, check_order, check_ranges


@dataclass
class SegmentationDataConfig:
    """Where the pictures and masks come from and how they are fed."""

    root: str | None = None
    """Folder with images/SPLIT, annotations/SPLIT (index masks) and classes.txt, a class on each line; or ADE20K as it
    is published, with objectInfo150.txt."""
    train_split: str = "train"
    """Name of the training split; train stands for training as well."""
    val_split: str = "val"
    """Name of the validation split; val stands for validation as well."""
    ignored: int = 255
    """Number in the masks that stands for no class; in ADE20K, 0 does so too."""
    img_size: int | tuple[int, int] | None = None
    """Short side, or short and long side, into which whole pictures are fitted for validation and prediction; a long
    side that is not given is four times the short one. Null for augment.scale in training, else for the model's."""
    batch_size: int = 4
    """Crops on each device in one step. Whole pictures are validated one by one."""
    workers: int = 4
    """Processes on each device that read and vary pictures; 0 to do it in the training process."""
    check_files: bool = False
    """Before the first epoch, read every picture and mask and list those that cannot be used."""


@dataclass
class SegmentationTrainConfig(BaseTrainConfig):
    """Train a model for semantic segmentation."""

    task: str = "segmentation"
    model: ModelConfig = field(default_factory=lambda: ModelConfig("upernet_vmamba_tiny_s1l8"))
    """Model and initial weights"""
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    """Pictures and masks"""
    augment: SegmentationAugmentConfig = field(default_factory=SegmentationAugmentConfig)
    """Augmentation"""

    @override
    def check(self) -> None:
        super().check()
        check_ranges("augment", self.augment, 1, None, "scale", "crop")
        check_ranges("augment", self.augment, 0, 1, "most_of_one_class", "hflip")
        check_order("augment", self.augment, "ratio")


@dataclass
class SegmentationValidateConfig(BaseValidateConfig):
    """Measure a model for semantic segmentation on pictures with known masks."""

    task: str = "segmentation"
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    """Pictures and masks; where no root is given, those the run was validated on"""
    multi_scale: bool = False
    """The published test at several scales: each picture at 0.5 to 1.75 times its own size, and mirrored as well."""
