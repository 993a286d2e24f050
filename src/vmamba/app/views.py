"""The parts of the page as HTML, from numbers and pictures that others computed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmamba.app import drawing
from vmamba.app.guard import MOST_BYTES
from vmamba.app.texts import both, plain
from vmamba.data.images import IMAGE_EXTENSIONS

_MOST_LINES = 16  # of a grid that does not hide the picture

# An arrow to the right, to be turned into a route's direction.
_ARROW = '<svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true"><g transform="rotate({turn} 8 8)">'
_ARROW += '<path d="M2 8h10M8.5 4l4 4-4 4" fill="none" stroke="{colour}" stroke-width="2.4"/></g></svg>'


def header() -> str:
    """Title, and the switches of language and light."""
    return (
        f'<div class="vm top"><div><h1>{both("title")}</h1><p>{both("tagline")}</p></div><div class="switch">'
        '<button data-send data-language="en">English</button><button data-send data-language="zh">中文</button>'
        f'<button data-theme aria-label="{plain("theme", "en")}" title="{plain("theme", "en")}">◐</button></div></div>'
    )


def picker(examples: Sequence[tuple[str, str]]) -> str:
    """Where a picture is dropped, and examples: a name and the address of a small picture each."""
    kinds = ",".join(sorted(IMAGE_EXTENSIONS))
    buttons = "".join(
        f'<button data-send data-example="{place}" title="{escape(name)}"><img src="{address}" alt="{escape(name)}">'
        "</button>"
        for place, (name, address) in enumerate(examples)
    )
    return (
        f'<div class="vm"><div class="drop" data-most="{MOST_BYTES}"><span>{both("drop")}</span>'
        f'<label>{both("browse")}<input type="file" accept="image/*,{kinds}"></label></div>'
        f'<div class="examples">{buttons}</div></div>'
    )


def canvas(picture: Image.Image, grid: tuple[int, int], cell: tuple[float, float]) -> str:
    """The picture as the network sees it, on the grid of one stage; what lies over it follows by other ways.

    The picture is kept in a variable of the style sheet, so that every map of the page lies over it at no cost.
    """
    style = f"<style>:root{{--photo:url({drawing.photograph(picture)})}}</style>"
    return (
        f'{style}<div class="vm">{stack(grid, cell, picture.size, "canvas", focus=True)}'
        f'<div class="under"><label for="vm-strength">{both("strength")}</label><input id="vm-strength" type="range" '
        'min="0" max="1" step="0.05" value="0.8" data-variable="--strength">'
        f'<span>{both("less")}</span><div class="scale"></div><span>{both("more")}</span></div>'
        f'<div class="under keys">{both("keys")}</div></div>'
    )


def stack(
    grid: tuple[int, int],
    cell: tuple[float, float],
    size: tuple[int, int],
    kind: str = "",
    heat: str | None = None,
    focus: bool = False,
    outline: str | None = None,
) -> str:
    """The picture, a map over it, and the frame around the chosen patch.

    Args:
        grid: rows and columns of patches.
        cell: height and width of a patch in pixels; what is beyond the picture is cut off.
        size: width and height of the picture.
        kind: "canvas" for the large one, "still" for one that is not clicked on.
        heat: address of the map; without one the style sheet says which.
        focus: whether the keyboard can reach it.
        outline: address of a picture of outlines, which lies over all.
    """
    small = " small-picture" if drawing.is_small(size) else ""
    image = f' style="background-image:url({heat})"' if heat else ""
    places = "" if kind == "still" else f' data-rows="{grid[0]}" data-columns="{grid[1]}"'
    frame = "" if kind == "still" else '<div class="query"></div>'
    edge = f'<div style="background-image:url({outline})"></div>' if outline else ""
    lines = '<div class="grid"></div>' if kind != "still" and max(grid) <= _MOST_LINES else ""
    reach = f' tabindex="0" role="application" aria-label="{plain("canvas", "en")}"' if focus else ""
    return (
        f'<div class="stack {kind}{small}"{places}{reach} '
        f'style="--rows:{grid[0]};--columns:{grid[1]};{_covering(cell, size)};aspect-ratio:{size[0]}/{size[1]}">'
        f'<div class="photo"></div><div class="heat"{image}></div>{lines}'
        f"{frame}{edge}</div>"
    )


def network(
    numbers: Sequence[int], depths: Sequence[int], grids: Sequence[tuple[int, int]], stage: int, block: int
) -> str:
    """The stages that scan, each under its number in the network, with a button for each block."""
    parts = []
    for s, (number, depth, grid) in enumerate(zip(numbers, depths, grids, strict=True)):
        dots = ""
        for b in range(depth):
            name, pressed = plain("block", "en", stage=number + 1, block=b + 1), str((s, b) == (stage, block)).lower()
            dots += f'<button data-send data-stage="{s}" data-block="{b}" aria-pressed="{pressed}" '
            dots += f'aria-label="{name}" title="{name}"></button>'
        chosen = " chosen" if s == stage else ""
        title = f'<b>{both("stage", stage=number + 1)}</b><div class="muted">{grid[0]}×{grid[1]}</div>'
        parts.append(f'<div class="stage{chosen}">{title}<div class="dots">{dots}</div></div>')
    ends = [f'<div class="end">{both(end)}</div>' for end in ("stem", "head")]
    return f'<div class="vm"><div class="network">{ends[0]}{"".join(parts)}{ends[1]}</div></div>'


def beware() -> str:
    """That nothing has been learned yet."""
    return f'<div class="vm"><p class="beware">{both("beware")}</p></div>'


def classes(scores: Sequence[tuple[str, float]]) -> str:
    """Names of classes with their probabilities, best first."""
    rows = "".join(
        f'<span>{escape(name)}</span><div class="bar"><i style="width:{share:.1%}"></i></div><b>{share:.1%}</b>'
        for name, share in scores
    )
    return f'<div class="bars">{rows}</div>'


def wide(picture: Image.Image, name: str) -> str:
    """A picture as wide as the page."""
    return f'<div class="wide"><img src="{drawing.photograph(picture, 1200)}" alt="{escape(name)}"></div>'


def picture(address: str, grid: tuple[int, int], cell: tuple[float, float], size: tuple[int, int]) -> str:
    """A map alone, in the shape of a picture of this width and height; see `stack`."""
    style = f"--rows:{grid[0]};--columns:{grid[1]};{_covering(cell, size)};aspect-ratio:{size[0]}/{size[1]}"
    return f'<div class="map" style="background-image:url({address});{style}"></div>'


def _covering(cell: tuple[float, float], size: tuple[int, int]) -> str:
    """What part of the picture's height and width a patch takes, for the style sheet."""
    return f"--down:{cell[0] / size[1]:.6g};--across:{cell[1] / size[0]:.6g}"


