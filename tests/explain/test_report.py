"""The command: figures, numbers, and what it says when something is wrong."""

from __future__ import annotations

import inspect
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmamba
from vmamba.cli import main
from vmamba.explain.scans import Recording
from vmamba.explain.selectivity import selectivity
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.hub import save_folder
from vmamba.models.registry import load_model
from vmamba.ops import PATTERNS
from vmamba.tasks.detector import Detector

KWARGS = {"depths": [1, 2], "dims": [8, 12]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A photo that is higher than wide, and models for three tasks."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_femto_s2", num_classes=2, in_chans=3, **KWARGS)
    metadata = {"class_names": ["cat", "dog"], "img_size": [32, 32], "model_kwargs": KWARGS, "crop_pct": 1.0}
    save_checkpoint(model, tmp_path / "model.safetensors", metadata)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


def run(capsys, *arguments):
    code = main(["explain", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.split(), captured.err


def numbers(path="out/explain.json"):
    return json.loads(Path(path).read_text())


def test_figures_and_numbers_of_a_classifier(folder, capsys):
    code, out, err = run(
        capsys, "photo.png", "--checkpoint", "model.safetensors", "--query", "24,20", "--output", "out"
    )
    assert code == 0, err
    names = ["stages", "activation_stage1_block1", "activation_stage2_block2", "memory_stage1_block1",
             "memory_stage2_block2", "class"]  # fmt: skip
    assert out == [f"out/photo/{name}.png" for name in names]
    for path in out:
        with Image.open(path) as image:
            assert min(image.size) > 300
    assert "the numbers are in out/explain.json" in err
    found = numbers()
    assert found["model"] == "vmamba_femto_s2"
    photo = found["photos"][0]
    assert (photo["size"], photo["seen"]) == ([64, 48], [32, 32])
    assert photo["part"] == pytest.approx([0, 5 * 64 / 42, 48, 32 * 64 / 42])  # 48×64 becomes 32×42, then 32×32
    first, second = photo["activation"]
    assert first["patch"] == [int((20 * 42 / 64 - 5) / 2), 8]
    assert second["block"] == "stages.1.blocks.1"
    for maps in (first, second):
        assert maps["error"] < 1e-5
        assert sum(route["share"] for route in maps["routes"]) + maps["skip_share"] == pytest.approx(1, abs=1e-5)
    assert photo["class"]["target"] in ("“cat”", "“dog”")
    assert len(photo["stages"]["stages"]) == 2
    # The same counts as forgotten by the command and from Python.
    asked = [inspect.signature(each).parameters["share"].default for each in (selectivity, Recording.selectivity)]
    assert [*asked, *(memory["share"] for memory in photo["memory"])] == [math.exp(-1)] * 4


def test_parts_blocks_and_several_photos(folder, capsys):
    Path("bad.jpg").write_bytes(b"nothing")
    code, out, err = run(
        capsys, "bad.jpg", "photo.png", "missing.png", "--checkpoint", "model.safetensors", "--what",
        "matrix, activation", "--block=-1,stages.0.blocks.0", "--output", "out",
    )  # fmt: skip
    assert code == 1
    assert "bad.jpg: not an image" in err
    assert "missing.png: no such file" in err
    assert [Path(path).stem for path in out] == [
        "matrix_stage2_block2", "matrix_stage1_block1", "activation_stage2_block2", "activation_stage1_block1",
    ]  # fmt: skip
    found = numbers()["photos"]
    assert found[0] == {"file": "bad.jpg", "error": found[0]["error"]}
    assert [len(entry["heard"]) for entry in found[1]["matrix"]] == [64, 256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", "50,20"], "the place (50, 20) is outside photo.png, which is 48×64 pixels"),
        (["--query", "5,60"], "in the margin that the model's preprocessing cuts off"),
        (["--query", "here"], "query is 'here'; expected x,y in pixels of the photo"),
        (["--what", "stages,colour"], "what names 'colour'; expected some of stages, activation"),
        (["--block", "7"], "there is no block 7; expected a number from 0 to 2"),
        (["--what", "class,stages", "--target", "2"], "there is no class 2; the model has classes 0 to 1"),
        (["--what", "depth"], "name their folder with --labelled"),
        (["--device", "cuda:7"], "device 'cuda:7' cannot be used"),
    ],
)
def test_wrong_settings(folder, capsys, arguments, message):
    code, _, err = run(
        capsys, "photo.png", "--checkpoint", "model.safetensors", "--what", "activation,class", *arguments
    )
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not Path("runs/explain/explain.json").exists()


def test_numbers_of_a_model_that_diverged_are_null(folder, capsys):
    model, metadata = load_model(folder / "model.safetensors")
    torch.nn.init.constant_(model.stages[1].blocks[0].norm1.weight, torch.nan)
    save_checkpoint(model, "diverged.safetensors", metadata)
    files = ["photo.png", "--checkpoint", "diverged.safetensors", "--output", "out"]
    code, _, err = run(capsys, *files)
    assert code == 0, err
    (photo,) = numbers()["photos"]
    assert photo["class"]["score"] is None
    assert photo["activation"][1]["skip_share"] is None
    assert [stage["edges"] is None for stage in photo["stages"]["stages"]] == [False, True]
    code, _, err = run(capsys, *files, "--what", "stages,field")
    assert code == 1
    assert "or they are not finite" in err


def test_what_photos_show_is_kept_where_the_model_as_a_whole_cannot_be_looked_at(folder, capsys):
    files = ["photo.png", "--checkpoint", "model.safetensors", "--output", "out"]
    code, _, err = run(capsys, *files, "--what", "class,depth")
    assert code == 1
    assert "name their folder with --labelled" in err
    (photo,) = numbers()["photos"]
    assert photo["class"]["target"] in ("“cat”", "“dog”")


def test_what_the_only_photo_showed_before_is_kept(folder, capsys):
    code, out, err = run(
        capsys, "photo.png", "--checkpoint", "model.safetensors", "--what", "stages,class", "--target", 2,
        "--output", "out",
    )  # fmt: skip
    assert code == 1
    assert "there is no class 2" in err
    (photo,) = numbers()["photos"]
    assert photo["error"].startswith("photo.png: there is no class 2")
    assert [photo["stages"]["figure"]] == out
    assert "class" not in photo


def test_a_network_without_scans(folder, capsys):
    model = timm.create_model("resnet10t", num_classes=2)
    save_checkpoint(model, "resnet.safetensors", {"variant": "resnet10t", "img_size": [64, 64]})
    code, out, _ = run(capsys, "photo.png", "--checkpoint", "resnet.safetensors", "--output", "out")
    assert code == 0
    assert [Path(path).stem for path in out] == ["stages", "class"]
    code, _, err = run(capsys, "photo.png", "--checkpoint", "resnet.safetensors", "--what", "activation")
    assert code == 1
    assert "ResNet computed no selective scan" in err
    assert main(["explain", "--checkpoint", "model.safetensors"]) == 1
    assert "no photos were named" in capsys.readouterr().err


def test_patterns_need_neither_photos_nor_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "--what", "patterns", "--output", "out")
    assert code == 0, err
    assert out == ["out/patterns.gif", "out/patterns.png"]
    found = numbers()
    assert {"model", "weights"}.isdisjoint(found)
    assert found["patterns"]["model"] == []
    assert [pattern["pattern"] for pattern in found["patterns"]["patterns"]] == list(PATTERNS)
    for more in (["--checkpoint", "none.safetensors"], ["--what", "patterns,scaling"]):  # what asks for a model
        code, _, err = run(capsys, "--what", "patterns", *more)
        assert code == 1
        assert "none.safetensors" in err or "no checkpoint was named" in err
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    photos = capsys.readouterr().out.partition("photos ")[2].partition("options:")[0]
    assert "patterns need none" in " ".join(photos.split())
    assert "(required)" not in photos


