"""Numbers as small pictures that travel inside the page: heat maps, photographs, line charts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vmamba.tasks.overlays import OKABE_ITO

ROUTE_COLOURS = OKABE_ITO[:4]

# From dark violet over red to light yellow, evenly bright to the eye: each colour at its place from 0 to 1.
_HEAT = np.array([
    (18, 9, 50), (74, 12, 107), (128, 31, 108), (182, 54, 85), (225, 91, 56), (246, 144, 27), (250, 200, 62),
    (252, 252, 180),
], float)  # fmt: skip

_OUTLINE_SIDE = 384  # at least, of the longer side of a picture with an outline
_LEAST_SIDE = 128  # a picture with shorter sides is shown with its pixels as squares


def heat_rgba(values: NDArray[np.floating], power: float = 0.5) -> NDArray[np.uint8]:
    """Numbers (H, W) from 0 to 1 to colours (H, W, 4): the larger, the lighter and the less transparent.

    Small numbers are lifted by a power. Those that are not a number become a veil of grey.
    """
    roots = np.clip(np.nan_to_num(np.asarray(values, float)), 0, 1) ** power
    places = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([*(np.interp(roots, places, channel) for channel in _HEAT.T), 255 * (0.3 + 0.7 * roots)], -1)
    colours[np.isnan(values)] = (128, 128, 128, 170)
    return colours.round().astype(np.uint8)


def outline_rgba(region: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The outline of a region (H, W) as colours (h, w, 4), transparent elsewhere: light with dark edges.

    A region of few pixels is enlarged first, so that the line is thin.
    """
    times = -(-_OUTLINE_SIDE // max(region.shape))
    mask = Image.fromarray(np.kron(region, np.full((times, times), 255)).astype(np.uint8))
    colours = np.zeros((mask.height, mask.width, 4), np.uint8)
    for width, colour in ((7, (0, 0, 0, 255)), (3, (0, 229, 255, 255))):
        larger, smaller = (mask.filter(kind(width)) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        colours[np.asarray(larger) != np.asarray(smaller)] = colour
    return colours


def scaled(values: NDArray[np.floating], most: float | None = None) -> NDArray[np.floating]:
    """Numbers divided by the largest of them, or by `most`, with the negative ones as 0; NaN stays."""
    values = np.maximum(np.asarray(values, np.float64), 0)
    most = float(np.nanmax(values, initial=0)) if most is None else most
    return values / (most if most > 0 else 1.0)


def png(pixels: NDArray[np.uint8]) -> str:
    """Pixels (H, W), (H, W, 3) or (H, W, 4) as an address that holds them itself."""
    return _address(Image.fromarray(pixels), "png")


def photograph(picture: Image.Image, most: int = 896) -> str:
    """A picture, made smaller if its long side has more than `most` pixels, as an address that holds it itself."""
    picture = picture.convert("RGB")
    picture.thumbnail((most, most))
    return _address(picture, "png" if is_small(picture.size) else "jpeg")


def _address(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def is_small(size: Sequence[int]) -> bool:
    """Whether a picture is shown with its pixels as squares."""
    return min(size) < _LEAST_SIDE


class Line(NamedTuple):
    """One line of a chart: its name in HTML, its colour, and numbers of equal length."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 260, 72, 26, 8, 12


def chart(
    lines: Sequence[Line], x_title: str, y_title: str, log: str = "", percent: bool = False, dots: bool = False
) -> str:
    """A line chart as SVG in the page's own colours, with a legend.

    Args:
        lines: what is drawn; points that are not finite are left out, and those that a logarithmic axis does not have.
        x_title, y_title: HTML.
        log: which axes are logarithmic: "", "x" or "xy".
        percent: whether y is a share, from 0 to 1.
        dots: whether the points are marked.
    """
    kept = [(line, _points(line, log)) for line in lines]
    everything = [point for _, points in kept for point in points]
    if not everything:
        return ""
    x = _Axis([point[0] for point in everything], "x" in log)
    y = _Axis([point[1] for point in everything] + [1.0] * percent, "y" in log)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = _LEFT + x.at(point[0]) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - y.at(point[1]) * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for tick in y.ticks():
        _, height = place((x.low, tick))
        text = f"{tick:.0%}" if percent else brief(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x.ticks():
        across, _ = place((tick, y.low))
        parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{brief(tick)}</text>')
    for line, points in kept:
        path = " ".join(f"{across:.1f},{height:.1f}" for across, height in map(place, points))
        parts.append(f'<polyline points="{path}" stroke="{line.colour}"/>')
        if dots:
            marks = (f'<circle cx="{a:.1f}" cy="{h:.1f}" r="3.5" fill="{line.colour}"/>' for a, h in map(place, points))
            parts += marks
    legend = "".join(f'<span><i style="background:{escape(line.colour)}"></i>{line.name}</span>' for line in lines)
    return (
        f'<figure class="chart"><figcaption><b>{y_title}</b><span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg><small>{x_title}</small></figure>'
    )


def _points(line: Line, log: str) -> list[tuple[float, float]]:
    pairs = ((float(a), float(b)) for a, b in zip(line.x, line.y, strict=True))
    return [
        (a, b)
        for a, b in pairs
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or "x" not in log) and (b > 0 or "y" not in log)
    ]


class _Axis:
    """Where numbers lie between the smallest, or 0, and the largest."""

    def __init__(self, values: Sequence[float], log: bool) -> None:
        self.log = log
        self.low, self.high = min(values) if log else min(0.0, *values), max(values)
        if self.high <= self.low:
            self.high = self.low * 2 if log else self.low + 1

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high < 1000 * self.low else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(s for s in (1, 2, 5, 10) if (self.high - self.low) / (s * step) <= 5)
            found = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]
        return [tick for tick in found if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def brief(value: float) -> str:
    """A number in a few letters: 1.5 M, 20 k, 0.03."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
