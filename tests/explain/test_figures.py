"""Figures can be read, whatever the shape of the picture."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import vmamba
from vmamba import explain
from vmamba.explain.receptive_field import ReceptiveField, draw_receptive_fields


def assert_texts_are_apart(figure: Figure) -> None:
    """No text over another, or cut off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    width, height = canvas.get_width_height()
    # The numbers on axes may end in one corner, and those of powers lie beyond the ends of a bar, unseen.
    boxes = [(name, box) for name, box in boxes if not name.isdigit() and "mathdefault" not in name]
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


def test_numbers_of_steps_are_whole(segmenter):
    recording = explain.record_scans(segmenter, torch.randn(1, 3, 32, 32))
    found = recording.selectivity(0)
    steps = torch.full_like(found.steps, 3.0)
    steps[0, 0, 0, 0] = 6
    for few, labels in ((steps, ["3", "4", "5", "6"]), (torch.full_like(steps, torch.inf), [])):
        figure = dataclasses.replace(found, steps=few).figure()
        assert_texts_are_apart(figure)
        bar = next(axes for axes in figure.axes if axes.get_ylabel() == "remembered for, steps")
        assert [text.get_text() for text in bar.get_yticklabels()] == labels


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (16, 96)])
def test_fields_of_models_with_long_names(size):
    name = "/home/somebody/experiments/2031-05-17_long_schedule/runs/segmentation_of_streets/model.safetensors"
    shares = np.full(size, 1 / (size[0] * size[1]))
    fields = [ReceptiveField(f"{name}, {when}", shares, (size[0] / 2, size[1] / 2), 1) for when in ("as drawn", "now")]
    figure = draw_receptive_fields(fields, columns=2)
    assert_texts_are_apart(figure)
    right = figure.subfigs[1]
    assert "images" not in figure._supxlabel.get_text()
    assert not right.legends[0].get_window_extent().overlaps(right.axes[0].get_window_extent())
    assert "mean over 4 images" in draw_receptive_fields([ReceptiveField("a", shares, (1, 1), 4)])._supxlabel.get_text()
