"""The effective receptive field: how far one place of a feature map hears, measured as in the paper's figure of it.

For a place q of a stage's map F, the contribution of the pixel (y, x) is |∂(Σ_c F[c, q]) / ∂image[:, y, x]|, summed
over the image's channels and over many images. A convolution hears its neighbourhood; VMamba hears the whole image.
How far is told by squares around the field's centre, the median of its rows and of its columns.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models import get_model_args
from torch import Tensor, nn

from vmamba.data.images import find_images
from vmamba.data.sources import tracked
from vmamba.errors import ImageError, RecipeError
from vmamba.explain.images import evaluating, name_of, see, token_grid
from vmamba.explain.resolution import at_size
from vmamba.files import shown
from vmamba.models.vmamba import VMamba

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vmamba.explain.run import Explanation

FLOOR = 1e-4  # of the strongest contribution: where the logarithmic scale of the pictures ends


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """Which pixels one place of a feature map hears, and how much of each.

    Attributes:
        name: of the model.
        contributions: float64 (H, W), the share of each pixel of the image; they add up to 1.
        centre: of the contributions, (y, x) in pixels from the image's upper left corner. Half of the total lies above
            and half below, half to the left and half to the right. It need not be the middle of the patch that the
            place stands for: strided convolutions with padding listen further up and to the left.
        images: how many were looked at.
    """

    name: str
    contributions: NDArray[np.float64]
    centre: tuple[float, float]
    images: int

    def within(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sides of ever larger squares around the centre, in pixels, and the share of the total inside each."""
        height, width = self.contributions.shape
        down = np.abs(np.arange(height) + 0.5 - self.centre[0])[:, None]
        across = np.abs(np.arange(width) + 0.5 - self.centre[1])
        sides = 2 * np.maximum(down, across) + 1
        different, place = np.unique(sides.round(6), return_inverse=True)
        return different, np.bincount(place.ravel(), self.contributions.ravel()).cumsum()

    def side(self, share: float) -> float:
        """Side in pixels of the smallest square around the centre that holds this share of the total."""
        sides, shares = self.within()
        return float(sides[np.searchsorted(shares, share - 1e-9)])

    def area(self, share: float) -> float:
        """Share of the image's pixels that the strongest of them take up which together hold this share of the total.

        A field that is the same everywhere has area(0.9) = 0.9; a sharp one much less.
        """
        strongest_first = np.sort(self.contributions, axis=None)[::-1].cumsum()
        return float(np.searchsorted(strongest_first, share - 1e-9) + 1) / self.contributions.size

    def numbers(self) -> dict[str, Any]:
        """Sides and areas that hold 50 and 90 % of the total, as plain values for JSON."""
        shares = {f"{kind}_{share:.0%}".rstrip("%"): getattr(self, kind)(share)
                  for kind in ("side", "area") for share in (0.5, 0.9)}  # fmt: skip
        size = list(self.contributions.shape)
        return {"name": self.name, "images": self.images, "img_size": size, "centre": list(self.centre), **shares}


def receptive_field(
    model: nn.Module,
    images: Any,
    stage: int = -1,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 4,
    name: str | None = None,
) -> ReceptiveField:
    """Measure the effective receptive field of the middle place of a stage's map.

    Args:
        model: one of ours (a classifier, or a dense model, whose backbone is then looked at), another of timm's, or any
            module that maps (B, C, H, W) to (B, C', H', W'). It is not changed: gradients of parameters are not
            touched, and what it computes in evaluation mode is what is measured, on its device.
        images: a batch (B, C, H, W), normalised, or one or more pictures: files, folders, PIL images, uint8 arrays.
        stage: of the list `model.feature_info`, counted from 0 or from the end; for a ViT that is a block. Modules
            without such a list have one stage, their output.
        img_size: height and width that pictures are cut to, instead of the model's own.
        batch_size: images at a time.
        name: for `ReceptiveField.name`; by default that of the model.

    Raises:
        ValueError: no such stage, or an output that has no place.
        RecipeError: no images, or images of different sizes; or the middle hears nothing, or nothing that is finite.
        ImageError, TypeError: a picture cannot be used.
    """
    total, count = torch.zeros(()), 0
    sized = model
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        for batch in tracked(list(_batches(model, images, img_size, batch_size)), "listening"):
            x = batch.detach().clone().requires_grad_()
            sized = at_size(sized, x.shape[2:])
            features = stage_map(sized, x, stage)
            row, column = features.shape[2] // 2, features.shape[3] // 2
            (gradient,) = torch.autograd.grad(features[:, :, row, column].sum(), x, allow_unused=True)
            part = torch.zeros_like(x) if gradient is None else gradient
            part = part.double().abs().sum((0, 1)).cpu()
            if count and part.shape != total.shape:
                raise RecipeError(
                    f"the model sees these images in sizes {tuple(total.shape)} and {tuple(part.shape)}: give img_size,"
                    " or images of one size"
                )
            total = total + part
            count += len(x)
    if not count:
        raise RecipeError("no images were given; expected one or more")
    if not 0 < float(total.sum()) < float("inf"):
        raise RecipeError(
            f"the contributions to the middle of the map add up to {float(total.sum())}: either nothing of the image"
            " arrives there (the channels of a normalised output always add up to the same), or they are not finite"
        )
    contributions = (total / total.sum()).numpy()
    centre = _median(contributions.sum(1)), _median(contributions.sum(0))
    return ReceptiveField(name or name_of(model), contributions, centre, count)


