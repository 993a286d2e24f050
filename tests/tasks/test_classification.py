import math
import signal
import socket
from dataclasses import replace

import pytest
import torch
from tasks.small import CLASSES, checkpoint, make_images, recipe, spawn, train_and_die

import vmamba
from vmamba.data.config import AugmentConfig, DataConfig
from vmamba.data.transforms import BatchAugment
from vmamba.errors import DataError, ImageError, NonFiniteError, RecipeError
from vmamba.models.checkpoints import read_metadata
from vmamba.tasks import classification
from vmamba.tasks.classification import ClassificationTask
from vmamba.tasks.prediction import Classifier
from vmamba.tasks.recipe import ModelConfig, TrainerConfig, ValidateConfig
from vmamba.tasks.task import build_model
from vmamba.tasks.training import train, validate

PLAIN = AugmentConfig(
    scale=(1, 1), ratio=(1, 1), hflip=0, rand_augment=None, color_jitter=0, random_erasing=0, mixup=0, cutmix=0
)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_images(tmp_path / "images")


def history(run):
    return checkpoint(run)["callbacks"]["Recorder"]["history"]


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

    results = validate(ValidateConfig(trainer=TrainerConfig(accelerator="cpu")))
    best = max(rows, key=lambda row: row["val_top1"])
    assert (results["images"], results["top1"]) == (9, 1.0)
    assert results["per_class"] == dict.fromkeys(CLASSES, 1.0)
    assert results["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    for name in ("metrics.json", "confusion_matrix.png", "predictions.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100


def test_rates_follow_schedule_and_global_batch_and_gradients_are_clipped(images, tmp_path):
    rates, norms = [], []
    config = recipe(
        images, tmp_path / "run", epochs=4, warmup_epochs=1, lr=0.4, min_lr=0.04, warmup_lr=0.0, lr_batch=16
    )
    config.optim.clip_grad = 0.01
    step = torch.optim.AdamW.step

    def recording_step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        kwargs["closure"]()  # Lightning's closure: forward, backward, clipping
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recording_step)
        train(config)
    # 24 images, batches of 4, two steps an update: 3 updates an epoch at a batch of 8, half of lr_batch.
    cosine = [0.02 + 0.18 * (1 + math.cos(math.pi * t / 9)) / 2 for t in range(9)]
    assert rates == pytest.approx([0.0, 0.2 / 3, 0.4 / 3, *cosine])
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)


def test_no_decay_for_biases_norms_and_state_parameters_and_slower_lower_layers(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=2, layer_decay=0.5, lr=1.0)
    groups = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ClassificationTask,
            "on_train_start",
            lambda self: groups.append((self.model, self.optimizers().param_groups)) or 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            train(config)
    model, groups = groups[0]
    names = {id(p): n for n, p in model.named_parameters()}
    settings = {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert len(settings) == len(names)
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or any(name.endswith(end) for end in ("A_log", ".D", "dt_proj_bias"))
        assert settings[name][0] == (0.0 if exempt else 0.05), name
    assert settings["head.fc.weight"][1] == 1.0
    assert settings["stem.conv1.weight"][1] < settings["stages.1.blocks.0.mlp.fc1.weight"][1] < 1.0


def test_keep_best_or_last(images, tmp_path):
    config = recipe(images, tmp_path / "run", ema_decay=0.0)
    scores = iter([0.5, 0.9, 0.7] * 2)
    results = ClassificationTask.results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "results", lambda self: results(self) | {"top1": next(scores)})
        train(config)
        assert read_metadata(tmp_path / "run/model.safetensors")["epoch"] == 2
        config.keep, config.overwrite = "last", True
        train(config)
    assert read_metadata(tmp_path / "run/model.safetensors")["epoch"] == 3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(images, tmp_path, monkeypatch, where):
    config = recipe(images, tmp_path / "run")
    config.trainer.accumulate = 1
    kept = {}
    augment, build = BatchAugment.__call__, classification.build_model
    calls = []

    def poisoned(self, batch):
        calls.append(0)
        result = augment(self, batch)
        if len(calls) == 9:  # epoch 2, step 3
            kept["before"] = [p.clone() for p in kept["model"].parameters()]
            if where == "loss":
                result[0, 0, 0, 0] = math.nan
            else:
                kept["model"].head.fc.weight.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(BatchAugment, "__call__", poisoned)
    monkeypatch.setattr(
        classification, "build_model", lambda *args, **more: kept.setdefault("model", build(*args, **more))
    )
    with pytest.raises(
        NonFiniteError, match=rf"the {where}.* epoch 2, step 3 \(update 9 of the run; learning rate 0.0"
    ):
        train(config)
    assert all(map(torch.equal, kept["before"], kept["model"].parameters()))
    assert checkpoint(tmp_path / "run")["global_step"] == 6


