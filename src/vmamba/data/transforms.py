"""What happens to an image between the file and the network.

Images travel as uint8 (C, H, W): the resizing and colour augmentations act on single PIL images in the loader's
workers; cropping of small images, normalisation and erasing act on whole batches where the model lives, which costs a
quarter of the memory traffic of float images and, for small ones, no loader time at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from vmamba.data.config import (
    CROP_MODES,
    INTERPOLATIONS,
    AugmentConfig,
    DetectionAugmentConfig,
    SegmentationAugmentConfig,
)
from vmamba.data.images import check_channels
from vmamba.errors import RecipeError
from vmamba.models.segmentation import IGNORED

_LONG = 20  # times as long as wide, up to which a picture is resized whole

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
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        check_channels(self.in_chans)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_chans:
                raise ValueError(
                    f"{name} has {len(values)} value(s) {list(values)} but images have {self.in_chans} channel(s); "
                    f"give one value a channel"
                )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}")
        if min(self.img_size) < 1 or min(self.std) <= 0 or not 0 < self.crop_pct <= 1:
            raise ValueError(f"sides must be at least 1, std above 0 and crop_pct in (0, 1]; got {self}")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode is {self.crop_mode!r}; expected one of {', '.join(CROP_MODES)}")

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
        """PIL image of any size to uint8 (C, H, W): the short side to ``img_size / crop_pct``, then a centre crop.

        With timm's other crop modes the picture is first squashed to the sides, or fitted into them and bordered.
        """
        steps = transforms_imagenet_eval(
            self.img_size, crop_pct=self.crop_pct, crop_mode=self.crop_mode, interpolation=self.interpolation,
            normalize=False,
        )  # fmt: skip
        if self.crop_mode == "center":
            steps.transforms.insert(0, CropLong(self))
        return steps

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 with the given mean and standard deviation of each channel."""
        mean, std = _on_device(self.mean, images.device), _on_device(self.std, images.device)
        return (images.float() - mean * 255) / (std * 255)


