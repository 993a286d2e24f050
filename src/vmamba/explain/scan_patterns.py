"""The order in which a scan pattern visits the grid: as numbers, as a picture and as an animation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vmamba.errors import RecipeError
from vmamba.files import atomic_write, shown
from vmamba.nn import SS2D
from vmamba.ops.routes import PATTERNS, ROUTES, Pattern, check_pattern, scan_orders
from vmamba.tasks.overlays import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vmamba.explain.run import Explanation

ROUTE_NAMES = {
    "cross": ("rows →", "columns ↓", "rows ← back", "columns ↑ back"),
    "unidirectional": ("rows →",) * 4,
    "bidirectional": ("rows →", "rows →", "rows ← back", "rows ← back"),
    "diagonal": ("diagonals ↘", "diagonals ↙", "diagonals ↖ back", "diagonals ↗ back"),
    "hilbert": ("Hilbert curve →", "Hilbert curve ↓", "Hilbert curve ← back", "Hilbert curve ↑ back"),
    "spiral": ("clockwise in", "counter-clockwise in", "counter-clockwise out", "clockwise out"),
}
COLOURS = OKABE_ITO[:ROUTES]  # of the routes
# Of an animation.
_MARGIN, _LABEL = 12, 20  # pixels
_GREYS, _SHADES = 16, 12  # places in the palette: from white to ink for words, and then of each route


def route_names(pattern: Pattern) -> tuple[str, ...]:
    """The four routes of a pattern in words, those of one's own by their numbers."""
    name = known_as(pattern)
    return ROUTE_NAMES.get(name) or tuple(f"{name}, route {k + 1}" for k in range(4))


def known_as(pattern: Pattern) -> str:
    """A pattern in a word: its name, of a function that it is registered by or that it has."""
    if isinstance(pattern, str):
        return pattern.split(" at ")[0]
    registered = next((name for name, known in PATTERNS.items() if known is pattern), None)
    return registered or str(getattr(pattern, "__name__", type(pattern).__name__))


