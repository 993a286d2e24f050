"""Whole pictures through dense models, prepared as for the published results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.data.transforms import Preprocessing, fitted_size, resize_bilinear_uint8
from vmamba.models.detection import Detections, MaskRCNN
from vmamba.models.segmentation import UPerNet, resized
from vmamba.tasks.recipe import LEAST

MULTIPLE = 32  # of which the sides of a batch for a detector are
PUBLISHED_SIDES = (800, 1333)  # what the short and the long side of a detector's pictures are fitted into
SEVERAL = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the ratios of the published multi-scale results


def seen_size(picture: Tensor, sides: Sequence[int], least: int = LEAST) -> tuple[int, int]:
    """Height and width at which a dense network sees a whole picture.

    Args:
        picture: (C, H, W).
        sides: the short and the long side that it is fitted into.
        least: pixels a side; a narrower strip becomes broader. 1 for detectors, whose pictures are filled up instead.
    """
    height, width = fitted_size(picture.shape[1], picture.shape[2], max(sides), min(sides))
    return max(height, least), max(width, least)


def segment(
    model: UPerNet,
    picture: Tensor,
    scale: tuple[int, int] = (512, 2048),
    ratios: Sequence[float] = (),
    flip: bool = False,
) -> Tensor:
    """Scores of every class at every pixel of a picture; the class is that of the highest.

    The logits are resized twice, to what the network saw and then to the picture. Nothing is padded, see `seen_size`.

    Args:
        model: in evaluation mode.
        picture: uint8 (3, H, W), RGB.
        scale: what the network sees has at most this short and this long side.
        ratios: if given, the network sees the picture at each of these ratios of its own size instead, `SEVERAL` for
            the published multi-scale results; the scores are then the mean of the probabilities.
        flip: whether the network sees each of them mirrored as well; the scores are then the mean of the probabilities.

    Returns:
        float32 (num_classes, H, W): logits, or probabilities where several are averaged.
    """
    height, width = picture.shape[1:]
    bounds = [(int(height * ratio + 0.5), int(width * ratio + 0.5)) for ratio in ratios] or [scale]
    scores = torch.zeros(model.num_classes, height, width, device=picture.device)
    for sides in bounds:
        seen = resize_bilinear_uint8(picture, seen_size(picture, sides))
        images = _preprocessing_of(model).normalise(seen[None])
        for x in (images, images.flip(3)) if flip else (images,):
            logits = model(x)
            logits = resized((logits if x is images else logits.flip(3)).float(), (height, width))[0]
            if len(bounds) == 1 and not flip:
                return logits
            scores += logits.softmax(0)
    return scores / (len(bounds) * (1 + flip))


def detect(
    model: MaskRCNN,
    pictures: Sequence[Tensor],
    scale: tuple[int, int] = PUBLISHED_SIDES,
    multiple: int = MULTIPLE,
    least_score: float = 0.0,
) -> list[Detections]:
    """Objects in pictures of any sizes, in pixels of the pictures.

    Args:
        model: in evaluation mode.
        pictures: uint8 (3, H, W), RGB; at least one.
        scale: what the network sees has at most this short and this long side.
        multiple: it is padded with zeros, after normalisation, to a multiple of this and to the largest picture's size.
        least_score: see `MaskRCNN.forward`.

    Returns:
        What `MaskRCNN.forward` gives, for each picture.
    """
    file_sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
    sizes = [seen_size(picture, scale, least=1) for picture in pictures]
    resized_pictures = [resize_bilinear_uint8(picture, size) for picture, size in zip(pictures, sizes, strict=True)]
    images, _ = padded(resized_pictures, _preprocessing_of(model), multiple)
    return model(images, sizes=sizes, file_sizes=file_sizes, least_score=least_score)


def padded(
    batch: Sequence[Tensor], pre: Preprocessing, multiple: int = MULTIPLE
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pictures of different sizes as one batch, normalised and then filled up with zeros below and to the right.

    Args:
        batch: uint8 (3, H, W) each.
        pre: how they are normalised.
        multiple: the sides of the batch are multiples of this.

    Returns:
        float32 (B, 3, H, W), and the height and width of each picture.
    """
    sizes = [(picture.shape[1], picture.shape[2]) for picture in batch]
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    images = [
        F.pad(pre.normalise(picture[None])[0], (0, width - columns, 0, height - rows))
        for picture, (rows, columns) in zip(batch, sizes, strict=True)
    ]
    return torch.stack(images), sizes


def filled_up(images: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) of one size, filled up as `padded` does; traced, for open sizes too."""
    # Of numbers above zero alone: ONNX rounds quotients towards it.
    below, right = ((side + MULTIPLE - 1) // MULTIPLE * MULTIPLE - side for side in images.shape[2:])
    return F.pad(images, (0, right, 0, below))


def _preprocessing_of(model: UPerNet | MaskRCNN) -> Preprocessing:
    return Preprocessing.from_dict(dict(model.pretrained_cfg))
