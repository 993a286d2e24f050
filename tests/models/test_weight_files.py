"""Files of weights that are hostile, damaged, or no weights at all."""

from __future__ import annotations

import argparse
import builtins
import collections
import os
import pathlib
import pickle
import random
import socket
import subprocess
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from models.fuzz import fuzz, resident
from models.hostile import KINDS, make
from models.loading import State, assert_equal, assert_refused_unchanged, small
from models.released import foreign_class, theirs, write_released
from torch import nn

from vmamba import VMamba, identify_checkpoint, load_checkpoint
from vmamba.errors import CheckpointError
from vmamba.models.registry import load_model
from vmamba.models.weight_files import MAX_NOTES, check_sums, container_of, read_weight_file

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


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float4_e2m1fn_x2, "norm.bias (192,) is no plain tensor stored in full (torch.float4_e2m1fn_x2)"),
        (torch.complex64, "norm.bias (192,) torch.complex64, expected (192,)"),
        (torch.qint8, "norm.bias (192,) is no plain tensor stored in full (quantized)"),
    ],
)
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_numbers_that_a_model_cannot_hold_are_named(
    dtype: torch.dtype, words: str, as_zip: bool, tmp_path: Path
) -> None:
    given = torch.ones(192, dtype=torch.uint8).view(dtype) if dtype == torch.float4_e2m1fn_x2 else torch.ones(192)
    if dtype == torch.qint8:
        given = torch.quantize_per_tensor(given, 0.1, 0, dtype)
    elif dtype == torch.complex64:
        given = given.to(dtype)
    path = tmp_path / "weights.pth"
    torch.save(small().state_dict() | {"norm.bias": given}, path, _use_new_zipfile_serialization=as_zip)
    assert_refused_unchanged(small(), path, words)


def test_what_is_kept_beside_the_weights_is_small(tmp_path: Path) -> None:
    bomb: list[Any] = ["leaf"]
    for _ in range(15):
        bomb = [bomb] * 10
    path = tmp_path / "weights.pth"
    torch.save({"model": small().state_dict(), "config": {"bomb": bomb, "itself": bomb}, "epoch": 3}, path)
    start = time.process_time()
    metadata = identify_checkpoint(path).metadata
    assert time.process_time() - start < 5
    assert metadata["epoch"] == 3
    assert len(repr(metadata)) < 16 * MAX_NOTES


NO_FILES: dict[str, Callable[[Path], object]] = {
    "is a pipe": os.mkfifo,
    "is a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "is a folder|holds no model": os.mkdir,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "is empty": lambda path: path.symlink_to("/proc/self/mem"),
    "Too many levels of symbolic links": lambda path: path.symlink_to(path),
    "is not a weight file": lambda path: path.write_text("x"),
}


@pytest.mark.parametrize("words", NO_FILES)
@pytest.mark.timeout(60)
def test_what_is_no_file_is_refused_at_once(words: str, tmp_path: Path) -> None:
    NO_FILES[words](path := tmp_path / "path")
    for read in (identify_checkpoint, load_model, container_of, check_sums):
        with pytest.raises(CheckpointError, match=words):
            read(path)


def test_ten_thousand_hostile_files_in_small() -> None:
    lines, faults = fuzz(first=0, count=20 * len(KINDS))
    assert not faults
    assert len(lines) == 20 * len(KINDS)
    outcomes = Counter(outcome == "read" for line in lines for outcome in line["outcomes"])
    assert min(outcomes.values()) > len(lines) // 10  # some are harmless after all, and most are refused


@pytest.mark.parametrize("seed", [1137, 2411])
def test_hostile_files_that_once_ended_in_an_error_of_another_kind(seed: int, tmp_path: Path) -> None:
    (path := tmp_path / "weights").write_bytes(make(seed)[1])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_weight_file(path)


# --- Files that are as they should be --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_way_of_saving_loads(protocol: int, as_zip: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small().state_dict().items()}
    weights: dict[str, Any] = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
    weights["norm.bias"].note = {"an": "attribute"}
    weights["norm.weight"] = torch.cat([torch.zeros(5, dtype=dtype), state["norm.weight"]])[5:]
    contents = {"model": weights, "rng": torch.get_rng_state(), "big": 1 << 100, "data": b"bytes", "set": {1}}
    path = tmp_path / "weights.pth"
    torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
    load_checkpoint(model := small(), path)
    assert_equal(model, {name: tensor.float() for name, tensor in state.items()})


def test_shared_and_expanded_weights_load(tmp_path: Path) -> None:
    state, path = small().state_dict(), tmp_path / "weights.pth"
    state["norm.weight"] = torch.full((1,), 3.0).expand(192)
    state["norm.bias"] = torch.arange(192.0)
    state["stages.1.downsample.norm.bias"] = state["norm.bias"][: len(state["stages.1.downsample.norm.bias"])]
    torch.save({"model": state, "model_ema": state}, path)
    load_checkpoint(model := small(), path)
    assert_equal(model, state)


@pytest.mark.parametrize(
    "wrap", [lambda state: {"checkpoint": {"model": state}}, lambda state: {"a": {"b": {"c": state}}}]
)
def test_weights_in_dictionaries_in_dictionaries_load(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    torch.save(wrap(state := small().state_dict()), path := tmp_path / "weights.pth")
    load_checkpoint(model := small(), path)
    assert_equal(model, state)


def test_long_histories_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    """mmengine keeps the loss of every iteration in its checkpoints, and they can be larger than the weights."""
    logs = {f"loss_{i}": np.random.default_rng(i).normal(size=200_000) for i in range(10)}
    contents = {"state_dict": small().state_dict(), "message_hub": logs, "meta": {"epoch": 12, "cfg": "x = 1\n" * 5000}}
    torch.save(contents, path := tmp_path / "epoch_12.pth")
    info = load_checkpoint(model := small(), path)
    assert_equal(model, contents["state_dict"])
    assert info.metadata["meta"] == contents["meta"]


def test_archives_of_over_4_gb_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state := small().state_dict(), written := tmp_path / "written.pth")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # sizes and places above are then stored as in such an archive
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(path := tmp_path / "weights.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert b"\xff" * 8 in path.read_bytes()[-2000:]
    load_checkpoint(model := small(), path)
    assert_equal(model, state)
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("a/data.pkl", b"\x80\x02}.")
        target.writestr("a/byteorder", b"big")
    assert_refused_unchanged(small(), path, "big-endian")


@pytest.mark.parametrize(
    "write", [lambda path, state: torch.save(state, path), tensors_only], ids=["zip", "safetensors"]
)
def test_large_tensors_are_mapped_and_not_read(write: Callable[[Path, State], None], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write(path, {"odd": torch.ones(3), "x": torch.ones(8 << 20)})
    before = resident()
    tensors = read_weight_file(path).tensors
    assert resident() - before < 8 << 20
    assert tensors["x"].sum() == 8 << 20
    tensors["x"][0] = 7  # changes the copy in memory only
    assert read_weight_file(path).tensors["x"][0] == 1


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