@dataclass(frozen=True, eq=False)
class ScanPattern:
    """The four routes of a pattern over a grid of H×W patches, L = H·W.

    Attributes:
        name: of the pattern.
        grid: H and W.
        orders: (4, L), int64: entry (k, t) is the patch, counted row by row, that route k visits at step t.
        routes: the routes in words.
    """

    name: str
    grid: tuple[int, int]
    orders: NDArray[np.int64]
    routes: tuple[str, ...]

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """(4, L): the step at which route k visits each patch, the inverse of `orders`."""
        return np.argsort(self.orders, axis=1)

    @cached_property
    def stride(self) -> NDArray[np.float64]:
        """(4,): the mean distance between patches visited one after the other, in patches; 1 is the least."""
        rows, columns = np.divmod(self.orders, self.grid[1])
        lengths = np.hypot(np.diff(rows), np.diff(columns))
        return lengths.mean(1) if lengths.size else np.zeros(4)

    @cached_property
    def delay(self) -> NDArray[np.float64]:
        """(4,): the mean of |t(q) - t(p)| over neighbours p and q on the grid: how many steps part them on a route."""
        return self._apart.mean(1) if self._apart.size else np.zeros(4)

    @cached_property
    def nearest(self) -> float:
        """The mean over neighbours of the fewest steps that part them on any of the routes."""
        return float(self._apart.min(0).mean()) if self._apart.size else 0.0

    @cached_property
    def _apart(self) -> NDArray[np.int64]:
        """How many steps part the neighbours of each pair, on each route."""
        steps = self.steps.reshape(4, *self.grid)
        return np.concatenate([np.abs(np.diff(steps, axis=axis)).reshape(4, -1) for axis in (1, 2)], axis=1)

    def numbers(self) -> dict[str, Any]:
        """Orders and locality in plain values, for JSON."""
        return {
            "pattern": self.name,
            "grid": list(self.grid),
            "nearest": self.nearest,
            "routes": [
                {"name": name, "stride": float(self.stride[k]), "delay": float(self.delay[k]), "order": order}
                for k, (name, order) in enumerate(zip(self.routes, self.orders.tolist(), strict=True))
            ],
        }

    def figure(self, picture: NDArray[np.uint8] | None = None, title: str | None = None) -> Figure:
        """The four routes side by side, as lines that are light where they start and dark where they end.

        Args:
            picture: uint8 (h, w), what lies below the grid, of any size.
            title: above; by default the pattern's name and its locality.
        """
        return pattern_figure([self], picture, title)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figure, or where the name ends with .gif the animation."""
        save_patterns([self], path)


def scan_pattern(pattern: Pattern = "cross", height: int = 7, width: int = 7) -> ScanPattern:
    """The order in which each route of a pattern visits a grid, and how far it tears neighbours apart.

    Args:
        pattern: a name in `vmamba.ops.PATTERNS`, or a function from (H, W) to four orders.
        height, width: of the grid, in patches.

    Raises:
        ValueError: the pattern is unknown, or its function returns no permutations.
        RecipeError: the grid has no patch.
    """
    if min(height, width) < 1:
        raise RecipeError(f"the grid is {height}×{width} patches; expected at least one each way")
    check_pattern(pattern)
    orders = scan_orders(pattern, height, width).numpy()
    return ScanPattern(known_as(pattern), (height, width), orders, route_names(pattern))


# --- pictures --------------------------------------------------------------------------------------------------------


def pattern_figure(
    patterns: Sequence[ScanPattern], picture: NDArray[np.uint8] | None = None, title: str | None = None
) -> Figure:
    """A row of four routes for each pattern; see `ScanPattern.figure`."""
    from vmamba.explain import figures as f

    height, width = (2.4 * side / max(patterns[0].grid) for side in patterns[0].grid)
    heading = "The order in which scans visit the grid" if len(patterns) > 1 else ""
    figure = f.new_figure(4 * (width + 0.15), len(patterns) * (height + 0.75) + 0.35, title or heading)
    rows = figure.subfigures(len(patterns), 1, squeeze=False)[:, 0]
    for row, pattern in zip(rows, patterns, strict=True):
        if title is None:
            near = f"neighbours {pattern.nearest:.1f} steps apart on the route that suits them best"
            text = f"{pattern.name}: {pattern.stride.mean():.1f} patches a step, {near}"
            row.suptitle(f.text_of(text), fontsize=11, color=f.INK, x=0.01, ha="left")
        for k, axes in enumerate(row.subplots(1, 4)):
            _draw_route(axes, pattern, k, picture)
    return figure


def _draw_route(axes: Axes, pattern: ScanPattern, k: int, picture: NDArray[np.uint8] | None) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    (height, width), colour = pattern.grid, COLOURS[k]
    rows, columns = np.divmod(pattern.orders[k], width)
    points = np.stack([columns, rows], axis=1) + 0.5
    weight = min(2.2, 22 / max(height, width))
    axes.set_facecolor("#ECEFF1")
    if picture is not None:
        axes.imshow(picture, cmap="gray", extent=(0, width, height, 0), alpha=0.55, vmin=0, vmax=255)
    axes.set_xticks(range(width + 1), [])
    axes.set_yticks(range(height + 1), [])
    axes.tick_params(length=0)
    axes.grid(color="white", lw=weight / 2)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    if len(points) > 1:
        lines = np.stack([points[:-1], points[1:]], axis=1)
        inks = [(*to_rgb(colour), strength) for strength in np.linspace(0.2, 1.0, len(lines))]
        axes.add_collection(LineCollection(list(lines), colors=inks, linewidths=weight, capstyle="round"))
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": weight, "mutation_scale": 8 * weight, "shrinkA": 0}
        axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops={**arrow, "shrinkB": 0})
    axes.plot(*points[0], "o", color=colour, ms=3.2 * weight, mfc="white", mew=0.9 * weight)
    axes.set_title(pattern.routes[k], fontsize=10, color=colour, pad=5)
    axes.spines[:].set_visible(False)


# --- animation -------------------------------------------------------------------------------------------------------


def save_patterns(patterns: Sequence[ScanPattern], path: str | os.PathLike[str]) -> None:
    """Write a figure of patterns on one size of grid, or if the name ends with .gif an animation; folders are made."""
    from vmamba.explain import figures

    path = Path(path)
    if path.suffix.lower() != ".gif":
        figures.write(pattern_figure(patterns), path)
        return
    frames = animation(patterns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pace = max(30, min(120, 6000 // len(frames)))  # milliseconds: about six seconds
    with atomic_write(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], loop=0, optimize=True,
            duration=[*[pace] * (len(frames) - 1), 1500],
        )  # fmt: skip


def animation(patterns: Sequence[ScanPattern], side: int = 88) -> list[Image.Image]:
    """Frames in which all routes run at once, a row of four for each pattern; a patch pales as the scan moves on.

    Args:
        patterns: on one size of grid.
        side: pixels of the longer side of a grid.

    Returns:
        At most 120 images in one palette, of which the last shows the routes at their ends.
    """
    (height, width), length = patterns[0].grid, patterns[0].orders.shape[1]
    cell = max(2, side // max(height, width))
    across, down = width * cell + _MARGIN, height * cell + _MARGIN + _LABEL
    still = np.zeros((len(patterns) * down + _MARGIN, 4 * across + _MARGIN), dtype=np.uint8)
    for i, pattern in enumerate(patterns):
        words = _words(f"{pattern.name}: {pattern.stride.mean():.1f} patches a step", still.shape[1] - 2 * _MARGIN)
        still[_MARGIN + i * down :, _MARGIN:][: words.shape[0], : words.shape[1]] = words
    frames = []
    for t in sorted({round(step) for step in np.linspace(0, length - 1, min(length, 120))}):
        frame = still.copy()
        for i, pattern in enumerate(patterns):
            for k in range(4):
                age = t - pattern.steps[k].reshape(height, width)
                fading = np.ceil((_SHADES - 2) * np.exp(-4 * np.maximum(age, 0) / length))
                shade = np.where(age < 0, 0, np.where(age == 0, _SHADES - 1, fading)).astype(np.uint8)
                tiles = (_GREYS + k * _SHADES + shade).repeat(cell, 0).repeat(cell, 1)
                if cell > 4:  # lines between the patches
                    tiles[::cell], tiles[:, ::cell] = 0, 0
                top, left = _MARGIN + _LABEL + i * down, _MARGIN + k * across
                frame[top : top + height * cell, left : left + width * cell] = tiles
        image = Image.fromarray(frame, "P")
        image.putpalette(_palette())
        frames.append(image)
    return frames


def _palette() -> list[int]:
    """White to ink; for each route the ground, what was visited from long ago to just now, and the patch it is at."""
    ink = np.array([34, 34, 34])
    colours = [255 + (ink - 255) * share for share in np.linspace(0, 1, _GREYS)]
    for text in COLOURS:
        colour = np.array([int(text[at : at + 2], 16) for at in (1, 3, 5)])
        visited = [255 + (colour - 255) * share for share in np.linspace(0.3, 1, _SHADES - 2)]
        colours += [np.array([236, 239, 241]), *visited, colour * 0.35]
    return np.round(np.concatenate(colours)).astype(int).tolist()


def _words(text: str, width: int) -> NDArray[np.uint8]:
    """A line of text, as places in the palette."""
    image = Image.new("L", (width, _LABEL))
    ImageDraw.Draw(image).text((0, 2), text, fill=255, font=ImageFont.load_default(12))
    return (np.asarray(image) // (256 // _GREYS)).astype(np.uint8)


def report(run: Explanation, photos: Sequence[str]) -> dict[str, Any]:
    """The part "patterns" of `vmamba explain`: every pattern that has a name, and those of the model."""
    own = [module.pattern for module in run.model.modules() if isinstance(module, SS2D)]
    names = {known_as(pattern): pattern for pattern in [*PATTERNS, *own]}
    patterns = [scan_pattern(pattern, 8, 8) for pattern in names.values()]
    path = Path(run.config.output) / "patterns.gif"
    save_patterns(patterns, path)
    run.written.append(shown(path))
    return {
        "figure": run.write(pattern_figure(patterns), "patterns"),
        "animation": shown(path),
        "model": sorted({known_as(pattern) for pattern in own}),
        "patterns": [pattern.numbers() for pattern in patterns],
    }
