"""Shallow is detail, deep is meaning: two numbers for each stage of a backbone, measured on labelled pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from vmamba.data.sources import Split
from vmamba.errors import DataError, RecipeError
from vmamba.explain.images import see
from vmamba.explain.resolution import at_size, labelled_batches, open_labelled
from vmamba.explain.stage_maps import StageMaps, stage_outputs
from vmamba.files import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vmamba.explain.run import Explanation

_PENALTIES = torch.logspace(-4, 4, 17, dtype=torch.float64)  # times the number of pictures
_FOLDS = 5


@dataclass(frozen=True)
class DepthProfile:
    """What is in the stages of one model.

    Attributes:
        name: of the model.
        edges: one a stage: how much the maps follow the edges (`StageMaps.edges`), mean of the pictures.
        accuracy: one a stage: how often a linear probe on the maps' means names the right class (`linear_probe`).
        deviation: one a stage: the standard deviation of that over the folds.
        pictures, classes: how many there were.
    """

    name: str
    edges: tuple[float, ...]
    accuracy: tuple[float, ...]
    deviation: tuple[float, ...]
    pictures: int
    classes: int


def depth_profiles(
    models: Mapping[str, nn.Module],
    pictures: Split | Sequence[tuple[Any, int]],
    limit: int = 1000,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
) -> list[DepthProfile]:
    """How much of detail and of meaning is in each stage of some models, on the same labelled pictures.

    Args:
        models: by the name to show: classifiers of ours or of timm, see `stage_maps`.
        pictures: what `vmamba.data.sources.open_split` opens, or pairs of a picture (see `see`) and its class's number.
        limit: of more pictures, so many are taken at even distances.
        size: side, or height and width, that all models are to see; by default each its own.
        batch_size: pictures at a time.

    Raises:
        DataError: too few pictures, or of a single class.
        RecipeError: a model gives no maps of its stages.
    """
    count = min(limit, len(pictures))
    found = []
    for name, model in models.items():
        sized = model if size is None else at_size(model, to_2tuple(size))
        edges: list[Tensor] = []
        features: list[list[Tensor]] = []
        labels: list[int] = []
        in_chans = 1 if getattr(model, "in_chans", 3) == 1 else 3
        for pairs in labelled_batches(pictures, count, batch_size, in_chans, name):
            seen = see(sized, [picture for picture, _ in pairs], size)
            maps = StageMaps(name, seen, tuple(x.float().cpu() for x in stage_outputs(sized, seen.images)))
            edges.append(maps.edges())
            features.append([x.mean((2, 3)) for x in maps.maps])
            labels += [label for _, label in pairs]
        stages = [torch.cat(parts) for parts in zip(*features, strict=True)]
        accuracy, deviation = zip(*(linear_probe(x, torch.tensor(labels)) for x in stages), strict=True)
        mean = tuple(torch.cat(edges).mean(0).tolist())
        found.append(DepthProfile(name, mean, accuracy, deviation, count, len(set(labels))))
    return found


def linear_probe(features: Tensor, labels: Tensor, folds: int = _FOLDS) -> tuple[float, float]:
    """How often a linear classifier names the right class of pictures that it was not fitted on.

    Ridge regression from standardised features to the classes' indicators; the class is that of the largest answer.
    Each fold is answered by what was fitted on the others, with the penalty under which these, each left out in turn,
    were answered best (in closed form, by the singular value decomposition).

    Args:
        features: (n, C).
        labels: (n,), integers.
        folds: how many parts; the pictures are shuffled first, always in the same way.

    Returns:
        The share of right answers over all folds, and its standard deviation from fold to fold.

    Raises:
        DataError: fewer pictures than two a fold, or a single class.
    """
    classes, targets = labels.unique(return_inverse=True)
    if len(labels) < 2 * folds or len(classes) < 2:
        raise DataError(
            f"a linear probe was given {len(labels)} pictures of {len(classes)} classes; expected {2 * folds} pictures"
            " or more, of two classes or more"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    features, targets = features[order].double(), targets[order]
    right = []
    for fold in range(folds):
        held_out = torch.arange(len(labels)) % folds == fold
        answers = _ridge(features[~held_out], targets[~held_out], len(classes), features[held_out])
        right.append((answers == targets[held_out]).double())
    return float(torch.cat(right).mean()), float(torch.stack([part.mean() for part in right]).std())


def _ridge(x: Tensor, targets: Tensor, classes: int, new: Tensor) -> Tensor:
    """The class of each new row."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-12)
    x, new = (x - mean) / deviation, (new - mean) / deviation
    wanted = F.one_hot(targets, classes).double()
    middle = wanted.mean(0)
    wanted = wanted - middle
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ wanted
    best = (-1.0, torch.zeros(()))
    for penalty in _PENALTIES * len(x):
        shrunk = s.square() / (s.square() + penalty)
        fitted = u @ (shrunk[:, None] * projected)
        leverage = (u.square() @ shrunk + 1 / len(x)).clamp(max=1 - 1e-9)
        left_out = wanted - (wanted - fitted) / (1 - leverage[:, None]) + middle
        share = float((left_out.argmax(1) == targets).double().mean())
        if share > best[0]:
            best = share, penalty
    weights = vh.T @ ((s / (s.square() + best[1]))[:, None] * projected)
    return (new @ weights + middle).argmax(1)


def draw_depth(profiles: Sequence[DepthProfile]) -> Figure:
    """Both numbers against depth, one line a model."""
    from vmamba.explain import figures as f

    first = profiles[0]
    figure = f.new_figure(
        9.6, 4.3, "Shallow is detail, deep is meaning",
        f"{first.pictures:,} pictures of {first.classes} classes. Left: correlation of the gradients of map and"
        f" picture. Right: ridge regression on the maps' means, {_FOLDS} folds, bars one standard deviation; dotted:"
        " chance.",
    )  # fmt: skip
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(
        panels, ("edges", "accuracy"), ("how much the maps follow edges", "how well a line tells the classes apart"),
        strict=True,
    ):  # fmt: skip
        f.bare(axes, title, "stage")
        for number, profile in enumerate(profiles):
            values: tuple[float, ...] = getattr(profile, key)
            stages = list(range(1, len(values) + 1))
            colour = f.COLOURS[number % len(f.COLOURS)]
            axes.plot(stages, values, color=colour, lw=2, marker="o", ms=5, label=profile.name)
            if key == "accuracy":
                axes.errorbar(stages, values, profile.deviation, color=colour, lw=0, elinewidth=1.2, capsize=2)
        axes.set_xticks(range(1, max(len(profile.edges) for profile in profiles) + 1))
    panels[1].axhline(1 / first.classes, color=f.GREY, ls=":", lw=1)
    panels[1].yaxis.set_major_formatter(lambda value, _: f.percent(value))
    panels[0].legend(frameon=False, labelcolor=f.INK, fontsize=9)
    return figure


def report(run: Explanation, photos: Sequence[str]) -> dict[str, Any]:
    """`vmamba explain --what depth`: on labelled pictures, beside other models."""
    config = run.config
    if config.labelled is None:
        raise RecipeError("depth is measured on pictures with known classes: name their folder with --labelled")
    models = {shown(run.weights.source): run.model, **run.others}
    found = depth_profiles(models, open_labelled(config.labelled), config.limit, config.img_size)
    return {"figure": run.write(draw_depth(found), "depth"), "models": [vars(profile) for profile in found]}
