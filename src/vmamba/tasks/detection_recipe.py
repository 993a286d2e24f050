"""Settings of detection and instance segmentation, as dataclasses that flags and YAML files fill; quick to import."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from vmamba.data.config import DetectionAugmentConfig
from vmamba.errors import RecipeError
from vmamba.tasks.recipe import BaseTrainConfig, BaseValidateConfig, ModelConfig, check_order, check_ranges


@dataclass
class DetectionDataConfig:
    """Where pictures with objects come from and how they are fed."""

    root: str | None = None
    """Folder in which COCO's annotations/instances_train2017.json, train2017/ and the same with val are known, or
    train.json, val.json and images/; other places are named below, relative to it."""
    train_annotations: str | None = None
    """JSON file in COCO's format, or folder of Pascal VOC's XML files, of the training split."""
    val_annotations: str | None = None
    """The same of the validation split."""
    train_images: str | None = None
    """Folder of the training pictures."""
    val_images: str | None = None
    """Folder of the validation pictures."""
    masks: bool | None = None
    """Learn the objects' masks as well as their boxes; null to do so where every object has one."""
    img_size: int | tuple[int, int] | None = None
    """Short side, or short and long side, that pictures are fitted into for validation and later use; null for the
    model's, at first 800 and 1333. Training's are augment.short_sides and augment.longest."""
    batch_size: int = 2
    """Pictures on each device in one step: all upright or none, so that little of a batch is filling."""
    val_batch_size: int = 1
    """The same for validation; what smaller pictures of a batch are filled up with changes results a little."""
    workers: int = 4
    """Processes on each device that read and augment pictures; 0 to do it in the training process."""
    check_files: bool = False
    """Before the first epoch, decode every picture and mask and list those that cannot be used."""


@dataclass
class DetectionTrainConfig(BaseTrainConfig):
    """Train a model for detection or instance segmentation."""

    task: str = "detection"
    model: ModelConfig = field(default_factory=lambda: ModelConfig("maskrcnn_vmamba_tiny_s1l8"))
    """Model and initial weights"""
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    """Pictures and objects"""
    augment: DetectionAugmentConfig = field(default_factory=DetectionAugmentConfig)
    """Augmentation"""

    @override
    def check(self) -> None:
        super().check()
        a = self.augment
        if not a.short_sides and a.jitter is None:
            raise RecipeError("augment.short_sides is empty; expected one side or more, such as [800]")
        check_ranges("augment", a, 1, None, "short_sides", "longest", "crop_sides", "jitter_size")
        check_ranges("augment", a, 0, 1, "hflip")
        check_order("augment", a, "crop", *(["jitter"] if a.jitter is not None else []))


@dataclass
class DetectionValidateConfig(BaseValidateConfig):
    """Measure a model for detection or instance segmentation on pictures with known objects."""

    task: str = "detection"
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    """Pictures and objects; where no root is given, those the run was validated on"""
