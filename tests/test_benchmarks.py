"""The benchmarks run, and compare what they say they compare."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("learning")
    for name in ("learning", "environment"):
        sys.modules.pop(name, None)


def test_contenders_are_of_one_size(learning):
    sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in learning.CONTENDERS.items()}
    assert set(sizes) == {"VMamba", "Swin", "ConvNeXt", "ViT", "ResNet"}
    for name, size in sizes.items():
        assert 0.85 < size / sizes["VMamba"] < 1.15, name


def test_a_short_run_learns_and_reports(learning, monkeypatch, tmp_path):
    images, labels = torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 2
    images[labels == 1, :, 10:18, 10:18] = 255
    monkeypatch.setattr(learning, "load", lambda split: (images, labels, images, labels))
    monkeypatch.setattr(learning, "BATCH", 16)
    contenders = learning.run(3.0, "test", seed=0, only=["VMamba"])
    table = learning.report(contenders, 3.0, "test", 0, tmp_path)
    assert contenders[0].curve[-1][1] > 0.9
    assert "| VMamba | 0.71 M |" in table
    assert {path.name for path in tmp_path.iterdir()} == {"learning.json", "learning.md", "learning.png"}
