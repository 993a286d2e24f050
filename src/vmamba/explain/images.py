"""Pictures in any form, as what a model sees of them: how every function of `vmamba.explain` takes its images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from vmamba.data.images import any_image
from vmamba.data.transforms import Preprocessing, resize_bilinear_uint8
from vmamba.errors import CheckpointError, RecipeError
from vmamba.files import shown
from vmamba.models.detection import MaskRCNN
from vmamba.models.feature_maps import DenseModel
from vmamba.models.segmentation import UPerNet
from vmamba.tasks.detector import fitted_sides, sides_of
from vmamba.tasks.inference import filled_up, seen_size
from vmamba.tasks.prediction import preprocessing_of
from vmamba.tasks.recipe import LEAST
from vmamba.tasks.segmenter import segmentation_preprocessing


class Part(NamedTuple):
    """The part of a picture that a model sees, in pixels of the picture; for a detector, which sees it filled up, it
    reaches beyond the right and the lower edge."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, eq=False)
class Seen:
    """Pictures as a model sees them: resized, cropped, normalised, and for a detector filled up with zeros.

    Attributes:
        images: (B, C, H, W), normalised, in the dtype and on the device of the model.
        pictures: uint8 (B, H, W, 3), RGB: the same to look at.
        names: one a picture: the file's name, or its number.
        parts: one a picture: what part of it is seen.
        sizes: one a picture: its own height and width.
    """

    images: Tensor
    pictures: NDArray[np.uint8]
    names: tuple[str, ...]
    parts: tuple[Part, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the model sees."""
        return self.images.shape[2], self.images.shape[3]

    def drawn(self, image: int = 0) -> tuple[int, int]:
        """Rows and columns of what the model sees that are picture: what is beyond them was filled up."""
        (height, width), part = self.sizes[image], self.parts[image]
        rows, columns = round(height / part.height * self.size[0]), round(width / part.width * self.size[1])
        return min(rows, self.size[0]), min(columns, self.size[1])

    def cell(self, grid: tuple[int, int]) -> tuple[float, float]:
        """Height and width, in pixels, of what a patch of a grid of so many rows and columns stands for."""
        height, width = (_stride(*pair) for pair in zip(self.size, grid, strict=True))
        return height, width

    def one(self, image: int) -> Seen:
        """One of the pictures alone."""
        this = slice(image, image + 1)
        return Seen(self.images[this], self.pictures[this], self.names[this], self.parts[this], self.sizes[this])

    def locate(self, x: float, y: float, image: int = 0) -> tuple[float, float]:
        """Where a place of the picture given (x, y), in its pixels, is in the picture seen.

        Raises:
            RecipeError: it is outside the picture, or in a margin that the model does not see.
        """
        (height, width), part = self.sizes[image], self.parts[image]
        if not (0 <= x < width and 0 <= y < height):
            raise RecipeError(
                f"the place ({x:g}, {y:g}) is outside {self.names[image]}, which is {width}×{height} pixels; expected"
                f" x from 0 to {width - 1} and y from 0 to {height - 1}"
            )
        across, down = self.seen_at(x, y, image)
        if not (0 <= across < self.size[1] and 0 <= down < self.size[0]):
            right, bottom = part.left + part.width, part.top + part.height
            raise RecipeError(
                f"the place ({x:g}, {y:g}) of {self.names[image]} is in the margin that the model's preprocessing cuts"
                f" off: it sees x from {part.left:.0f} to {right:.0f} and y from {part.top:.0f} to {bottom:.0f}"
            )
        return across, down

    def seen_at(self, x: float, y: float, image: int = 0) -> tuple[float, float]:
        """The same of any place, which may lie outside."""
        part = self.parts[image]
        return (x - part.left) / part.width * self.size[1], (y - part.top) / part.height * self.size[0]

    def given(self, x: float, y: float, image: int = 0) -> tuple[float, float]:
        """Where a place of the picture seen is in the picture given: the inverse of `locate`."""
        part = self.parts[image]
        return part.left + x / self.size[1] * part.width, part.top + y / self.size[0] * part.height


AnyPicture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
AnyPictures = AnyPicture | Sequence[AnyPicture] | Seen


def see(
    model: nn.Module,
    pictures: AnyPictures,
    size: int | tuple[int, int] | None = None,
    pre: Preprocessing | None = None,
) -> Seen:
    """What a model sees of pictures: its own preprocessing, as in its test and in `vmamba predict`.

    A classifier sees a crop of the middle; a model for segmentation or detection sees whole pictures, a detector filled
    up below and to the right to multiples of 32 pixels.

    Args:
        model: one of ours or of timm's.
        pictures: one or several of: files, PIL images, uint8 arrays (H, W, 3) in RGB or (H, W) in grey, uint8 tensors
            (3, H, W) or (1, H, W), a batch of such arrays or tensors; or float tensors (C, H, W) or (B, C, H, W), which
            are taken for what the model is given, as they are. What this function returned is returned again.
        size: side, or height and width, that the model is to see; for dense models the short side, or the short and the
            long one. By default those it was made or trained for.
        pre: resizing, cropping and normalisation, where it is not the model that knows.

    Raises:
        ImageError: a file cannot be used.
        RecipeError: no pictures, one without pixels, or several that the model sees in different sizes.
        CheckpointError: the model takes pictures of other than 1 or 3 channels, and these are not tensors of floats.
        TypeError: something that is no picture.
    """
    if isinstance(pictures, Seen):
        return pictures
    views = []
    for number, picture in enumerate(_one_by_one(pictures), start=1):
        name = shown(picture) if isinstance(picture, (str, os.PathLike)) else f"picture {number}"
        shape = picture.size if isinstance(picture, Image.Image) else getattr(picture, "shape", ())
        if 0 in shape:
            raise RecipeError(
                f"{name} has no pixels, its shape is {tuple(shape)}; expected one or more in each direction"
            )
        if isinstance(picture, Tensor) and picture.is_floating_point():
            views.append(_as_given(model, picture, name, pre))
        else:
            views.append(_prepared(model, picture, name, size, pre))
    if not views:
        raise RecipeError("no pictures were given; expected one or more")
    if len({view.size for view in views}) > 1:
        sizes = ", ".join(f"{view.names[0]} {view.size[1]}×{view.size[0]}" for view in views)
        raise RecipeError(f"the model sees these pictures in different sizes, {sizes}: give them one at a time")
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return Seen(
        torch.cat([view.images for view in views]).to(reference),
        np.concatenate([view.pictures for view in views]),
        *(tuple(value for view in views for value in getattr(view, name)) for name in ("names", "parts", "sizes")),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the `with` block, every part of it, and then back as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def name_of(model: nn.Module) -> str:
    """What to call a model: its variant's name, or else its class's."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(getattr(model, "variant", None) or cfg.get("architecture") or type(model).__name__)


def _one_by_one(pictures: Any) -> Iterator[Any]:
    if isinstance(pictures, (np.ndarray, Tensor)):
        yield from pictures if pictures.ndim == 4 else [pictures]
    elif isinstance(pictures, (str, os.PathLike, Image.Image)):
        yield pictures
    elif isinstance(pictures, Sequence):
        yield from pictures
    else:
        raise TypeError(
            f"a {type(pictures).__name__} is no picture; expected a file, a PIL image, an array or a tensor"
        )


def _as_given(model: nn.Module, image: Tensor, name: str, pre: Preprocessing | None) -> Seen:
    """A float tensor (C, H, W), which the model is given as it is."""
    if image.ndim != 3:
        raise TypeError(
            f"{name} is a tensor of shape {tuple(image.shape)}; expected (C, H, W), or a batch (B, C, H, W)"
        )
    pixels = image.detach().cpu().float()
    try:
        pre = pre or preprocessing_of(model)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (pre.mean, pre.std))
        pixels = pixels * std + mean if len(pixels) == pre.in_chans else _stretched(pixels)
    except CheckpointError:
        pixels = _stretched(pixels)
    pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    size = image.shape[1], image.shape[2]
    return Seen(image.detach()[None], _rgb(pixels), (name,), (Part(0, 0, size[1], size[0]),), (size,))


