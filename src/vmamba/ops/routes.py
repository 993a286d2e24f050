"""Scan routes: the orders in which the four sequences walk an H×W grid (paper, section 4.2, "2D-Selective-Scan").

`cross_scan` lays a grid out as four sequences; `cross_merge`, its adjoint, puts four sequences back on the grid and
adds them. A pattern is data: four `Route`s, which every backend turns into index arithmetic of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmamba.ops import checks


class Route(NamedTuple):
    """One order over the grid: by rows or by columns, forwards or backwards."""

    columns: bool
    backwards: bool


_ROWS, _COLUMNS = Route(columns=False, backwards=False), Route(columns=True, backwards=False)
_ROWS_BACK, _COLUMNS_BACK = Route(columns=False, backwards=True), Route(columns=True, backwards=True)

PATTERNS: dict[str, tuple[Route, Route, Route, Route]] = {
    "cross": (_ROWS, _COLUMNS, _ROWS_BACK, _COLUMNS_BACK),
    "unidirectional": (_ROWS, _ROWS, _ROWS, _ROWS),
    "bidirectional": (_ROWS, _ROWS, _ROWS_BACK, _ROWS_BACK),
}


def get_routes(pattern: str) -> tuple[Route, ...]:
    """The four routes of a named pattern.

    Raises:
        ValueError: the pattern has no entry in `PATTERNS`.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}; expected one of {', '.join(map(repr, PATTERNS))}")
    return PATTERNS[pattern]


def cross_scan(x: Tensor, pattern: str = "cross") -> Tensor:
    """Lay a grid out as four sequences.

    Args:
        x: (B, C, H, W), any dtype.
        pattern: "cross" (rows, columns and both backwards), "unidirectional" or "bidirectional".

    Returns:
        (B, 4, C, H·W), the dtype of `x`.

    Raises:
        ValueError: `x` is not four-dimensional, or the pattern is unknown.
    """
    checks.ndim("x", x, 4, "(B, C, H, W)")
    sequences = []
    for route in get_routes(pattern):
        sequence = (x.transpose(2, 3) if route.columns else x).flatten(2)
        sequences.append(sequence.flip(-1) if route.backwards else sequence)
    return torch.stack(sequences, dim=1)


def cross_merge(ys: Tensor, size: tuple[int, int], pattern: str = "cross") -> Tensor:
    """Put four sequences back on their grid and add them: the adjoint of `cross_scan`.

    Args:
        ys: (B, 4, C, L) with L = H·W, any dtype.
        size: (H, W) of the grid.
        pattern: the pattern that `cross_scan` was called with.

    Returns:
        (B, C, H, W), the dtype of `ys`.

    Raises:
        ValueError: `ys` does not hold four sequences of length H·W, or the pattern is unknown.
    """
    height, width = size
    checks.ndim("ys", ys, 4, "(B, 4, C, H·W)")
    checks.shape("ys", ys, (None, 4, None, height * width), f"(B, 4, C, H·W) for a grid of {height}×{width}")
    merged = None
    for sequence, route in zip(ys.unbind(1), get_routes(pattern), strict=True):
        sequence = sequence.flip(-1) if route.backwards else sequence
        if route.columns:
            grid = sequence.unflatten(-1, (width, height)).transpose(2, 3)
        else:
            grid = sequence.unflatten(-1, (height, width))
        merged = grid if merged is None else merged + grid
    assert merged is not None
    return merged
