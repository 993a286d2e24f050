"""What all figures of `vmamba.explain` have in common: their look, pictures with axes in pixels, maps over pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vmamba.errors import needing
from vmamba.files import atomic_write, shown
from vmamba.tasks.overlays import LUMA, OKABE_ITO

with needing("explain", "figures need one more package"):
    from matplotlib import colormaps, patheffects
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedLocator

    from vmamba.tasks.pictures import BLUE, GREY, INK, ORANGE, PALE

__all__ = ["BLUE", "GREY", "HEAT", "INK", "ORANGE", "PALE", "SIGNED", "Figure"]

COLOURS = OKABE_ITO  # for lines
HEAT, SIGNED = "inferno", "RdBu_r"  # colours of what is 0 or more, and of what has a sign
_BRIGHT = "#00E5FF"  # of marks on pictures, which have few such colours
_LEAST_BAR = 1.3  # inches of a colour bar, for its numbers
_LETTERS = 125  # to the inch, in letters of the size 1, at their usual width


def new_figure(width: float, height: float, title: str, note: str = "") -> Figure:
    """An empty figure of so many inches, with a title at its upper left and a note, in grey, below that."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    for put, text, size, colour in ((figure.suptitle, title, 13, INK), (figure.supxlabel, note, 9, GREY)):
        if text:
            put(text_of(wrapped(text, width, size)), fontsize=size, color=colour, x=0.01, ha="left", linespacing=1.3)
    return figure


def wrapped(text: str, width: float, size: float) -> str:
    """A text in lines of so many inches, in letters of this size."""
    return textwrap.fill(text, round(width * _LETTERS / size))


def text_of(text: str) -> str:
    """Any text as a figure can show it, in its lines: every byte, and no formula."""
    text = "\n".join(map(shown, text.split("\n")))
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def bare(axes: Axes, title: str = "", x: str = "") -> None:
    """Axes of a curve: a title, a label, and as few lines as will do."""
    axes.set_title(text_of(title), fontsize=11, color=INK, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, length=0)
    axes.set_xlabel(x, color=GREY)
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)


