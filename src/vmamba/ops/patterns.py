"""Scan patterns that are not rows and columns: functions from a grid's height and width to four orders over it.

Each returns (4, H·W), int64: entry (k, t) is the position, counted row by row, that route k visits at step t. The third
and fourth routes are the first and second walked back. Those made of torch's functions alone also work where a traced
graph leaves the sizes open.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def diagonal(height: int, width: int) -> Tensor:
    """Down-right diagonals from the lower left corner on, down-left diagonals from the upper left corner on, and back.

    A diagonal is followed from its upper end to its lower one.
    """
    rows, columns = _cells(height, width)
    down_right = torch.argsort((columns - rows) * height + rows)
    down_left = torch.argsort((columns + rows) * height + rows)
    return _and_back(down_right, down_left)


def spiral(height: int, width: int) -> Tensor:
    """Clockwise from the upper left corner to the middle, counter-clockwise from there, and back outwards."""
    rows, columns = _cells(height, width)
    up, down, left, right = rows, height - 1 - rows, columns, width - 1 - columns  # distances to the four edges
    ring = torch.minimum(torch.minimum(up, down), torch.minimum(left, right))
    across, along = width - 1 - 2 * ring, height - 1 - 2 * ring  # steps along a ring's horizontal and vertical sides
    up, down, left, right = (distance - ring for distance in (up, down, left, right))

    def walk(first: Tensor, second: Tensor, across: Tensor, along: Tensor) -> Tensor:
        """The order that starts along the side where `second` is 0, `first` counting its steps."""
        lower, last = across + along + (across - first), 2 * across + along + (along - second)
        step = torch.where(second == along, lower, last)
        step = torch.where(first == across, across + second, step)
        step = torch.where(second == 0, first, step)
        return torch.argsort(ring * (2 * (height + width)) + step)

    return _and_back(walk(left, up, across, along), walk(up, left, along, across))


def hilbert(height: int, width: int) -> Tensor:
    """A Hilbert curve along the upper side, one along the left side, and both back.

    On a grid of any size: every step leads to a neighbour, but for one diagonal step where the side that the curve
    follows is odd and the other even. Made by recursion, so a traced graph needs fixed sizes.
    """
    across, down = complex(width, 0), complex(0, height)
    curves = [_curve(0, across, down), _curve(0, down, across)]
    orders = [[int(cell.imag) * width + int(cell.real) for cell in curve] for curve in curves]
    return _and_back(*torch.tensor(orders, dtype=torch.int64).unbind())


def _curve(corner: complex, along: complex, aside: complex) -> Iterator[complex]:
    """All cells of a rectangle, from `corner` to the other end of its side `along`; the real axis points right.

    The generalised Hilbert curve (J. Červený, 2018): a rectangle is three smaller ones, entered in turn, or where it is
    long two. Halves are of even length if possible: such are left beside where the next part is entered.
    """
    length, breadth = int(abs(along)), int(abs(aside))
    if 1 in (length, breadth):
        side, count = (along, length) if breadth == 1 else (aside, breadth)
        yield from (corner + side / count * step for step in range(count))
        return
    a, b = along / length, aside / breadth
    half, other_half = (n // 2 + (n // 2 % 2 and n > 2) for n in (length, breadth))
    if 2 * length > 3 * breadth:
        yield from _curve(corner, a * half, aside)
        yield from _curve(corner + a * half, a * (length - half), aside)
    else:
        half = length // 2
        yield from _curve(corner, b * other_half, a * half)
        yield from _curve(corner + b * other_half, along, b * (breadth - other_half))
        yield from _curve(corner + a * (length - 1) + b * (other_half - 1), -b * other_half, -a * (length - half))


def _cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every position."""
    positions = torch.arange(height * width)
    return positions // width, positions % width


def _and_back(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second, first.flip(0), second.flip(0)])
