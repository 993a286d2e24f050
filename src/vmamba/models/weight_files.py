"""Files of weights from anywhere: told apart, and read without running anything in them.

A file is untrusted. Tensors are read by safetensors or by torch's restricted unpickler, which runs no code from it; the
few harmless classes that published files hold beside their weights, such as a yacs config, become empty stand-ins.
"""

from __future__ import annotations

import os
import pickle
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from vmamba.errors import CheckpointError, CheckpointNotFoundError

StrPath = str | os.PathLike[str]


class _Inert:
    """Stands in for a harmless class named in a file: takes whatever the file says about it and does nothing."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _inert_method(owner: object, name: str) -> _Inert:
    """getattr(class, name), which is how a pickle refers to a class's method; no class but a stand-in is accepted."""
    if owner is not _Inert:
        raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")
    return _Inert()


# What published files hold beside tensors. torch's unpickler fills plain OrderedDicts only, so these are what a config
# becomes. What the other classes held is lost, and no weight with it.
_HARMLESS: list[tuple[Callable[..., Any], str]] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "mmengine.config.config.ConfigDict"),
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (_inert_method, "builtins.getattr"),  # mmengine.logging.history_buffer.HistoryBuffer names methods of its own
    *(
        (_Inert, name)
        for name in (
            "argparse.Namespace",
            "jsonargparse._namespace.Namespace",
            "mmengine.logging.history_buffer.HistoryBuffer",
            "numpy.core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
            "numpy.ndarray",
            *(f"{module}.{system}Path" for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
        )
    ),
]
_unpickling = threading.Lock()

_TORCH_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_WEB_PAGE = "a web page saved in place of the file: download it again"
_NOT_WEIGHTS = (  # beginnings of files, in lower case
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to: run `git lfs pull`"),
    (b"<!doctype", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"<?xml", "an XML document, often a server's error message: download the file again"),
    (b"{", "a JSON document"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89png", "a PNG picture"),
    (b"gif8", "a GIF picture"),
    (b"%pdf", "a PDF document"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"bzh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zxz", "compressed with xz: unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it first"),
    (b"rar!", "a RAR archive: unpack it first"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x93numpy", "a NumPy array"),
    (b"\x08", "an ONNX model, whose weights have lost their names: use the PyTorch file it was exported from"),
    (b"\x80", "a plain pickle, which cannot be read safely"),
)
_EXPECTED = "Expected a file written by torch.save or a .safetensors file."


def read_weight_file(path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """A file's dictionary, and for safetensors its header's texts; large tensors are mapped into memory, not read.

    Raises:
        CheckpointError: not a weight file, damaged, or a pickle that asks for more than data.
    """
    container = container_of(path)
    try:
        if container == "safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        contents = _unpickle(path, mapped=container == "zip")
    except Exception as error:  # a hostile or damaged file can fail anywhere in the reader
        refused = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|allowlisted .* got (.+)", str(error))
        if refused:
            what = next(filter(None, refused.groups()))
            raise CheckpointError(
                f"{path} was refused, and nothing in it was run: beside data it asks for {what}. If you trust where it"
                " comes from, ask there for a .safetensors file, or for the state dict alone saved with torch.save."
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, cut short, or in a format that is not read here ({reason}). Fetch it again, or save it"
            " again with torch.save and its defaults."
        ) from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}; expected a dictionary of weights.")
    return dict(contents), None


def container_of(path: Path) -> str:
    """Which reader a file needs: "safetensors", or "zip" or "legacy" for torch.save's formats.

    Raises:
        CheckpointError: not a weight file; the message says what it is instead.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such file")
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder or a device; name the weight file itself")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head.strip(b"\0"):
        what = "empty" if size == 0 else "nothing but zeros at its start"
        raise CheckpointError(f"{path} is {what} ({size} bytes): a copy or download that failed. Fetch it again.")
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return "zip"
    if head.startswith(_TORCH_LEGACY):
        return "legacy"
    if head[8:9] == b"{":
        if int.from_bytes(head[:8], "little") + 8 <= size:
            return "safetensors"
        raise CheckpointError(f"{path} is cut short: its {size} bytes are fewer than its header says. Fetch it again.")
    for beginning, what in _NOT_WEIGHTS:
        if head.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path} is {what}. {_EXPECTED}")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive: unpack it first. {_EXPECTED}")
    raise CheckpointError(f"{path} is not a weight file; it starts with the bytes {head[:8]!r}. {_EXPECTED}")


def _check_archive(path: Path) -> None:
    """Check that a zip archive is whole and one of torch.save's."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile has many ways to fail on damaged archives
        raise CheckpointError(
            f"{path} is cut short or damaged: its table of contents, which comes last, cannot be read ({error})."
            f" It has {path.stat().st_size} bytes; fetch it again."
        ) from error
    names = [member.filename.rpartition("/")[2] for member in members]
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program: save torch.jit.load(path).state_dict() instead")
    if "data.pkl" not in names:
        what = "a NumPy .npz archive" if any(name.endswith(".npy") for name in names) else "an ordinary zip archive"
        raise CheckpointError(f"{path} is {what}. {_EXPECTED}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path} was unpacked and packed again. Use the file as torch.save wrote it.")


def check_sums(path: Path) -> None:
    """Compare the data in torch.save's archives with their checksums, which torch.load does not.

    Raises:
        CheckpointError: the data has changed since it was written.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({error}). Fetch it again.") from error
    # torch can be told to leave checksums out; then the first record fails, which is always data.pkl.
    if damaged and not damaged.endswith("/data.pkl"):
        raise CheckpointError(f"{path} is damaged: {damaged} in it fails its checksum. Fetch it again.")


def _unpickle(path: Path, mapped: bool) -> object:
    """torch.load with the harmless classes above and no others."""
    with _unpickling:
        # torch keeps one list for the whole process; what other code has put on it is not safe in a file from anywhere.
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(_HARMLESS):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        finally:
            torch.serialization.add_safe_globals(others)
