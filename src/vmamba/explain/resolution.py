"""Accuracy against the size of the images that a trained classifier is tested on: the paper's input-scaling figure."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vmamba.data.config import DataConfig
from vmamba.data.images import any_image
from vmamba.data.sources import Split, open_split, tracked
from vmamba.errors import RecipeError
from vmamba.files import shown
from vmamba.models.feature_maps import DenseModel
from vmamba.tasks.prediction import preprocessing_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vmamba.explain.run import Explanation


@dataclass(frozen=True)
class AccuracyBySize:
    """How often one model is right at each size of the images.

    Attributes:
        name: of the model.
        sizes: sides of the square images, in pixels, smallest first.
        accuracies: the share of the pictures whose most likely class is the true one, at each size.
        images: number of pictures.
    """

    name: str
    sizes: tuple[int, ...]
    accuracies: tuple[float, ...]
    images: int


def accuracy_by_size(
    models: Mapping[str, nn.Module],
    pictures: Split | Sequence[tuple[Any, int]],
    sizes: Sequence[int] = (224, 288, 384, 512, 640, 768),
    batch_size: int = 16,
) -> list[AccuracyBySize]:
    """Test trained classifiers on the same pictures at several sizes.

    Each picture is resized and cropped as in the model's own test, but to another size; nothing is trained again.

    Args:
        models: by the name to show, each in evaluation mode where it is to be run. Those with a fixed image size (ViT,
            Swin) are copied, and the copy's positions interpolated to each size.
        pictures: labelled: what `vmamba.data.sources.open_split` opens, or pairs of a picture (file, PIL image or uint8
            array) and the number of its class among the model's outputs.
        sizes: sides of the images in pixels.
        batch_size: images at a time.

    Raises:
        ValueError: no pictures, or no sizes.
        ImageError, DataError: a picture cannot be read.
    """
    sizes = sorted(set(sizes))
    if not len(pictures) or not sizes:
        raise ValueError(f"there are {len(pictures)} pictures and {len(sizes)} sizes; expected at least one of each")
    found = []
    for name, model in models.items():
        right = [_right(model, pictures, size, batch_size, f"{name} at {size}²") for size in sizes]
        found.append(AccuracyBySize(name, tuple(sizes), tuple(n / len(pictures) for n in right), len(pictures)))
    return found


def draw_accuracy_by_size(found: Sequence[AccuracyBySize]) -> Figure:
    """Accuracy against the side of the image."""
    from vmamba.explain.figures import COLOURS, bare, new_figure

    figure = new_figure(5.6, 4.2, "Accuracy against the size of the images", f"{found[0].images:,} pictures")
    axes = figure.subplots()
    bare(axes, "", "side of the image, pixels")
    for number, each in enumerate(found):
        percent = [100 * accuracy for accuracy in each.accuracies]
        axes.plot(each.sizes, percent, color=COLOURS[number % len(COLOURS)], lw=2, marker="o", ms=4, label=each.name)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.legend(frameon=False, fontsize=8)
    return figure


@torch.inference_mode()
def _right(model: nn.Module, pictures: Any, size: int, batch_size: int, what: str) -> int:
    """How many pictures are classified right."""
    pre = replace(preprocessing_of(model), img_size=(size, size))
    transform, sized = pre.eval_transform(), at_size(model, (size, size))
    device, right = next(model.parameters()).device, 0
    for start in tracked(range(0, len(pictures), batch_size), what):
        images, labels = [], []
        for index in range(start, min(start + batch_size, len(pictures))):
            picture, label = pictures.read(index, pre.in_chans) if isinstance(pictures, Split) else pictures[index]
            images.append(transform(any_image(picture, pre.in_chans)))
            labels.append(label)
        answers = sized(pre.normalise(torch.stack(images).to(device))).argmax(1)
        right += int((answers.cpu() == torch.tensor(labels)).sum())
    return right


def at_size(model: nn.Module, size: Sequence[int]) -> nn.Module:
    """The model itself if it takes images of any size, else a copy whose positions are interpolated to this one.

    A Swin's windows stay as large as they are: timm alone would let them grow with the image, and their cost with it.

    Args:
        model: one of ours or of timm's.
        size: height and width.
    """
    embed = getattr(model, "patch_embed", None)
    fixed = getattr(embed, "img_size", None)
    if fixed is None or tuple(fixed) == tuple(size) or not hasattr(model, "set_input_size"):
        return model
    model = copy.deepcopy(model)
    resize: Any = model.set_input_size
    windows = [module.window_size for module in model.modules() if hasattr(module, "window_size")]
    kept = {"window_size": windows[0]} if windows and "window_size" in inspect.signature(resize).parameters else {}
    resize(img_size=tuple(size), **kept)
    return model


def sizes_from(model: nn.Module, factors: Sequence[float]) -> list[int]:
    """Multiples of 32 near so many times the side that a model is meant for."""
    own: Any = getattr(model, "img_size", None) or preprocessing_of(model).img_size
    return sorted({max(32, 32 * round(factor * min(own) / 32)) for factor in factors})


def report(run: Explanation, photos: Sequence[str]) -> dict[str, Any]:
    """`vmamba explain --what accuracy`: on labelled pictures, at one to three times the side of training."""
    config = run.config
    if config.labelled is None:
        raise RecipeError("accuracy is measured on pictures with known classes: name their folder with --labelled")
    if isinstance(run.model, DenseModel):
        raise RecipeError(f"{shown(run.weights.source)} is no classifier; accuracy by size is measured on classifiers")
    split = open_split(DataConfig(root=config.labelled), False, run.weights.metadata.get("class_names"))
    count = min(config.limit, len(split))
    pictures = [split.read(round(i * len(split) / count), 3) for i in range(count)]
    models = {shown(run.weights.source): run.model, **run.others}
    found = accuracy_by_size(models, pictures, sizes_from(run.model, (1, 1.25, 1.5, 2, 3)))
    return {"figure": run.write(draw_accuracy_by_size(found), "accuracy"), "models": [vars(each) for each in found]}
