"""torch.export programs, read back in a process that has not imported this package."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import timm
import torch

from vmamba.deploy import export_torch
from vmamba.deploy.graphs import Images, traced_from_one
from vmamba.errors import ExportError
from vmamba.models.vmamba import VMamba

HAS_SHAPES = find_spec("torch.fx.experimental.dynamic_spec") is not None
READ = """
import sys, json, torch
files = {"metadata.json": ""}
module = torch.export.load(sys.argv[1], extra_files=files).module()
torch.manual_seed(1)
with torch.no_grad():
    logits = module(torch.randn(*json.loads(sys.argv[2])))
print(json.dumps([logits.tolist(), json.loads(files["metadata.json"]), "vmamba" in sys.modules]))
"""


def test_programs_need_torch_alone(tmp_path):
    torch.manual_seed(0)
    model = VMamba(depths=(1,), dims=(8,), num_classes=4, img_size=16, stem_stride=2).eval()
    written = export_torch(model, tmp_path / "model.pt2", class_names=list("abcd"))
    assert max(written.differences.values()) < 1e-5
    shape = [1, 3, 2, 27] if HAS_SHAPES else [3, 3, 18, 27]
    assert min(shape[0] for shape in written.differences) == (1 if HAS_SHAPES else 2)
    command = [sys.executable, "-c", READ, str(tmp_path / "model.pt2"), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    logits, metadata, imports_vmamba = json.loads(done.stdout)
    assert json.loads(metadata["class_names"]) == list("abcd")
    assert not imports_vmamba
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(torch.randn(*shape)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ExportError, match="is a folder"):
        export_torch(model, tmp_path)


def test_with_torch_before_2_14(monkeypatch):
    if HAS_SHAPES:
        monkeypatch.delattr("torch.fx.experimental.dynamic_spec.ShapeVar")
    network = torch.nn.Conv2d(3, 4, 3)
    program, trials = traced_from_one(network, Images(3, 16, 16, smallest=4, is_open=True))
    assert min(map(len, trials)) == 2
    for batch in trials:
        torch.testing.assert_close(program.module()(batch), network(batch))


@pytest.mark.skipif(not HAS_SHAPES, reason="torch is older than 2.14")
def test_strides_are_written_as_torch_reads_them_quickly():
    model = VMamba(depths=(1,), dims=(8,), num_classes=4, img_size=16, stem_stride=2).eval()
    program, _ = traced_from_one(model, Images(3, 16, 16, smallest=2, is_open=True))
    values = [node.meta.get("val") for node in program.graph.nodes]
    steps = {str(step) for value in values if isinstance(value, torch.Tensor) for step in value.stride()}
    assert any("u" in step for step in steps)
    assert not any("Max" in step for step in steps)


def test_networks_that_pool_take_two_images_or_more_and_nothing_is_said_of_it(tmp_path, capfd):
    model = timm.create_model("resnet10t", num_classes=2).eval()
    written = export_torch(model, tmp_path / "model.pt2")
    assert min(shape[0] for shape in written.differences) == 2
    assert capfd.readouterr().err == ""
