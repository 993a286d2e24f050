"""Files of weights that are hostile, damaged, or no weights at all."""

from __future__ import annotations

import argparse
import builtins
import collections
import os
import pathlib
import pickle
import random
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from models.loading import State, assert_equal, assert_refused_unchanged, small
from models.released import foreign_class, theirs, write_released
from torch import nn

from vmamba import VMamba, identify_checkpoint, load_checkpoint
from vmamba.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.serialization", "ignore::FutureWarning:torch.jit")


def zipped(path: Path, state: State) -> None:
    write_released(path, theirs(state))


def legacy(path: Path, state: State) -> None:
    write_released(path, theirs(state), _use_new_zipfile_serialization=False)


def tensors_only(path: Path, state: State) -> None:
    safetensors.torch.save_file(state, path)


# --- Untrusted pickles -----------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def touch(marker: Path) -> list[Call]:
    command = f"touch {marker}"
    return [
        Call(os.system, command),
        Call(subprocess.Popen, ["touch", str(marker)]),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(builtins.open, str(marker), "w"),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(getattr, collections.OrderedDict, "fromkeys"),
        Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        Call(torch.load, str(marker)),
        Call(np.load, str(marker)),
        Call(pathlib.Path.touch, marker),
        Call(collections.defaultdict, os.getcwd),
    ]


