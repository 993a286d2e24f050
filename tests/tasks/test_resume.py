"""A run that is killed at any moment and resumed ends with the very bits of a run that never stopped."""

import os
import signal
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tasks.landscapes import landscape_recipe, make_landscapes
from tasks.shapes import make_shapes, shape_recipe
from tasks.small import checkpoint, make_images, recipe, spawn, train_and_die
from tasks.toy import toy_recipe

from vmamba.models.checkpoints import read_metadata
from vmamba.tasks.training import train

MOMENTS = ["training", "asked to end", "validating", "writing", "renaming"]
# What is written and when is the same for all tasks: those that take long are killed where they differ.
KILLED = {
    "classification": ["training", "writing"], "segmentation": ["validating"], "detection": ["training"],
    "toy": MOMENTS,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """The recipe of a task, and the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    os.chdir(folder)
    if request.param == "toy":
        config = toy_recipe("")
    elif request.param == "segmentation":
        config = landscape_recipe(make_landscapes(folder / "images"), "")
    elif request.param == "detection":
        config = shape_recipe(make_shapes(folder / "images", train=12, val=2), "")
        config.trainer.accumulate = 2
    else:
        config = recipe(make_images(folder / "images"), "")
    process = spawn(train, replace(config, run=str(folder / "run")))
    process.join()
    assert process.exitcode == 0
    return config, folder / "run"


def equal(a, b):
    """The same nested values, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("whole", "moment"), [(task, moment) for task, moments in KILLED.items() for moment in moments], indirect=["whole"]
)
def test_killed_and_resumed_is_never_stopped(whole, tmp_path, monkeypatch, moment):
    monkeypatch.chdir(tmp_path)
    config, reference = whole
    config = replace(config, run=str(tmp_path / "run"))
    process = spawn(train_and_die, config, moment)
    process.join()
    assert process.exitcode == (128 + signal.SIGTERM if moment == "asked to end" else -signal.SIGKILL)
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    leftovers = list((tmp_path / "run/checkpoints").glob(".*.partial"))
    assert bool(leftovers) == (moment in ("writing", "renaming"))

    config.resume = True
    if config.task != "toy":
        config.data = replace(config.data, workers=1)
    process = spawn(train, config)
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["last.ckpt"]

    ours, theirs = checkpoint(tmp_path / "run"), checkpoint(reference)
    assert ours["global_step"] == theirs["global_step"] == 9
    assert any(name.startswith("ema.") for name in theirs["state_dict"])
    assert equal(ours["state_dict"], theirs["state_dict"])
    assert equal(ours["optimizer_states"], theirs["optimizer_states"])
    assert equal(ours["loops"], theirs["loops"])
    for history in (ours["callbacks"]["Recorder"]["history"], theirs["callbacks"]["Recorder"]["history"]):
        assert [row.pop("seconds") > 0 for row in history] == [True] * 3
    assert equal(ours["callbacks"], theirs["callbacks"])
    models = [run / "model.safetensors" for run in (tmp_path / "run", reference)]
    assert equal(*map(safetensors.torch.load_file, models))
    assert equal(*map(read_metadata, models))


@pytest.mark.parametrize("whole", KILLED, indirect=True)
def test_the_training_was_worth_comparing(whole):
    """Weights and their average moved, and differ."""
    state = checkpoint(whole[1])["state_dict"]
    model = torch.cat([v.flatten() for k, v in state.items() if k.startswith("model.")])
    ema = torch.cat([v.flatten() for k, v in state.items() if k.startswith("ema.")])
    assert model.shape == ema.shape
    assert (model - ema).abs().max() > 1e-4
    rows = checkpoint(whole[1])["callbacks"]["Recorder"]["history"]
    assert rows[0]["train_loss"] != rows[2]["train_loss"]
