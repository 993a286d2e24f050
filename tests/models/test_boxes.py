from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models.dense import GOLDEN, unpacked
from torch import Tensor
from torchvision.ops import nms

from vmamba.models import boxes as bx
from vmamba.ops.roi_align import roi_align


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Single steps of mmdetection; see tests/golden/dense/README.md."""
    with np.load(GOLDEN / "dense_ops.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def test_anchors_are_mmdetections(golden: dict[str, Tensor]) -> None:
    for stride, expected in zip((4, 8, 16, 32, 64), golden["anchors_base"], strict=True):
        assert torch.equal(bx.anchors((1, 1), stride), expected)
    assert torch.equal(bx.anchors((3, 4), 16), golden["anchors_grid_3x4_stride16"])


def test_decoding_is_mmdetections(golden: dict[str, Tensor]) -> None:
    boxes, deltas, stds = golden["coder_boxes"], golden["coder_deltas"], (0.1, 0.1, 0.2, 0.2)
    assert torch.equal(bx.decode(boxes, deltas, size=(150, 211)), golden["coder_stds_1"])
    assert torch.equal(bx.decode(boxes, 5 * deltas, stds, (150, 211)), golden["coder_stds_01_02"])
    assert torch.equal(bx.decode(boxes, 5 * deltas, stds), golden["coder_no_clip"])


def test_decoding_undoes_encoding(golden: dict[str, Tensor]) -> None:
    boxes = golden["coder_boxes"]
    targets, stds = boxes.roll(1, 0), (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(bx.decode(boxes, bx.encode(boxes, targets, stds), stds), targets, atol=1e-3, rtol=0.0)
    assert bx.encode(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 25, 20]]), stds).tolist() == [
        pytest.approx([10.0, 0.0, 5 * math.log(2), 0.0])
    ]


def test_region_levels_are_mmdetections(golden: dict[str, Tensor]) -> None:
    assert bx.region_levels(golden["level_boxes"], 4).tolist() == golden["levels"].tolist()
    endless = torch.tensor([[0.0, 0, math.inf, 5], [0, 0, math.nan, 5], [9, 0, 0, 5]])
    assert bx.region_levels(endless, 4).tolist() == [3, 0, 0]


def test_roi_align_is_mmcvs(golden: dict[str, Tensor]) -> None:
    rows = torch.cat([torch.zeros(8, 1), golden["align_rois_stride8"]], 1)
    for side in (7, 14):
        repeated = golden["align_map"].repeat(1, 16, 1, 1)  # enough channels for the fast path
        pooled = roi_align(repeated, rows, side, 1 / 8).unflatten(1, (16, -1))[:, -1]
        torch.testing.assert_close(pooled, golden[f"align_{side}"], atol=1e-6, rtol=0.0)


def test_suppression_rounds_as_mmcvs(golden: dict[str, Tensor]) -> None:
    boxes, scores, classes = golden["nms_boxes"], golden["nms_scores"], golden["nms_ids"].long()
    kept = bx.suppress(boxes, scores, classes, 0.5)
    assert kept.tolist() == golden["nms_keep"].tolist()
    assert len(kept) != len(golden["nms_keep_without_offset"])
    assert bx.suppress(boxes[:0], scores[:0], classes[:0], 0.5).tolist() == []


def test_suppression_of_very_many_boxes_runs_class_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    corner = torch.rand(600, 2) * 400
    boxes, scores = torch.cat([corner, corner + 20 + 60 * torch.rand(600, 2)], 1), torch.rand(600)
    classes = torch.randint(0, 5, (600,))
    together = bx.suppress(boxes, scores, classes, 0.5)
    monkeypatch.setattr(bx, "_ONE_RUN_BELOW", 600)
    runs: list[int] = []
    monkeypatch.setattr(bx, "nms", lambda *given: runs.append(len(given[0])) or nms(*given))
    assert torch.equal(bx.suppress(boxes, scores, classes, 0.5), together)
    assert runs == classes.bincount().tolist()
    assert scores[together].diff().max() <= 0


def test_matching_by_mmdetections_rules() -> None:
    truths = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]])
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],  # 1 with the first
            [0, 0, 10, 8],  # 0.8 with the first
            [0, 0, 10, 5],  # 0.5: neither match nor negative
            [20, 0, 30, 4],  # 0.4 with the second, whose best it is
            [20, 0, 30, 4],  # as good
            [50, 50, 60, 52],  # 0.2 with the third, whose best it is: too little
            [80, 80, 90, 90],
        ]
    )
    matched = bx.match(boxes, truths, positive=0.7, negative=0.3, rescue=0.3)
    assert matched.tolist() == [0, 0, bx.LEFT_OUT, 1, 1, bx.NEGATIVE, bx.NEGATIVE]
    assert bx.match(boxes, truths[:0], 0.7, 0.3, 0.3).tolist() == [bx.NEGATIVE] * 7
    # Exactly as much as makes a match is one, and exactly as much as is no longer a negative is none.
    halves = bx.match(boxes, truths, positive=0.5, negative=0.5, rescue=0.5)
    assert halves.tolist() == [0, 0, 0, bx.NEGATIVE, bx.NEGATIVE, bx.NEGATIVE, bx.NEGATIVE]
    assert bx.match(boxes, truths, positive=0.7, negative=0.5, rescue=0.7)[2] == bx.LEFT_OUT
    # A box that is the best one of two true boxes belongs to the last of them.
    twins = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 11]])
    assert bx.match(boxes[:1], twins, 0.7, 0.3, 0.3).tolist() == [2]


def test_sampling_fills_up_with_negatives() -> None:
    torch.manual_seed(0)
    matched = torch.full((1000,), bx.NEGATIVE)
    matched[:100], matched[100:200] = 3, bx.LEFT_OUT
    for count, share, positives in ((512, 0.25, 100), (256, 0.25, 64), (40, 0.5, 20)):
        positive, negative = bx.sample(matched, count, share)
        assert (len(positive), len(negative)) == (positives, count - positives)
        assert len(set(positive.tolist())) == positives
        assert (matched[positive] == 3).all()
        assert (matched[negative] == bx.NEGATIVE).all()
    assert not torch.equal(bx.sample(matched, 40, 0.5)[0], bx.sample(matched, 40, 0.5)[0])
    positive, negative = bx.sample(matched[:210], 512, 0.25)
    assert (len(positive), len(negative)) == (100, 10)


def test_masks_are_pasted_as_by_mmdetection(golden: dict[str, Tensor]) -> None:
    size = tuple(golden["paste_size"].tolist())
    masks = bx.paste_masks(golden["paste_probabilities"], golden["paste_boxes"], size)
    assert torch.equal(masks, unpacked(golden["paste_masks"], masks.shape))
    assert masks.sum((1, 2)).tolist() == golden["paste_pixels"].tolist()
    outside = torch.tensor([[-20.0, 5, -10, 15], [100, 5, 120, 15], [5, 5, 5, 10]])
    assert not bx.paste_masks(torch.ones(3, 28, 28), outside, size).any()
