"""What moves pictures, boxes and masks together."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from vmamba.data.config import DetectionAugmentConfig, SegmentationAugmentConfig
from vmamba.data.seeding import seed_sample
from vmamba.data.transforms import (
    IGNORED,
    Crop,
    PhotometricDistort,
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
    filled = 0
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
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        assert inside[:height, :width].all()  # filled up at the right and bottom alone
        assert inside.sum() == height * width
        filled += not inside.all()
        seed_sample(seed)
        again = transform(picture, mask)
        assert torch.equal(again[0], moved)
        assert torch.equal(again[1], labels)
    assert filled > 10
    config = SegmentationAugmentConfig((80, 60), (1.0, 1.0), (60, 80), photometric=False, hflip=1.0)
    moved, labels = segmentation_transform(config, PRE)(picture, mask)
    assert torch.equal(moved, picture.flip(-1))
    assert torch.equal(labels, mask.flip(-1))


def test_pixels_without_a_class_do_not_count_among_those_of_a_part():
    """Of a picture of two classes that is mostly unlabelled, parts that show one class alone are drawn again."""
    mask = torch.full((40, 40), IGNORED, dtype=torch.int16)
    mask[:, 19], mask[:, 20] = 0, 1
    part = Crop((10, 10), most_of_one_class=0.75)
    shown = 0
    for seed in range(40):
        seed_sample(seed)
        labels = part(Image(torch.zeros(3, 40, 40, dtype=torch.uint8)), Mask(mask))[1]
        shown += set(labels[labels != IGNORED].tolist()) == {0, 1}
    assert shown > 30  # 9 places of 31 show all of both, and there are ten draws


def test_the_sides_of_a_scale_have_no_order():
    picture, mask, _ = scene()
    found = []
    for scale in ((64, 512), (512, 64)):
        seed_sample(0)
        config = SegmentationAugmentConfig(crop=(48, 48), scale=scale, ratio=(1, 1))
        found.append(segmentation_transform(config, PRE)(picture, mask))
    assert all(map(torch.equal, *found))


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


def test_objects_are_dropped_of_which_less_than_a_pixel_is_left():
    picture, _, target = scene()
    boxes = torch.tensor([[30.0, 20, 33, 23], [30, 20, 50, 21], [70, 50, 71.5, 60]])
    target["boxes"] = BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 80))
    target["labels"], target["masks"] = torch.tensor([1, 2, 3]), Mask(torch.ones(3, 60, 80, dtype=torch.uint8))
    halved = detection_transform(DetectionAugmentConfig(short_sides=(30,), hflip=0.0), PRE)(picture, target)[1]
    assert halved["labels"].tolist() == [1]
    assert halved["boxes"].tolist() == [[15.0, 10.0, 16.5, 11.5]]
    assert len(halved["masks"]) == 1


def test_parts_are_cut_out_of_half_of_the_pictures_for_3x():
    config = DetectionAugmentConfig(short_sides=(30,), longest=90, crop_sides=(60, 120), crop=(20, 50), hflip=0.0)
    transform, whole, shapes = detection_transform(config, PRE), 0, set()
    for seed in range(200):
        seed_sample(seed)
        picture, _, target = scene()
        moved, found = transform(picture, target)
        height, width = moved.shape[1:]
        shapes.add((height, width))
        assert height == 30 or width == 90 or min(height, width) == 30
        whole += (height, width) == (30, 40)
        for box, label, mask in zip(found["boxes"], found["labels"], found["masks"], strict=True):
            assert ((box >= 0) & (box <= torch.tensor([width, height, width, height]))).all()
            if label == 4:
                assert ((moved[1] > 150) != (mask == 1)).float().mean() < 0.1
    assert 80 < whole < 130
    assert len(shapes) > 30
    part = Crop((20, 20), (50, 50))
    for side in (0, 1):
        sizes = {part(scene()[0]).shape[1 + side] for _ in range(400)}
        assert sizes == set(range(20, 51))
    assert part(scene(10, 200)[0]).shape[1] == 10


def test_colours_are_varied_as_published(monkeypatch):
    """Of one pixel: its channels plus a shift, times a contrast, and its hue and saturation in HSV."""
    for pixel in ([200, 100, 40], [10, 20, 250], [90, 90, 90], [0, 0, 0], [255, 0, 0]):
        image = Image(torch.tensor(pixel, dtype=torch.uint8).view(3, 1, 1))
        hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in pixel))

        def changed(image=image, **params):
            none = {"brightness": 0, "contrast": (1.0, 1.0), "saturation": 1, "hue": 0}
            monkeypatch.setattr(PhotometricDistort, "make_params", lambda *_: none | params)
            return PhotometricDistort()(image).flatten().tolist()

        assert changed() == pixel
        assert changed(brightness=-32.0) == [max(x - 32, 0) for x in pixel]
        assert changed(brightness=31.5) == [min(int(x + 31.5), 255) for x in pixel]
        assert changed(contrast=(0.5, 1.0)) == changed(contrast=(1.0, 0.5)) == [x // 2 for x in pixel]
        assert changed(contrast=(1.5, 1.0)) == [min(int(1.5 * x), 255) for x in pixel]
        for factor in (0.5, 1.4):
            expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
            assert changed(saturation=factor) == pytest.approx([255 * x for x in expected], abs=0.51)
        expected = colorsys.hsv_to_rgb((hue - 0.1) % 1, saturation, value)
        assert changed(hue=-0.1) == pytest.approx([255 * x for x in expected], abs=1)


def test_how_much_colours_are_varied():
    transform, (picture, mask, _) = PhotometricDistort(), scene()
    draws = [transform.make_params([picture]) for _ in range(2000)]
    values = {
        "brightness": [d["brightness"] for d in draws if d["brightness"]],
        "contrast": [f for d in draws for f in d["contrast"] if f != 1],
        "saturation": [d["saturation"] for d in draws if d["saturation"] != 1],
        "hue": [d["hue"] * 180 for d in draws if d["hue"]],
    }
    for name, (low, high) in {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}.items():
        assert 900 < len(values[name]) < 1100
        assert low <= min(values[name]) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values[name]) <= high
    assert {round(x) for x in values["hue"]} == {*range(-18, 18)} - {0}
    first = sum(d["contrast"][0] != 1 for d in draws)
    assert 0.4 < first / len(values["contrast"]) < 0.6
    moved, same = transform(picture, mask)
    assert moved.dtype == torch.uint8
    assert torch.equal(same, mask)
