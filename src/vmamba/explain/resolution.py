"""Accuracy against the size of the images that a trained classifier is tested on: the paper's input-scaling figure."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vmamba.data.config import DataConfig
from vmamba.data.images import any_image
from vmamba.data.sources import Split, open_split, tracked
from vmamba.errors import DataError, RecipeError
from vmamba.explain.images import evaluating, name_of
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
    limit: int | None = None,
) -> list[AccuracyBySize]:
    """Test trained classifiers on the same pictures at several sizes.

    Each picture is resized and cropped as in the model's own test, but to another size; nothing is trained again.

    Args:
        models: by the name to show, each where it is to be run. Those with a fixed image size (ViT, Swin) are copied,
            and the copy's positions interpolated to each size.
        pictures: labelled: what `vmamba.data.sources.open_split` opens, or pairs of a picture (file, PIL image or uint8
            array) and the number of its class among the model's outputs.
        sizes: sides of the images in pixels.
        batch_size: images at a time.
        limit: of more pictures, so many are taken at even distances; by default all.

    Raises:
        ValueError: no pictures, or no sizes.
        DataError: the pictures are of more or fewer classes than a model tells apart.
        ImageError: a picture cannot be read.
    """
    sizes = sorted(set(sizes))
    count = len(pictures) if limit is None else min(limit, len(pictures))
    if count < 1 or not sizes:
        raise ValueError(f"there are {count} pictures and {len(sizes)} sizes; expected at least one of each")
    if isinstance(pictures, Split) and pictures.class_names:
        _check_classes(models, pictures.class_names, pictures.where)
    found = []
    for name, model in models.items():
        right = [_right(model, pictures, size, count, batch_size, f"{name} at {size}²") for size in sizes]
        found.append(AccuracyBySize(name, tuple(sizes), tuple(n / count for n in right), count))
    return found


def _check_classes(models: Mapping[str, nn.Module], class_names: Sequence[str], where: str) -> None:
    for name, model in models.items():
        known = getattr(model, "num_classes", len(class_names))
        if known != len(class_names):
            raise DataError(
                f"{where} has {len(class_names)} classes, and {name} tells {known} apart; expected the same classes in"
                " the same order: give pictures of all the classes that the model was trained on"
            )


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
def _right(model: nn.Module, pictures: Any, size: int, count: int, batch_size: int, what: str) -> int:
    """How many of so many pictures are classified right."""
    pre = replace(preprocessing_of(model), img_size=(size, size))
    transform, sized = pre.eval_transform(), at_size(model, (size, size))
    device, right = next(model.parameters()).device, 0
    with evaluating(sized):
        for pairs in labelled_batches(pictures, count, batch_size, pre.in_chans, what):
            images = torch.stack([transform(any_image(picture, pre.in_chans)) for picture, _ in pairs])
            answers = sized(pre.normalise(images.to(device))).argmax(1)
            right += int((answers.cpu() == torch.tensor([label for _, label in pairs])).sum())
    return right


def labelled_batches(
    pictures: Split | Sequence[tuple[Any, int]], count: int, batch_size: int, in_chans: int, what: str
) -> Iterator[list[tuple[Any, int]]]:
    """So many of some labelled pictures, at even distances, with the numbers of their classes.

    Args:
        pictures: a split, or pairs.
        count: at most as many as there are.
        batch_size: pictures at a time.
        in_chans: channels that pictures of a split are read with, 1 or 3.
        what: is going on, beside the bar that shows how far it is.
    """
    chosen = [round(i * len(pictures) / count) for i in range(count)]
    for start in tracked(range(0, count, batch_size), what):
        batch = chosen[start : start + batch_size]
        yield [pictures.read(i, in_chans) if isinstance(pictures, Split) else pictures[i] for i in batch]


def open_labelled(where: str, class_names: Sequence[str] | None = None) -> Split:
    """The validation split of a folder, or a .tar file of one.

    Raises:
        DataError: see `vmamba.data.sources.open_split`.
    """
    alone = where if where.lower().endswith(".tar") else None
    return open_split(DataConfig(root=where, val_root=alone), False, class_names)


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


@contextmanager
def seeing(model: nn.Module, size: tuple[int, int]) -> Iterator[nn.Module]:
    """The model `at_size`, to use it in the `with` block.

    Raises:
        RecipeError: it fails there, being one of timm's for images of one size, which this is not.
    """
    try:
        yield at_size(model, size)
    except (AssertionError, RuntimeError) as error:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        own = preprocessing_of(model).img_size if cfg.get("fixed_input_size") else size
        if own == size:
            raise
        raise RecipeError(
            f"{name_of(model)} was made for images of {own[0]}×{own[1]} pixels; those given are {size[0]}×{size[1]}, at"
            f" which it fails ({error}): give no size, or take a model for any size"
        ) from error


def sizes_from(model: nn.Module, factors: Sequence[float]) -> list[int]:
    """Multiples of 32 near so many times the side that a model is meant for."""
    own = min(preprocessing_of(model).img_size)
    return sorted({max(32, 32 * round(factor * own / 32)) for factor in factors})


def report(run: Explanation, photos: Sequence[str]) -> dict[str, Any]:
    """`vmamba explain --what accuracy`: on labelled pictures, at one to three times the side of training."""
    config = run.config
    if config.labelled is None:
        raise RecipeError("accuracy is measured on pictures with known classes: name their folder with --labelled")
    if isinstance(run.model, DenseModel):
        raise RecipeError(f"{shown(run.weights.source)} is no classifier; accuracy by size is measured on classifiers")
    split = open_labelled(config.labelled, run.weights.metadata.get("class_names"))
    models = {shown(run.weights.source): run.model, **run.others}
    found = accuracy_by_size(models, split, sizes_from(run.model, (1, 1.25, 1.5, 2, 3)), limit=config.limit)
    return {"figure": run.write(draw_accuracy_by_size(found), "accuracy"), "models": [vars(each) for each in found]}
