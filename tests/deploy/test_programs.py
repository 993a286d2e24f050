"""Files of torch.export that ask for more than operators are refused before they have it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from vmamba.deploy import programs
from vmamba.errors import ExportError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return (x * self.weight)[:, : x.shape[1] // 2]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    sizes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(Small(), (torch.randn(4, 6, 3),), dynamic_shapes=sizes)
    path = tmp_path_factory.mktemp("programs") / "good.pt2"
    programs.write(program, path, {"model": "Small"})
    return path


class Running:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def _pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _changed(good, path, change):
    """A file whose records, without the folder that all are in, `change` has changed."""
    with zipfile.ZipFile(good) as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
    return path


def _replacing(record, old, new):
    def change(records):
        text = records[record].decode()
        assert old in text
        records[record] = text.replace(old, new).encode()

    return change


def test_what_was_written_is_read(good, tmp_path):
    program, metadata = programs.read(good)
    assert metadata == {"model": "Small"}
    x = torch.randn(5, 8, 3)
    torch.testing.assert_close(program.module()(x), (x * program.state_dict["weight"])[:, :4])
    again, _ = programs.read(_changed(good, tmp_path / "same.pt2", lambda records: None))
    assert again.graph_signature == program.graph_signature


WEIGHTS, GRAPH = "data/weights/model_weights_config.json", "models/model.json"


def test_pickles_are_not_read(good, tmp_path):
    made = tmp_path / "made"

    def weight(records):
        _replacing(WEIGHTS, '"use_pickle": false', '"use_pickle": true')(records)
        records["data/weights/weight_0"] = _pickled(Running(made))

    def inputs(records):
        records["data/sample_inputs/model.pt"] = _pickled(((Running(made),), {}))

    for change, message in ((weight, "weight is pickled"), (inputs, "data/sample_inputs/model.pt is pickled")):
        path = _changed(good, tmp_path / "evil.pt2", change)
        with pytest.raises(ExportError, match=rf"evil.pt2 is not read: {message}, which could run any code"):
            programs.read(path)
        assert not made.exists()
        with suppress(Exception):  # a folder is no tensor; but by then it is there
            torch.export.load(path)
        made.rmdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replacing(GRAPH, "torch.ops.aten.mul.Tensor", "torch.os.mkdir"), "its graph calls torch.os.mkdir"),
        (_replacing(GRAPH, "torch.ops.aten.mul.Tensor", "_operator.__class__"), "its graph calls _operator.__class__"),
        (_replacing(GRAPH, "Symbol('s", "__import__('s"), r"it has the size .*__import__"),
        (_replacing(GRAPH, "Symbol('s", "Symbol('a.b"), r"it has the size .*a\.b"),
        (_replacing(GRAPH, '"guards_code": [', '"guards_code": ["exit()", '), r"it has the guard exit\(\)"),
        (_replacing(GRAPH, '"guards_code": [', '"guards_code": ["L.__class__ == 1", '), "it has the guard L.__class__"),
        (_replacing(WEIGHTS, '"weight_0"', '"opaque_obj_0"'), "it has the object opaque_obj_0"),
        (lambda records: records.update({"data/aotinductor/model/a.so": b""}), "it holds data/aotinductor/model/a.so"),
        (lambda records: records.update({"data/weights/model.pt": b""}), "it holds data/weights/model.pt"),
    ],
)
def test_nothing_but_operators_is_read(good, tmp_path, change, message):
    assert "guards_code" in json.loads(zipfile.ZipFile(good).read("archive/models/model.json"))
    with pytest.raises(ExportError, match=message):
        programs.read(_changed(good, tmp_path / "evil.pt2", change))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_full_disk_is_an_error(good):
    with pytest.raises(OSError, match="No space left"):
        programs.write(programs.read(good)[0], Path("/dev/full"), {})
    with pytest.raises(ExportError, match="cannot be read as a torch program"):
        programs.read(good.parent / "missing.pt2")