def _median(shares: NDArray[np.float64]) -> float:
    """Where half of the total is on either side, in pixels: the middle of a row or column, or between two of them."""
    cumulated = shares.cumsum()
    first, last = (int(np.searchsorted(cumulated, 0.5 + margin)) for margin in (-1e-9, 1e-9))
    return (first + last + 1) / 2


def stage_map(model: nn.Module, x: Tensor, stage: int = -1) -> Tensor:
    """What a stage of any of timm's models puts out for normalised images, (B, C, H', W').

    The stage is listened to while the model itself runs, so hooks, replaced parts and subclasses count.

    Args:
        model: see `receptive_field`.
        x: (B, C, H, W).
        stage: see `receptive_field`.
    """
    found = _staged(model)
    if found is None:
        features = model(x)
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise ValueError(f"{type(model).__name__} has no feature_info and no output of shape (B, C, H, W)")
        return features
    network, names = found
    if not -len(names) <= stage < len(names):
        raise ValueError(
            f"stage is {stage}; {name_of(network)} has {len(names)}: expected {-len(names)} to {len(names) - 1}"
        )
    caught: list[Tensor] = []
    thread = threading.get_ident()

    def catch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if threading.get_ident() != thread:  # somebody else uses the model meanwhile
            return
        caught.append(output)
        raise _CaughtError

    handle = network.get_submodule(names[stage]).register_forward_hook(catch)
    try:
        model(x)
    except _CaughtError:
        pass
    finally:
        handle.remove()
    if not caught:
        raise ValueError(f"{name_of(model)} does not run its stage {names[stage]}")
    return _as_map(network, caught[0], x)


class _CaughtError(Exception):
    """The stage has put out what was asked for; nothing further needs to be computed."""


def _staged(model: nn.Module) -> tuple[nn.Module, list[str]] | None:
    """The network in a model that lists its stages, and the names of the modules that put them out."""
    for module in model.modules():
        info: Any = getattr(module, "feature_info", None)
        listed = [each["module"] for each in getattr(info, "info", info) or []]
        inside = {name for name, _ in module.named_modules()}
        names = [next((name for name in (each, each.replace(".", "_")) if name in inside), None) for each in listed]
        if names and None not in names:
            return module, names  # type: ignore[return-value]
    return None


def _as_map(network: nn.Module, output: Tensor, x: Tensor) -> Tensor:
    """Channels first, on the grid."""
    if output.ndim == 3:  # tokens, of which the first may belong to no place
        grid = token_grid(network, (x.shape[2], x.shape[3]))
        if grid is None:
            raise ValueError(f"the stage puts out {tuple(output.shape)}; expected a map or the patches of a ViT")
        patches = output[:, output.shape[1] - grid[0] * grid[1] :]
        return patches.transpose(1, 2).unflatten(2, grid)
    return output.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else output


def untrained(model: nn.Module) -> nn.Module:
    """A copy whose parameters are drawn anew, to compare a trained model with what it was before.

    Raises:
        RecipeError: neither one of ours nor timm's, so nobody knows how it was drawn.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if any(isinstance(module, VMamba) for module in model.modules()):
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, VMamba):
                module.init_weights()
        return model
    if not architecture or not hasattr(model, "_model_args"):
        raise RecipeError(
            f"how this {type(model).__name__} was drawn is not known; expected a model with a VMamba inside, or a"
            " classifier of timm's. Make an untrained one yourself and measure it with receptive_field"
        )
    return timm.create_model(architecture, **get_model_args(model)).to(next(model.parameters()).device)


def _batches(model: nn.Module, images: Any, img_size: int | tuple[int, int] | None, count: int) -> Iterator[Tensor]:
    """Normalised images, (B, C, H, W), so many at a time, on the model's device."""
    if isinstance(images, Tensor):
        reference = next((p for p in model.parameters() if p.is_floating_point()), images)
        if images.ndim != 4 or not images.is_floating_point():
            raise TypeError(
                f"the images are {images.dtype} {tuple(images.shape)}; expected normalised ones (B, C, H, W)"
            )
        yield from images.to(reference).split(count) if len(images) else ()
        return
    pictures = _opened(images)
    for start in range(0, len(pictures), count):
        yield see(model, pictures[start : start + count], img_size).images


