"""`vmamba share`: from a training run's folder to one that others can use."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import vmamba
from vmamba.cli import main
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import load_model
from vmamba.tasks import parts_of, settings_of

NAMES = ["cat", "dog", "树"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, as training and validation leave it."""
    folder = tmp_path / "runs/pets"
    model: Any = vmamba.create_model("vmamba_femto_s2", num_classes=3, img_size=48)
    with torch.no_grad():
        model.head.fc.weight.mul_(10)  # so that it is sure of something
    told = {"class_names": NAMES, "epoch": 2, "val_top1": 0.5, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    save_checkpoint(model, folder / "model.safetensors", {**told, "img_size": [48, 40], "crop_pct": 0.8})
    recipe = {
        "model": {"name": "vmamba_femto_s2"}, "data": {"root": "/home/ada/pets"}, "optim": {"epochs": 2}, "run": "x"
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    results = {"top1": 0.625, "weights": "elsewhere/model.safetensors", "images": 8, "data": "/home/ada/pets/val"}
    (folder / "metrics.json").write_text(json.dumps(results))
    return folder


def shared(run: Path, *arguments: str) -> Path:
    output = run.parent / "shared"
    assert main(["share", str(run / "model.safetensors"), "--output", str(output), *arguments]) == 0
    return output


def test_a_run_becomes_a_folder_with_a_card(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shared(run, "--license", "mit")
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert f"'local-dir:{output}'" in capsys.readouterr().err
    card = (output / "README.md").read_text()
    assert "| top-1 accuracy | 62.50% |" in card
    assert "Trained on pets." in card
    assert "home" not in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    again = shared(run, "--data", "other")  # which keeps the card, for somebody may have written in it
    assert (again / "README.md").read_text() == card
    assert "was there and stays as it is" in capsys.readouterr().err
    (again / "README.md").unlink()
    assert "Trained on other." in (shared(run, "--data", "other") / "README.md").read_text()
    assert "no licence is named" in capsys.readouterr().err


def test_what_is_not_of_this_model_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    time = (run / "model.safetensors").stat().st_mtime
    os.utime(run / "metrics.json", (time - 10, time - 10))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(recipe | {"model": {"name": "vmamba_nano"}}))
    card = (shared(run) / "README.md").read_text()
    told = capsys.readouterr().err
    assert "is of another model (vmamba_nano)" in told
    assert "is older than the model" in told
    assert "62.50%" not in card
    assert "| top-1 accuracy | 50.00% |" in card  # of the last epoch, from the model's own file
    assert "## Recipe" not in card


def test_predict_and_the_pipeline_agree_on_every_label(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pictures = []
    for number in range(4):
        picture = Image.effect_mandelbrot((70 + 9 * number, 90), (-2.0, -1.5, 1.0, 1.5), 100).convert("RGB")
        pictures.append(str(tmp_path / f"{number}.png"))
        picture.rotate(50 * number).save(pictures[-1])
    output = shared(run)
    for checkpoint in (f"local-dir:{output}", str(run / "model.safetensors")):
        capsys.readouterr()
        assert main(["predict", *pictures, "--checkpoint", checkpoint, "--format", "json"]) == 0
        predicted = json.loads(capsys.readouterr().out)
        pipe = transformers.pipeline("image-classification", model=str(output), device="cpu")
        for one, found in zip(predicted, pipe(pictures), strict=True):
            ours = {entry["name"]: entry["confidence"] for entry in one["classes"]}
            assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(ours, abs=1e-5)
            assert set(ours) == set(NAMES)
            assert found[0]["label"] == one["classes"][0]["name"]
    assert len({one["classes"][0]["confidence"] for one in predicted}) == 4


def test_a_grey_model_works_in_pipelines_once_it_takes_rgb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    model = vmamba.create_model("vmamba_femto", num_classes=3, in_chans=1)
    save_checkpoint(model, tmp_path / "grey.safetensors", {"class_names": NAMES, "mean": [0.3], "std": [0.4]})
    picture = Image.effect_mandelbrot((70, 60), (-2.0, -1.5, 1.0, 1.5), 100)
    picture.save(tmp_path / "picture.png")
    command = ["share", str(tmp_path / "grey.safetensors"), "--output", str(tmp_path / "rgb"), "--rgb", "true"]
    assert main(command) == 0
    capsys.readouterr()
    words = ["predict", str(tmp_path / "picture.png"), "--checkpoint", str(tmp_path / "grey.safetensors")]
    assert main([*words, "--format", "json"]) == 0
    ours = {entry["name"]: entry["confidence"] for entry in json.loads(capsys.readouterr().out)[0]["classes"]}
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "rgb"), device="cpu")
    assert {entry["label"]: entry["score"] for entry in pipe(picture)} == pytest.approx(ours, abs=1e-5)
    assert main([*command[:-2], "--output", str(tmp_path / "plain")]) == 0
    card = (tmp_path / "plain/README.md").read_text()
    assert "they give RGB and it takes one grey channel" in card
    assert "transformers" not in yaml.safe_load(card.split("---\n")[1])["tags"]


def test_it_is_uploaded_on_request(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, name: str, **options: Any) -> Any:
            asked.update(options, name=name)
            return SimpleNamespace(repo_id=name)

        def file_exists(self, *_: Any, **__: Any) -> bool:
            return False

        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            asked["card"] = Path(folder_path, "README.md").read_text()
            return SimpleNamespace(pr_url=None, commit_url="https://hub/ada/pets/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    shared(run, "--push", "ada/pets", "--private", "true")
    assert capsys.readouterr().out == "https://hub/ada/pets/commit/1\n"
    assert (asked["name"], asked["private"]) == ("ada/pets", True)
    assert 'vmamba.create_model("hf-hub:ada/pets", pretrained=True)' in asked["card"]
    assert "# pets\n" in asked["card"]

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(Api, "create_repo", refused)
    words = ["share", str(run / "model.safetensors"), "--output", str(run / "x"), "--push", "ada/pets"]
    assert main(words) == 1
    assert "vmamba share: ada/pets could not be uploaded: 401 Unauthorized. Check" in capsys.readouterr().err


def test_what_cannot_be_shared_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(run / "model.safetensors")

    def told(*arguments: str) -> str:
        assert main(["share", *arguments]) == 1
        return capsys.readouterr().err

    assert "there is no such file" in told(str(tmp_path / "none.safetensors"), "--output", str(tmp_path / "x"))
    (tmp_path / "file").write_text("")
    assert "file cannot be written to: File exists" in told(file, "--output", str(tmp_path / "file"))
    assert "rgb is for classifiers of grey pictures" in told(file, "--output", str(tmp_path / "x"), "--rgb", "true")
    (run / "metrics.json").write_text("[]")
    assert re.search("metrics.json is not what `vmamba validate` writes", told(file, "--output", str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["upernet_vmamba_femto_s2", "maskrcnn_vmamba_femto_s2"])
def test_dense_models_are_shared_too_and_predict_reads_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"channels": 16} | ({"hidden": 32} if "mask" in name else {"auxiliary_channels": 0})
    model = vmamba.create_model(name, num_classes=3, img_size=(64, 96), **arguments)
    save_checkpoint(model, file := tmp_path / "model.safetensors", {"class_names": NAMES, "sides": [64, 96]})
    assert main(["share", str(file), "--output", str(tmp_path / "out"), "--license", "cc-by-4.0"]) == 0
    again, metadata = load_model(f"local-dir:{tmp_path / 'out'}")
    assert metadata["class_names"] == NAMES
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    Image.effect_noise((90, 70), 50).convert("RGB").save(tmp_path / "picture.png")
    words = ["predict", str(tmp_path / "picture.png"), "--checkpoint", f"local-dir:{tmp_path / 'out'}"]
    assert main([*words, "--pictures", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found/overlays/picture.png").exists()
    for place in (f"local-dir:{tmp_path / 'out'}", str(tmp_path / "out")):
        capsys.readouterr()
        assert main(["info", place, "--format", "json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["folder"], told["task"], told["variant"]) == (place, model.task, name)
        assert (told["num_classes"], told["img_size"]) == (3, [64, 96])
        assert settings_of("validate", ["--checkpoint", place]) is parts_of(model.task).load("validate_config")
