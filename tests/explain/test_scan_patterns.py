"""Scan patterns in numbers, as pictures and as animations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.errors import RecipeError
from vmamba.explain import save_patterns, scan_pattern
from vmamba.explain.scan_patterns import animation, pattern_figure
from vmamba.ops import PATTERNS, scan_orders


def test_numbers_of_rows_and_columns():
    found = scan_pattern("cross", 2, 3)
    assert found.orders.tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert found.steps[1].tolist() == [0, 2, 4, 1, 3, 5]
    # Rows: four steps of 1 and one back to the start of the next row. Columns: three of 1 and two up and to the right.
    rows, columns = (4 + math.sqrt(5)) / 5, (3 + 2 * math.sqrt(2)) / 5
    np.testing.assert_allclose(found.stride, [rows, columns, rows, columns])
    # Rows: four neighbours beside each other, a step apart, and three below each other, three apart.
    np.testing.assert_allclose(found.delay, [13 / 7, 11 / 7, 13 / 7, 11 / 7])
    assert found.nearest == 1  # on the better of the two


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7)])
def test_every_pattern_on_every_grid(pattern, size):
    found = scan_pattern(pattern, *size)
    assert torch.equal(torch.from_numpy(found.orders), scan_orders(pattern, *size))
    assert len(set(found.routes)) == (1 if pattern == "unidirectional" else 2 if pattern == "bidirectional" else 4)
    numbers = json.loads(json.dumps(found.numbers(), allow_nan=False))
    assert numbers["grid"] == list(size)
    assert [route["order"] for route in numbers["routes"]] == found.orders.tolist()
    assert len(animation([found])) == size[0] * size[1]


@pytest.mark.parametrize(("pattern", "longest"), [("spiral", 1), ("hilbert", math.sqrt(2))])
def test_curves_go_from_neighbour_to_neighbour(pattern, longest):
    for size in ((8, 8), (7, 7), (14, 14), (6, 9), (9, 6), (2, 13)):
        rows, columns = np.divmod(scan_pattern(pattern, *size).orders, size[1])
        lengths = np.hypot(np.diff(rows), np.diff(columns))
        assert lengths.max() <= longest
        assert (lengths > 1).sum(1).max() <= 1


def test_diagonals_by_hand():
    assert scan_orders("diagonal", 2, 3).tolist()[:2] == [[3, 0, 4, 1, 5, 2], [0, 1, 3, 2, 4, 5]]


def test_a_pattern_of_ones_own():
    def mine(height, width):
        return torch.stack([torch.arange(height * width)] * 4)

    assert scan_pattern(mine, 2, 2).numbers()["pattern"] == "mine"
    assert scan_pattern(mine, 2, 2).routes == tuple(f"mine, route {k}" for k in (1, 2, 3, 4))
    assert scan_pattern(PATTERNS["spiral"], 3, 3).routes == scan_pattern("spiral", 3, 3).routes
    with pytest.raises(ValueError, match="pattern is 'zigzag'"):
        scan_pattern("zigzag")
    with pytest.raises(RecipeError, match="the grid is 0×3 patches"):
        scan_pattern("cross", 0, 3)


def test_the_animation_lights_the_patches_in_order(tmp_path):
    pattern = scan_pattern("diagonal", 3, 4)
    frames = animation([pattern], side=40)  # cells of ten pixels
    assert len(frames) == 12
    for t, frame in enumerate(frames):
        pixels = np.asarray(frame.convert("RGB")).astype(int)
        for k in range(4):
            row, column = divmod(int(pattern.orders[k, t]), 4)
            top, left = 12 + 20, 12 + k * (4 * 10 + 12)
            cells = pixels[top + 5 : top + 30 : 10, left + 5 : left + 40 : 10]
            darkest = np.unravel_index(cells.sum(-1).argmin(), (3, 4))
            assert tuple(map(int, darkest)) == (row, column)
            visited = (cells != (236, 239, 241)).any(-1)  # of the ground
            assert visited.sum() == t + 1
    save_patterns([pattern, scan_pattern("cross", 3, 4)], path := tmp_path / "sub" / "patterns.gif")
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"], image.format) == (12, 0, "GIF")


def test_the_picture_has_a_line_for_each_route():
    figure = pattern_figure([scan_pattern("spiral", 4, 5), scan_pattern("cross", 4, 5)])
    panels = [axes for row in figure.subfigs for axes in row.axes]
    assert len(panels) == 8
    for k, axes in enumerate(panels[:4]):
        (lines,) = axes.collections
        points = [segment[0] for segment in lines.get_segments()] + [lines.get_segments()[-1][1]]
        order = [int(y) * 5 + int(x) for x, y in points]
        assert order == scan_orders("spiral", 4, 5)[k].tolist()
