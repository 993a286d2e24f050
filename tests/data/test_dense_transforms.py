"""What moves pictures, boxes and masks together."""

from pathlib import Path

import numpy as np
import torch
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from vmamba.data.config import DetectionAugmentConfig, SegmentationAugmentConfig
from vmamba.data.seeding import seed_sample
from vmamba.data.transforms import (
    IGNORED,
    Preprocessing,
    detection_transform,
    fitted_size,
    resize_bilinear_uint8,
    segmentation_transform,
)

PRE = Preprocessing()


def test_resizing_is_opencvs_bit_for_bit():
    golden = np.load(Path(__file__).parents[1] / "golden/dense/dense_ops.npz")
    picture = torch.from_numpy(np.random.RandomState(43).randint(0, 256, (45, 60, 3)).astype(np.uint8)).permute(2, 0, 1)
    for name, scale in (("up", (133, 80)), ("down", (40, 20)), ("slight", (64, 48))):
        expected = torch.from_numpy(golden[f"resize_{name}"]).permute(2, 0, 1)
        size = fitted_size(45, 60, max(scale), min(scale))
        assert size == tuple(expected.shape[1:])
        assert torch.equal(resize_bilinear_uint8(picture, size), expected)
    assert torch.equal(resize_bilinear_uint8(picture, (45, 60)), picture)
    pairs = picture[:, :44].reshape(3, 22, 2, 30, 2).int().sum((2, 4))
    assert torch.equal(resize_bilinear_uint8(picture[:, :44], (22, 30)), ((pairs + 2) // 4).to(torch.uint8))


def test_sizes_are_rounded_as_published():
    assert fitted_size(480, 640, 1333, 800) == (800, 1067)
    assert fitted_size(427, 640, 1333, 800) == (800, 1199)
    assert fitted_size(300, 900, 1333, 800) == (444, 1333)
    assert fitted_size(683, 512, 2048, 512) == (683, 512)


def scene(height=60, width=80):
    """A picture whose red channel is the mask's label times 20, a box of 200s in green."""
    mask = torch.arange(height * width).reshape(height, width) // (height * width // 4 + 1)
    picture = torch.stack((mask * 20, torch.zeros_like(mask), torch.full_like(mask, 7))).to(torch.uint8)
    picture[1, 20:40, 30:60] = 200
    boxes = BoundingBoxes(torch.tensor([[30.0, 20, 60, 40], [0, 0, 1, 1]]), format="XYXY", canvas_size=(height, width))
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 20:40, 30:60] = masks[1, :1, :1] = 1
    target = {"boxes": boxes, "labels": torch.tensor([4, 9]), "masks": Mask(masks)}
    return Image(picture), Mask(mask.to(torch.int16)), target


def test_masks_move_with_their_picture_and_what_is_added_is_ignored():
    picture, mask, _ = scene()
    config = SegmentationAugmentConfig((80, 60), (0.5, 2.0), (64, 72), photometric=False, most_of_one_class=0.7)
    transform = segmentation_transform(config, PRE)
    filled, flipped = 0, 0
    for seed in range(60):
        seed_sample(seed)
        moved, labels = transform(picture, mask)
        assert moved.shape == (3, 64, 72)
        assert labels.shape == (64, 72)
        assert labels.dtype == torch.int16
        inside = labels != IGNORED
        assert torch.equal(inside, ~((moved[0] == 124) & (moved[1] == 116) & (moved[2] == 104)))  # the mean's colour
        wrong = (moved[0].int() - labels * 20).abs()[inside] > 10  # bilinear against nearest, at the classes' borders
        assert wrong.float().mean() < 0.03
        counts = labels[inside].unique(return_counts=True)[1]
        assert counts.max() < 0.7 * counts.sum()
        filled += not inside.all()
        flipped += bool(labels[0, 0] == IGNORED)
        seed_sample(seed)
        again = transform(picture, mask)
        assert torch.equal(again[0], moved)
        assert torch.equal(again[1], labels)
    assert filled > 10
    assert 0 < flipped < filled


def test_boxes_and_masks_move_with_their_picture():
    picture, _, target = scene()
    configs = {
        (800, 1067): DetectionAugmentConfig(),
        None: DetectionAugmentConfig(short_sides=(30, 60, 90)),
        (64, 64): DetectionAugmentConfig(jitter=(0.5, 2.0), jitter_size=64),
    }
    for size, config in configs.items():
        transform, sizes = detection_transform(config, PRE), set()
        for seed in range(12):
            seed_sample(seed)
            moved, found = transform(picture, target)
            sizes.add(tuple(moved.shape[1:]))
            assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"])
            for box, label, mask in zip(found["boxes"], found["labels"], found["masks"], strict=True):
                if label == 4:
                    ys, xs = torch.where(mask == 1)
                    edges = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
                    assert (edges - box).abs().max() <= 1
                    assert (moved[1] > 150).int().sub(mask).abs().sum() <= mask.sum() * 0.2
        assert sizes == ({size} if size else {(30, 40), (60, 80), (90, 120)})
    moved, found = detection_transform(DetectionAugmentConfig(short_sides=(30,), hflip=1.0), PRE)(picture, target)
    assert found["labels"].tolist() == [4]  # the other is half a pixel wide
    assert found["boxes"].tolist() == [[10.0, 10.0, 25.0, 20.0]]
