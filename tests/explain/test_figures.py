"""Figures can be read, whatever the shape of the picture."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import vmamba
from vmamba import explain


def assert_texts_are_apart(figure: Figure) -> None:
    """No text over another, or cut off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    width, height = canvas.get_width_height()
    # The numbers on axes may end in one corner.
    boxes = [(name, box) for name, box in boxes if not name.isdigit()]
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= width, name
        assert box.y1 <= height, name
    for (name, box), (other, another) in combinations(boxes, 2):
        assert not box.overlaps(another), (name, other)
    bars = [axes.get_window_extent() for axes in figure.axes if not axes.images and axes.collections]
    for name, box in boxes:
        assert not any(box.overlaps(bar) for bar in bars), name


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=3, channels=8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(96, 72), (96, 32), (16, 96), (64, 64)])
def test_titles_and_labels_are_apart(segmenter, size):
    recording = explain.record_scans(segmenter, torch.randn(1, 3, *size))
    maps = recording.maps(block=0)
    for figure in (
        maps.figure(),
        maps.figure(measure="share"),
        recording.selectivity(0).figure(),
        recording.matrix(1).figure(),
        explain.stage_maps(segmenter, recording.seen).figure(),
        explain.class_maps(segmenter, recording.seen).figure(),
    ):
        assert_texts_are_apart(figure)
