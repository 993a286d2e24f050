"""Every command and snippet of the README, run as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models.released import as_released, golden_weights
from tasks.small import make_images

import vmamba
from vmamba.cli import main
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.variants import VARIANTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if shlex.split(line, comments=True)
]

# What makes a command short enough for a test; everything else runs as it stands.
ONE_EPOCH = shlex.split("--optim.epochs 1 --optim.warmup_epochs 0 --data.batch_size 4 --trainer.progress false")
SHORTENED = {
    "examples": ["--train", "8", "--val", "7"],
    "imagenet": [*ONE_EPOCH, "--data.img_size", "32", "--data.workers", "0"],
    "segmentation": ONE_EPOCH,
    "coco": [*ONE_EPOCH, "--data.img_size", "[64,96]"],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with all that the README speaks of, and a cache that already holds the released file."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "configs").symlink_to(ROOT / "configs")
    (desk / "examples").symlink_to(ROOT / "examples")
    make_images(desk / "flowers", train=2, val=2)
    demo = vmamba.create_model("vmamba_femto", num_classes=10, in_chans=1)
    save_checkpoint(demo, desk / "runs/demo/model.safetensors", {"mean": [0.286], "std": [0.353], "crop_pct": 1.0,
                                                                 "class_names": list("0123456789")})  # fmt: skip
    (desk / "photo.jpg").write_bytes((ROOT / "examples/images/bag.png").read_bytes())
    name = "vmamba_tiny_s1l8"
    cache = desk / "cache/hub/checkpoints"
    cache.mkdir(parents=True)
    released = {"model": as_released(name, golden_weights(name)), "epoch": 264}
    torch.save(released, desk / "checkpoint.pth")
    (cache / VARIANTS[name].release.file).symlink_to(desk / "checkpoint.pth")
    return desk


def run(desk: Path, command: list[str]) -> str:
    environment = os.environ | {"TORCH_HOME": str(desk / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def output_of(capfd, *arguments: str) -> str:
    """What `vmamba` prints, in this process: starting another takes longer than most commands."""
    capfd.readouterr()
    code = main([*arguments])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets(desk, number):
    run(desk, [sys.executable, "-c", SNIPPETS[number]])


def test_commands(desk, monkeypatch, capfd):
    """In the README's order, in one folder: later ones use what earlier ones made."""
    monkeypatch.chdir(desk)
    monkeypatch.setenv("TORCH_HOME", str(desk / "cache"))
    outputs = defaultdict(list)
    for command in COMMANDS:
        if command[0] == "make":
            targets = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
            assert targets.stdout
            continue
        program, name, *arguments = command
        if program == "python":
            run(desk, [sys.executable, name, *arguments, *SHORTENED[Path(name).parent.name]])
            continue
        assert program == "vmamba"
        if name == "batch" and find_spec("ray") is None:  # of the extra "scale"
            continue
        recipe = next((Path(value) for value in arguments if value.endswith(".yaml")), None)
        shortened = SHORTENED[recipe.parent.name] if recipe else []
        outputs[name].append(output_of(capfd, name, *arguments, *shortened))
    assert {"models", "info", "train", "validate", "predict", "export", "quantize", "share"} <= set(outputs)
    classes, regions, objects = outputs["predict"]
    assert "photo.jpg" in classes
    assert "masks/0007.png" in regions
    assert "overlays/0007.png" in objects  # of what a hardly trained detector may have found
    for text, scores in zip(outputs["validate"], (["6 images: top-1"], ["mIoU"], ["box AP", "mask AP"]), strict=True):
        assert all(score in text for score in scores)
    assert (desk / "int8.onnx").stat().st_size < (desk / "garments.onnx").stat().st_size
    assert [*(desk / "results").glob("*.parquet")] or find_spec("ray") is None
    assert "license: mit" in (desk / "garments/README.md").read_text()
    places = ("predictions/overlays", "predictions/masks", "garments_detection/overlays")
    assert all((desk / "runs" / place / "0007.png").exists() for place in places)


def test_table_of_models(capfd):
    """The table in the README is the one that `vmamba models` prints."""
    printed = output_of(capfd, "models")
    for text in (README, CHINESE):
        rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE))
        assert list(rows) == list(VARIANTS)
        for name, row in rows.items():
            (line,) = (line for line in printed.splitlines() if line.split()[0] == name)
            params, flops, *_ = (cell.strip() for cell in row.split("|"))
            assert params in line
            if release := VARIANTS[name].release:
                assert flops == f"{release.flops} G"
                assert f"{release.top1} %" in row


def test_both_languages_have_the_same_code():
    def code(text: str) -> list[str]:
        blocks = re.findall(r"```(?:python|bash)\n(.*?)```", text, re.DOTALL)
        return [re.sub(r"\s*#.*", "", block) for block in blocks]

    assert code(README) == code(CHINESE)


def test_pictures_and_links_lead_somewhere():
    for text in (README, CHINESE):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / target).exists(), target
