from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models.dense import DETECTION, MEAN, SEGMENTATION, STD, case_of
from torch import Tensor, nn
from torch.nn import functional as F

import vmamba
from vmamba.models.segmentation import resized
from vmamba.tasks.inference import SEVERAL, detect, segment


def picture(height: int, width: int, seed: int) -> Tensor:
    bgr = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return torch.from_numpy(bgr[:, :, ::-1].copy()).permute(2, 0, 1)


class Seen(nn.Module):
    """A model that notes what it is shown and answers with the numbers given."""

    num_classes = 3
    backbone = SimpleNamespace(strides=[4, 8])
    pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []
        self.sizes: dict[str, object] = {}

    def forward(self, images: Tensor, least_score: float = 0.0, **sizes: object) -> Tensor:
        self.images.append(images)
        self.sizes = sizes
        return images * torch.tensor([1.0, -2.0, 0.5])[:, None, None]


@pytest.mark.parametrize("path", [path for path in [*SEGMENTATION, *DETECTION] if "picture" in path.stem])
def test_the_network_sees_the_golden_input(path: object) -> None:
    name, images, (height, width), expected = case_of(path)
    seed, model = int(path.stem.rpartition("seed")[2]), Seen()
    if name.startswith("upernet"):
        segment(model, picture(height, width, seed), scale=(width, height))
    else:
        detect(model, [picture(height, width, seed)], scale=(width, height))
        assert model.sizes == {"sizes": [(height, width)], "file_sizes": [(height, width)]}
    (seen,) = model.images
    torch.testing.assert_close(seen, images, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(seen.mean((2, 3)), expected["input_mean"], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(seen[:, :, :4, :4], expected["input_corner"], atol=1e-5, rtol=0.0)


def test_ratios_bound_the_picture_and_keep_its_shape() -> None:
    """As mmcv's Resize(scale_factor=0.75, keep_ratio=True): 683·0.75 is 512 wide, and 450·512/683 is 337 high."""
    model = Seen()
    segment(model, picture(450, 683, 1), ratios=(0.75, 1.0))
    assert [seen.shape[2:] for seen in model.images] == [(337, 512), (450, 683)]


def test_segmentation_resizes_logits_twice() -> None:
    model, shown = Seen(), picture(40, 60, 1)
    logits = segment(model, shown, scale=(80, 36))
    (seen,) = model.images
    assert seen.shape == (1, 3, 36, 54)
    assert torch.equal(logits, resized(seen * torch.tensor([1.0, -2.0, 0.5])[:, None, None], (40, 60))[0])


def test_segmentation_at_several_scales_and_mirrored() -> None:
    model, shown = Seen(), picture(81, 121, 2)
    scores = segment(model, shown, ratios=SEVERAL, flip=True)
    assert [tuple(x.shape[2:]) for x in model.images[::2]] == [
        (41, 61), (61, 91), (81, 121), (101, 151), (122, 182), (142, 212),
    ]  # fmt: skip
    assert all(torch.equal(a, b.flip(3)) for a, b in zip(model.images[::2], model.images[1::2], strict=True))
    torch.testing.assert_close(model.images[4][0], (shown.float() - MEAN[:, None, None]) / STD[:, None, None])
    expected = [
        resized(x * torch.tensor([1.0, -2.0, 0.5])[:, None, None], (81, 121))[0].softmax(0) for x in model.images[::2]
    ]
    torch.testing.assert_close(scores, torch.stack(expected).mean(0), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(scores.sum(0), torch.ones(81, 121))


def test_detection_pads_pictures_after_normalising_and_answers_in_their_own_pixels() -> None:
    model, pictures = Seen(), [picture(480, 640, 3), picture(100, 50, 4)]
    detect(model, pictures)
    (seen,) = model.images
    assert model.sizes == {"sizes": [(800, 1067), (1333, 667)], "file_sizes": [(480, 640), (100, 50)]}
    assert seen.shape == (2, 3, 1344, 1088)
    assert not seen[0, :, 800:].any()
    assert not seen[0, :, :, 1067:].any()
    assert not seen[1, :, 1333:].any()
    alone = Seen()
    detect(alone, pictures[:1])
    torch.testing.assert_close(F.pad(alone.images[0], (0, 0, 0, 544)), seen[:1])

    torch.manual_seed(0)
    network = vmamba.create_model("maskrcnn_vmamba_femto", num_classes=3, channels=8, hidden=16, score_thr=0.0).eval()
    with torch.inference_mode():
        found = detect(network, [picture(60, 90, 5), picture(90, 40, 6)], scale=(64, 48))
    assert [tuple(one["masks"].shape) for one in found] == [(100, 60, 90), (100, 90, 40)]
    for one, size in zip(found, ([90, 60], [40, 90]), strict=True):
        assert (one["boxes"] <= torch.tensor(size * 2) + 1e-3).all()


@pytest.mark.parametrize(("height", "width"), [(1, 500), (3000, 8), (1, 1)])
def test_strips_of_a_few_pixels_get_an_answer(height: int, width: int) -> None:
    model, strip = Seen(), picture(height, width, 7)
    logits = segment(model, strip, scale=(256, 64))
    segment(model, strip, ratios=(1.0,))
    (seen, at_its_own_size) = model.images
    assert seen.shape[2:] == {(1, 500): (32, 256), (3000, 8): (256, 32), (1, 1): (64, 64)}[height, width]
    assert at_its_own_size.shape[2:] == (max(height, 32), max(width, 32))
    assert logits.shape == (3, height, width)
    small = {"channels": 8, "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    torch.manual_seed(0)
    segmenter = vmamba.create_model("upernet_vmamba_nano", num_classes=4, auxiliary_channels=0, **small).eval()
    detector = vmamba.create_model("maskrcnn_vmamba_nano", num_classes=4, hidden=8, score_thr=0.0, **small).eval()
    with torch.inference_mode():
        scores = segment(segmenter, strip, ratios=SEVERAL, flip=True)
        (found,) = detect(detector, [strip], scale=(256, 64))
    torch.testing.assert_close(scores.sum(0), torch.ones(height, width))
    assert found["masks"].shape == (100, height, width)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
