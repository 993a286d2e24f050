"""What happens to an image between the file and the network.

Images travel as uint8 (C, H, W): the resizing and colour augmentations act on single PIL images in the loader's
workers; cropping of small images, normalisation and erasing act on whole batches where the model lives, which costs a
quarter of the memory traffic of float images and, for small ones, no loader time at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torch.nn import functional as F

from vmamba.data.config import AugmentConfig
from vmamba.data.images import check_channels

ImageTransform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """What a classifier expects of its input; kept in the metadata of every checkpoint we write."""

    img_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        check_channels(self.in_chans)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_chans:
                raise ValueError(
                    f"{name} has {len(values)} value(s) {list(values)} but images have {self.in_chans} channel(s); "
                    f"give one value a channel"
                )
        if min(self.img_size) < 1 or min(self.std) <= 0 or not 0 < self.crop_pct <= 1:
            raise ValueError(f"sides must be at least 1, std above 0 and crop_pct in (0, 1]; got {self}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """From timm's ``pretrained_cfg`` or from our checkpoints' metadata; keys that are absent keep the default."""
        known: dict[str, Any] = {k: values[k] for k in cls.__dataclass_fields__ if values.get(k) is not None}
        if "input_size" in values and "img_size" not in known:
            known["in_chans"], *known["img_size"] = values["input_size"]
        for key in ("img_size", "mean", "std"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def eval_transform(self) -> ImageTransform:
        """PIL image of any size to uint8 (C, H, W): the short side to ``img_size / crop_pct``, then a centre crop."""
        return transforms_imagenet_eval(
            self.img_size, crop_pct=self.crop_pct, interpolation=self.interpolation, normalize=False
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 with the given mean and standard deviation of each channel."""
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        return (images.float() - mean * 255) / (std * 255)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value a channel, (C, 1, 1); copied to a device once, for each copy waits for what the device is doing."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def train_transform(config: AugmentConfig, pre: Preprocessing) -> ImageTransform:
    """PIL image of any size to an augmented uint8 (C, H, W): random resized crop, flips, RandAugment or jitter."""
    transform = transforms_imagenet_train(
        pre.img_size,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        auto_augment=config.rand_augment,
        color_jitter=config.color_jitter,
        interpolation=config.interpolation,
        mean=pre.mean,
        normalize=False,
    )
    for step in transform.transforms:
        policy = getattr(step, "policy", [])  # AutoAugment holds lists of operations, RandAugment and AugMix one list
        for operation in [*getattr(step, "ops", []), *(op for pair in policy for op in pair)]:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's strongest draw keeps 0 bits: a black image in every Pillow before 13, which raises an error instead."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep)


class BatchAugment:
    """The augmentations that act on a batch, where the model lives: uint8 (B, C, H, W) to normalised float32.

    Padded random crops and flips happen only for data held in memory: everything else was cropped and flipped by
    `train_transform`. Draws from torch's and Python's global generators.
    """

    def __init__(self, config: AugmentConfig, pre: Preprocessing, in_memory: bool) -> None:
        self.pre = pre
        self.padding = config.crop_padding if in_memory else 0
        self.hflip = config.hflip if in_memory else 0.0
        self.erasing = config.random_erasing

    def __call__(self, images: Tensor) -> Tensor:
        """Augment and normalise one batch."""
        if self.padding or self.hflip:
            images = crop_and_flip(images, self.padding, self.hflip)
        images = self.pre.normalise(images)
        if self.erasing:
            images = RandomErasing(self.erasing, mode="pixel", device=images.device)(images)
        return images


def crop_and_flip(images: Tensor, padding: int, hflip: float) -> Tensor:
    """Pad with zeros, crop each image at its own random place back to size, and mirror it with probability ``hflip``.

    Args:
        images: (B, C, H, W), any dtype. The result has the same shape and dtype.
    """
    batch, _, height, width = images.shape
    device = images.device
    top = torch.randint(2 * padding + 1, (batch, 1), device=device)
    left = torch.randint(2 * padding + 1, (batch, 1), device=device)
    mirror = torch.rand(batch, 1, device=device) < hflip
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = left + torch.where(mirror, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    picked = padded[torch.arange(batch, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)  # the two index tensors put C last: (B, H, W, C)
