"""Every command and snippet of docs/deployment.md, run as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import create_model

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

TEXT = (Path(__file__).parents[2] / "docs/deployment.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL)


def test_commands_and_snippets(tmp_path):
    torch.manual_seed(0)
    model = create_model("vmamba_femto_s2", num_classes=3)
    save_checkpoint(model, tmp_path / "model.safetensors", metadata={"class_names": ["cat", "dog", "树"]})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    printed = []
    for language, block in BLOCKS:
        commands = [[sys.executable, "-c", block]]
        if language == "bash":
            lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
            commands = [[sys.executable, "-m", "vmamba.cli", *line] for line in lines]
        for command in commands:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.append(done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors", "model.onnx", "pictures.onnx", "small.onnx", "model.pt2"
    }  # fmt: skip
    assert "torch.Size([2, 3]) ['cat', 'dog', '树']" in printed[-1]