def _opened(images: Any) -> list[Any]:
    """Every picture, with folders and patterns opened."""
    if isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    pictures: list[Any] = []
    for image in images:
        found, problems = find_images([image]) if isinstance(image, str | os.PathLike) else ([image], [])
        if problems:
            raise ImageError("; ".join(problems))
        pictures += found
    return pictures


def draw_receptive_fields(fields: Sequence[ReceptiveField], columns: int = 5) -> Figure:
    """The fields beside each other, and the share of each that ever larger squares hold.

    One logarithmic scale holds for all, from the strongest pixel of each field down to a ten-thousandth of it. The
    squares, around each field's centre, hold 50 % (solid) and 90 % (dashed) of it.

    Args:
        fields: one picture each.
        columns: pictures in a row.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    from vmamba.explain.figures import COLOURS, GREY, HEAT, bare, new_figure, show, text_of, wrapped

    columns, norm = min(columns, len(fields)), LogNorm(FLOOR, 1)
    rows = -(-len(fields) // columns)
    title = "Effective receptive field of the middle of the map"
    mean = f", mean over {fields[0].images} images" if fields[0].images > 1 else ""
    note = f"size of the gradient of its channels by each pixel{mean}; the squares hold 50 % (solid) and 90 % (dashed)"
    names, labels = ([wrapped(field.name, width, size) for field in fields] for width, size in ((2, 10), (3.2, 8)))
    above = 0.17 * max(name.count("\n") for name in names)
    legend = 0.16 * sum(label.count("\n") + 1 for label in labels)
    figure = new_figure(2.5 * columns + 4.6, max((2.7 + above) * rows + 0.8, 3.5 + legend), title, note)
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(2.5 * columns + 0.8, 3.8)))
    grid = left.add_gridspec(rows, columns + 1, width_ratios=[*[1] * columns, 0.05])
    for number, (field, name) in enumerate(zip(fields, names, strict=True)):
        place = left.add_subplot(grid[divmod(number, columns)], anchor="W")
        strength = field.contributions / field.contributions.max()
        show(place, np.maximum(strength, FLOOR), name, norm=norm, cmap=HEAT)
        below = f"50 % in {field.side(0.5):.0f} px, 90 % in {field.side(0.9):.0f} px"
        place.set_xlabel(below, loc="left", fontsize=8, color=GREY)
        for share, line in ((0.5, "-"), (0.9, "--")):
            side, (y, x) = field.side(share), field.centre
            place.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, fill=False, ec="white", lw=1, ls=line))
        place.set(xlim=(0, strength.shape[1]), ylim=(strength.shape[0], 0))
    bar = left.colorbar(ScalarMappable(norm, HEAT), cax=left.add_subplot(grid[:, columns]))
    bar.set_label("contribution, strongest = 1", color=GREY, fontsize=8)
    bar.ax.tick_params(colors=GREY, labelsize=8)
    growth = right.subplots()
    bare(growth, "share inside a square around its centre", "side of the square, pixels")
    for number, (field, label) in enumerate(zip(fields, labels, strict=True)):
        sides, shares = field.within()
        growth.plot(sides, 100 * shares, color=COLOURS[number % len(COLOURS)], lw=1.8, label=text_of(label))
    growth.set(xlim=(0, min(max(field.contributions.shape) for field in fields)), ylim=(0, 100))
    growth.yaxis.set_major_formatter("{x:g} %")
    right.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def report(run: Explanation, photos: Sequence[str]) -> dict[str, Any]:
    """`vmamba explain --what field`: the field of the last map over the photos, before and after training."""
    if not photos:
        raise RecipeError("the receptive field is measured on photos; name some, or a folder")
    seen = [run.see(photo).images for photo in photos]
    if len({images.shape for images in seen}) > 1:
        raise RecipeError(
            "the model sees these photos in different sizes; the receptive field needs photos of one size"
        )
    looks: list[tuple[str, nn.Module, Any]] = [(shown(run.weights.source), run.model, torch.cat(seen))]
    looks += [(name, model, photos) for name, model in run.others.items()]
    fields = [
        receptive_field(each, images, name=f"{name}, {when}")
        for name, model, images in looks
        for when, each in (("as drawn", untrained(model)), ("trained", model))
    ]
    figure = run.write(draw_receptive_fields(fields, columns=2), "field")
    return {"figure": figure, "models": [field.numbers() for field in fields]}
