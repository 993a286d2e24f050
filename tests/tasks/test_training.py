"""Training, validation and runs, whatever the task; what is special to one is in its own file."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tasks.small import CLASSES, PLAIN, checkpoint, distributed, history, recipe, spawn, train_and_die
from tasks.toy import Toy, ToyTrainConfig, ToyValidateConfig, toy_recipe

from vmamba.cli import main
from vmamba.data.transforms import BatchAugment
from vmamba.errors import CheckpointError, DataError, NonFiniteError, RecipeError
from vmamba.models.checkpoints import read_metadata
from vmamba.tasks import classification, settings_of
from vmamba.tasks.classification import ClassificationTask
from vmamba.tasks.detection_recipe import DetectionTrainConfig
from vmamba.tasks.prediction import Classifier
from vmamba.tasks.recipe import TrainConfig, TrainerConfig, ValidateConfig, differences, load_recipe
from vmamba.tasks.segmentation_recipe import SegmentationTrainConfig
from vmamba.tasks.task import build_model
from vmamba.tasks.training import train, validate


def test_another_task_trains_is_measured_and_predicts_through_the_same_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = toy_recipe("runs/toy", epochs=4)
    assert train(config) == Path("runs/toy")
    rows = history(Path("runs/toy"))
    assert list(rows[0]) == [
        "epoch", "lr", "train_loss", "train_square", "train_absolute", "val_error", "seconds"
    ]  # fmt: skip
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_square"] + row["train_absolute"])
    errors = [row["val_error"] for row in rows]
    assert min(errors) < 0.8 * errors[0]
    metadata = read_metadata(Path("runs/toy/model.safetensors"))
    assert (metadata["task"], metadata["variant"]) == ("toy", "toy_colours")
    assert metadata["epoch"] == 1 + errors.index(min(errors))  # the lowest error is the best
    assert Image.open("runs/toy/swatches.png").size == (24, 1)

    found = validate(ToyValidateConfig(trainer=TrainerConfig(accelerator="cpu")))
    assert found["error"] == pytest.approx(min(errors), rel=1e-6)
    assert found["summary"] == f"colour error {found['error']:.4f}"
    stored = json.loads(Path("runs/toy/metrics.json").read_text())
    assert stored == {"error": found["error"], "weights": found["weights"], "images": 24, "data": "drawn"}
    with pytest.raises(RecipeError, match=r"is a model for toy: set task to toy"):
        validate(ValidateConfig())
    with pytest.raises(CheckpointError, match=r"is a model for toy, not for classification"):
        Classifier.load()
    with pytest.raises(RecipeError, match=r"settings of toy are a ToyTrainConfig, not a TrainConfig"):
        train(TrainConfig(task="toy"))


def test_progress_names_the_score_of_the_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = toy_recipe("runs/toy", epochs=2)
    config.trainer.progress, config.trainer.validate_every = True, 5  # after the last epoch
    train(config)
    first, second = capsys.readouterr().err.splitlines()
    rows = history(Path("runs/toy"))
    assert first.startswith(f"epoch   1/2  training loss {rows[0]['train_loss']:.4f}  | lr ")
    error = f"{rows[1]['val_error']:.4f}"
    assert f"training loss {rows[1]['train_loss']:.4f}  | validation colour error {error}  | lr" in second


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        ([], "classification"),
        (["--task", "toy"], "toy"),
        (["--task=toy", "--config", "plain.yaml"], "toy"),
        (["--config", "based.yaml", "--optim.epochs", "1"], "toy"),
        (["--config", "toy.yaml", "--config", "plain.yaml"], "toy"),
        (["--config", "based.yaml", "--task", "classification"], "classification"),
    ],
)
def test_the_recipe_says_which_task(tmp_path, monkeypatch, arguments, task):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text("task: toy\n")
    Path("based.yaml").write_text("base: toy.yaml\nseed: 1\n")
    Path("plain.yaml").write_text("seed: 1\n")
    assert settings_of("train", arguments) is {"toy": ToyTrainConfig, "classification": TrainConfig}[task]


def test_the_model_file_says_which_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert settings_of("validate", []) is ValidateConfig  # there is no run yet
    train(toy_recipe("runs/toy", epochs=2))
    assert settings_of("validate", []) is ToyValidateConfig
    assert settings_of("validate", ["--checkpoint", "runs/toy/model.safetensors"]) is ToyValidateConfig
    assert settings_of("validate", ["--pretrained", "vmamba_tiny_s1l8"]) is ValidateConfig
    with pytest.raises(
        RecipeError, match=r"no task 'juggling'; choose one of: classification, segmentation, detection, toy"
    ):
        settings_of("train", ["--task", "juggling"])
    assert main(["validate", "--data.images", "5", "--trainer.accelerator", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("colour error 0.")
    assert json.loads(Path("runs/toy/metrics.json").read_text())["images"] == 5
    Image.new("RGB", (9, 9), "red").save("a.png")
    Path("b.png").write_bytes(b"")
    assert main(["predict", "a.png", "b.png", "--format", "csv"]) == 1
    header, row = capsys.readouterr().out.splitlines()
    assert header == "file,red,green,blue"
    assert row.startswith("a.png,0.")


def test_what_is_no_number_is_null_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(toy_recipe("runs/toy", epochs=2))
    monkeypatch.setattr(Toy, "results", lambda self: {"error": math.nan, "other": -math.inf, "more": 0.5})
    monkeypatch.setattr(Toy, "details", lambda self: {"images": 5, "data": "", "each": {"a": [math.nan]}})
    assert math.isnan(validate(ToyValidateConfig(trainer=TrainerConfig(accelerator="cpu")))["error"])
    stored = json.loads(Path("runs/toy/metrics.json").read_text(), parse_constant=pytest.fail)
    assert (stored["error"], stored["other"], stored["more"], stored["each"]) == (None, None, 0.5, {"a": [None]})


def test_what_the_command_line_says_counts_even_where_it_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = toy_recipe("runs/toy", epochs=2)
    config.data.images, config.data.batch_size = 12, 2
    train(config)
    Path("more.yaml").write_text("data:\n  images: 24\n")  # the toy's default
    for arguments, images in (
        ([], 12), (["--data.images", "24"], 24), (["--data.images=5"], 5), (["--config", "more.yaml"], 24),
    ):  # fmt: skip
        assert main(["validate", "--trainer.accelerator", "cpu", *arguments]) == 0
        assert json.loads(Path("runs/toy/metrics.json").read_text())["images"] == images


def test_a_run_copes_with_names_that_are_not_utf8(images, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/run\xe9")
    for split in ("train", "val"):
        old = os.fsencode(images / split / "red")
        os.rename(old, old[:-3] + b"caf\xe9 $a$ $")
        os.rename(old[:-3] + b"caf\xe9 $a$ $/0.png", old[:-3] + b"caf\xe9 $a$ $/\xff.png")
    os.rename(images, os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    config = recipe(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9")), folder, epochs=2)
    assert train(config) == Path(folder)
    assert load_recipe(Path(folder) / "config.yaml")["data"]["root"] == config.data.root
    found = validate(ValidateConfig(checkpoint=f"{folder}/model.safetensors", trainer=TrainerConfig(accelerator="cpu")))
    assert found["images"] == 9
    stored = json.loads((Path(folder) / "metrics.json").read_text())
    assert (stored["weights"], len(stored["per_class"])) == (f"{folder}/model.safetensors", 3)
    assert (Path(folder) / "predictions.png").exists()
    config.resume = True
    train(config)


def test_training_in_a_thread_and_what_it_leaves_of_the_handlers_of_signals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, toy_recipe("runs/a", epochs=2)).result() == Path("runs/a")
    train(toy_recipe("runs/b", epochs=2))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_two_processes_told_to_end_say_so_and_can_be_resumed(images, tmp_path):
    config = recipe(images, tmp_path / "run")
    config.data.batch_size = 2
    said = tmp_path / "stderr"
    distributed(train_and_die, config, "asked to end", exitcode=128 + signal.SIGTERM, stderr=said)
    error = said.read_text()
    assert error.count("stopped by SIGTERM; go on from its last epoch with --resume true") == 1
    assert "Traceback" not in error
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    config.resume = True
    distributed(train, config)
    assert len(history(tmp_path / "run")) == 3


@pytest.mark.parametrize(("devices", "workers"), [(1, 2), (2, 0)])
def test_a_command_whose_processes_are_told_to_end_does_so_in_order(images, tmp_path, devices, workers):
    config = recipe(images, tmp_path / "run", epochs=1000)
    config.data.workers, config.trainer.devices = workers, devices
    settings = config.to_dict() | {"run": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "vmamba.cli", "train", "--config", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not (tmp_path / "run/checkpoints/last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.1)
        if workers:
            os.killpg(process.pid, signal.SIGTERM)  # all at once, as from a scheduler
        else:
            process.send_signal(signal.SIGTERM)  # to the first process alone, which passes it on
        _, error = process.communicate(timeout=300)
    assert process.returncode == 143
    # torch's loader may complain of its processes' end after that.
    said = f"{tmp_path / 'run'}: stopped by SIGTERM; go on from its last epoch with --resume true"
    assert said in error.splitlines()
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("**/.*.partial"))


@pytest.fixture
def updates(monkeypatch):
    """Learning rate and gradient norm of each update."""
    found = []
    step = torch.optim.AdamW.step

    def recording_step(self, *args, **kwargs):
        kwargs["closure"]()  # Lightning's closure: forward, backward, clipping
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        found.append((self.param_groups[0]["lr"], float(torch.cat(gradients).norm())))
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    return found


def test_rates_follow_schedule_and_global_batch_and_gradients_are_clipped(images, tmp_path, updates):
    config = recipe(
        images, tmp_path / "run", epochs=4, warmup_epochs=1, lr=0.4, min_lr=0.04, warmup_lr=0.0, lr_batch=16
    )
    config.optim.clip_grad = 0.01
    train(config)
    rates, norms = zip(*updates, strict=True)
    # 24 images, batches of 4, two steps an update: 3 updates an epoch at a batch of 8, half of lr_batch.
    cosine = [0.02 + 0.18 * (1 + math.cos(math.pi * t / 9)) / 2 for t in range(9)]
    assert rates == pytest.approx((0.0, 0.2 / 3, 0.4 / 3, *cosine))
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)


def test_a_small_rate_does_not_rise_to_the_default_of_the_last(tmp_path, monkeypatch, updates, capsys):
    monkeypatch.chdir(tmp_path)
    train(toy_recipe("runs/toy", epochs=2, warmup_epochs=1, lr=5e-7))
    assert [rate for rate, _ in updates] == pytest.approx([5e-7] * 6)
    said = "optim.min_lr 1e-05 and optim.warmup_lr 1e-06: above optim.lr 5e-07, which is taken instead"
    assert said in capsys.readouterr().err


def test_rates_fall_at_milestones(tmp_path, monkeypatch, updates):
    monkeypatch.chdir(tmp_path)
    train(toy_recipe("runs/toy", epochs=4, warmup_epochs=1, warmup_lr=0.0, schedule="multistep", milestones=(2, 3)))
    warm = [0.0, 0.05 / 3, 0.1 / 3]  # 3 updates an epoch
    assert [rate for rate, _ in updates] == pytest.approx([*warm, *[0.05] * 3, *[0.005] * 3, *[0.0005] * 3])


def test_a_run_of_so_many_steps_takes_the_nearest_number_of_epochs(tmp_path, monkeypatch, updates):
    monkeypatch.chdir(tmp_path)
    poly = {"schedule": "poly", "min_lr": 0.0, "warmup_lr": 0.0, "warmup_steps": 2}
    train(toy_recipe("runs/toy", epochs=1, steps=10, **poly))  # 3 updates an epoch
    assert [rate for rate, _ in updates] == pytest.approx([0.0, 0.025, *(0.05 * (1 - step / 7) for step in range(7))])
    config = toy_recipe("runs/even", epochs=1, steps=10, **poly)
    config.trainer.validate_every = 2
    train(config)
    assert len(history(Path("runs/even"))) == 4
    with pytest.raises(RecipeError, match=r"warm-up of 9 updates leaves nothing of the 9 of the whole run"):
        train(toy_recipe("runs/warm", steps=10, warmup_steps=9))
    with pytest.raises(RecipeError, match=r"optim.layer_decay: Sequential does not tell the order of its layers"):
        train(toy_recipe("runs/none", layer_decay=0.5))
    with pytest.raises(RecipeError, match=r"optim.optimizer nosuch cannot be made as configured: .*not found"):
        train(toy_recipe("runs/none", optimizer="nosuch"))
    with pytest.raises(RecipeError, match=r"optim.steps is 0; it must be above 0"):
        train(toy_recipe("runs/none", steps=0))


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


@pytest.mark.parametrize(("warmup", "lengthens"), [(None, True), (False, False), (True, True)])
def test_the_average_of_a_short_run_is_of_its_own_weights(tmp_path, monkeypatch, capsys, warmup, lengthens):
    monkeypatch.chdir(tmp_path)
    train(toy_recipe("runs/toy", ema_decay=0.999, ema_warmup=warmup))
    said = "after 9 updates an average with optim.ema_decay 0.999 would still hold 99% of the initial weights"
    assert (said in capsys.readouterr().err) == (warmup is None)
    state = checkpoint(Path("runs/toy"))["state_dict"]
    initial = build_model(toy_recipe("").model).state_dict()
    moved = {
        part: sum(float((state[f"{part}.{name}"] - tensor).abs().sum()) for name, tensor in initial.items())
        for part in ("model", "ema.module")
    }
    assert (moved["ema.module"] > 0.3 * moved["model"]) == lengthens


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
    validate(ValidateConfig(checkpoint=str(tmp_path / "run/model.safetensors"), trainer=TrainerConfig("cpu")))
    results = {"metrics.json", "predictions.png", "confusion_matrix.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} >= results
    train(config)
    assert len(history(tmp_path / "run")) == 2
    assert not {path.name for path in (tmp_path / "run").iterdir()} & results


def test_the_settings_in_a_runs_folder_replace_no_run_and_resume_any(images, tmp_path, capsys):
    config = recipe(images, tmp_path / "run", epochs=2)
    config.overwrite = True
    train(config)
    written = tmp_path / "run/config.yaml"
    assert main(["train", "--config", str(written)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--config", str(written), "--resume", "true"]) == 0
    assert main(["train", "--config", str(written), "--overwrite", "true"]) == 0


def test_the_link_to_the_latest_run_names_it(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipe(images, Path("runs/latest"), epochs=2)
    with pytest.raises(RecipeError, match=r"runs/latest is a link to the latest run, and there is none yet"):
        train(config)
    train(replace(config, run="runs/first"))
    for change in ({"resume": True}, {"overwrite": True}):
        train(replace(config, **change))
        assert os.readlink("runs/latest") == "first"
        assert len(history(Path("runs/first"))) == 2
    with monkeypatch.context() as patch:  # as on Windows, and on disks formatted for it
        patch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("a privilege is not held")))
        train(replace(config, run="runs/third"))
    assert os.readlink("runs/latest") == "first"
    Path("runs/latest").unlink()
    Path("runs/latest").mkdir()
    with pytest.raises(RecipeError, match=r"runs/latest is to be a link to the latest run, but is a folder"):
        train(replace(config, run="runs/second"))
    assert not Path("runs/second").exists()


def test_a_run_goes_on_with_as_many_processes_and_images(images, tmp_path):
    config = recipe(images, tmp_path / "run")
    config.trainer.accumulate = 1
    process = spawn(train_and_die, config, "training")
    process.join()
    before = checkpoint(tmp_path / "run")
    config.resume = True
    distributed(train, config, exitcode=1, stderr=tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "has had 1 processes, 6 updates an epoch, and would now have 2 processes, 3 updates an epoch" in said
    for number in range(4):
        (images / f"train/red/{number}.png").unlink()
    with pytest.raises(RecipeError, match=r"has had 1 processes, 6 updates .* would now have 1 processes, 5 updates"):
        train(config)
    assert checkpoint(tmp_path / "run")["global_step"] == before["global_step"] == 6


def test_workers_of_a_stream_share_it(tmp_path):
    before = TrainConfig().to_dict()
    for dataset, changed in (("", []), ("torch/cifar10", []), ("wds/", ["data.workers: 1 -> 2"])):
        settings = [before | {"data": before["data"] | {"dataset": dataset, "workers": w}} for w in (1, 2)]
        assert differences(*settings) == changed


def test_a_file_that_is_no_yaml_is_told(tmp_path, capsys):
    for text in (b"seed: 1\n\tepochs: 2\n", b"run: \xff\n", b"base: other.yaml\n"):
        (tmp_path / "recipe.yaml").write_bytes(text)
        (tmp_path / "other.yaml").write_text("seed: [1\n")
        for command in ("train", "predict"):
            assert main([command, "--config", str(tmp_path / "recipe.yaml")]) == 1
            said = capsys.readouterr().err
            assert "Traceback" not in said
            assert re.search(r"(recipe|other)\.yaml cannot be read as YAML: ", said)


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
    refused(r"milestones \[\] do not go with optim.schedule multistep", optim__schedule="multistep")
    refused(r"milestones \[2\] do not go with optim.schedule cosine", optim__milestones=(2,))
    refused(r"does not divide", trainer__validate_every=2)
    refused(r"held in memory", augment__crop_padding=2)
    refused(r"augment.rand_augment to None", data__in_memory=True)
    refused(r"trainer: ", trainer__accelerator="abacus")
    assert not (tmp_path / "run").exists()


ORDER = r"expected the smaller number first, above 0"


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (TrainConfig, "data.workers", -1, "expected 0 or more"),
        (TrainConfig, "data.batch_size", 0, "expected 1 or more"),
        (TrainConfig, "data.val_batch_size", 0, "expected 1 or more"),
        (TrainConfig, "optim.clip_grad", -1, "expected 0 or more"),
        (TrainConfig, "optim.weight_decay", -0.1, "expected 0 or more"),
        (TrainConfig, "optim.min_lr", math.nan, "expected 0 or more"),
        (TrainConfig, "optim.warmup_epochs", -1, "expected 0 or more"),
        (TrainConfig, "optim.layer_decay", 0, "must be above 0"),
        (TrainConfig, "optim.layer_decay", 2, "expected 0 to 1"),
        (TrainConfig, "model.drop_path_rate", 2, "expected 0 to 1"),
        (TrainConfig, "seed", 2**63, "no more than 64 bits"),
        (TrainConfig, "augment.label_smoothing", 1.5, "expected 0 to 1"),
        (TrainConfig, "augment.mixup", -1, "expected 0 or more"),
        (TrainConfig, "augment.cutmix", -1, "expected 0 or more"),
        (TrainConfig, "augment.mixup_prob", 2, "expected 0 to 1"),
        (TrainConfig, "augment.switch_prob", -0.5, "expected 0 to 1"),
        (TrainConfig, "augment.random_erasing", 2, "expected 0 to 1"),
        (TrainConfig, "augment.hflip", 3, "expected 0 to 1"),
        (TrainConfig, "augment.vflip", -1, "expected 0 to 1"),
        (TrainConfig, "augment.color_jitter", -1, "expected 0 or more"),
        (TrainConfig, "augment.interpolation", "foo", "expected one of nearest, bilinear"),
        (TrainConfig, "augment.scale", (1.0, 0.5), ORDER),
        (TrainConfig, "augment.scale", (0.5, 1.5), "expected 0 to 1"),
        (TrainConfig, "augment.ratio", (2, 0.5), ORDER),
        (SegmentationTrainConfig, "augment.ratio", (2, 0.5), ORDER),
        (SegmentationTrainConfig, "augment.crop", (0, 16), "expected 1 or more"),
        (SegmentationTrainConfig, "augment.scale", (0, 1), "expected 1 or more"),
        (SegmentationTrainConfig, "augment.hflip", 3, "expected 0 to 1"),
        (DetectionTrainConfig, "augment.short_sides", (), "expected one side or more"),
        (DetectionTrainConfig, "augment.jitter", (2.0, 0.1), ORDER),
        (DetectionTrainConfig, "augment.crop", (600, 384), ORDER),
        (ValidateConfig, "data.batch_size", 0, "expected 1 or more"),
        (ValidateConfig, "data.val_batch_size", 0, "expected 1 or more"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(config, name, value, message):
    settings = config()
    settings.check()
    *group, setting = name.split(".")
    setattr(getattr(settings, *group) if group else settings, setting, value)
    with pytest.raises(RecipeError, match=rf"^{re.escape(name)} is .*{message}"):
        (train if "Train" in config.__name__ else validate)(settings)


def test_names_that_timm_does_not_know_are_refused_before_an_old_run_is_given_up(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=1, warmup_epochs=0)
    train(config)
    config.overwrite = True
    for group, setting, value, message in (
        ("augment", "rand_augment", "foo", r"augment.rand_augment is 'foo'; expected a policy of timm's"),
        ("data", "interpolation", "foo", r"interpolation is 'foo'; expected one of nearest"),
        ("optim", "optimizer", "foo", r"optim.optimizer foo cannot be made as configured"),
    ):
        part = getattr(config, group)
        with pytest.raises(RecipeError, match=message):
            train(replace(config, **{group: replace(part, **{setting: value})}))
    assert len(history(tmp_path / "run")) == 1


def test_mixed_precision_keeps_float32_weights_and_checkpointed_gradients_train(images, tmp_path):
    config = recipe(images, tmp_path / "run", epochs=2)
    config.trainer.precision, config.model.grad_checkpointing = "bf16-mixed", True
    train(config)
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert history(tmp_path / "run")[-1]["train_loss"] < 1.3


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

    measure = ValidateConfig(checkpoint=str(tmp_path / "two/model.safetensors"), trainer=TrainerConfig("cpu"))
    alone = validate(measure)
    distributed(validate, replace(measure, output=str(tmp_path / "measured")))
    together = json.loads((tmp_path / "measured/metrics.json").read_text())
    assert together["images"] == alone["images"] == 8
    assert (together["top1"], together["per_class"]) == (alone["top1"], alone["per_class"])
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)

    killed = config("three", 4)
    distributed(train_and_die, killed, "validating", exitcode=-signal.SIGKILL)
    killed.resume = True
    distributed(train, killed)
    three = checkpoint(tmp_path / "three")["state_dict"]
    assert all(torch.equal(three[name], tensor) for name, tensor in two["state_dict"].items())