def _stretched(pixels: Tensor) -> Tensor:
    """Channels without colours as one grey channel from 0 to 1."""
    grey = pixels.mean(0, keepdim=True)
    return (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-12)


def _prepared(model: nn.Module, picture: Any, name: str, size: Any, pre: Preprocessing | None) -> Seen:
    """A picture after the model's own preprocessing."""
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) not in (1, 3):
            shape = f"{picture.dtype} {tuple(picture.shape)}"
            raise TypeError(f"{name} is a tensor, {shape}; expected uint8 (3, H, W) or (1, H, W), or floats (C, H, W)")
        picture = to_pil_image(picture.cpu())
    pre = pre or preprocessing_for(model, size)
    image = any_image(picture, pre.in_chans)
    own = image.height, image.width
    if isinstance(model, DenseModel):
        pixels, least = pil_to_tensor(image), 1 if isinstance(model, MaskRCNN) else LEAST
        pixels = resize_bilinear_uint8(pixels, seen_size(pixels, pre.img_size, least))
        part = Part(0, 0, image.width, image.height)
    else:
        pixels, part = _cropped(image, pre)
    seen = Seen(pre.normalise(pixels[None]), _rgb(pixels), (name,), (part,), (own,))
    return _filled_up(seen, pre) if isinstance(model, MaskRCNN) else seen


