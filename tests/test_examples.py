"""The scripts under examples/ write what they say."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from vmamba.data.coco import open_objects
from vmamba.data.masks import open_masks

SCRIPT = Path(__file__).parents[1] / "examples" / "garments.py"
SIZES = ["--train", "5", "--val", "3"]


@pytest.fixture(scope="module")
def garments():
    spec = importlib.util.spec_from_file_location("garments", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(garments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "runs" / "garments"
    garments.main([str(folder), *SIZES])
    return folder


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("val", 3)])
def test_garments_are_what_both_readers_take(garments, made, split, count):
    objects, masked = open_objects(made / f"{split}.json", made / "images"), open_masks(made, split)
    assert len(objects) == len(masked) == count
    assert objects.class_names == list(garments.CLASSES) == masked.class_names[1:]
    assert objects.has_masks
    assert objects.dropped == {}
    assert masked.class_names[0] == "background"
    areas = {a["id"]: a["area"] for a in json.loads((made / f"{split}.json").read_text())["annotations"]}
    known = objects.ground_truth()["annotations"]
    assert {a["id"]: a["area"] for a in known} == areas
    for index in range(count):
        (picture, target), (same, labels) = objects.read(index), masked.read(index)
        assert objects.name(index) == masked.name(index)
        assert picture.equal(same)
        assert picture.shape == (3, 256, 320)
        masks = target["masks"].numpy().astype(bool)
        assert garments.LEAST <= len(masks) <= garments.MOST
        assert masks.sum(0).max() == 1  # what is covered belongs to the garment on top alone
        expected = (masks * (target["labels"].numpy() + 1)[:, None, None]).sum(0)
        assert np.array_equal(labels.numpy(), expected)
        for box, mask in zip(target["boxes"].numpy(), masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_garments_follow_from_the_seed_and_nothing_is_overwritten(garments, made, tmp_path):
    def content(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = content(made)
    assert len(before) == 2 * (5 + 3) + 3
    garments.main([str(tmp_path / "same"), *SIZES])
    assert content(tmp_path / "same") == before
    garments.main([str(tmp_path / "other"), *SIZES, "--seed", "1"])
    assert not {p for p, text in content(tmp_path / "other").items() if p.suffix == ".jpg" and before[p] == text}
    with pytest.raises(SystemExit, match="exists already"):
        garments.main([str(made), *SIZES])
    assert content(made) == before
    assert {path.name for path in tmp_path.iterdir()} == {"same", "other"}


def test_no_garment_is_in_both_splits(garments, tmp_path, monkeypatch):
    used = {}

    def write_split(folder, split, count, seed, images, labels):
        folder.mkdir(exist_ok=True)
        used[split] = {image.tobytes() for image in images}
        assert len(images) == len(labels)

    monkeypatch.setattr(garments, "write_split", write_split)
    for options, sizes in (([], (60_000, 10_000)), (["--tuning"], (50_000, 10_000))):
        garments.main([str(tmp_path / f"with{len(options)}"), *options])
        assert tuple(map(len, used.values())) == sizes
        assert not used["train"] & used["val"]


def test_garments_are_cut_out_along_their_outline(garments):
    pixels = np.zeros((28, 28), np.uint8)
    pixels[6:22, 8:20] = 200
    pixels[12:16, 12:16] = 0  # a dark place: of a coat it is a part, between a sandal's straps there is nothing
    for label, hole in ((4, 255), (garments.SANDAL, 0)):
        piece = garments.garment(pixels, label, 56, 0.0, "#3a6ea5")
        alpha = np.asarray(piece.getchannel("A"))
        assert piece.size == (56, 56)
        assert alpha[27, 27] == hole
        assert alpha[20, 20] == 255
        assert alpha[6, 28] == 0
    red, _, blue = piece.getpixel((20, 20))[:3]
    assert blue > red + 40
    turned = garments.garment(pixels, 0, 56, 30.0, "#3a6ea5")
    assert turned.width > 56
