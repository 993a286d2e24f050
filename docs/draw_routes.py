"""Draws docs/images/routes.png, the picture in the README: what one block of VMamba does to an image.

python docs/draw_routes.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from vmamba.ops import cross_scan

HERE = Path(__file__).parent
GRID = 7
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
TITLES = ("rows", "columns", "rows, backwards", "columns, backwards")


def draw_route(axes: Axes, image: np.ndarray, order: list[int], colour: str, title: str) -> None:
    """A route as a line over the patches, light where it starts and dark where it ends."""
    axes.set_facecolor("#dfe3e6")
    axes.imshow(image, cmap="gray", extent=(-0.5, GRID - 0.5, GRID - 0.5, -0.5), alpha=0.55, vmin=0, vmax=255)
    axes.set_xticks(np.arange(-0.5, GRID), [])
    axes.set_yticks(np.arange(-0.5, GRID), [])
    axes.tick_params(length=0)
    axes.grid(color="white", lw=1.2)
    points = np.array([(patch % GRID, patch // GRID) for patch in order], dtype=float)
    segments = np.stack([points[:-1], points[1:]], axis=1)
    strength = np.linspace(0.2, 1.0, len(segments))
    rgba = np.array([(*matplotlib.colors.to_rgb(colour), a) for a in strength])
    axes.add_collection(LineCollection(list(segments), colors=rgba, linewidths=2.2, capstyle="round"))
    axes.plot(*points[0], "o", color=colour, ms=7, mfc="white", mew=2)
    axes.annotate("", xy=tuple(points[-1]), xytext=tuple(points[-2]),
                  arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2, "mutation_scale": 18})  # fmt: skip
    axes.set_title(title, fontsize=12, color=colour, pad=8)
    axes.spines[:].set_visible(False)


def main() -> None:
    """Draw the four routes side by side."""
    image = np.asarray(Image.open(HERE.parent / "examples/images/ankle_boot.png"))
    orders = cross_scan(torch.arange(GRID * GRID).view(1, 1, GRID, GRID))[0, :, 0].tolist()
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.6), layout="constrained")
    for axes, order, colour, title in zip(panels, orders, COLOURS, TITLES, strict=True):
        draw_route(axes, 255 - image, order, colour, title)
    figure.suptitle(
        "Four routes over the image. Along each, a state remembers what the patches it met told it to remember.",
        fontsize=12, y=1.08,
    )  # fmt: skip
    figure.savefig(HERE / "images/routes.png", dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
