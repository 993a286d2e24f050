"""Files of torch.export that ask for more than operators are refused before they have it."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._export.serde.schema import SCHEMA_VERSION

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
MUL = "torch.ops.aten.mul.Tensor"


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


def _archive(records, padding=0):
    """The files of an archive, and its table of contents, which `padding` makes longer; with a comment of its own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for index, (name, content) in enumerate(records.items()):
            info = zipfile.ZipInfo(name)
            info.comment = b"." * padding * (index == len(records) - 1)
            file.writestr(info, content)
        start = file.start_dir
    return buffer.getvalue()[:start], buffer.getvalue()[start:-22]


def _of_two(path, shown, hidden):
    """An archive with two tables of contents: torch goes to where the last record says, Python to just before that."""
    lengths = [len(_archive(records)[1]) for records in (shown, hidden)]
    (files, table), (others, other) = (
        _archive(records, max(lengths) - length) for records, length in zip((shown, hidden), lengths, strict=True)
    )
    assert len(table) == len(other)
    moved, at = bytearray(other), 0
    while at < len(moved):
        (offset,) = struct.unpack_from("<I", moved, at + 42)
        struct.pack_into("<I", moved, at + 42, len(files) + offset - len(others))
        at += 46 + sum(struct.unpack_from("<HHH", moved, at + 28))
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(shown), len(shown), len(table), len(files), 0)
    path.write_bytes(files + table + others + bytes(moved) + end)
    return path


def test_an_archive_is_what_torch_finds_in_it(good, tmp_path, monkeypatch):
    made = tmp_path / "made"
    with zipfile.ZipFile(good) as file:
        every = {f"archive/{name.partition('/')[2]}": file.read(name) for name in file.namelist()}
    harmless = {name: content for name, content in every.items() if not re.search("/(models|data|extra)/", name)}
    harmless["archive/data/weights/weight_0"] = bytes(2**16)
    oldest = {
        "version": ".".join(map(str, SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": every["archive/models/model.json"],
        "serialized_state_dict.pt": _pickled({}),
        "serialized_constants.pt": _pickled(Running(made)),
        "serialized_example_inputs.pt": _pickled(((), {})),
    }
    path = _of_two(tmp_path / "evil.pt2", harmless, oldest)
    with pytest.raises(ExportError, match=r"evil.pt2 is not read: Python and torch find different files in it"):
        programs.read(path)
    monkeypatch.setattr(programs, "_is_read_alike", lambda content, archive: True)
    with pytest.raises(ExportError, match=r"evil.pt2 is no torch program: it has no graph named model"):
        programs.read(path)
    assert not made.exists()
    with suppress(Exception):
        torch.export.load(path)
    made.rmdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replacing(GRAPH, MUL, "torch.os.mkdir"), "its graph calls torch.os.mkdir"),
        (_replacing(GRAPH, MUL, "_operator.__class__"), "its graph calls _operator.__class__"),
        (_replacing(GRAPH, MUL, "_operator.attrgetter"), "its graph calls _operator.attrgetter"),
        (_replacing(GRAPH, MUL, "_operator.call"), "its graph calls _operator.call"),
        (_replacing(GRAPH, MUL, "torch.ops.aten.from_file.default"), "its graph calls torch.ops.aten.from_file"),
        (_replacing(GRAPH, MUL, "torch.ops.aten.save.default"), "its graph calls torch.ops.aten.save"),
        (_replacing(GRAPH, MUL, "torch.ops.aten.mul.overloads"), "its graph calls torch.ops.aten.mul.overloads"),
        (_replacing(GRAPH, MUL, "torch.ops.image.write_file.default"), "its graph calls torch.ops.image.write_file"),
        (
            _replacing(GRAPH, MUL, "torch.ops.higher_order.call_torchbind"),
            "its graph calls torch.ops.higher_order.call",
        ),
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


def test_a_graph_is_a_graph_whatever_its_name(good, tmp_path):
    def renamed(records):
        _replacing(GRAPH, MUL, "torch.os.mkdir")(records)
        records["models/sly_config.json"] = json.dumps(json.loads(records[GRAPH]) | {"config": {}}).encode()
        del records[GRAPH]

    with pytest.raises(ExportError, match=r"its graph calls torch.os.mkdir"):
        programs.read(_changed(good, tmp_path / "evil.pt2", renamed))


class Combining(nn.Module):
    def forward(self, x):
        return x * ((x > 0) & (x < 1))


def test_operators_that_write_files_are_refused(tmp_path):
    file, picture = tmp_path / "file", torch.arange(65, 70, dtype=torch.uint8)
    programs.write(torch.export.export(Combining(), (picture,)), tmp_path / "good.pt2", {})

    def writing(records):
        program = json.loads(records[GRAPH])
        graph = program["graph_module"]["graph"]
        given = {"filename": {"as_string": str(file)}, "data": {"as_tensor": {"name": "x"}}}
        inputs = [{"name": name, "arg": value, "kind": 1} for name, value in given.items()]
        outputs, target = [{"as_tensor": {"name": "written"}}], "torch.ops.image.write_file.default"
        graph["nodes"].append({"target": target, "inputs": inputs, "outputs": outputs, "metadata": {}})
        graph["tensor_values"]["written"] = graph["tensor_values"]["x"]
        records[GRAPH] = json.dumps(program).encode()

    path = _changed(tmp_path / "good.pt2", tmp_path / "evil.pt2", writing)
    with pytest.raises(ExportError, match=r"evil.pt2 is not read: its graph calls torch.ops.image.write_file.default"):
        programs.read(path)
    torch.export.load(path).module()(picture)
    assert file.read_bytes() == b"ABCDE"


def test_operators_that_python_has_signs_for_are_read(tmp_path):
    x = torch.linspace(-1, 2, 7)
    programs.write(torch.export.export(Combining(), (x,)), tmp_path / "good.pt2", {})
    program, _ = programs.read(tmp_path / "good.pt2")
    assert "aten.__and__" in str(program.graph)
    assert torch.equal(program.module()(x), Combining()(x))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_full_disk_is_an_error(good):
    with pytest.raises(OSError, match="No space left"):
        programs.write(programs.read(good)[0], Path("/dev/full"), {})
    with pytest.raises(ExportError, match="cannot be read as a torch program"):
        programs.read(good.parent / "missing.pt2")