def walk(places: Sequence[tuple[int, int]], side: int, colour: str) -> str:
    """A route over a grid as a line that draws itself, from a ring on: places as (row, column), in order."""
    points = " ".join(f"{column + 0.5:g},{row + 0.5:g}" for row, column in places)
    row, column = places[0]
    return (
        f'<svg class="walk" viewBox="0 0 {side} {side}" role="img" style="--colour:{colour};--side:{side}">'
        f'<polyline class="trace" points="{points}"/><polyline class="pen" pathLength="1" points="{points}"/>'
        f'<circle cx="{column + 0.5:g}" cy="{row + 0.5:g}" r="0.22"/></svg>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells of HTML."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{lines}</table></div>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Titles, what is below each, and a line of text: all HTML."""
    parts = (
        f'<div class="card">{title and f"<h3>{title}</h3>"}{body}<p>{text}</p></div>' for title, body, text in items
    )
    return f'<div class="cards">{"".join(parts)}</div>'


def panel(*parts: str, **data: Any) -> str:
    """Parts of a tab together; `data` becomes attributes that the page's script reads."""
    attributes = "".join(f' data-{name.replace("_", "-")}="{escape(str(value))}"' for name, value in data.items())
    return f'<div class="vm"{attributes}>{"".join(parts)}</div>'


def say(key: str, **values: Any) -> str:
    """A paragraph."""
    return f'<p class="say">{both(key, **values)}</p>'


def arrow(first: Sequence[int], second: Sequence[int], colour: str) -> str:
    """A small arrow in the direction of a route's first step, both ends as (row, column)."""
    turn = np.degrees(np.arctan2(second[0] - first[0], second[1] - first[1]))
    return _ARROW.format(turn=round(float(turn)), colour=colour)


def heat(values: NDArray[np.floating], most: float | None = None) -> str:
    """The address of a heat map."""
    return drawing.png(drawing.heat_rgba(drawing.scaled(values, most)))