@pytest.mark.parametrize("number", range(len(touch(Path()))))
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_pickled_code_is_refused_and_not_run(number: int, as_zip: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    contents = {"config": touch(marker)[number], "model": small().state_dict()}
    torch.save(contents, path, _use_new_zipfile_serialization=as_zip)
    assert_refused_unchanged(small(), path, "was refused, and nothing in it was run: beside data it asks for ")
    with pytest.raises(CheckpointError, match="refused"):
        identify_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_pickled_code_is_not_run_from_any_protocol(protocol: int, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    for as_zip in (True, False):
        torch.save({"x": touch(marker)[0]}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
        with pytest.raises(CheckpointError):
            identify_checkpoint(path)
    path.write_bytes(pickle.dumps(touch(marker)[0], protocol))
    with pytest.raises(CheckpointError):
        identify_checkpoint(path)
    assert not marker.exists()


def test_what_the_process_has_declared_safe_does_not_count(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    torch.save({"config": Call(eval, f"open({str(marker)!r}, 'w')"), **small().state_dict()}, path)
    with torch.serialization.safe_globals([eval, getattr]):
        declared = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match="asks for eval"):
            identify_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == declared > {eval, getattr}
    assert not marker.exists()


def test_harmless_objects_beside_the_weights_load(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", small().state_dict()

    def get_state(self: Any) -> dict[str, Any]:
        return {"log": np.arange(3.0), "methods": {"mean": type(self).mean}}

    members = {"__getstate__": get_state, "mean": lambda self: 0.0}
    with foreign_class("mmengine.logging.history_buffer.HistoryBuffer", **members) as history_buffer:
        history_buffer.mean.__module__ = history_buffer.__module__  # type: ignore[attr-defined]
        history_buffer.mean.__qualname__ = "HistoryBuffer.mean"  # type: ignore[attr-defined]
        contents = {
            "args": argparse.Namespace(lr=0.1, output=pathlib.Path("runs")),
            "best": np.float64(0.9),
            "history": np.arange(4),
            "counts": collections.Counter("abc"),
            "message_hub": {"loss": history_buffer()},
            "itself": [],
        }
        contents["itself"].append(contents["itself"])
        torch.save({"model": state, "config": contents}, path)
    load_checkpoint(model := small(), path)
    assert_equal(model, state)


def test_tensors_that_claim_more_than_is_stored_are_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", small().state_dict()
    torch.save(state | {"norm.bias": torch.zeros(1).expand(1 << 50)}, path)
    assert_refused_unchanged(small(), path, "norm.bias (1125899906842624,) is no plain tensor stored in full")
    torch.save(state | {"norm.bias": torch.zeros(192).to_sparse()}, path)
    assert_refused_unchanged(small(), path, "norm.bias (192,) is no plain tensor", "sparse")
    torch.save(state | {"norm.bias": torch.empty(192, device="meta")}, path)
    assert_refused_unchanged(small(), path, "norm.bias (192,) is no plain tensor", "meta")

    class Outside:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.zeros(4).untyped_storage()
            view = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (view, 2, (192,), (1,), False, collections.OrderedDict())

    torch.save(state | {"norm.bias": Outside()}, path)
    assert_refused_unchanged(small(), path, "damaged")


# --- Files that are something else -----------------------------------------------------------------------------------

NOT_WEIGHTS = {
    b"": "is empty (0 bytes)",
    b"\0" * 4096: "nothing but zeros",
    b"\xff\xd8\xff\xe0" + b"j" * 600: "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\n<!DOCTYPE html><title>Sign in</title>": "web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "git lfs pull",
    b"\x08\x07\x12\x07pytorch": "ONNX",
    b"\x1f\x8b\x08\0": "gzip",
    b'{"model": 1}': "JSON",
    b"just some text that somebody wrote": "starts with the bytes b'just som'",
    pickle.dumps({"model": 1}): "plain pickle",
    (1 << 40).to_bytes(8, "little") + b'{"a":{}}': "cut short",
}


@pytest.mark.parametrize("content", NOT_WEIGHTS, ids=NOT_WEIGHTS.values())
def test_files_of_other_kinds_are_told_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=NOT_WEIGHTS[content].replace("(", r"\(").replace(")", r"\)")) as caught:
        identify_checkpoint(path)
    assert str(path) in str(caught.value)


def test_archives_of_other_kinds_are_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    np.savez(path.open("wb"), weights=np.ones(3))
    with pytest.raises(CheckpointError, match=r"NumPy \.npz"):
        identify_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "weights are elsewhere")
    with pytest.raises(CheckpointError, match="ordinary zip"):
        identify_checkpoint(path)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(CheckpointError):
        identify_checkpoint(path)
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "weights.pth")
    with pytest.raises(CheckpointError, match="tar archive"):
        identify_checkpoint(path)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        identify_checkpoint(path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        identify_checkpoint(path)


def test_archive_packed_again_is_refused(tmp_path: Path) -> None:
    torch.save(small().state_dict(), path := tmp_path / "weights.pth")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert_refused_unchanged(small(), path, "packed again")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(small(), tmp_path / "absent.pth")
    assert_refused_unchanged(small(), tmp_path, "is a folder")


@pytest.mark.parametrize("write", [zipped, legacy, tensors_only], ids=lambda write: write.__name__)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_truncated_files_are_refused(write: Callable[[Path, State], None], kept: float, tmp_path: Path) -> None:
    write(path := tmp_path / "weights", small().state_dict())
    os.truncate(path, int(path.stat().st_size * kept))
    assert_refused_unchanged(small(), path, str(path))


def test_one_flipped_bit_among_the_weights_is_noticed(tmp_path: Path) -> None:
    torch.save(small().state_dict(), path := tmp_path / "weights.pth")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_refused_unchanged(small(), path, "fails its checksum")


def test_files_without_checksums_load(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state := small().state_dict(), path := tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    load_checkpoint(model := small(), path)
    assert_equal(model, state)


@pytest.mark.parametrize("write", [zipped, legacy, tensors_only], ids=lambda write: write.__name__)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_never_fail_in_another_way(write: Callable[[Path, State], None], tmp_path: Path) -> None:
    model = VMamba(img_size=32, depths=(1, 1), dims=(16, 16), num_classes=2)
    path = tmp_path / "weights"
    write(path, model.state_dict())
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            content[rng.randrange(6000)] = rng.randrange(256)
        path.write_bytes(content)
        try:
            load_checkpoint(model, path)
        except CheckpointError:
            refused += 1
    assert refused > 10