def _filled_up(seen: Seen, pre: Preprocessing) -> Seen:
    """A picture as a detector's batch holds it; zeros after normalisation are to look at as the mean colour."""
    (height, width), images = seen.size, filled_up(seen.images)
    rows, columns = images.shape[2:]
    pictures = np.empty((1, rows, columns, 3), np.uint8)
    pictures[:] = np.round(np.multiply(pre.mean, 255))
    pictures[:, :height, :width] = seen.pictures
    part = Part(0, 0, seen.parts[0].width * columns / width, seen.parts[0].height * rows / height)
    return replace(seen, images=images, pictures=pictures, parts=(part,))


def preprocessing_for(
    model: nn.Module, size: int | tuple[int, int] | None = None, stored: dict[str, Any] | None = None
) -> Preprocessing:
    """What a model of any task expects of pictures.

    Args:
        model: one of ours or of timm's.
        size: see `see`.
        stored: metadata of the model's file, if it has any; without, the model itself is asked.

    Raises:
        CheckpointError: it takes images of other than 1 or 3 channels.
    """
    asked = SimpleNamespace(img_size=size)
    if isinstance(model, UPerNet):
        return segmentation_preprocessing(model, asked, stored)
    pre = preprocessing_of(model, asked, stored)
    if isinstance(model, MaskRCNN):
        return replace(pre, img_size=fitted_sides(size or (stored or {}).get("sides") or sides_of(model)))
    return pre


def _cropped(image: Image.Image, pre: Preprocessing) -> tuple[Tensor, Part]:
    """A picture after a classifier's test transform, uint8 (C, H, W), and what part of it that is."""
    step: Any
    view: Any = image
    left = top = 0.0
    across = down = 1.0  # pixels of the picture in one of the view
    for step in pre.eval_transform().transforms:  # type: ignore[attr-defined]
        before = view
        view = step(view)
        if isinstance(view, Image.Image) and view.size != before.size:
            if "Crop" in type(step).__name__:
                left += round((before.width - view.width) / 2) * across
                top += round((before.height - view.height) / 2) * down
            else:
                across, down = across * before.width / view.width, down * before.height / view.height
    pixels = torch.as_tensor(view)
    return pixels, Part(left, top, pixels.shape[2] * across, pixels.shape[1] * down)


def in_pixels(values: Tensor, cell: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Maps (..., H, W) of patches in pixels, (..., *size), each patch as the rectangle of `cell` that it stands for."""
    for dim, (pixels, side) in enumerate(zip(size, cell, strict=True), start=-2):
        values = values.index_select(dim, _patches(pixels, side, values.shape[dim]).to(values.device))
    return values


def in_patches(values: Tensor, cell: tuple[float, float], grid: tuple[int, int]) -> Tensor:
    """The other way: maps (..., H, W) of pixels as (..., *grid), of each patch the mean over its pixels."""
    for dim, (patches, side) in enumerate(zip(grid, cell, strict=True), start=-2):
        belongs = F.one_hot(_patches(values.shape[dim], side, patches), patches).to(values)
        values = ((belongs / belongs.sum(0).clamp(min=1)).T @ values.movedim(dim, -2)).movedim(-2, dim)
    return values


def token_grid(model: nn.Module, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the tokens of one of timm's ViTs for images of this height and width; None of others."""
    known: Any = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    return known(size) if known else None


def _patches(pixels: int, side: float, patches: int) -> Tensor:
    """Of each pixel of a row the patch that it belongs to."""
    return ((torch.arange(pixels) + 0.5) / side).long().clamp(max=patches - 1)


def _stride(pixels: int, patches: int) -> float:
    """Pixels a patch: a power of two where that explains the grid, whose last patch may then be cut off or left out."""
    powers = [2**n for n in range(16)]
    whole = [side for side in powers if -(-pixels // side) == patches]
    whole += [side for side in powers if pixels // side == patches]
    return float(whole[0]) if whole else pixels / patches


def _rgb(pixels: Tensor) -> NDArray[np.uint8]:
    """uint8 (1 or 3, H, W) as (1, H, W, 3)."""
    return pixels.expand(3, -1, -1).permute(1, 2, 0)[None].cpu().numpy()
