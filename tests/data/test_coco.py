import copy
import json

import numpy as np
import pytest
from PIL import Image

from vmamba.data.coco import decode_mask, open_objects
from vmamba.data.sources import check_all
from vmamba.errors import DataError

pytest.importorskip("faster_coco_eval")

SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]
DATA = {
    "images": [
        {"id": 7, "file_name": "b.png", "height": 6, "width": 8},
        {"id": 3, "file_name": "a.png", "height": 6, "width": 8},
    ],
    "categories": [{"id": 40, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 40, "bbox": [1, 1, 4, 3], "area": 12, "segmentation": SQUARE},
        {"id": 2, "image_id": 3, "category_id": 5, "bbox": [6, 4, 5, 1], "iscrowd": 0,
         "segmentation": {"size": [6, 8], "counts": [40, 2, 6]}},
        {"id": 3, "image_id": 3, "category_id": 5, "bbox": [0, 0, 8, 6], "iscrowd": 1,
         "segmentation": {"size": [6, 8], "counts": [0, 48]}},
        {"id": 4, "image_id": 7, "category_id": 5, "bbox": [9, 0, 3, 3], "segmentation": SQUARE},
        {"id": 5, "image_id": 7, "category_id": 5, "bbox": [2, 2, 0, 3], "segmentation": SQUARE},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / name)
    return tmp_path


def opened(folder, data):
    (folder / "data.json").write_text(json.dumps(data))
    return open_objects(folder / "data.json", folder)


def changed(**changes):
    """DATA with fields of its first annotation changed."""
    data = copy.deepcopy(DATA)
    data["annotations"][0].update(changes)
    return data


def test_boxes_classes_and_masks(folder):
    data = opened(folder, DATA)
    assert (data.class_names, data.category_ids, data.has_masks) == (["dog", "cat"], [5, 40], True)
    assert data.dropped == {
        "boxes cut at the picture's edge": 1, "boxes outside of the picture": 1, "empty boxes": 1,
    }  # fmt: skip
    assert [data.name(i) for i in range(2)] == [str(folder / "a.png"), str(folder / "b.png")]
    assert data.with_objects() == [0]
    picture, target = data.read(0)
    assert picture[:, 0, 0].tolist() == [1, 2, 3]
    assert target["boxes"].tolist() == [[1, 1, 5, 4], [6, 4, 8, 5]]
    assert target["labels"].tolist() == [1, 0]
    expected = np.zeros((2, 6, 8), dtype=np.uint8)
    expected[0, 1:4, 1:5] = expected[1, 4:, 6] = 1  # run lengths go down the columns
    assert target["masks"].tolist() == expected.tolist()
    empty = data.read(1)[1]
    assert (empty["boxes"].shape, empty["labels"].shape, empty["masks"].shape) == ((0, 4), (0,), (0, 6, 8))
    truth = data.ground_truth()
    assert [(a["id"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [(1, 12, 0), (2, 2, 0), (3, 48, 1)]
    assert truth["categories"] == [{"id": 5, "name": "dog"}, {"id": 40, "name": "cat"}]
    check_all(len(data), data.read, data.where)


def test_the_ground_truth_against_itself_scores_one(folder):
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(opened(folder, DATA).ground_truth())
    found = truth.loadRes([
        {"image_id": 3, "category_id": 40, "bbox": [1, 1, 4, 3], "score": 0.9},
        {"image_id": 3, "category_id": 5, "bbox": [6, 4, 2, 1], "score": 0.8},
    ])  # fmt: skip
    evaluation = COCOeval_faster(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_a_picture_of_a_crowd_alone_is_not_learned_from(folder):
    data = opened(folder, changed(iscrowd=1) | {"annotations": changed(iscrowd=1)["annotations"][:1]})
    assert data.with_objects() == []
    assert data.read(0)[1]["boxes"].shape == (0, 4)
    assert [a["iscrowd"] for a in data.ground_truth()["annotations"]] == [1]


def test_the_area_is_that_of_the_file_or_else_of_the_box(folder):
    for given, expected in ((7.5, 7.5), (None, 12), ("7", 12)):
        truth = opened(folder, changed(area=given)).ground_truth()
        assert truth["annotations"][0]["area"] == expected


def test_boxes_of_less_than_a_pixel_are_dropped(folder):
    for box in ([2, 2, 0.5, 3], [2, 2, 3, 0.5], [-2, 2, 2.5, 3]):
        data = opened(folder, changed(bbox=box))
        assert data.dropped["boxes of less than a pixel"] == 1
        assert data.read(0)[1]["labels"].tolist() == [0]


def test_annotations_may_be_numbered_from_0(folder):
    """For COCO's evaluation an object of number 0 is one that was not found."""
    data = copy.deepcopy(DATA)
    for annotation in data["annotations"]:
        annotation["id"] -= 1
    assert opened(folder, data).ground_truth() == opened(folder, DATA).ground_truth()


def test_boxes_alone(folder):
    data = opened(folder, changed(segmentation=[]))
    assert not data.has_masks
    assert (data.some_masks, data.maskless) == (
        True, "1 of 3 objects have no mask, the first in a.png, annotation 1",
    )  # fmt: skip
    assert not opened(folder, DATA).some_masks
    assert set(data.read(0)[1]) == {"boxes", "labels"}


def test_what_is_wrong_is_listed_by_file_and_annotation(folder):
    run = {"size": [6, 8], "counts": [40, 2, 6]}
    for change, message in (
        ({"id": 2}, "annotation 2 occurs twice"),
        ({"id": None}, "annotation number 0: its id None is no whole number"),
        ({"id": "1"}, "annotation number 0: its id '1' is no whole number"),
        ({"image_id": 4}, "annotation 1: there is no picture 4"),
        ({"category_id": 6}, "a.png, annotation 1: there is no category 6"),
        ({"bbox": [1, 2, 3]}, r"a.png, annotation 1: the box \[1, 2, 3\] is not four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "is not four numbers"),
        ({"bbox": None}, "annotation 1 has no proper bbox"),
        ({"segmentation": [[1, 1, 2, 2]]}, "a polygon is not three or more pairs"),
        ({"segmentation": [[1, 1, 2, 2, 1e9, 3]]}, "a polygon reaches beyond the picture of 8×6"),
        ({"segmentation": "x"}, "neither polygons nor run lengths"),
        ({"segmentation": run | {"size": [8, 6]}}, r"run lengths of size \[8, 6\]; the picture has \[6, 8\]"),
        ({"segmentation": run | {"counts": [40, 2]}}, "damaged run lengths"),
        ({"segmentation": run | {"counts": "zzzz"}}, "damaged run lengths"),
        ({"segmentation": run | {"counts": [1 << 40]}}, "damaged run lengths"),
        ({"segmentation": run | {"counts": [-5, 53]}}, "damaged run lengths"),
    ):
        known = "1 of 9 pictures, annotations and categories in .*data.json"
        with pytest.raises(DataError, match=rf"{known}.*\n.*{message}"):
            opened(folder, changed(**change))
    data = copy.deepcopy(DATA)
    data["images"][0]["file_name"] = "gone.png"
    data["images"].append({"id": 9, "file_name": "a.png", "height": 1 << 40, "width": 1 << 40})
    data["categories"] += [{"id": 5, "name": "cow"}, {"id": 41, "name": "cat"}]
    for message in (
        "category 5 occurs twice", "several classes are called cat: give each a name", "gone.png: no such file",
        "picture 9 .*no possible",
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"(?s)\n.*{message}"):
            opened(folder, data)
    with pytest.raises(DataError, match="no id"):
        opened(folder, DATA | {"annotations": [{"image_id": 3, "category_id": 5, "bbox": [1, 1, 2, 2]}]})
    data = copy.deepcopy(DATA)
    for entry in (data["images"][1], *data["annotations"][:3]):
        entry["id" if "file_name" in entry else "image_id"] = "three"
    with pytest.raises(DataError, match=r"1 of 9 .*\n  picture number 1: its id 'three' is no whole number$"):
        opened(folder, data)
    for content, message in (
        ("{", "cannot be read as JSON"), ("[]", "is not a COCO file"), ('{"images": []}', "is not a COCO file"),
        ("[" * 100_000, "cannot be read as JSON"), (json.dumps(DATA | {"categories": []}), "there is no category"),
    ):  # fmt: skip
        (folder / "data.json").write_text(content)
        with pytest.raises(DataError, match=message):
            open_objects(folder / "data.json", folder)


def test_pictures_that_do_not_fit_are_listed(folder):
    Image.new("RGB", (6, 8)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    data = opened(folder, DATA)
    with pytest.raises(DataError, match=r"(?s)a.png: 6×8, but annotated as 8×6.*b.png: the file is empty"):
        check_all(len(data), data.read, data.where)


def test_compressed_run_lengths_are_cocos():
    from faster_coco_eval.core import mask as rle

    mask = (np.random.default_rng(0).random((37, 53)) > 0.6).astype(np.uint8)
    runs = rle.encode(np.asfortranarray(mask))
    assert np.array_equal(decode_mask(runs, 37, 53), mask)
    assert np.array_equal(decode_mask(runs | {"counts": runs["counts"].decode()}, 37, 53), mask)


def test_pascal_voc(folder):
    (folder / "xml").mkdir()
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}"
        f"</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, difficult, box in (("dog", 0, (1, 1, 8, 6)), ("cat", 0, (3, 2, 4, 4)), ("dog", 1, (1, 1, 2, 2)))
    )
    size = "<size><width>8</width><height>6</height><depth>3</depth></size>"
    (folder / "xml/a.xml").write_text(f"<annotation><filename>a.png</filename>{size}{objects}</annotation>")
    (folder / "xml/b.xml").write_text(f"<annotation><filename>b.png</filename>{size}</annotation>")
    data = open_objects(folder / "xml", folder)
    assert data.class_names == ["cat", "dog"]
    assert not data.has_masks
    target = data.read(0)[1]
    assert target["boxes"].tolist() == [[0, 0, 8, 6], [2, 1, 4, 4]]
    assert target["labels"].tolist() == [1, 0]
    assert data.with_objects() == [0]
    with pytest.raises(DataError, match=r"a.xml: there is no class 'cat'; the classes are dog"):
        open_objects(folder / "xml", folder, ["dog"])
    (folder / "xml/0.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"0.xml: no element found"):
        open_objects(folder / "xml", folder)
    with pytest.raises(DataError, match=r"(?s)0.xml: no element found.*a.xml: there is no class 'cat'"):
        open_objects(folder / "xml", folder, ["dog"])
