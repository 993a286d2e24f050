"""Semantic segmentation: what is special to it. That a killed run is resumed to the bit is in test_resume."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tasks.landscapes import NAMES, landscape_recipe, make_landscapes
from tasks.small import distributed, history
from torch import nn

import vmamba
from vmamba.cli import main, make_parser
from vmamba.data.config import SegmentationAugmentConfig
from vmamba.data.images import read_index_mask
from vmamba.data.transforms import Preprocessing
from vmamba.errors import CheckpointError, DataError, ImageError, RecipeError
from vmamba.models.checkpoints import read_metadata, save_checkpoint
from vmamba.models.registry import ENTRIES
from vmamba.models.segmentation import resized
from vmamba.tasks import overlays, settings_of
from vmamba.tasks.inference import SEVERAL, segment
from vmamba.tasks.prediction import Classifier, Weights
from vmamba.tasks.recipe import ModelConfig, TrainerConfig
from vmamba.tasks.segmentation import SegmentationTask, class_scores, scores
from vmamba.tasks.segmentation_recipe import SegmentationDataConfig, SegmentationTrainConfig, SegmentationValidateConfig
from vmamba.tasks.segmenter import Segmentation, Segmenter, best_classes, output_names
from vmamba.tasks.task import build_model
from vmamba.tasks.training import train, validate

CPU = TrainerConfig(accelerator="cpu", progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The pictures, and a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(landscape_recipe(make_landscapes(folder / "pictures"), folder / "run", epochs=24))
    return folder


def test_training_learns_and_says_what(whole):
    rows = history(whole / "run")
    assert list(rows[0]) == [
        "epoch", "lr", "train_loss", "train_decode", "train_auxiliary", "val_loss", "val_mIoU", "val_mAcc", "val_aAcc",
        "seconds",
    ]  # fmt: skip
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_decode"] + row["train_auxiliary"])
    assert rows[-1]["train_auxiliary"] < rows[-1]["train_decode"]  # its weight is 0.4
    assert max(row["val_mIoU"] for row in rows) > 0.6
    metadata = read_metadata(whole / "run/model.safetensors")
    assert (metadata["task"], metadata["variant"]) == ("segmentation", "upernet_vmamba_femto_s2")
    assert (metadata["class_names"], metadata["img_size"], metadata["num_classes"]) == (NAMES, [44, 60], 3)
    for name in ("samples", "per_class", "confusion_matrix", "learning_curve"):
        assert np.asarray(Image.open(whole / f"run/{name}.png").convert("RGB")).std() > 10


def test_scores_are_those_of_mmsegmentation():
    matrix = np.array([[5, 1, 0, 0], [2, 4, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]])  # true, found
    iou, accuracy, share = class_scores(matrix)
    np.testing.assert_allclose(iou, [5 / 8, 4 / 10, 0, np.nan])
    np.testing.assert_allclose(accuracy, [5 / 6, 4 / 6, 0, np.nan])
    np.testing.assert_allclose(share, [6 / 15, 6 / 15, 3 / 15, 0])
    found = scores(matrix)
    assert found == pytest.approx({"mIoU": (5 / 8 + 4 / 10) / 3, "mAcc": (5 / 6 + 4 / 6) / 3, "aAcc": 9 / 15})


@pytest.mark.parametrize("multi_scale", [False, True])
def test_validation_measures_what_whole_pictures_are_segmented_as(whole, tmp_path, multi_scale):
    checkpoint = str(whole / "run/model.safetensors")
    found = validate(
        SegmentationValidateConfig(
            checkpoint=checkpoint, trainer=CPU, output=str(tmp_path / "out"), multi_scale=multi_scale
        )
    )
    segmenter = Segmenter.load(checkpoint)
    matrix = np.zeros((3, 3), np.int64)
    for number in range(5):
        picture = torch.from_numpy(np.array(Image.open(whole / f"pictures/images/val/{number}.png"))).permute(2, 0, 1)
        mask = read_index_mask(whole / f"pictures/annotations/val/{number}.png")
        how = {"ratios": SEVERAL, "flip": True} if multi_scale else {"scale": (60, 44)}
        with torch.inference_mode():
            labels = segment(segmenter.model, picture, **how).argmax(0).numpy()
        np.add.at(matrix, (mask[mask != 255], labels[mask != 255]), 1)
    assert matrix.sum() == 5 * 44 * 58  # the ignored border does not count
    expected = scores(matrix)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    if not multi_scale:
        rows = history(whole / "run")
        assert found["mIoU"] == pytest.approx(max(row["val_mIoU"] for row in rows), abs=1e-6)  # the best was kept
    stored = json.loads((tmp_path / "out/metrics.json").read_text())
    iou, accuracy, share = class_scores(matrix)
    assert list(stored["per_class"]) == NAMES
    assert stored["per_class"]["disc"] == pytest.approx(
        {"IoU": iou[2], "accuracy": accuracy[2], "share": share[2]}, abs=6e-5
    )
    first, _, head, *lines = found["summary"].splitlines()
    assert first.startswith(f"5 images: mIoU {expected['mIoU']:.2%}, mAcc {expected['mAcc']:.2%}, aAcc ")
    assert head.split() == ["class", "IoU", "accuracy", "of", "pixels"]
    assert [line.split()[0] for line in lines] == NAMES
    assert (tmp_path / "out/samples.png").exists()


def _validate(checkpoint, output, devices):
    validate(SegmentationValidateConfig(
        checkpoint=str(checkpoint), output=str(output), trainer=TrainerConfig("cpu", devices, progress=False)
    ))  # fmt: skip


def test_several_processes_measure_what_one_does(whole, tmp_path):
    """Five pictures on two processes: one of them gets a filler, which does not count."""
    checkpoint = whole / "run/model.safetensors"
    _validate(checkpoint, tmp_path / "one", 1)
    distributed(_validate, checkpoint, tmp_path / "two", 2)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
    assert two == one


def test_the_class_of_each_pixel_is_found_without_all_logits():
    logits = torch.randn(1, 37, 9, 13)
    logits[0, 20] = logits[0, 3]  # of equal ones the first counts
    for size in ((9, 13), (31, 22), (4, 5)):
        assert torch.equal(best_classes(logits, size), resized(logits, size)[0].argmax(0))


class Pointwise(nn.Module):
    """A model that looks at single pixels, so that windows cannot change what it finds."""

    num_classes = 3

    def forward(self, images):
        return images


def _segmenter(model, img_size=(512, 2048)):
    model.register_parameter("anything", nn.Parameter(torch.zeros(1)))
    return Segmenter(model, Preprocessing(img_size, mean=(0, 0, 0), std=(1, 1, 1)), ["red", "green", "blue"], "here")


@pytest.mark.parametrize("size", [(50, 70), (32, 32), (33, 90), (64, 43)])
def test_windows_cover_every_pixel_and_add_up(size):
    picture = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    assert torch.equal(_segmenter(Pointwise()).labels(picture, window=32), picture.float().argmax(0))
    seen = []

    class Counting(Pointwise):
        def forward(self, images):
            assert images.shape[2] <= 32
            assert images.shape[3] <= 32
            seen.append(images.shape)
            return torch.zeros_like(images) + torch.tensor([1.0, 0.0, 0.5])[:, None, None]

    assert not _segmenter(Counting()).labels(picture, window=32).any()
    rows, columns = (1 if side <= 32 else 1 + -(-(side - 32) // 21) for side in size)
    assert len(seen) == rows * columns


def test_overlapping_windows_are_averaged_as_in_mmsegmentation():
    """One row of pixels, two windows with a third of their pixels in common: logits add up where both are."""

    class Ends(Pointwise):
        def forward(self, images):  # each window is sure of class 1 in its first third, less so of 2 in its last
            logits = torch.zeros_like(images)
            logits[:, 1, :, :12], logits[:, 2, :, -12:] = 2.0, 1.0
            return logits

    picture = torch.zeros(3, 36, 60, dtype=torch.uint8)
    assert (
        _segmenter(Ends()).labels(picture, window=36)[0].tolist()
        == [1] * 12 + [0] * 12 + [1] * 12 + [0] * 12 + [2] * 12
    )
    with pytest.raises(RecipeError, match=r"windows of 31 pixels are too small"):
        _segmenter(Ends()).labels(picture, window=31)


def test_pictures_of_extreme_shapes(whole):
    segmenter = Segmenter.load(str(whole / "run/model.safetensors"))
    for size in ((1, 1), (1, 700), (700, 1), (3, 5)):
        found = segmenter.segment(np.full((*size, 3), 200, np.uint8))
        assert found.labels.shape == size
        assert max(found.overlay().size) >= 720


def test_prediction_from_files_images_and_arrays(whole):
    file = whole / "pictures/images/val/0.png"
    segmenter = Segmenter.load(str(whole / "run/model.safetensors"))
    assert (segmenter.class_names, segmenter.pre.img_size) == (NAMES, (44, 60))
    found = segmenter.segment(file)
    image = Image.open(file)
    for same in (str(file), image, image.convert("RGBA"), np.array(image)):
        assert np.array_equal(segmenter.segment(same).labels, found.labels)
    truth = read_index_mask(whole / "pictures/annotations/val/0.png")
    assert (found.labels == truth)[truth != 255].mean() > 0.8
    assert sum(share.share for share in found.shares) == pytest.approx(1)
    assert found.shares[0].share == max(np.bincount(found.labels.ravel())) / found.labels.size
    assert found.mask().mode == "L"
    assert found.overlay().width == 720
    with pytest.raises(TypeError, match=r"the array is float64 \(44, 60, 3\); expected uint8 \(H, W, 3\) or \(H, W\)"):
        segmenter.segment(np.zeros((44, 60, 3)))
    with pytest.raises(ImageError, match=r"nowhere.png"):
        segmenter.segment("nowhere.png")


def test_the_command_writes_overlays_and_masks(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/deep").mkdir(parents=True)
    source = Image.open(whole / "pictures/images/val/0.png")
    source.save("in/a.png")
    source.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("in/a.bmp")
    source.save("in/deep/a.png")
    Path("in/bad.jpg").write_bytes(b"no picture")
    checkpoint = str(whole / "run/model.safetensors")
    assert main(["predict", "in", "--checkpoint", checkpoint, "--pictures", "out", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert "bad.jpg" in err
    results = json.loads(out)
    assert [result["file"] for result in results] == ["in/a.bmp", "in/a.png", "in/bad.jpg", "in/deep/a.png"]
    segmenter = Segmenter.load(checkpoint)
    for result, name in zip(results, ("a.bmp", "a.png", None, "deep/a"), strict=True):
        if name is None:
            assert set(result) == {"file", "error"}
            continue
        assert (result["overlay"], result["mask"]) == (f"out/overlays/{name}.png", f"out/masks/{name}.png")
        labels = read_index_mask(result["mask"])
        assert np.array_equal(labels, segmenter.segment(result["file"]).labels)
        assert {share["name"]: share["share"] for share in result["classes"]} == {
            NAMES[index]: (labels == index).mean() for index in np.unique(labels)
        }
        assert Image.open(result["overlay"]).width == 720
    assert sorted(p.name for p in Path("out").rglob("*.png")) == ["a.bmp.png"] * 2 + ["a.png"] * 2 + ["a.png.png"] * 2

    assert main(["predict", "in/a.png", "--checkpoint", checkpoint, "--window", "32", "--format", "csv"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "file,class,index,share,overlay,mask"
    assert all(row.endswith(",runs/predictions/overlays/a.png,runs/predictions/masks/a.png") for row in rows)
    assert main(["predict", "in/a.png", "--checkpoint", checkpoint]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_names_of_outputs_are_never_the_same():
    assert output_names(["x/a.jpg"]) == ["a.png"]
    assert output_names(["x/a.jpg", "x/y/b.png", "x/b.png"]) == ["a.png", "y/b.png", "b.png"]
    assert output_names(["a.jpg", "a.png", "b.png"]) == ["a.jpg.png", "a.png.png", "b.png"]


def test_more_than_256_classes_take_16_bits():
    labels = np.array([[0, 300]])
    found = Segmentation(Image.new("RGB", (2, 1)), labels, [f"class {i}" for i in range(301)])
    assert np.array_equal(np.asarray(found.mask()), labels)
    assert [share.name for share in found.shares] == ["class 0", "class 300"]


def test_overlays_show_regions_borders_and_a_legend():
    labels = np.zeros((100, 200), int)
    labels[:, 100:] = 1
    labels[:20, :20] = -1
    colours = overlays.palette(2)
    grey = Image.new("RGB", (200, 100), (128, 128, 128))
    pixels = np.asarray(overlays.painted(grey, labels, colours, share=0.5))
    for place, colour in (((60, 50), colours[0]), ((60, 150), colours[1]), ((5, 5), (60, 60, 60))):
        assert np.abs(pixels[place] - (np.array(colour) + 128) / 2).max() <= 1
    assert (pixels[60, 98:102].max(0) > 220).all()  # a light line in any two colours
    legend = overlays.with_legend(grey, [overlays.Entry(colours[0], "ground", "80 %")])
    assert legend.width == 200
    below = np.asarray(legend)[100:]
    assert (below == colours[0]).all(-1).sum() > 50
    assert (below[[0, -1]] == 255).all()
    many = overlays.with_legend(grey, [overlays.Entry(c, "x") for c in overlays.palette(150)], most=10)
    assert many.height < 350


def test_colours_are_far_from_each_other():
    assert overlays.palette(150)[:11] == overlays.palette(11)
    assert len(set(overlays.palette(300))) == 300
    first = np.array(overlays.palette(11), float)
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1)
    assert distance[~np.eye(11, dtype=bool)].min() > 60


def test_files_are_checked_before_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = landscape_recipe(make_landscapes(tmp_path / "pictures", 2, 2), "run")
    config.data.check_files = True
    Image.new("L", (60, 44), 7).save("pictures/annotations/train/1.png")
    with pytest.raises(DataError, match=r"(?s)1 of 2 images .*1.png: 2640 pixels of value 7, outside of the 3 classes"):
        train(config)
    assert not Path("run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_labels_is_neither_trained_on_nor_measured(tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    config = landscape_recipe(make_landscapes(tmp_path / "pictures", 4, 2), "run")
    for mask in (tmp_path / "pictures/annotations" / split).iterdir():
        Image.new("L", (60, 44), 255).save(mask)
    with pytest.raises(DataError, match=rf"images/{split}: no pixel of the \d masks has a class"):
        train(config)
    assert not Path("run").exists()
    weights = Weights(vmamba.create_model("upernet_vmamba_femto", num_classes=3, channels=8), {}, "here")
    measured = SegmentationValidateConfig(data=SegmentationDataConfig(root=str(tmp_path / "pictures"), val_split=split))
    with pytest.raises(DataError, match=r"no pixel of the \d masks has a class"):
        SegmentationTask.from_weights(measured, weights)


def test_what_does_not_fit_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = landscape_recipe(whole / "pictures", "run")
    config.model = ModelConfig("vmamba_femto_s2")
    with pytest.raises(RecipeError, match=r"vmamba_femto_s2 is no model for segmentation"):
        train(config)
    config = landscape_recipe(whole / "pictures", "run")
    config.data.batch_size = 1
    with pytest.raises(RecipeError, match=r"data.batch_size is 1, but the coarsest level"):
        train(config)
    config.data.root = None
    with pytest.raises(DataError, match=r"data.root is not set"):
        train(config)
    weights = Weights(vmamba.create_model("upernet_vmamba_femto", num_classes=3, channels=8), {}, "here")

    def named(names):
        return weights._replace(metadata={"class_names": names})

    other = SegmentationValidateConfig(data=SegmentationDataConfig(root=str(whole / "pictures")))
    assert SegmentationTask.from_weights(other, weights).names == NAMES  # its classes have no names
    assert SegmentationTask.from_weights(other, named(["soil", *NAMES[1:]])).names == NAMES  # spelt otherwise
    with pytest.raises(DataError, match=r"are not those of here: 2 differ, such as ground for sky"):
        SegmentationTask.from_weights(other, named(["sky", "ground", "disc"]))
    with pytest.raises(DataError, match=r"are not those of here: 2 differ, such as ground for cell"):
        SegmentationTask.from_weights(other, named(["cell", "nucleus", "disc"]))
    four = Weights(vmamba.create_model("upernet_vmamba_femto", num_classes=4, channels=8), {}, "here")
    with pytest.raises(DataError, match=r"val has 3 classes, but here 4"):
        SegmentationTask.from_weights(other, four)
    with pytest.raises(CheckpointError, match=r"is a model for segmentation, not for classification"):
        Classifier.from_weights(weights)
    with pytest.raises(CheckpointError, match=r"is a model for classification, not for segmentation"):
        Segmenter.from_weights(Weights(vmamba.create_model("vmamba_femto"), {}, "here"))


def test_batch_norm_is_over_all_accelerators(whole):
    task = SegmentationTask.from_recipe(landscape_recipe(whole / "pictures", "run"))
    names = list(task.state_dict())
    weight = task.model.decode_head.bottleneck.bn.weight
    for device, kind in (("cpu", nn.BatchNorm2d), ("cuda", nn.SyncBatchNorm)):
        trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device(device)))
        task.trainer = trainer
        task.configure_model()
        assert type(task.model.decode_head.bottleneck.bn) is kind
    assert task.model.decode_head.bottleneck.bn.weight is weight
    assert list(task.state_dict()) == names


def test_another_backbone_of_timm_is_trained_and_read_back(whole, tmp_path):
    config = landscape_recipe(whole / "pictures", tmp_path / "run", epochs=2, ema_decay=0.0)
    kwargs = {"backbone": "test_resnet", "channels": 8, "auxiliary_channels": 0, "out_norm": False}
    config.model = ModelConfig("upernet", kwargs=kwargs)
    with pytest.raises(RecipeError, match=r"made as configured: the layers of FeatureListNet are in no known order"):
        train(replace(config, optim=replace(config.optim, layer_decay=0.5)))
    train(config)
    rows = history(tmp_path / "run")
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["train_decode"] == rows[1]["train_loss"]
    segmenter = Segmenter.load(str(tmp_path / "run/model.safetensors"))
    assert type(segmenter.model.backbone.extractor.layer1).__name__ == "Sequential"
    assert segmenter.segment(whole / "pictures/images/val/0.png").labels.shape == (44, 60)


def test_models_for_other_tasks_give_their_backbone(tmp_path):
    small = {"depths": [1, 1, 1], "dims": [8, 12, 16]}
    classifier = vmamba.create_model("vmamba_femto_s2", num_classes=5, **small)
    save_checkpoint(classifier, tmp_path / "classifier.safetensors")
    config = ModelConfig(
        "upernet_vmamba_femto_s2", checkpoint=str(tmp_path / "classifier.safetensors"), kwargs=small | {"channels": 8}
    )
    images, model = torch.rand(1, 3, 32, 32), build_model(config, seed=1, num_classes=3).eval()
    with torch.inference_mode():
        ours = model.backbone.extractor(images)
        theirs = classifier.eval().forward_intermediates(images, intermediates_only=True)
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)

    # And so does a model for another task; one for the same task gives all but its classifiers.
    save_checkpoint(model, tmp_path / "segmenter.safetensors")
    heir = ModelConfig(checkpoint=str(tmp_path / "segmenter.safetensors"), kwargs=small | {"channels": 8})
    heir.name = "maskrcnn_vmamba_femto_s2"
    detector = build_model(heir, seed=2, num_classes=4, hidden=8).eval()
    heir.name = "upernet_vmamba_femto_s2"
    segmenter = build_model(heir, seed=2, num_classes=4).eval()
    with torch.inference_mode():
        for a, b in zip(ours, detector.backbone.extractor(images), strict=True):
            torch.testing.assert_close(a, b)
    for layer, same in (("fpn_bottleneck.conv", True), ("conv_seg", False)):
        theirs, own = (net.decode_head.get_submodule(layer).weight for net in (model, segmenter))
        assert (theirs.shape == own.shape and torch.equal(theirs, own)) == same


def test_the_published_recipes_name_every_published_model():
    folder = Path(__file__).parents[2] / "configs/ade20k"
    published = {entry.name for entry in ENTRIES.values() if entry.task == "segmentation" and entry.url}
    assert {file.stem for file in folder.glob("upernet_*.yaml")} == published
    for name in published:
        arguments = ["train", "--config", str(folder / f"{name}.yaml"), "--data.root", "ade"]
        settings = settings_of("train", arguments)
        assert settings is SegmentationTrainConfig
        given = make_parser("train", settings)
        config = given.instantiate(given.parse_args(arguments))["train"]
        assert config["model"].name == name
        assert config["model"].kwargs == {"pretrained_backbone": True}
        assert (config["optim"].steps, config["optim"].warmup_steps, config["optim"].schedule) == (160000, 1500, "poly")
        assert (config["optim"].lr, config["optim"].weight_decay, config["optim"].clip_grad) == (6e-5, 0.01, None)
        assert config["augment"] == SegmentationAugmentConfig()
