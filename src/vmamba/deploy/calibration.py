"""The pictures that a quantised model is calibrated with, and others, kept apart, that it is checked with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor

from vmamba.data.config import DataConfig
from vmamba.data.images import any_image, find_images
from vmamba.data.sources import Split, open_split, split_names, tracked
from vmamba.data.transforms import ImageTransform, Preprocessing, fitted_size
from vmamba.errors import DataError, ImageError

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture] | Split
Reader = Callable[[int], Image.Image | Tensor]  # of one picture, by the number of channels

LEAST = 8  # with fewer, neither the ranges nor the check mean anything
_PIXELS = 2**19  # of a batch: about ten images of 224²


@dataclass(frozen=True)
class Calibration:
    """What a network is shown.

    Attributes:
        seen: (N, C, H, W) to calibrate with: uint8, or float32 if ready for the network.
        held_back: (M, C, H, W), the same, to check with.
        skipped: what could not be read, one message each.
        normalise: from these to what the network takes.
        watched: whether progress is shown, if stderr is a terminal.
    """

    seen: Tensor
    held_back: Tensor
    skipped: tuple[str, ...]
    normalise: Callable[[Tensor], Tensor]
    watched: bool

    def batches(self, images: Tensor, label: str) -> Iterator[Tensor]:
        """Inputs of the network; no batch is of a single image, which torch takes for a special case."""
        size = min(32, max(2, _PIXELS // (images.shape[2] * images.shape[3])))
        starts = range(0, len(images) - 1, size)
        for start in _progress(starts, label, self.watched):
            end = start + size
            yield self.normalise(images[start : end if end < len(images) - 1 else len(images)])


def gather(
    pictures: Pictures,
    chans: int,
    preprocessing: Preprocessing | None,
    samples: int,
    held_back: int,
    raw: bool = False,
    watched: bool = False,
    fitted: bool = False,
    only: tuple[int, int] | None = None,
) -> Calibration:
    """Read as many pictures as are wanted, drawn evenly from all that there are; the draw is always the same.

    Of fewer than `samples + held_back`, a quarter is held back.

    Args:
        pictures: as `vmamba.deploy.quantize` takes them.
        chans: channels of the network's inputs.
        preprocessing: how pictures become inputs; None where they cannot.
        samples, held_back: how many to calibrate and to check with, at most.
        raw: whether the network takes uint8.
        watched: whether progress is shown, if stderr is a terminal.
        fitted: whether the size to preprocess to is, as of dense models, that of which the sides are not exceeded: all
            pictures are then brought to the size of the first one, fitted into it.
        only: height and width, if the network takes no others: pictures of dense models are then stretched to them.

    Raises:
        DataError: too few pictures can be read, or they do not fit the network.
    """
    if samples + held_back < LEAST or samples < 2 or held_back < 2:
        raise DataError(
            f"{samples} + {held_back} pictures are too few: at least {LEAST}, 2 of them to calibrate with and 2 held"
            " back, are needed"
        )
    readers, skipped = _readers(pictures)
    if preprocessing and only:
        preprocessing = replace(preprocessing, img_size=only)
    transform = preprocessing.eval_transform() if preprocessing else None
    if preprocessing and fitted and only:
        transform = _stretching(preprocessing)
    order = iter(torch.randperm(len(readers), generator=torch.Generator().manual_seed(0)).tolist())
    found: list[Tensor] = []
    for _ in _progress(range(min(samples + held_back, len(readers))), "reading", watched):
        for index in order:
            try:
                image = readers[index](chans if transform else 3)
            except ImageError as error:
                skipped.append(str(error))
                continue
            if fitted and not only and preprocessing and not found and isinstance(image, Image.Image):
                transform = _fitted(preprocessing, image.height, image.width).eval_transform()
            found.append(_as_input(image, chans, transform, raw))
            break
    if len(found) < LEAST:
        why = f", and {len(skipped)} cannot ({skipped[0]})" if skipped else ""
        raise DataError(
            f"{len(found)} pictures can be used{why}; at least {LEAST} are needed, and a hundred or more, like those"
            " that the model will meet, are better"
        )
    if len({(image.dtype, image.shape) for image in found}) > 1:
        raise DataError("pictures and tensors, or tensors of several sizes, cannot be mixed; give one kind")
    images = torch.stack(found)
    if only and images.shape[2:] != only:
        raise DataError(
            f"tensors are {images.shape[2]} high and {images.shape[3]} wide, and the network takes {only[0]} and"
            f" {only[1]} alone; give such, or a network for any size"
        )
    checked = min(held_back, max(2, len(found) // 4)) if len(found) < samples + held_back else held_back
    is_ready = raw or images.dtype != torch.uint8
    normalise = (lambda batch: batch) if is_ready or preprocessing is None else preprocessing.normalise
    return Calibration(images[checked:], images[:checked], tuple(skipped), normalise, watched)


def open_pictures(where: str, dataset: str = "") -> Split | list[str]:
    """The training pictures of a data set, or all pictures of a folder that has no training split.

    Args:
        where: a folder, in which pictures may lie at any depth, with classes or without; or a .tar file of class
            folders.
        dataset: the name of a data set that timm's factory knows, as in a recipe: torch/fashion_mnist, hfds/NAME, ...

    Raises:
        DataError: there is no such data.
    """
    if dataset:
        return open_split(DataConfig(root=where, dataset=dataset), training=True)
    if where.lower().endswith(".tar"):
        return open_split(DataConfig(root=where, val_root=where), training=True)
    names = [os.path.join(where, name) for name in split_names("train")]
    if folder := next(filter(os.path.isdir, names), None):
        where = folder
    elif any(os.path.isfile(f"{name}.tar") for name in names):
        return open_split(DataConfig(root=where), training=True)
    files, problems = find_images([where])
    if not files:
        advice = ". Of a data set that timm's factory reads, say which it is (--dataset torch/fashion_mnist)"
        raise DataError("; ".join(problems) + advice * os.path.isdir(where))
    return [where]


def _fitted(pre: Preprocessing, height: int, width: int) -> Preprocessing:
    """To the size of a picture that is fitted into the sides."""
    return replace(pre, img_size=fitted_size(height, width, max(pre.img_size), min(pre.img_size)), crop_pct=1.0)


def _stretching(pre: Preprocessing) -> ImageTransform:
    """PIL image of any size to uint8 (C, H, W) of the sides, whatever its shape."""
    return transforms_imagenet_eval(
        pre.img_size, crop_pct=1.0, crop_mode="squash", interpolation=pre.interpolation, normalize=False
    )


def _readers(pictures: Pictures) -> tuple[list[Reader], list[str]]:
    """How each picture is read, and what is wrong with the places where none are."""
    if isinstance(pictures, (str, os.PathLike)):
        return _readers(open_pictures(os.fspath(pictures)))
    if isinstance(pictures, Split):
        if pictures.is_stream:
            raise DataError(f"{pictures.where} comes as a stream; give pictures that can be drawn from")
        return [partial(_of_split, pictures, index) for index in range(len(pictures))], []
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    elif isinstance(pictures, (np.ndarray, Tensor)):
        pictures = list(pictures) if pictures.ndim == 4 else [pictures]
    readers: list[Reader] = []
    problems: list[str] = []
    for picture in pictures:
        if isinstance(picture, (str, os.PathLike)):
            files, wrong = find_images([picture])
            problems += wrong
            readers += [partial(any_image, file) for file in files]
        elif isinstance(picture, Tensor):
            readers.append(partial(_itself, picture))
        else:
            readers.append(partial(any_image, picture))
    return readers, problems


def _of_split(split: Split, index: int, chans: int) -> Image.Image:
    return split.read(index, chans)[0]


def _itself(tensor: Tensor, chans: int) -> Tensor:
    return tensor


def _as_input(image: Image.Image | Tensor, chans: int, transform: Callable[[Any], Tensor] | None, raw: bool) -> Tensor:
    """uint8 (C, H, W) of a picture; a tensor, which is ready, as it is."""
    if isinstance(image, Tensor):
        if image.dtype != torch.float32 or image.ndim != 3 or len(image) != chans or raw:
            wanted = "with embed, pictures" if raw else f"float32 ({chans}, H, W), ready for the network"
            raise DataError(f"a tensor is {str(image.dtype)[6:]} {tuple(image.shape)}; expected {wanted}")
        return image
    if transform is None:
        why = f"the network takes {chans} channels, and pictures have 1 or 3"
        if chans in (1, 3):
            why = "nothing says how pictures become the network's inputs (preprocessing)"
        raise DataError(f"{why}; give tensors, float32 ({chans}, H, W), ready for the network")
    return transform(image)


def _progress(steps: range, label: str, watched: bool) -> Iterator[int]:
    yield from tracked(steps, label, transient=True) if watched else steps