def test_a_mask_at_the_query(folder, capsys):
    torch.manual_seed(0)
    kwargs = {"backbone": "vmamba_femto_s2", "channels": 8, "auxiliary_channels": 8}
    model = vmamba.create_model("upernet", num_classes=3, img_size=64, **kwargs)
    metadata = {"class_names": ["sky", "road", "car"], "model_kwargs": kwargs, "img_size": [64, 64]}
    save_checkpoint(model, "segmenter.safetensors", metadata)
    code, _, err = run(
        capsys, "photo.png", "--checkpoint", "segmenter.safetensors", "--what", "class", "--query", "10,20",
        "--output", "out",
    )  # fmt: skip
    assert code == 0, err
    found = numbers()["photos"][0]
    assert found["seen"] == [64, 48]
    assert found["class"]["target"].removeprefix("mask of ") in ("“sky”", "“road”", "“car”")
    assert 0 < found["class"]["region_share"] <= 1
    assert all(0 <= stage["inside"] <= 1 for stage in found["class"]["stages"])


def test_a_photo_in_which_nothing_is_found(folder, capsys):
    torch.manual_seed(0)
    kwargs = {"backbone": "vmamba_femto_s2", "channels": 8, "hidden": 16, "masks": False, "score_thr": 0.0}
    model = vmamba.create_model("maskrcnn", num_classes=2, **kwargs)
    Image.new("RGB", (64, 48)).save("black.png")
    detector = Detector(model.eval(), (48, 64), ["a", "b"], [1, 2], "")
    empty, full = sorted(("photo.png", "black.png"), key=lambda file: detector.detect(file, 0.0).scores[0])
    between = float(np.mean([detector.detect(file, 0.0).scores[0] for file in (empty, full)]))
    metadata = {"class_names": ["a", "b"], "model_kwargs": kwargs | {"score_thr": between}, "sides": [48, 64]}
    save_checkpoint(model, "detector.safetensors", metadata)
    arguments = ["--checkpoint", "detector.safetensors", "--output", "out"]
    code, out, err = run(capsys, empty, full, "--what", "stages,class", *arguments)
    assert code == 0, err
    assert out == [
        f"out/{Path(empty).stem}/stages.png",
        *(f"out/{Path(full).stem}/{n}.png" for n in ("stages", "class")),
    ]
    first, second = (photo["class"] for photo in numbers()["photos"])
    nothing = f"the model finds no object in {empty}; expected a picture in which it does"
    assert first == {"figure": None, "target": None, "nothing_found": nothing}
    assert second["target"] in ("“a”, object 0", "“b”, object 0")
    code, out, err = run(capsys, empty, full, "--what", "class", "--target", 0, *arguments)
    assert code == 1
    assert f"{empty}: there is no object number 0; the model finds 0 objects in the picture" in err
    assert out == [f"out/{Path(full).stem}/class.png"]


