"""Draws the pictures of the scan patterns in docs/images: routes.png (the README's) and patterns.*.

python docs/draw_routes.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from vmamba.explain import figures
from vmamba.explain.scan_patterns import pattern_figure, save_patterns, scan_pattern
from vmamba.ops import PATTERNS

HERE = Path(__file__).parent
TITLES = ("rows", "columns", "rows, backwards", "columns, backwards")


def save(figure: figures.Figure, path: Path) -> None:
    """Write a figure in few colours, which is a third as large and looks the same."""
    figures.write(figure, path, dpi=100)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main(folder: Path = HERE / "images") -> None:
    """Draw all of them."""
    boot = np.asarray(Image.open(HERE.parent / "examples/images/ankle_boot.png"))
    cross = dataclasses.replace(scan_pattern("cross", 7, 7), routes=TITLES)
    title = "Four routes over the image. Along each, a state remembers what the patches told it to."
    figures.write(cross.figure(255 - boot, title), folder / "routes.png")
    patterns = [scan_pattern(name, 8, 8) for name in PATTERNS]
    save_patterns(patterns, folder / "patterns.gif")
    save(pattern_figure(patterns), folder / "patterns.png")
    save(pattern_figure([scan_pattern(name, 7, 10) for name in ("hilbert", "spiral")]), folder / "patterns_own.png")


if __name__ == "__main__":
    main()
