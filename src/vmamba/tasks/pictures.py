"""Results as pictures: the learning curve, the confusion matrix, and sample images with their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from vmamba.files import atomic_write, shown
from vmamba.tasks.overlays import OKABE_ITO

if TYPE_CHECKING:
    from vmamba.tasks.task import Score

BLUE, ORANGE, INK, GREY, PALE = *OKABE_ITO[:2], "#222222", "#767676", "#E4E4E4"

_MOST_CLASSES_NAMED = 40
_MISTAKES = 20  # listed beside a confusion matrix
_COLUMNS = 8  # of sample images


@dataclass(frozen=True)
class Sample:
    """One classified image: uint8 (H, W, C), true and predicted class, and the confidence in the prediction."""

    image: NDArray[np.uint8]
    true: str
    predicted: str
    confidence: float


class Gallery:
    """Keeps some images that a validation meets: a random sample, and the mistakes it was most confident in.

    Args:
        length: images of the validation split.
        every: of the images of the split, in order, one in so many is added here; the others elsewhere.
        names: of the classes.
    """

    def __init__(self, length: int, every: int, names: Sequence[str], random_ones: int = 24, most: int = 8) -> None:
        order = torch.randperm(max(length, 1), generator=torch.Generator().manual_seed(0))
        self.places, self.every, self.seen = set(order[:random_ones].tolist()), every, 0
        self.names, self.most = names, most
        self.chosen: list[Sample] = []
        self.mistakes: list[Sample] = []

    def add(self, images: Tensor, labels: Tensor, predicted: Tensor, confidences: Tensor) -> None:
        """Images (B, C, H, W), uint8, with true and predicted class and the confidence in it, (B,) each."""
        for row in zip(images, *(values.tolist() for values in (labels, predicted, confidences)), strict=True):
            image, true, answer, confidence = row
            chosen = self.seen * self.every in self.places
            self.seen += 1
            mistake = true != answer and (len(self.mistakes) < self.most or confidence > self.mistakes[-1].confidence)
            if chosen or mistake:
                pixels = image.permute(1, 2, 0).cpu().numpy()
                sample = Sample(pixels, self.names[true], self.names[answer], confidence)
                self.chosen += [sample] * chosen
                self.mistakes = sorted(self.mistakes + [sample] * mistake, key=lambda s: -s.confidence)[: self.most]


def learning_curve(history: Sequence[dict[str, float]], curves: Sequence[Score], score: Score, path: Path) -> None:
    """Losses and scores of training and validation against the epoch, side by side.

    Args:
        history: one dict an epoch with "epoch" and any of "train_NAME" and "val_NAME".
        curves: what to draw, one panel each; those of which there is no number yet are left out.
        score: the one that tells which epoch was best.
    """
    curves = [s for s in curves if any(row.keys() & {f"train_{s.name}", f"val_{s.name}"} for row in history)]
    figure = Figure(figsize=(5 * len(curves), 4.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    key, last = f"val_{score.name}", history[-1]
    best = max((row for row in history if key in row), key=lambda row: score.rank(row[key]), default=None)
    figure.suptitle(
        f"{last['epoch']:.0f} epoch{'s' if last['epoch'] > 1 else ''}"
        + (f", best validation {score.label} {score.text(best[key])} in epoch {best['epoch']:.0f}" if best else ""),
        fontsize=13, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    for axes, curve in zip(panels, curves, strict=True):
        _bare(axes, curve.label)
        for split, label, colour in (("train", "training", BLUE), ("val", "validation", ORANGE)):
            points = [(row["epoch"], row[f"{split}_{curve.name}"]) for row in history if f"{split}_{curve.name}" in row]
            if points:
                x, y = zip(*points, strict=True)
                marker = "o" if len(points) <= 20 else None
                axes.plot(x, y, color=colour, lw=2, marker=marker, ms=4, label=label)
        axes.set_xlabel("epoch", color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        margin = 0.02 * len(history) + 0.1
        axes.set_xlim(history[0]["epoch"] - margin, last["epoch"] + margin)
        axes.grid(axis="y", color=PALE)
        if curve.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].legend(frameon=False, labelcolor=INK)
    _save(figure, path)


def confusion_matrix(
    matrix: NDArray[np.int64], class_names: Sequence[str], path: Path, counted: str = "images"
) -> None:
    """Share of each true class (row) that was taken for each class (column).

    Args:
        matrix: counts, (true, predicted).
        class_names: one a class. Beyond 40 classes the cells are not labelled, and the most frequent mistakes are
            listed beside the picture instead.
        path: of the PNG.
        counted: what the counts are of.
    """
    number = len(matrix)
    named = number <= _MOST_CLASSES_NAMED
    totals = matrix.sum(1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    side = 3.2 + 0.52 * number if named else 7.5
    figure = Figure(figsize=(side, side) if named else (side + 4, side), layout="constrained")
    axes: Axes = figure.subplots() if named else figure.subplots(1, 2, width_ratios=(2, 1))[0]
    figure.suptitle(
        f"{np.trace(matrix) / max(matrix.sum(), 1):.2%} of {matrix.sum():,} {counted} right",
        fontsize=13, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    # Small shares are what one looks for here, so the scale is stretched at its lower end.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
    axes.set_xlabel("predicted class", color=GREY)
    axes.set_ylabel("true class", color=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=INK)
    if named:
        labels = [_named(name, 24) for name in class_names]
        axes.set_xticks(range(number), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(number), labels)
        axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=1.5)
        axes.tick_params(which="minor", length=0)
        for (row, column), share in np.ndenumerate(shares):
            if round(share * 100):
                colour = "white" if share > 0.45 else INK
                axes.text(column, row, f"{share * 100:.0f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_title("percent of each true class", fontsize=10, color=GREY, loc="left")
    else:
        _list_mistakes(figure.axes[1], matrix, class_names)
    _save(figure, path)


def _list_mistakes(axes: Axes, matrix: NDArray[np.int64], class_names: Sequence[str]) -> None:
    axes.axis("off")
    axes.set_title("most frequent mistakes", fontsize=11, color=INK, loc="left")
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    for place, flat in enumerate(np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES]):
        true, predicted = np.unravel_index(flat, wrong.shape)
        if wrong[true, predicted]:
            names = [_named(class_names[c], 22) for c in (true, predicted)]
            text = f"{wrong[true, predicted]:>4}  {names[0]} → {names[1]}"
            axes.text(0, 1 - (place + 0.7) / _MISTAKES, text, fontsize=9, color=INK, transform=axes.transAxes)


def predictions(samples: Sequence[Sample], mistakes: Sequence[Sample], path: Path) -> None:
    """Sample images with true class, predicted class and confidence; below them, the mistakes made most confidently."""
    blocks = [("Images taken at random", list(samples)), ("The most confident mistakes", list(mistakes))]
    blocks = [(title, block) for title, block in blocks if block]
    if not blocks:
        return
    rows = [-(-len(block) // _COLUMNS) for _, block in blocks]
    figure = Figure(figsize=(1.6 * _COLUMNS, sum(2.15 * r + 0.5 for r in rows)), layout="constrained")
    panels = figure.subfigures(len(blocks), 1, height_ratios=[2.15 * r + 0.5 for r in rows], squeeze=False)[:, 0]
    for panel, (title, block), n in zip(panels, blocks, rows, strict=True):
        right = sum(sample.true == sample.predicted for sample in block)
        panel.suptitle(
            f"{title}: {right} of {len(block)} right" if right else title, fontsize=13, color=INK, x=0.01, ha="left"
        )
        for position, axes in enumerate(panel.subplots(n, _COLUMNS, squeeze=False).flat):
            axes.axis("off")
            if position < len(block):
                _show(axes, block[position])
    _save(figure, path)


def _show(axes: Axes, sample: Sample) -> None:
    image = sample.image[..., 0] if sample.image.shape[-1] == 1 else sample.image
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    correct = sample.true == sample.predicted
    true = "" if correct else f"is {_named(sample.true, 20)}"
    title = f"{'✓' if correct else '✗'} {_named(sample.predicted, 20)}\n{sample.confidence:.0%}"
    axes.set_title(title, fontsize=9, color=BLUE if correct else ORANGE, pad=3)
    axes.text(0.5, -0.04, true, transform=axes.transAxes, ha="center", va="top", fontsize=9, color=INK)


def _named(name: str, width: int) -> str:
    """A class name as a picture can show it: any bytes, no longer than ``width``, and no formula."""
    name = shown(name).encode(errors="backslashreplace").decode()
    return (name if len(name) <= width else name[: width - 1] + "…").replace("$", r"\$")


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, length=0)


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150, facecolor="white")