class CropLong:
    """Cut off the ends of a long picture, far from what timm's centre crop leaves, before timm resizes all of it.

    One row of pixels would become as many as a square picture has, for each pixel that it is long.
    """

    def __init__(self, pre: Preprocessing) -> None:
        self.sides = [math.floor(side / pre.crop_pct) for side in pre.img_size]  # that the picture is resized to cover

    def __call__(self, image: Image.Image) -> Image.Image:
        """A picture of any size; one that is no more than `_LONG` times as long as these sides is left as it is."""
        factor = max(self.sides[0] / image.height, self.sides[1] / image.width)
        most = math.ceil(_LONG * max(self.sides) / factor)
        left, top = (max(given - most, 0) // 2 for given in image.size)  # as much at the other end: the centre stays
        return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value a channel, (C, 1, 1); copied to a device once, for each copy waits for what the device is doing."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def train_transform(config: AugmentConfig, pre: Preprocessing) -> ImageTransform:
    """PIL image of any size to an augmented uint8 (C, H, W): random resized crop, flips, RandAugment or jitter.

    Raises:
        RecipeError: timm knows no such policy.
    """
    try:
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
    except (AssertionError, ValueError) as error:
        raise RecipeError(
            f"augment.rand_augment is {config.rand_augment!r}; expected a policy of timm's, such as "
            f"rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original-mstd0.5, or null ({error})"
        ) from error
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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with masks or boxes


def resize_bilinear_uint8(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as the published dense models were trained and tested: OpenCV's INTER_LINEAR on uint8, bit for bit.

    No antialiasing; weights of 11 bits, in integers.

    Args:
        image: uint8 (..., H, W).
        size: the new height and width.

    Returns:
        uint8 (..., *size).
    """
    if tuple(size) == image.shape[-2:]:
        return image
    top, bottom, (w0, w1) = _taps(size[0], image.shape[-2], image.device)
    left, right, (v0, v1) = _taps(size[1], image.shape[-1], image.device)

    def across(rows: Tensor) -> Tensor:
        return rows.index_select(-1, left) * v0 + rows.index_select(-1, right) * v1 >> 4

    if 2 * size[0] < image.shape[-2]:  # most rows of a photograph are not needed
        above, below = (across(image.index_select(-2, at)) for at in (top, bottom))
    else:
        rows = across(image.contiguous())
        above, below = (rows.index_select(-2, at) for at in (top, bottom))
    above.mul_(w0[:, None]).bitwise_right_shift_(16)
    below.mul_(w1[:, None]).bitwise_right_shift_(16)
    return above.add_(below).add_(2).bitwise_right_shift_(2).to(torch.uint8)


def _taps(new: int, old: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each new place the two old ones that it lies between, and their weights, int32 (2, new), of 2048."""
    at = ((torch.arange(new, dtype=torch.float64, device=device) + 0.5) * (old / new) - 0.5).float()
    first = at.floor()
    share = at - first
    weights = (torch.stack((1 - share, share)) * 2048).round().int()
    index = first.long()
    return index.clamp(0, old - 1), (index + 1).clamp(0, old - 1), weights


def fitted_size(height: int, width: int, longest: float, shortest: float) -> tuple[int, int]:
    """The largest height and width of the same shape whose long and short side are no longer than these."""
    factor = min(longest / max(height, width), shortest / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


class FitSides(v2.Transform):
    """Resize to `fitted_size` for one of several pairs (longest, shortest), drawn at random, times a random factor."""

    def __init__(self, sides: Sequence[tuple[float, float]], ratio: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.sides, self.ratio = list(sides), ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        longest, shortest = self.sides[int(torch.randint(len(self.sides), ()))]
        factor = float(torch.empty(()).uniform_(*self.ratio))
        height, width = v2.query_size(flat_inputs)
        return {"size": fitted_size(height, width, longest * factor, shortest * factor)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pictures bilinearly and without antialiasing, masks by the nearest pixel."""
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(resize_bilinear_uint8(inpt.as_subclass(Tensor), params["size"]), like=inpt)
        return self._call_kernel(v2.functional.resize, inpt, list(params["size"]))


class Crop(v2.Transform):
    """A random part whose sides are drawn between those of two sizes; no larger than the picture.

    Where a semantic mask comes along, parts of which one class takes more than a share are drawn again.
    """

    def __init__(
        self, least: tuple[int, int], most: tuple[int, int] | None = None, most_of_one_class: float = 1.0
    ) -> None:
        super().__init__()
        self.least, self.most, self.most_of_one_class = least, most or least, most_of_one_class

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw size and corner."""
        rows, columns = v2.query_size(flat_inputs)
        height, width = (
            int(torch.randint(min(least, side), min(most, side) + 1, ()))
            for least, most, side in zip(self.least, self.most, (rows, columns), strict=True)
        )
        mask = next((x for x in flat_inputs if isinstance(x, tv_tensors.Mask) and x.ndim == 2), None)
        for _ in range(10):
            top = int(torch.randint(rows - height + 1, ()))
            left = int(torch.randint(columns - width + 1, ()))
            if mask is None or self.most_of_one_class >= 1:
                break
            part = mask[top : top + height, left : left + width]
            counts = part[part >= 0].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < self.most_of_one_class * counts.sum():
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


class FillUp(v2.Transform):
    """Fill up smaller pictures at the right and bottom: with the mean colour, which the network sees as zeros."""

    def __init__(self, size: tuple[int, int], mean: Sequence[float]) -> None:
        super().__init__()
        self.size, self.fill = size, [round(255 * m) for m in mean]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """What is missing: left, top, right, bottom."""
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(self.size[1] - width, 0), max(self.size[0] - height, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Fill up; in a semantic mask with what is ignored."""
        semantic = isinstance(inpt, tv_tensors.Mask) and inpt.ndim == 2
        fill = self.fill if isinstance(inpt, tv_tensors.Image) else IGNORED if semantic else 0
        return self._call_kernel(v2.functional.pad, inpt, fill=fill, **params) if any(params["padding"]) else inpt


class PhotometricDistort(v2.Transform):
    """Vary brightness, contrast, saturation and hue, each with probability 1/2, as published for ADE20K.

    Of values from 0 to 255: brightness adds -32 to 32; contrast multiplies by 0.5 to 1.5, before or after the other
    two; saturation, that of HSV, is multiplied by 0.5 to 1.5; hue turns by -36 to 34 degrees, in steps of two.
    (torchvision's RandomPhotometricDistort multiplies brightness, moves contrast and saturation towards and from grey,
    turns hue half as far, and exchanges channels.)
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw how much."""

        def draw(low: float, high: float, neutral: float) -> float:
            value = float(torch.empty(()).uniform_(low, high))
            return value if torch.rand(()) < 0.5 else neutral

        contrast, first = draw(0.5, 1.5, 1), bool(torch.rand(()) < 0.5)
        return {
            "brightness": draw(-32, 32, 0),
            "contrast": (contrast, 1.0) if first else (1.0, contrast),
            "saturation": draw(0.5, 1.5, 1),
            "hue": math.floor(draw(-18, 18, 0)) / 180,  # of a full turn
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Of pictures alone."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        before, after = params["contrast"]
        x = _linear(inpt.as_subclass(Tensor), 1.0, params["brightness"])
        x = saturate(_linear(x, before), params["saturation"])
        if params["hue"]:
            x = v2.functional.adjust_hue(x, params["hue"])
        return tv_tensors.wrap(_linear(x, after), like=inpt)


def _linear(image: Tensor, factor: float, shift: float = 0.0) -> Tensor:
    """uint8 times a factor and shifted, cut off at 0 and 255, fractions dropped."""
    same = factor == 1 and shift == 0
    return image if same else (image * factor + shift).clamp_(0, 255).to(torch.uint8)


def saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation in HSV, 1 - least / most of a pixel's channels, leaving hue and value, the most.

    Args:
        image: uint8 (..., 3, H, W).
        factor: 0 makes grey; a saturation that would pass 1 becomes 1.
    """
    if factor == 1:
        return image
    most, least = image.amax(-3, keepdim=True).float(), image.amin(-3, keepdim=True)
    factors = (most / (most - least).clamp_(min=1)).clamp_(max=factor)
    return (most - (most - image) * factors).round_().to(torch.uint8)


def segmentation_transform(config: SegmentationAugmentConfig, pre: Preprocessing) -> v2.Transform:
    """(picture, uint8 (3, H, W), and mask of labels (H, W)) to the same, varied, of the crop's size."""
    return v2.Compose([
        FitSides([(max(config.scale), min(config.scale))], config.ratio),
        Crop(config.crop, most_of_one_class=config.most_of_one_class),
        v2.RandomHorizontalFlip(config.hflip),
        *([PhotometricDistort()] if config.photometric else []),
        FillUp(config.crop, pre.mean),
    ])  # fmt: skip


def detection_transform(config: DetectionAugmentConfig, pre: Preprocessing) -> v2.Transform:
    """(picture, uint8 (3, H, W), and dictionary of boxes, labels and masks) to the same, varied.

    Objects of which less than a pixel is left are dropped.
    """
    square = config.jitter_size, config.jitter_size
    several = FitSides([(config.longest, side) for side in config.short_sides])
    if config.jitter is not None:
        resize = v2.Compose([FitSides([square], config.jitter), Crop(square)])
    elif config.crop_sides:
        least, most = config.crop
        first = FitSides([(config.longest, side) for side in config.crop_sides])
        resize = v2.RandomChoice([several, v2.Compose([first, Crop((least, least), (most, most)), several])])
    else:
        resize = several
    return v2.Compose([
        v2.RandomHorizontalFlip(config.hflip),
        resize,
        *([PhotometricDistort()] if config.photometric else []),
        *([FillUp(square, pre.mean)] if config.jitter is not None else []),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=1),
    ])  # fmt: skip
