import copy
import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tasks.shapes import CLASSES, KWARGS, make_shapes, shape_recipe
from tasks.small import distributed, history
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba.cli import main, make_parser
from vmamba.data.coco import encode_masks, open_objects
from vmamba.data.transforms import Preprocessing
from vmamba.errors import CheckpointError, DataError, RecipeError
from vmamba.models.checkpoints import read_metadata
from vmamba.models.registry import ENTRIES
from vmamba.tasks.detection import NUMBERS, DetectionTask, evaluate
from vmamba.tasks.detection_recipe import DetectionDataConfig, DetectionTrainConfig, DetectionValidateConfig
from vmamba.tasks.detector import Detector, _with_windows, drawn
from vmamba.tasks.inference import padded
from vmamba.tasks.overlays import INK, palette
from vmamba.tasks.prediction import Classifier
from vmamba.tasks.recipe import ModelConfig, TrainerConfig
from vmamba.tasks.training import train, validate

CPU = TrainerConfig(accelerator="cpu", progress=False)
LOSSES = ("rpn_cls", "rpn_reg", "cls", "reg", "mask")


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_shapes(tmp_path / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and a run that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    config = shape_recipe(make_shapes(folder / "data", train=24, val=5), folder / "run", epochs=10, ema_decay=0)
    config.model.drop_path_rate, config.augment.photometric = 0.0, False
    train(config)
    os.chdir(before)
    return folder


def boxes_overlap(a, b):
    inter = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


def test_a_run_learns_and_leaves_a_model_that_stands_alone(trained, monkeypatch):
    monkeypatch.chdir(trained)
    rows = history(trained / "run")
    header = (trained / "run/metrics.csv").read_text().splitlines()[0].split(",")
    assert header == [
        "epoch", "lr", "train_loss", *(f"train_{name}" for name in LOSSES),
        *(f"val_{kind}_{name}" for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")), "seconds",
    ]  # fmt: skip
    assert rows[-1]["train_loss"] == pytest.approx(sum(rows[-1][f"train_{name}"] for name in LOSSES), rel=1e-5)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 3
    assert rows[-1]["val_box_AP"] > 0.3
    assert rows[-1]["val_mask_AP"] > 0.3

    metadata = read_metadata(trained / "run/model.safetensors")
    assert (metadata["task"], metadata["variant"]) == ("detection", "maskrcnn")
    assert (metadata["class_names"], metadata["category_ids"], metadata["sides"]) == (list(CLASSES), [3, 8], [64, 96])
    assert metadata["img_size"] == metadata["sides"]
    assert metadata["model_kwargs"] == {**KWARGS, "masks": True}

    found = validate(DetectionValidateConfig(trainer=CPU))
    best = max(rows, key=lambda row: row["val_box_AP"])
    for name in ("box_AP", "box_AP50", "mask_AP"):
        assert found[name] == pytest.approx(best[f"val_{name}"], abs=1e-6)
    stored = json.loads((trained / "run/metrics.json").read_text())
    assert list(stored["box"]) == list(stored["mask"]) == list(NUMBERS)
    assert stored["box"]["AP"] == pytest.approx(found["box_AP"], abs=1e-5)
    assert stored["box"]["AP_large"] is None  # nothing is as large
    assert {name: row["objects"] for name, row in stored["per_class"].items()} == {
        name: sum(
            a["category_id"] == category for a in json.loads((trained / "data/val.json").read_text())["annotations"]
        )
        for name, category in zip(CLASSES, (3, 8), strict=True)
    }
    assert np.mean([row["mask_AP"] for row in stored["per_class"].values()]) == pytest.approx(
        found["mask_AP"], abs=1e-4
    )
    assert found["summary"].startswith(f"5 images: box AP {found['box_AP']:.2%}, box AP50")
    for name in ("samples.png", "per_class_box.png", "per_class_mask.png", "learning_curve.png"):
        assert Image.open(trained / "run" / name).width > 400


def test_objects_are_found_in_files_images_and_arrays(trained):
    detector = Detector.load(str(trained / "run/model.safetensors"))
    file = trained / "data/images/val1.png"
    found = detector.detect(file, threshold=0.5)
    for same in (Image.open(file), np.asarray(Image.open(file))):
        again = detector.detect(same, threshold=0.5)
        assert np.array_equal(again.boxes, found.boxes)
        assert np.array_equal(again.masks, found.masks)
    truth = [a for a in json.loads((trained / "data/val.json").read_text())["annotations"] if a["image_id"] == 2]
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores >= 0.5).all()
    assert found.masks.shape == (len(found), 64, 80)
    for annotation in truth:
        x, y, w, h = annotation["bbox"]
        overlaps = [boxes_overlap(box, np.array([x, y, x + w, y + h])) for box in found.boxes]
        best = int(np.argmax(overlaps))
        assert overlaps[best] > 0.6
        assert found.objects[best].category_id == annotation["category_id"]
        assert found.objects[best].name == CLASSES[found.labels[best]]
        assert found.masks[best, y + h // 2, x + w // 2]
    overlay = np.asarray(found.overlay().convert("RGB"))
    assert overlay.shape[1] == 720
    assert overlay.shape[0] > 720 * 64 / 80  # a legend below
    with pytest.raises(TypeError, match=r"the array is float64 \(4, 4, 3\); expected uint8"):
        detector.detect(np.zeros((4, 4, 3)))
    with pytest.raises(CheckpointError, match=r"is a model for detection, not for classification"):
        Classifier.load(str(trained / "run/model.safetensors"))


@pytest.mark.parametrize("ground", [0, 255])
@pytest.mark.parametrize("with_masks", [False, True])
def test_boxes_are_drawn_where_they_are_on_any_ground(ground, with_masks):
    picture = Image.new("RGB", (400, 200), (ground,) * 3)
    boxes = np.array([[100, 50, 300, 150], [300, 0, 400, 30]], np.float32)
    masks = np.zeros((2, 200, 400), bool)
    masks[0, 80:120, 150:250] = True
    image = np.asarray(drawn(picture, boxes, np.array([1, 0]), masks if with_masks else None, ["a", "b"]))
    assert image.shape == (360, 720, 3)
    colours = palette(2)
    for x, y in ((180, 180), (300, 270), (539, 200)):  # 1.8 times as large: left, bottom and right edge
        near = image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
        assert (near == colours[1]).all(1).any()
        assert (near == INK).all(1).any()
    assert (image[40:65, 700:719].reshape(-1, 3) == colours[0]).all(1).any()  # the small one reaches the corner
    inside, outside = image[180, 360], image[120, 250]
    assert (outside == ground).all()
    tinted = np.round(ground + (np.array(colours[1]) - ground) * 0.45)
    assert np.abs(inside - (tinted if with_masks else ground)).max() <= 1


def test_windows_find_what_is_too_small_in_the_whole_picture(trained):
    detector = Detector.load(str(trained / "run/model.safetensors"))
    picture = Image.open(trained / "data/images/val1.png")
    large = Image.new("RGB", (400, 320), (45, 45, 45))
    places = [(0, 0), (320, 0), (160, 128), (0, 256), (320, 256)]
    for place in places:
        large.paste(picture, place)
    alone = detector.detect(picture, threshold=0.5)
    whole, windows = (detector.detect(large, threshold=0.5, window=window) for window in (None, 96))
    assert windows.masks.shape[1:] == (320, 400)

    def hits(found):
        wanted = [alone.boxes[0] + np.tile(place, 2) for place in places]
        return sum(max([boxes_overlap(box, want) for box in found.boxes], default=0) > 0.5 for want in wanted)

    with pytest.raises(RecipeError, match=r"windows of 8 pixels are too small: give 32 or more"):
        detector.detect(picture, window=8)
    assert hits(whole) <= 1
    assert hits(windows) >= 4


def test_masks_of_windows_are_as_large_as_the_picture_only_where_they_are_kept(monkeypatch):
    """Those of all objects in all windows would not fit into memory."""
    windows, most = [], [0]

    def found(model, pictures, *sides, least_score):
        height, width = pictures[0].shape[1:]
        windows.append((height, width))
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[0, 10:20, 12:30] = True
        scores = pictures[0].float().mean()[None] / 255
        return [{"boxes": torch.tensor([[12.0, 10, 30, 20]]), "scores": scores, "labels": scores.long(), "masks": mask}]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            y = function(*args, **kwargs or {})
            most[0] = max(most[0], y.numel() if isinstance(y, torch.Tensor) else 0)
            return y

    monkeypatch.setattr("vmamba.tasks.detector.detect", found)
    model = SimpleNamespace(nms_iou=0.5, max_per_img=3)
    picture = torch.linspace(0, 255, 600)[:, None].expand(1, 600, 800).to(torch.uint8)  # brightest at the bottom
    whole = found(model, [picture], least_score=0)[0]
    with Sizes():
        kept = _with_windows(model, picture, 64, whole, 0.0)
    assert len(windows) > 100
    assert most[0] == kept["masks"].numel() == 3 * 600 * 800
    for box, mask in zip(kept["boxes"].int().tolist(), kept["masks"], strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box[1] > 500


def test_windows_leave_what_they_cut_off_to_their_neighbours(monkeypatch):
    """But nobody else has what lies at an edge of the picture."""

    def found(model, pictures, *sides, least_score):
        height, width = pictures[0].shape[1:]
        boxes = [[0, 20, 12, 40], [20, 0, 40, 12], [width - 12, 20, width, 40], [20, height - 12, 40, height]]
        return [{"boxes": torch.tensor(boxes, dtype=torch.float32), "scores": torch.ones(4), "labels": torch.arange(4)}]

    monkeypatch.setattr("vmamba.tasks.detector.detect", found)
    model, picture = SimpleNamespace(nms_iou=0.5, max_per_img=100), torch.zeros(3, 100, 120, dtype=torch.uint8)
    whole = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    kept = _with_windows(model, picture, 64, whole, 0.0)
    for label, edge in enumerate((0, 0, 120, 100)):
        boxes = kept["boxes"][kept["labels"] == label]
        assert len(boxes) >= 2
        assert (boxes[:, label] == edge).all()


def test_a_device_that_only_fills_up_computes_with_the_others(monkeypatch):
    """In shards a network computes on all devices together: one that skips its turn keeps the others waiting."""
    looked_at = []

    def found(network, pictures, sides):
        looked_at.append(pictures)
        return [{"boxes": torch.zeros(0, 4)} for _ in pictures]

    monkeypatch.setattr("vmamba.tasks.detection.detect", found)
    task = SimpleNamespace(network=None, sides=(80, 64), entries=[], _entries=lambda number, found: [number])
    for numbers, seen in (([-1], 1), ([4, -1], 1), ([5, 6], 2)):
        DetectionTask.judge(task, [(torch.zeros(3, 8, 8, dtype=torch.uint8), number) for number in numbers])
        assert len(looked_at[-1]) == seen
    assert task.entries == [4, 5, 6]


def test_the_command_line_predicts(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, images = str(trained / "run/model.safetensors"), trained / "data/images"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    call = ["predict", "--checkpoint", model, "--device", "cpu", "--pictures", "seen", "--threshold", "0.5"]
    assert main([*call, str(images / "val*.png"), "broken.png", "--format", "json", "--output", "found.json"]) == 1
    assert "broken.png: " in capsys.readouterr().err
    found = json.loads((tmp_path / "found.json").read_text())
    assert {entry["class"] for entry in found} == set(CLASSES)
    assert all(entry["segmentation"]["size"] == [64, 80] and entry["score"] >= 0.5 for entry in found)
    truth = open_objects(trained / "data/val.json", images)
    number = {entry["file_name"]: entry["id"] for entry in truth.pictures}
    for entry in found:
        entry["image_id"] = number[os.path.basename(entry["file"])]
    assert evaluate(truth, found, "box").numbers[1] > 0.3
    assert sorted(path.name for path in (tmp_path / "seen/overlays").rglob("*.png")) == [
        f"val{i}.png" for i in range(5)
    ]

    assert main([*call, str(images / "val0.png"), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    first = next(entry for entry in found if entry["file"].endswith("val0.png"))
    assert rows[0]["class"] == first["class"]
    assert float(rows[0]["left"]) == pytest.approx(first["bbox"][0], abs=0.01)
    assert float(rows[0]["right"]) == pytest.approx(first["bbox"][0] + first["bbox"][2], abs=0.01)
    assert main([*call, str(images / "val0.png"), "--threshold", "1"]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_several_processes_measure_what_one_does(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DetectionValidateConfig(
        checkpoint=str(trained / "run/model.safetensors"),
        data=DetectionDataConfig(root=str(trained / "data"), workers=0),
        trainer=CPU,
        output=str(tmp_path / "one"),
    )
    alone = validate(config)
    distributed(validate, replace(config, output=str(tmp_path / "two")))
    together = json.loads((tmp_path / "two/metrics.json").read_text())
    assert together["images"] == alone["images"] == 5  # of six, one fills up
    for part in ("box_AP", "mask_AP", "box", "mask", "per_class"):
        assert together[part] == pytest.approx(alone[part]) if part.endswith("AP") else together[part] == alone[part]


def test_several_processes_train(shapes, tmp_path):
    distributed(train, shape_recipe(shapes, tmp_path / "run", epochs=2))
    rows = history(tmp_path / "run")
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert 0 <= rows[1]["val_box_AP"] <= 1


def test_boxes_without_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_shapes(tmp_path / "data", train=4, val=2, masks=False)
    config = shape_recipe(data, tmp_path / "run", epochs=1, warmup_epochs=0)
    train(config)
    assert read_metadata(tmp_path / "run/model.safetensors")["model_kwargs"]["masks"] is False
    row = history(tmp_path / "run")[0]
    assert "val_box_AP" in row
    assert not any("mask" in name for name in row)
    found = Detector.load().detect(np.zeros((30, 50), np.uint8), threshold=0)
    assert found.masks is None
    assert all("segmentation" not in thing.to_coco(1) for thing in found.objects)
    config.data.masks, config.overwrite = True, True
    with pytest.raises(DataError, match=r"data.masks asks for masks, but in .*train.json 7 of 7 objects have no mask"):
        train(config)


def test_one_object_without_a_mask_is_said_to_cost_the_masks(shapes, tmp_path, capsys):
    def without(split, number):
        content = json.loads((shapes / f"{split}.json").read_text())
        content["annotations"][number]["segmentation"] = []
        (shapes / f"{split}.json").write_text(json.dumps(content))

    config = shape_recipe(shapes, tmp_path / "run")
    assert DetectionTask.from_recipe(config).kinds == ["box", "mask"]
    assert "mask" not in capsys.readouterr().err
    without("val", 1)
    assert DetectionTask.from_recipe(config).kinds == ["box"]
    said = "val.json: 1 of 7 objects have no mask, the first in val1.png, annotation 2: the model's masks are not"
    assert said in capsys.readouterr().err
    without("train", 2)
    task = DetectionTask.from_recipe(config)
    assert not task.has_masks
    said = "train.json: 1 of 15 objects have no mask, the first in train1.png, annotation 3: boxes alone are learned"
    assert said in capsys.readouterr().err
    config.data.masks = False
    DetectionTask.from_recipe(config)
    assert "mask" not in capsys.readouterr().err


def test_batches_of_pictures_of_any_sizes():
    pre = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images, sizes = padded(
        [torch.full((3, 20, 40), 255, dtype=torch.uint8), torch.zeros(3, 33, 8, dtype=torch.uint8)], pre
    )
    assert (tuple(images.shape), sizes) == ((2, 3, 64, 64), [(20, 40), (33, 8)])
    for image, (height, width), values in zip(images, sizes, ((1, 3, 1), (-1, -1, 0)), strict=True):
        expected = torch.zeros(3, 64, 64)
        expected[:, :height, :width] = torch.tensor(values, dtype=torch.float32)[:, None, None]
        assert torch.equal(image, expected)


def test_upright_pictures_share_batches(shapes, tmp_path):
    data = json.loads((shapes / "train.json").read_text())
    turned = {entry["id"] for entry in data["images"][::2]}
    for entry in (entry for entry in data["images"] if entry["id"] in turned):
        file = shapes / "images" / entry["file_name"]
        Image.open(file).transpose(Image.Transpose.TRANSPOSE).save(file)
        entry["height"], entry["width"] = entry["width"], entry["height"]
    for annotation in (annotation for annotation in data["annotations"] if annotation["image_id"] in turned):
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [y, x, height, width]
        points = np.reshape(annotation["segmentation"][0], (-1, 2))
        annotation["segmentation"] = [points[:, ::-1].ravel().tolist()]
    (shapes / "train.json").write_text(json.dumps(data))
    task = DetectionTask.from_recipe(shape_recipe(shapes, tmp_path / "run"))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    task.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    batches = [[picture.shape[1] > picture.shape[2] for picture, _ in batch] for batch in task.loader(training=True)]
    assert sorted(batches) == [[False, False]] * 2 + [[True, True]] * 2


def test_pictures_without_objects_give_every_loss_and_gradient(shapes, tmp_path):
    task = DetectionTask.from_recipe(shape_recipe(shapes, tmp_path / "run"))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
             "masks": torch.zeros(0, 64, 80, dtype=torch.uint8)}  # fmt: skip
    losses = task.loss([(torch.zeros(3, 64, 80, dtype=torch.uint8), empty)] * 2)
    assert set(losses) == set(LOSSES)
    assert [float(losses[name].detach()) for name in ("rpn_reg", "reg", "mask")] == [0, 0, 0]
    sum(losses.values()).backward()
    missing = [name for name, parameter in task.model.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_metric_is_pycocotools(tmp_path, kind):
    """On random detections near the truth and away from it, of three sizes, with crowds and a class never seen."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    generator = np.random.default_rng(5)
    Image.new("RGB", (300, 240)).save(tmp_path / "x.png")
    images = [{"id": i, "file_name": "x.png", "height": 240, "width": 300} for i in range(1, 13)]
    known, found = [], []

    def mask(box):
        x, y, w, h = np.round(box).astype(int)
        pixels = np.zeros((1, 240, 300), bool)
        pixels[0, y : y + h, x : x + w] = True
        pixels[0, y : y + h // 3, x : x + w // 3] = False
        return encode_masks(pixels)[0], int(pixels.sum())

    for image in images:
        for _ in range(int(generator.integers(1, 6))):
            side = generator.choice([20, 60, 120])
            box = [*generator.uniform(0, 100, 2), *generator.uniform(side * 0.7, side, 2)]
            category = int(generator.integers(1, 4))
            run, area = mask(box)
            known.append({"id": len(known) + 1, "image_id": image["id"], "category_id": category, "bbox": box,
                          "area": area, "iscrowd": int(generator.random() < 0.1), "segmentation": run})  # fmt: skip
            for shift in generator.uniform(-0.3, 0.3, int(generator.integers(0, 4))):
                near = [box[0] + abs(shift) * side, box[1], box[2], box[3] * (1 - abs(shift))]
                guess = category if generator.random() < 0.8 else 1
                found.append({"image_id": image["id"], "category_id": guess, "bbox": near,
                              "score": float(generator.random()), "segmentation": mask(near)[0]})  # fmt: skip
    categories = [{"id": i, "name": f"c{i}"} for i in range(1, 5)]
    (tmp_path / "d.json").write_text(json.dumps({"images": images, "annotations": known, "categories": categories}))
    truth = open_objects(tmp_path / "d.json", tmp_path)
    measured = evaluate(truth, copy.deepcopy(found), kind)

    reference = pycocotools.COCO()
    reference.dataset = truth.ground_truth()
    reference.createIndex()
    if kind == "mask":
        found = [{key: value for key, value in entry.items() if key != "bbox"} for entry in found]
    theirs = evaluation.COCOeval(reference, reference.loadRes(found), {"box": "bbox", "mask": "segm"}[kind])
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    np.testing.assert_allclose(measured.numbers, theirs.stats, atol=1e-12)
    assert 0.1 < measured.numbers[0] < 0.9
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    np.testing.assert_allclose(measured.per_class, [precision[:, :, k].mean() for k in range(4)], atol=1e-12)
    assert measured.per_class[3] == -1
    assert (evaluate(truth, [], kind).numbers <= 0).all()


def test_bad_data_is_listed_before_any_work(shapes, tmp_path, capfd):
    config = shape_recipe(shapes, tmp_path / "run")
    good = {split: json.loads((shapes / f"{split}.json").read_text()) for split in ("train", "val")}

    def change(split, function):
        data = copy.deepcopy(good[split])
        function(data)
        (shapes / f"{split}.json").write_text(json.dumps(data))

    def break_two(data):
        data["annotations"][0]["category_id"] = 5
        data["images"][3]["file_name"] = "gone.png"

    change("train", break_two)
    with pytest.raises(
        DataError, match=r"(?s)2 of .*gone.png: no such file.*train0.png, annotation 1: .*no category 5"
    ):
        train(config)
    change("train", lambda data: data["annotations"][0].update(bbox=[100, 0, 5, 5]))
    change("val", lambda data: data["categories"][0].update(name="circle"))
    with pytest.raises(DataError, match=r"its classes are circle, square; expected disc, square"):
        train(config)
    assert "train.json: 1 boxes outside of the picture" in capfd.readouterr().err
    change("val", lambda data: data["annotations"].clear())
    with pytest.raises(DataError, match=r"val.json has no objects: there is nothing to find"):
        train(config)
    change("val", lambda data: None)
    (shapes / "images/val1.png").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(shapes / "images/val2.png")
    config.data.check_files = True
    with pytest.raises(
        DataError, match=r"(?s)2 of 4 images.*val1.png: the file is empty.*val2.png: 5×5, but annotated"
    ):
        train(config)
    (shapes / "val.json").unlink()
    with pytest.raises(
        DataError, match=r"has no annotations/instances_val2017.json or .*val.json: .*data.val_annotations"
    ):
        train(config)
    config.data.root = None
    with pytest.raises(DataError, match=r"data.root is not set"):
        train(config)
    config.data.root, config.model = str(shapes), ModelConfig("vmamba_femto_s2")
    (shapes / "val.json").write_text(json.dumps(good["train"]))
    config.data.check_files = False
    with pytest.raises(RecipeError, match=r"vmamba_femto_s2 .*"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_data_is_found_in_cocos_layout_and_where_it_is_named(shapes, tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (shapes / f"{split}.json").rename(coco / f"annotations/instances_{split}2017.json")
        (coco / f"{split}2017").symlink_to(shapes / "images")
    task = DetectionTask.from_recipe(shape_recipe(coco, tmp_path / "run"))
    assert (len(task.train_split), len(task.val)) == (8, 4)
    config = shape_recipe(coco, tmp_path / "run")
    config.data.val_annotations, config.data.val_images = "annotations/instances_train2017.json", "train2017"
    assert len(DetectionTask.from_recipe(config).val) == 8


def test_published_recipes_are_as_published():
    """Of each released file: AdamW 1e-4 at a batch of 16, 1000 steps of warm-up, 12 or 36 epochs."""
    folder = Path(__file__).parents[2] / "configs/coco"
    released = [entry for entry in ENTRIES.values() if entry.task == "detection" and entry.url]
    names = {f"{e.name.removesuffix('_3x')}_{'3x' if e.name.endswith('_3x') else '1x'}" for e in released}
    names.discard("maskrcnn_vmamba_base_s2l15_bs8_1x")  # the same recipe, run once more with half the batch
    assert {path.stem for path in folder.glob("maskrcnn_*.yaml")} == names
    for name in names:
        parser = make_parser("train", DetectionTrainConfig)
        given = parser.instantiate(parser.parse_args(["train", "--config", str(folder / f"{name}.yaml")])).train
        o, long = given.optim, name.endswith("_3x")
        assert (given.task, given.model.name) == ("detection", name[:-3])
        assert given.model.drop_path_rate == (0.6 if "base_s2" in name else 0.2)
        assert given.model.kwargs == {"pretrained_backbone": True}
        assert (o.optimizer, tuple(o.betas), o.lr, o.lr_batch, o.weight_decay) == (
            "adamw",
            (0.9, 0.999),
            1e-4,
            16,
            0.05,
        )
        assert (o.epochs, list(o.milestones), o.warmup_steps) == ((36, [27, 33], 1000) if long else (12, [8, 11], 1000))
        assert (o.schedule, o.clip_grad, o.ema_decay) == ("multistep", None, 0)
        assert list(given.augment.short_sides) == ([*range(480, 801, 32)] if long else [800])
        assert (given.augment.longest, list(given.data.img_size), given.data.masks) == (1333, [800, 1333], True)
