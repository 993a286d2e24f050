"""torch.export programs, read back in a process that has not imported this package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from vmamba.deploy import export_torch
from vmamba.errors import ExportError
from vmamba.models.vmamba import VMamba

READ = """
import sys, json, torch
files = {"metadata.json": ""}
module = torch.export.load(sys.argv[1], extra_files=files).module()
torch.manual_seed(1)
with torch.no_grad():
    logits = module(torch.randn(3, 3, 18, 27))
print(json.dumps([logits.tolist(), json.loads(files["metadata.json"]), "vmamba" in sys.modules]))
"""


def test_programs_need_torch_alone(tmp_path):
    torch.manual_seed(0)
    model = VMamba(depths=(1,), dims=(8,), num_classes=4, img_size=16, stem_stride=2).eval()
    written = export_torch(model, tmp_path / "model.pt2", class_names=list("abcd"))
    assert max(written.differences.values()) < 1e-5
    command = [sys.executable, "-c", READ, str(tmp_path / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    logits, metadata, imports_vmamba = json.loads(done.stdout)
    assert json.loads(metadata["class_names"]) == list("abcd")
    assert not imports_vmamba
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(torch.randn(3, 3, 18, 27)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ExportError, match="is a folder"):
        export_torch(model, tmp_path)
