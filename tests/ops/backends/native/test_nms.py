"""Non-maximum suppression in C++ against torchvision's, with every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import nms as torchvisions

from vmamba.ops.backends.native import nms as native
from vmamba.ops.nms import nms

pytestmark = pytest.mark.skipif(native.reason_unavailable() is not None, reason=str(native.reason_unavailable()))


def _boxes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some without area, and scores of which some are equal."""
    generator = torch.Generator().manual_seed(count)
    centres, halves = torch.rand(count, 2, generator=generator) * 200, torch.rand(count, 2, generator=generator) * 60
    boxes, scores = torch.cat([centres - halves, centres + halves], 1), torch.rand(count, generator=generator)
    boxes[::17, 2:] = boxes[::17, :2]
    scores[::3] = scores[::3].round(decimals=1)
    return boxes, scores


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 700])
def test_the_boxes_that_stay_are_torchvisions(kernels, count):
    boxes, scores = _boxes(count)
    for iou in (0.0, 0.3, 0.5, 0.7, 1.0):
        kept = torchvisions(boxes, scores, iou)
        assert torch.equal(native.nms(boxes, scores, iou), kept)
    assert count < 100 or len(torchvisions(boxes, scores, 0.3)) < count / 2


@pytest.mark.parametrize("iou", [0.1, 0.2, 0.25, 1 / 3, 0.5, 0.6, 2 / 3, 0.7])
def test_overlaps_of_just_the_threshold(kernels, iou):
    corners = torch.randint(0, 12, (500, 2, 2), generator=torch.Generator().manual_seed(3)).float().sort(1).values
    boxes, scores = corners.flatten(1), torch.linspace(1, 0, 500)
    assert torch.equal(native.nms(boxes, scores, iou), torchvisions(boxes, scores, iou))


@pytest.mark.filterwarnings("ignore:.*create_unbacked_symint")
def test_other_tensors_are_torchvisions():
    boxes, scores = _boxes(50)
    kept = nms(boxes, scores, 0.5)
    assert torch.equal(kept, native.nms(boxes, scores, 0.5))
    assert torch.equal(nms(boxes.double(), scores.double(), 0.5), kept)
    assert torch.equal(nms(boxes.requires_grad_(), scores, 0.5), kept)
    compiled = torch.compile(lambda b, s: nms(b, s, 0.5), backend="eager")
    assert torch.equal(compiled(boxes.detach(), scores), kept)


def test_arguments_that_do_not_fit_are_refused():
    boxes, scores = _boxes(5)
    with pytest.raises(ValueError, match=r"expected \(n, 4\)"):
        native.nms(boxes[:, :3], scores, 0.5)
    with pytest.raises(ValueError, match=r"scores has shape \(4,\)"):
        native.nms(boxes, scores[1:], 0.5)
    with pytest.raises(TypeError, match=r"boxes have dtype torch\.float64"):
        native.nms(boxes.double(), scores, 0.5)


def test_another_default_device_changes_nothing():
    boxes, scores = _boxes(33)
    kept = torchvisions(boxes, scores, 0.5)
    with torch.device("meta"):
        found = native.nms(boxes, scores, 0.5)
    assert torch.equal(found, kept)