def show(axes: Axes, picture: NDArray[Any], title: str = "", **style: Any) -> Any:
    """A picture or map on axes in pixels.

    Args:
        axes: where.
        picture: (H, W, 3 or 4), or (H, W) with a colour map.
        title: above it, in one line or several.
        **style: of matplotlib's `imshow`.
    """
    height, width = picture.shape[:2]
    shown_as = axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", **style)
    axes.set_title(text_of(title), fontsize=10, color=INK, loc="left")
    axes.xaxis.set_major_locator(FixedLocator([0, width]))
    axes.yaxis.set_major_locator(FixedLocator([0, height]))
    axes.tick_params(colors=GREY, length=0, labelsize=7, pad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return shown_as


def scale(values: NDArray[Any], power: float = 0.5, signed: bool = False, low: float = 0.0) -> Normalize:
    """From values to colours: from `low` to the largest, small ones lifted by a power; with a sign, evenly around 0."""
    largest = float(np.abs(values).max(initial=0.0))
    largest = largest if np.isfinite(largest) and largest > low else low + 1.0
    return Normalize(-largest, largest) if signed else PowerNorm(power, low, largest)


def ended(colours: str) -> Colormap:
    """A colour map in which what is infinite is grey."""
    return colormaps[colours].with_extremes(over=PALE, bad=PALE)  # what is infinite is bad to imshow


def overlay(
    axes: Axes,
    picture: NDArray[np.uint8],
    values: NDArray[Any],
    norm: Normalize,
    title: str = "",
    colours: str = HEAT,
    cell: tuple[float, float] | None = None,
) -> None:
    """A map over its picture, which is grey and dark where the map says nothing.

    Args:
        axes: where.
        picture: uint8 (H, W, 3).
        values: (h, w); NaN where there is nothing to show.
        norm: see `scale`.
        title: above it.
        colours: name of a colour map.
        cell: of a map in patches, height and width of each in pixels, to blend between them; else it is in pixels.
    """
    height, width = picture.shape[:2]
    grey = picture @ np.array(LUMA) / 255
    share = np.clip(np.asarray(norm(np.nan_to_num(values)), dtype=np.float64), 0, 1)
    rgba = colormaps[colours](share)
    strength = np.abs(2 * share - 1) if colours == SIGNED else share
    rgba[..., 3] = np.where(np.isnan(values), 0, 0.25 + 0.65 * strength)
    show(axes, np.repeat((0.15 + 0.6 * grey)[..., None], 3, 2), title, vmin=0, vmax=1)
    down, across = cell or (1, 1)
    extent = (0, across * values.shape[1], down * values.shape[0], 0)
    axes.imshow(rgba, extent=extent, interpolation="bilinear" if cell else "nearest")
    axes.set(xlim=(0, width), ylim=(height, 0))


def picture_grid(
    rows: int,
    columns: int,
    size: tuple[int, int],
    title: str,
    note: str = "",
    side: float = 2.7,
    titles: Sequence[str] = (),
    bars: Sequence[str] = (),
) -> tuple[Figure, NDArray[Any], list[Axes]]:
    """A figure of equal panels for pictures of one size.

    Args:
        rows, columns: how many panels.
        size: height and width of the pictures.
        title, note: above and below.
        side: inches of a picture's longer side.
        titles: what is written in and above panels, which are made wide and high enough for it.
        bars: what the colour bars at the right are of: of one along all rows, or of one a row.

    Returns:
        The figure, its panels (rows, columns), and the axes for the bars.
    """
    height, width = (side * pixels / max(size) for pixels in size)
    lines = [title.split("\n") for title in titles]
    width = max([width, *(10 * len(line) / _LETTERS for title in lines for line in title)])
    height = max(height, _LEAST_BAR * len(bars) / rows) + 0.25 + 0.17 * max(map(len, lines), default=1)
    labels = [wrapped(label, height * rows / len(bars) - 0.6, 9) for label in bars]
    right = 0.9 + 0.16 * max(label.count("\n") + 1 for label in labels) if bars else 0.1
    figure = new_figure((width + 0.2) * columns + right, height * rows + (0.8 if note else 0.45), title, note)
    grid = figure.add_gridspec(rows, columns + bool(bars), width_ratios=[*[1] * columns, *[0.12 / width] * bool(bars)])
    panels = [[figure.add_subplot(grid[i, j], anchor="W") for j in range(columns)] for i in range(rows)]
    step = rows // max(len(bars), 1)
    beside = [figure.add_subplot(grid[i * step : (i + 1) * step, columns]) for i in range(len(bars))]
    for axes, label in zip(beside, labels, strict=True):
        axes.set_ylabel(label)
    return figure, np.array(panels), beside


def colour_bar(
    figure: Figure,
    axes: Axes,
    norm: Normalize | None,
    colours: str = HEAT,
    form: Callable[[float], str] | None = None,
    whole: bool = False,
) -> None:
    """What the colours mean, drawn on `axes`, whose label says of what.

    Args:
        figure, axes: where; see `picture_grid`.
        norm: see `scale`; None where no value is shown, for the label alone.
        colours: name of a colour map.
        form: from a value to its text.
        whole: whether all values are whole numbers.
    """
    label = axes.get_ylabel()
    if norm is None:
        axes.set(frame_on=False, xticks=[], yticks=[])
        axes.yaxis.set_label_position("right")
        axes.yaxis.label.set(color=GREY, fontsize=9)
        return
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=axes)
    bar.outline.set_visible(False)
    values = [float(norm.inverse(place)) for place in np.linspace(0, 1, 5)]
    values = sorted({round(value) for value in values}) if whole else values
    form = str if whole else form or (lambda value: f"{value:.3g}")
    bar.set_ticks(values, labels=[form(value) for value in values])
    bar.ax.tick_params(colors=GREY, length=0, labelsize=8)
    bar.set_label(label, color=GREY, fontsize=9)


def percent(share: float) -> str:
    """A share as text: 12 %, 0.3 %, and no minus before a zero."""
    if not np.isfinite(share):
        return f"{share} %"
    size = abs(100 * share)
    digits = 0 if size >= 9.95 or size < 1e-4 else min(max(1 - int(np.floor(np.log10(size))), 0), 4)
    text = f"{100 * share:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{100 * share:.0f}"
    return f"{text.removeprefix('-') if text == '-0' else text.replace('-', '−')} %"


def array(values: Tensor) -> NDArray[Any]:
    """A tensor as matplotlib takes it."""
    return values.detach().float().cpu().numpy()


def mark(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """A frame around the patch that is asked about, visible on any ground."""
    shape = Rectangle((left, top), width, height, fill=False, edgecolor=_BRIGHT, lw=1.6, zorder=5)
    shape.set_path_effects([patheffects.withStroke(linewidth=3.4, foreground="black")])
    axes.add_patch(shape)


def outline(axes: Axes, region: NDArray[Any]) -> None:
    """The outline of a region, bool (H, W), in pixels."""
    height, width = region.shape
    edge = np.pad(region.astype(np.float32), 1)
    grid = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
    for ink, line in (("black", 2.2), (_BRIGHT, 1.0)):
        axes.contour(*grid, edge, levels=[0.5], colors=[ink], linewidths=line)
    axes.set(xlim=(0, width), ylim=(height, 0))


def write(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG, or as what the name ends with (.pdf, .svg), whole or not at all; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:].lower() if path.suffix.lower() in (".pdf", ".svg", ".jpg", ".webp") else "png"
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=dpi, facecolor="white")
