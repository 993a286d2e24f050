import os

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.coco import open_objects
from vmamba.data.images import read_index_mask
from vmamba.data.masks import open_masks, pair
from vmamba.data.sources import check_all
from vmamba.errors import DataError, ImageError

VALUES = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)


def make(root, splits=("training", "validation"), values=VALUES, names="road\nsky\ntree\n"):
    for split in splits:
        for kind in ("images", "annotations"):
            (root / kind / split / "deep").mkdir(parents=True)
        for name in ("a", "deep/b"):
            Image.new("RGB", values.shape[::-1], (9, 8, 7)).save(root / f"images/{split}/{name}.jpg", quality=100)
            Image.fromarray(values).save(root / f"annotations/{split}/{name}.png")
    if names:
        (root / "classes.txt").write_text(names)


def test_pictures_and_masks_are_paired_and_labelled(tmp_path):
    make(tmp_path)
    for split in ("train", "val", "validation"):
        data = open_masks(tmp_path, split)
        assert len(data) == 2
        assert data.class_names == ["road", "sky", "tree"]
        assert [os.path.basename(data.name(i)) for i in range(2)] == ["a.jpg", "b.jpg"]
        picture, labels = data.read(1)
        assert picture.shape == (3, 2, 3)
        assert labels.dtype == torch.int16
        assert labels.tolist() == [[0, 1, 2], [2, -1, 0]]
        check_all(len(data), data.read, data.where)


def test_ade20k_ignores_zero_and_starts_from_one(tmp_path):
    make(tmp_path, names=None)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
    )
    data = open_masks(tmp_path, "val")
    assert data.class_names == ["wall", "building"]
    assert data.read(0)[1].tolist() == [[-1, 0, 1], [1, -1, -1]]


def test_masks_of_every_kind_of_file(tmp_path):
    palette = Image.fromarray(VALUES, "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "p.png", transparency=0)
    Image.fromarray(VALUES.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    Image.fromarray(VALUES).save(tmp_path / "l.tif")
    assert (
        read_index_mask(tmp_path / "p.png").tolist() == read_index_mask(tmp_path / "l.tif").tolist() == VALUES.tolist()
    )
    assert read_index_mask(tmp_path / "deep.png").tolist() == (VALUES.astype(int) * 200).tolist()
    Image.new("RGB", (3, 2)).save(tmp_path / "rgb.png")
    with pytest.raises(ImageError, match=r"rgb.png: an index mask has one number a pixel; this picture has mode RGB"):
        read_index_mask(tmp_path / "rgb.png")


def test_masks_without_a_single_labelled_pixel_are_refused(tmp_path):
    make(tmp_path)
    data = open_masks(tmp_path, "train")
    data.check_labels()
    for mask in data.masks:
        data.check_labels()  # one labelled mask is enough
        Image.fromarray(np.full((2, 3), 255, np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"no pixel of the 2 masks has a class: all have the ignored value 255; "):
        data.check_labels()


def test_what_is_wrong_is_listed_by_file(tmp_path):
    make(tmp_path)
    data = open_masks(tmp_path, "train")
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(data.masks[0])
    Image.fromarray(np.zeros((3, 2), np.uint8)).save(data.masks[1])
    with pytest.raises(
        DataError,
        match=r"(?s)2 of 2 images.*a.png: 6 pixels of value 7, outside of the 3 classes 0 to 2 and of the ignored "
        r"value 255\n.*b.png: 2×3, but its picture is 3×2",
    ):
        check_all(len(data), data.read, data.where)
    os.remove(data.masks[1])
    Image.new("L", (3, 2)).save(tmp_path / "images/training/a.png")
    with pytest.raises(DataError, match=r"(?s)2 of 2 pictures.*a.png and .*a.jpg: which.*deep/b.jpg: no mask in"):
        open_masks(tmp_path, "train")
    with pytest.raises(DataError, match=r"no folders images/test and annotations/test"):
        open_masks(tmp_path / "images", "test")
    (tmp_path / "classes.txt").write_text("road\nsky\nroad\n")
    with pytest.raises(DataError, match=r"images/validation: several classes are called road: give each a name of its"):
        open_masks(tmp_path, "val")
    os.remove(tmp_path / "classes.txt")
    with pytest.raises(DataError, match=r"classes.txt should name a class on each line"):
        open_masks(tmp_path, "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no images"):
        pair(tmp_path / "empty", tmp_path / "empty", ["a"])


@pytest.mark.skipif("VMAMBA_DENSE_DATA" not in os.environ, reason="VMAMBA_DENSE_DATA names no folder of real data sets")
def test_real_data_sets():
    root = os.environ["VMAMBA_DENSE_DATA"]
    for name, split, pictures, classes in (
        ("camvid", "train", 367, 11),
        ("camvid", "val", 101, 11),
        ("ade_samples", "val", 3, 150),
    ):
        data = open_masks(f"{root}/{name}", split)
        assert (len(data), len(data.class_names)) == (pictures, classes)
        check_all(len(data), data.read, data.where)
    for split, pictures, boxes in (("train", 205, 2804), ("val", 87, 1137)):
        cells = open_objects(f"{root}/bccd/{split}.json", f"{root}/bccd/images")
        assert (len(cells), len(cells.ground_truth()["annotations"])) == (pictures, boxes)
        assert (cells.class_names, cells.has_masks, cells.dropped) == (["RBC", "WBC", "Platelets"], False, {})
        check_all(len(cells), cells.read, cells.where)