def test_a_place_outside_of_one_of_several_photos(folder, capsys):
    Image.new("RGB", (80, 80), "green").save("wide.png")
    code, out, err = run(
        capsys, "photo.png", "wide.png", "--checkpoint", "model.safetensors", "--query", "60,20", "--what",
        "stages,activation", "--block", "0", "--output", "out",
    )  # fmt: skip
    assert code == 1
    message = "photo.png: the place (60, 20) is outside photo.png"
    assert message in err
    assert out == ["out/photo/stages.png", "out/wide/stages.png", "out/wide/activation_stage1_block1.png"]
    first, second = numbers()["photos"]
    assert first["error"].startswith(message)
    assert first["stages"]["figure"] == "out/photo/stages.png"
    assert len(second["activation"]) == 1


def test_depth_beside_another_model(folder, capsys):
    for number in range(16):
        for split in ("train", "val"):
            path = folder / "data" / split / ("dark" if number % 2 else "light") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (200 - 120 * (number % 2) + number,) * 3).save(path)
    save_folder(load_model("model.safetensors")[0], "other")
    code, out, err = run(
        capsys, "--checkpoint", "model.safetensors", "--what", "depth", "--labelled", "data", "--beside",
        "local-dir:other", "--output", "out",
    )  # fmt: skip
    assert code == 0, err
    assert out == ["out/depth.png"]
    found = numbers()["depth"]["models"]
    assert [model["name"] for model in found] == ["model.safetensors", "local-dir:other"]
    assert found[0]["pictures"] == 16
    assert found[0]["accuracy"][0] == 1.0
    assert len(found[0]["edges"]) == 2
    with tarfile.open("val.tar", "w") as archive:
        archive.add("data/val", "")
    code, _, err = run(
        capsys, "--checkpoint", "model.safetensors", "--what", "depth", "--labelled", "val.tar", "--output", "tar"
    )
    assert code == 0, err
    assert numbers("tar/explain.json")["depth"]["models"][0] == found[0]
