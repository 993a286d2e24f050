"""Every command and snippet of docs/deployment.md, run as a reader would."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vmamba.cli import main
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import create_model

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("torchao")

TEXT = (Path(__file__).parents[2] / "docs/deployment.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL)


def test_commands_and_snippets(tmp_path, monkeypatch, capfd):
    torch.manual_seed(0)
    model = create_model("vmamba_femto_s2", num_classes=3, depths=(1, 1), dims=(16, 32))  # of few layers, to be quick
    save_checkpoint(model, tmp_path / "model.safetensors", metadata={"class_names": ["cat", "dog", "树"]})
    (tmp_path / "photos").mkdir()
    for index, pixels in enumerate(torch.randint(0, 256, (12, 40, 48, 3), dtype=torch.uint8).numpy()):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCKS:
        if language == "python":
            # Each in a process of its own, for OpenVINO's sake: see test_onnx.py.
            subprocess.run([sys.executable, "-c", block], check=True, timeout=120)
            continue
        for line in block.splitlines():
            assert main(shlex.split(line, comments=True)[1:]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors", "model.onnx", "pictures.onnx", "small.onnx", "model.pt2", "photos", "int8.onnx", "int8.pt2"
    }  # fmt: skip
    out, err = capfd.readouterr()
    assert 'torch.Size([1, 3]) ["cat", "dog", "树"]' in out
    said = re.findall(r"^checked on [\d×]+: differs from the model by [\d.]+e[+-]\d+ of the", err, re.MULTILINE)
    assert len(said) == 12  # on three sizes by each of four exports