def test_a_folder_that_holds_a_run_is_resumed_replaced_or_refused(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=2)
    train(config)
    before = checkpoint(tmp_path / "run")
    with pytest.raises(RecipeError, match=r"already holds a run. Give --resume true"):
        train(config)
    config.resume = True
    train(config)  # nothing left to do
    assert checkpoint(tmp_path / "run")["global_step"] == before["global_step"]
    config.optim.lr, config.data.workers = 0.5, 1
    with pytest.raises(RecipeError, match=r"other settings.*\n  optim.lr: 0.01 -> 0.5\n"):
        train(config)
    config.resume, config.overwrite, config.data.batch_size = False, True, 64
    with pytest.raises(DataError, match="fewer than one batch"):
        train(config)
    assert checkpoint(tmp_path / "run")["global_step"] == before["global_step"]  # not given up for a run that cannot be
    config.data.batch_size = 4
    train(config)
    assert len(history(tmp_path / "run")) == 2


def test_a_checkpoint_with_code_in_it_is_refused_unread(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=2)
    train(config)

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Malicious()}, tmp_path / "run/checkpoints/last.ckpt")
    config.resume = True
    with pytest.raises(RecipeError, match=r"last.ckpt cannot be read"):
        train(config)
    assert not (tmp_path / "owned").exists()


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


def test_settings_that_do_not_go_together_are_refused(images, tmp_path):
    def refused(message, **changes):
        config = recipe(images, tmp_path / "run")
        for name, value in changes.items():
            group, _, setting = name.partition("__")
            setattr(getattr(config, group) if setting else config, setting or group, value)
        with pytest.raises(RecipeError, match=message):
            train(config)

    refused(r"ema_decay cannot be combined with trainer.strategy fsdp", trainer__strategy="fsdp")
    refused(r"data.batch_size is 5: make it even", data__batch_size=5)
    refused(r"warmup_epochs 3 leaves nothing of optim.epochs 3", optim__warmup_epochs=3)
    refused(r"give one of them", model__pretrained=True, model__checkpoint="x")
    refused(r"ask for one of them", resume=True, overwrite=True)
    refused(r"optim.epochs is 0", optim__epochs=0)
    refused(r"does not divide", trainer__validate_every=2)
    refused(r"held in memory", augment__crop_padding=2)
    refused(r"augment.rand_augment to None", data__in_memory=True)
    refused(r"trainer: ", trainer__accelerator="abacus")
    assert not (tmp_path / "run").exists()


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


def test_mixed_precision_keeps_float32_weights_and_checkpointed_gradients_train(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=2)
    config.trainer.precision, config.model.grad_checkpointing = "bf16-mixed", True
    train(config)
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert history(tmp_path / "run")[-1]["train_loss"] < 1.3


def distributed(function, *arguments, processes=2, exitcode=0):
    """Run a function in as many processes as torchrun would start for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    ranks = [
        spawn(function, *arguments, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [exitcode] * processes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does_with_twice_the_batch(images, tmp_path, strategy):
    def config(run, batch):
        config = recipe(images, tmp_path / run, epochs=2, ema_decay=0.0, lr=0.01, lr_batch=8)
        config.augment, config.model.drop_path_rate, config.data.batch_size = PLAIN, 0.0, batch
        config.trainer.accumulate, config.trainer.strategy = 1, strategy if batch == 4 else "auto"
        (images / "val/red/2.png").unlink(missing_ok=True)  # an odd number of validation images
        return config

    train(config("one", 8))
    distributed(train, config("two", 4))
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["global_step"] == two["global_step"] == 6
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert Classifier.load(str(tmp_path / "two/model.safetensors")).class_names == list(CLASSES)

    killed = config("three", 4)
    distributed(train_and_die, killed, "validating", exitcode=-signal.SIGKILL)
    killed.resume = True
    distributed(train, killed)
    three = checkpoint(tmp_path / "three")["state_dict"]
    assert all(torch.equal(three[name], tensor) for name, tensor in two["state_dict"].items())
