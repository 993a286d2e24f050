import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from data.test_loading import make_shards
from tasks.small import CLASSES, PLAIN, history, recipe
from torch.nn import functional as F

import vmamba
from vmamba.data.config import DataConfig
from vmamba.data.seeding import seed_sample
from vmamba.errors import CheckpointError, DataError, ImageError, RecipeError
from vmamba.models.checkpoints import read_metadata, save_checkpoint
from vmamba.tasks.classification import ClassificationTask
from vmamba.tasks.prediction import Classifier, load_weights, preprocessing_of
from vmamba.tasks.recipe import ModelConfig, TrainerConfig, ValidateConfig
from vmamba.tasks.task import Means, build_model
from vmamba.tasks.training import train, validate


def test_a_run_learns_and_leaves_a_model_that_stands_alone(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=6, ema_decay=0.5)
    config.augment, config.trainer.accumulate = replace(PLAIN, label_smoothing=0.0), 1
    assert train(config) == tmp_path / "run"
    rows = history(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["val_top1"] == 1.0
    assert rows[-1]["train_top1"] > 0.9
    assert rows[-1]["train_loss"] < 0.4
    metrics = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert metrics[0] == "epoch,lr,train_loss,train_top1,val_loss,val_top1,seconds"
    assert len(metrics) == 7
    assert (tmp_path / "runs/latest").resolve() == tmp_path / "run"
    assert (tmp_path / "run/learning_curve.png").read_bytes()[:4] == b"\x89PNG"

    metadata = read_metadata(tmp_path / "run/model.safetensors")
    assert metadata["class_names"] == list(CLASSES)
    assert metadata["img_size"] == [16, 16]
    assert metadata["variant"] == "vmamba_femto_s2"
    assert metadata["crop_pct"] == 1.0
    classifier = Classifier.load()
    files = [str(path) for name in CLASSES for path in sorted((images / "val" / name).iterdir())]
    found = list(classifier.predict(files, topk=2, batch_size=4))
    assert [result.classes[0].name for result in found] == [name for name in CLASSES for _ in range(3)]
    assert all(len(result.classes) == 2 and result.classes[0].confidence > 0.34 for result in found)

    from_training = Classifier.from_weights(load_weights(str(tmp_path / "run/checkpoints/last.ckpt")))
    assert (from_training.pre, from_training.class_names) == (classifier.pre, classifier.class_names)

    results = validate(ValidateConfig(trainer=TrainerConfig(accelerator="cpu")))
    best = max(rows, key=lambda row: row["val_top1"])
    assert (results["images"], results["top1"]) == (9, 1.0)
    assert results["per_class"] == dict.fromkeys(CLASSES, 1.0)
    assert results["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    for name in ("metrics.json", "confusion_matrix.png", "predictions.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_labels_are_smoothed_and_mixed_as_the_settings_say(images, tmp_path, mixup):
    config = recipe(images, tmp_path / "run")
    config.augment = replace(PLAIN, label_smoothing=0.3, mixup=mixup, mixup_prob=0.0)
    task = ClassificationTask.from_recipe(config).eval()
    task.trained = Means(torch.device("cpu"))
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    logits = task.model(task.pre.normalise(pixels)).detach()
    expected = float(F.cross_entropy(logits, labels, label_smoothing=0.3))
    assert task.loss((pixels, labels)).item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)
    config.augment = replace(config.augment, mixup=0.8, mixup_prob=1.0)
    mixed = ClassificationTask.from_recipe(config).eval()
    seed_sample(0)
    assert mixed.loss((pixels, labels)).item() != pytest.approx(expected, rel=1e-3)


def test_images_have_the_size_that_a_model_was_made_for():
    size = preprocessing_of(vmamba.create_model("vmamba_femto_s2", img_size=(48, 64))).img_size  # its own is 32
    assert size == (48, 64)
    vit = timm.create_model("test_vit", img_size=96)  # whose configuration says 160
    assert preprocessing_of(vit).img_size == (96, 96)
    assert preprocessing_of(vit, DataConfig(img_size=64)).img_size == (64, 64)
    assert preprocessing_of(vit, stored={"img_size": [128, 160]}).img_size == (128, 160)
    assert preprocessing_of(timm.create_model("test_resnet")).img_size == (160, 160)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_model_of_timm_is_trained_measured_and_used(images, tmp_path, name):
    config = recipe(images, tmp_path / "run", epochs=2)
    config.model, config.data.img_size = ModelConfig(name), 32  # a ViT is built for one size
    train(config)
    model = tmp_path / "run/model.safetensors"
    metadata = read_metadata(model)
    assert (metadata["variant"], metadata["task"], metadata["num_classes"]) == (name, "classification", 3)
    found = validate(ValidateConfig(checkpoint=str(model), trainer=TrainerConfig(accelerator="cpu")))
    best = max(history(tmp_path / "run"), key=lambda row: row["val_top1"])
    assert (found["top1"], found["loss"]) == pytest.approx((best["val_top1"], best["val_loss"]), rel=1e-4)
    classifier = Classifier.load(str(model))
    assert (classifier.class_names, classifier.pre.img_size) == (list(CLASSES), (32, 32))
    files = sorted(str(path) for path in images.glob("val/*/*.png"))
    right = [result.classes[0].name == Path(result.file).parent.name for result in classifier.predict(files)]
    assert sum(right) / 9 == pytest.approx(found["top1"])


def test_one_class_and_four_channels_are_refused_before_any_work(images, tmp_path):
    config = recipe(images, tmp_path / "run")
    config.data.in_chans = 4
    with pytest.raises(RecipeError, match=r"data.in_chans is 4; image files are read with 1 \(grey\) or 3"):
        train(config)
    config.data.in_chans, config.model.kwargs["in_chans"] = None, 4
    with pytest.raises(RecipeError, match=r"model.kwargs holds in_chans, .* of its own: data.in_chans"):
        train(config)
    del config.model.kwargs["in_chans"]
    for split in ("train", "val"):
        for name in ("green", "blue"):
            shutil.rmtree(images / split / name)
    with pytest.raises(DataError, match=r"train has one class \(red\)"):
        train(config)
    assert not (tmp_path / "run").exists()

    kwargs = {"depths": [1, 1, 1], "dims": [8, 12, 16]}
    for name, (classes, channels), message in (
        ("one", (1, 3), r"one.safetensors knows a single class, class 0: it cannot tell classes apart"),
        ("four", (3, 4), r"images of 4 channels; image files are read with 1 \(grey\) or 3 \(RGB\)"),
        ("none", (0, 3), r"holds a backbone without a classifier"),
    ):
        model = vmamba.create_model("vmamba_femto_s2", num_classes=classes, in_chans=channels, **kwargs)
        path = tmp_path / f"{name}.safetensors"
        metadata = {"mean": [0.5] * channels, "std": [0.5] * channels, "model_kwargs": kwargs}
        save_checkpoint(model, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            Classifier.load(str(path))
        with pytest.raises(CheckpointError, match=message):
            validate(ValidateConfig(checkpoint=str(path), data=DataConfig(root=str(images))))


def test_fine_tuning_starts_from_the_weights_and_a_new_head(images, tmp_path):
    kwargs = {"depths": [1, 1, 1], "dims": [8, 12, 16]}
    source = vmamba.create_model("vmamba_femto_s2", num_classes=7, **kwargs)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    config = ModelConfig("vmamba_femto_s2", checkpoint=str(tmp_path / "source.pth"), kwargs=kwargs)
    model = build_model(config, num_classes=3)
    assert torch.equal(model.stem.conv1.weight, source.stem.conv1.weight)
    assert model.head.fc.weight.shape == (3, 16)
    with pytest.raises(RecipeError, match=r"no model 'vmamba_nope'"):
        build_model(ModelConfig("vmamba_nope"), 3)
    config = ModelConfig("vmamba_femto_s2", kwargs={**kwargs, "pattern": "diagonal"})
    assert build_model(config, num_classes=3).pattern == "diagonal"
    config.kwargs["pattern"] = "zigzag"
    with pytest.raises(RecipeError, match=r"vmamba_femto_s2 cannot be built as configured .* pattern is 'zigzag'"):
        build_model(config, num_classes=3)


def test_bad_data_is_refused_before_any_work(images, tmp_path):
    config = recipe(images, tmp_path / "run")
    config.data.batch_size = 64
    with pytest.raises(DataError, match=r"has 24 images, fewer than one batch of 64"):
        train(config)
    (images / "val/red").rename(images / "val/pink")
    with pytest.raises(DataError, match=r"only in the first: red; only in the second: pink"):
        train(config)
    (images / "val/pink").rename(images / "val/red")
    (images / "train/blue/3.png").write_bytes(b"")
    config = recipe(images, tmp_path / "run")
    with pytest.raises(ImageError, match=r"blue/3.png: the file is empty"):
        train(config)
    config.data.check_files = True
    with pytest.raises(DataError, match=r"1 of 24 images.*\n.*blue/3.png: the file is empty"):
        train(config)
    config = ValidateConfig(data=DataConfig(root=str(images)), trainer=TrainerConfig(accelerator="cpu"))
    vmamba.models.checkpoints.save_checkpoint(
        vmamba.create_model("vmamba_femto_s2", num_classes=2),
        tmp_path / "two.safetensors",
        {"class_names": ["blue", "pink"]},
    )
    config.checkpoint = str(tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"missing: pink; unknown: green, red"):
        validate(config)


def test_classes_without_names_are_measured_by_number(images, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(vmamba.create_model("vmamba_femto_s2", num_classes=3, img_size=16), path)
    config = ValidateConfig(checkpoint=str(path), data=DataConfig(root=str(images)), trainer=TrainerConfig("cpu"))
    found = validate(config)
    assert found["images"] == 9
    assert list(found["per_class"]) == list(CLASSES)
    (images / "val/yellow").mkdir()
    (images / "val/red/0.png").rename(images / "val/yellow/0.png")
    with pytest.raises(DataError, match=r"has 4 classes, but .*model.safetensors has 3"):
        validate(config)


def test_a_network_is_never_given_a_batch_of_no_images(images, tmp_path, monkeypatch):
    """Where there are more devices than images, one has nothing but what fills up."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(vmamba.create_model("vmamba_femto_s2", num_classes=3, img_size=16), path)
    config = ValidateConfig(checkpoint=str(path), data=DataConfig(root=str(images)), trainer=TrainerConfig("cpu"))
    task = ClassificationTask.from_weights(config, load_weights(str(path)))
    task.on_validation_epoch_start()
    network, sizes = task.network, []
    network.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    pictures = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    for labels in ([-1, -1, -1, -1], [2, 0, -1, -1]):
        task.judge((pictures, torch.tensor(labels)))
    assert sizes == [4, 4]
    logits = network(task.pre.normalise(pictures[:2]))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]))
    assert task.means.local("loss") == pytest.approx(loss.item(), rel=1e-5)


def test_a_file_whose_preprocessing_contradicts_its_network_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(vmamba.create_model("vmamba_femto_s2", num_classes=3), path, {"mean": [0.5]})
    with pytest.raises(RecipeError, match=r"mean has 1 value"):
        Classifier.load(str(path))


def test_shards_fewer_than_workers_are_trained_on_and_measured_to_the_last_image(images, tmp_path, capsys):
    pytest.importorskip("webdataset")
    config = recipe(images, tmp_path / "run", epochs=2)
    config.data = replace(
        make_shards(tmp_path / "shards", shards=2, each=6), num_classes=2, img_size=16, crop_pct=1.0, workers=4
    )
    train(config)
    assert "2 shard(s), so 2 worker(s) a device read them" in capsys.readouterr().err
    assert [set(row) >= {"val_top1"} for row in history(tmp_path / "run")] == [True, True]
    found = validate(
        ValidateConfig(checkpoint=str(tmp_path / "run/model.safetensors"), trainer=TrainerConfig(accelerator="cpu"))
    )
    assert found["images"] == 12
