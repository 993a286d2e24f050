"""Weights on disk: reading files of any origin safely, telling what they hold, loading them strictly, saving, downloading.

A file is untrusted. Tensors are read by safetensors or by torch's restricted unpickler, which runs no code from the file;
the few harmless classes that published files hold beside their weights (a yacs config, say) become empty stand-ins.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
import os
import pickle
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vmamba.models.variants import VARIANTS

StrPath = str | os.PathLike[str]
State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

ROUTES = 4  # scan routes, the leading dimension of the SS2D parameters
METADATA_FORMAT = 1  # raised when the metadata of saved files changes in a way old readers would misread
_SHOWN = 5  # names listed per kind of disagreement in an error


class CheckpointError(RuntimeError):
    """A weight file cannot be read, does not fit the model, or cannot be fetched; the message says what to do."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such weight file."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a weight file holds, told from its names and shapes.

    Attributes:
        path: the file.
        format: "vmamba" (written by `save_checkpoint`), "safetensors", "released" (a dictionary with the weights under
            "model"), "lightning" (a training checkpoint), "mmsegmentation", "mmdetection", "openmmlab" (a backbone
            with no known head beside it) or "state_dict".
        variant: the name for `vmamba.create_model`, or None when the layout is that of no known variant.
        num_classes: size of the classifier, or None when the file holds a backbone only.
        in_chans: channels of the input images.
        weights: the sets of weights inside: "model", "ema", or both.
        metadata: numbers and texts stored beside the weights (epoch, config, class names ...).
    """

    path: Path
    format: str
    variant: str | None
    num_classes: int | None
    in_chans: int
    weights: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def backbone_only(self) -> bool:
        """Whether the classifier is missing, as in segmentation and detection files."""
        return self.num_classes is None


# ---------------------------------------------------------------------------------------------------------------------
# Reading: from a path to a flat dictionary of tensors


class _Placeholder:
    """Stands in for a harmless class named in a file; accepts whatever the file says about it and does nothing."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _placeholder_method(owner: object, name: str) -> _Placeholder:
    """How a protocol-2 pickle refers to a method of a class: getattr(class, name). Only placeholders have methods here."""
    if owner is not _Placeholder:
        raise pickle.UnpicklingError("GLOBAL getattr was not an allowed global")
    return _Placeholder()


# What published files hold beside tensors. torch's unpickler fills exact OrderedDicts, so that is what dict subclasses
# become; values of the others are lost, which is fine: none of them is a weight.
_INERT: list[tuple[Callable[..., Any], str]] = [
    (OrderedDict, "yacs.config.CfgNode"),
    (OrderedDict, "mmengine.config.config.ConfigDict"),
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (_placeholder_method, "builtins.getattr"),
    *(
        (_Placeholder, name)
        for name in (
            "argparse.Namespace",
            "jsonargparse._namespace.Namespace",
            "mmengine.logging.history_buffer.HistoryBuffer",
            "numpy.dtype",
            "numpy.ndarray",
            "numpy.core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "pathlib.Path",
            "pathlib.PosixPath",
            "pathlib.PurePosixPath",
            "pathlib.WindowsPath",
            "pathlib.PureWindowsPath",
            "pathlib._local.PosixPath",
            "pathlib._local.WindowsPath",
        )
    ),
]
_unpickling = threading.Lock()

_NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to: run `git lfs pull`"),
    (b"<!doctype", "a web page saved in place of the file: download it again"),
    (b"<html", "a web page saved in place of the file: download it again"),
    (b"<?xml", "an XML document, often a server's error message: download the file again"),
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
    (b"\x08", "an ONNX model, which holds a graph instead of named weights: use the PyTorch file it was exported from"),
    (b"{", "a JSON document"),
)
_TORCH_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_WANTED = "Expected a file written by torch.save or a .safetensors file."


def _container(path: Path) -> str:
    """Which reader a file needs, "safetensors", "zip" or "legacy", from its first bytes.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not a weight file; the message says what it is instead.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: there is no such file. Check the path.")
    if not path.is_file():
        raise CheckpointError(f"{path} is a folder or a device, not a file. Name the weight file itself.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head.strip(b"\0"):
        what = "empty" if size == 0 else "nothing but zeros at its start: the disk or the copy failed"
        raise CheckpointError(f"{path} is {what} ({size} bytes). Download or copy it again.")
    if head.startswith(b"PK\x03\x04"):
        return _check_zip(path)
    if head.startswith(_TORCH_LEGACY):
        return "legacy"
    if head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        if header + 8 <= size:
            return "safetensors"
        raise CheckpointError(f"{path} is cut short: {size} bytes, less than its header says. Download it again.")
    for signature, description in _NOT_WEIGHTS:
        if head.lstrip().lower().startswith(signature):
            raise CheckpointError(f"{path} is {description}. {_WANTED}")
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a plain pickle or tar archive, which cannot be read safely. {_WANTED}")
    raise CheckpointError(f"{path} is not a weight file: it starts with the bytes {head[:8]!r}. {_WANTED}")


def _check_zip(path: Path) -> str:
    """Check that a zip archive is whole and is one of torch.save's."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: {path.stat().st_size} bytes, and the archive's table of contents is"
            " missing from its end. Download it again."
        ) from error
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript program. Save its weights instead: torch.save(torch.jit.load(path).state_dict(), ...)"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        what = "a NumPy .npz archive" if any(name.endswith(".npy") for name in names) else "an ordinary zip archive"
        raise CheckpointError(f"{path} is {what}. {_WANTED}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path} was unpacked and compressed again. Use the file as torch.save wrote it.")
    return "zip"


def _unpickle(path: Path, container: str) -> object:
    """torch.load with the inert classes above and no others."""
    with _unpickling:
        # What other code marked as safe for this process is not safe for a file from anywhere.
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(_INERT):  # type: ignore[arg-type]
                # Mapped: optimizer state and the weights not asked for are never read from the disk.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=container == "zip")
        finally:
            torch.serialization.add_safe_globals(others)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's contents and, for safetensors, its metadata. Tensors of large files are mapped, not read.

    Raises:
        CheckpointError: unreadable, damaged, or a pickle that asks for more than data.
    """
    container = _container(path)
    try:
        if container == "safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        contents = _unpickle(path, container)
    except Exception as error:  # a hostile or damaged file can fail anywhere in the reader
        refused = re.search(r"GLOBAL (\S+)|reduce for unrecognized function (.+)|create new object for .* got (.+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} was refused, and nothing in it was run: it asks for {next(filter(None, refused.groups()))}, which"
                " is no plain data. If you trust where it comes from, ask there for a .safetensors file or for the bare"
                " state dict saved with torch.save."
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged, cut short, or in a format that is not read here: {reason}") from error
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not a dictionary of weights. {_WANTED}")
    return dict(contents), {}


# ---------------------------------------------------------------------------------------------------------------------
# Names: from any published layout to ours

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_NETWORK = re.compile(r"^(.*?)(?:stem|patch_embed)\.")  # where a network starts; what stands before is how it was wrapped
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^patch_embed\.(?:0|proj)\.", "stem.conv1."),
        (r"^patch_embed\.(?:2|norm)\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
        (r"^layers\.0\.downsample\.", "stages.1.downsample."),
        (r"^layers\.1\.downsample\.", "stages.2.downsample."),
        (r"^layers\.2\.downsample\.", "stages.3.downsample."),
        (r"\.downsample\.1\.", ".downsample.conv."),
        (r"\.downsample\.3\.", ".downsample.norm."),
        (r"^layers\.", "stages."),
        (r"(\.blocks\.\d+)\.(?:norm|ln_1)\.", r"\1.norm1."),
        (r"\.(?:op|self_attention)\.", ".ss2d."),
        (r"\.ss2d\.conv2d\.", ".ss2d.conv."),
        (r"\.ss2d\.out_norm\.", ".ss2d.norm."),
        (r"\.ss2d\.x_proj\.weight$", ".ss2d.x_proj_weight"),
        (r"\.ss2d\.dt_projs[._](weight|bias)$", r".ss2d.dt_proj_\1"),
        (r"\.ss2d\.A_logs$", ".ss2d.A_log"),
        (r"\.ss2d\.Ds$", ".ss2d.D"),
        (r"^classifier\.norm\.", "norm."),
        (r"^(?:classifier\.)?head\.(weight|bias)$", r"head.fc.\1"),
    )
)
_POINTWISE = re.compile(r"(?:in_proj|out_proj|fc1|fc2|reduction|fc)\.weight$")


def _ours(name: str, tensor: Tensor, patch_stem: bool) -> tuple[str, Tensor]:
    """A parameter under the name and in the shape it has in this package; what is not recognised passes through."""
    ours = name
    for pattern, replacement in _RENAMES:
        ours = pattern.sub(replacement, ours)
    if patch_stem:
        ours = ours.replace("stem.conv1.", "stem.conv.").replace("stem.norm1.", "stem.norm.")

    shape = tensor.shape
    if _POINTWISE.search(ours) and shape[2:] == (1, 1):
        return ours, tensor[:, :, 0, 0]
    if ".ss2d." not in ours or tensor.ndim == 0 or shape[0] % ROUTES:
        return ours, tensor
    leaf = ours.rsplit(".", 1)[1]
    if leaf in ("D", "dt_proj_bias") and tensor.ndim == 1:
        return ours, tensor.reshape(ROUTES, -1)
    if leaf == "A_log" and tensor.ndim == 2:
        return ours, tensor.reshape(ROUTES, -1, shape[1])
    if name.endswith(("x_proj.weight", "dt_projs.weight")) and shape[2:] == (1,):
        return ours, tensor.reshape(ROUTES, -1, shape[1])
    return ours, tensor


def _unwrapped(name: str) -> str:
    """A parameter's name without what torch.compile, activation checkpointing and FSDP put into it."""
    return _WRAPPERS.sub("", name)


def _tensors(contents: Mapping[str, Any]) -> State:
    """The tensors of a file's dictionary and of the dictionaries directly in it, under their joined names."""
    found: State = {}
    for key, value in contents.items():
        inner = value.items() if isinstance(value, Mapping) else ((None, value),)
        for name, tensor in inner:
            if isinstance(tensor, Tensor) and isinstance(key, str) and isinstance(name, str | None):
                found[_unwrapped(key if name is None else f"{key}.{name}")] = tensor
    return found


def _weight_sets(path: Path, contents: Mapping[str, Any]) -> tuple[dict[str, State], dict[str, str], State]:
    """The networks in a file under our names, keyed "model" and "ema"; the prefix each one had; and all tensors.

    Raises:
        CheckpointError: there is no VMamba in the file, or there are several and it is not clear which one is meant.
    """
    tensors = _tensors(contents)
    sets: dict[str, State] = {}
    prefixes: dict[str, str] = {}
    for prefix in dict.fromkeys(match[1] for match in map(_NETWORK.match, tensors) if match):
        kind = "ema" if re.search(r"(?:^|[._])ema(?:[._]|$)", prefix) else "model"
        if kind in sets:
            raise CheckpointError(
                f"{path} holds several networks, under {prefixes[kind]!r} and {prefix!r}. Save the one you want on its own."
            )
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        patch_stem = not any(name.startswith(("patch_embed.5.", "stem.conv2.")) for name in own)
        # outnorm0..3, a norm on each stage's output, belong to the segmentation or detection head that uses them.
        sets[kind] = dict(_ours(name, t, patch_stem) for name, t in own.items() if not name.startswith("outnorm"))
        prefixes[kind] = prefix
    if not sets:
        example = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:_SHOWN])
        raise CheckpointError(
            f"{path} holds no VMamba: no parameter in it is called stem.* or patch_embed.*. It holds {len(tensors)} tensors"
            + (f", the first being {example}." if example else f" under the keys {list(contents)[:_SHOWN]}.")
        )
    return sets, prefixes, tensors


# ---------------------------------------------------------------------------------------------------------------------
# Telling what a file holds


@functools.cache
def _layout(variant: str) -> Shapes:
    """Every parameter of a variant and its shape."""
    from vmamba.models.vmamba import create_model

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in create_model(variant).state_dict().items()}


def _depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks per stage."""
    blocks = {match[0] for match in map(re.compile(r"stages\.(\d+)\.blocks\.\d+\.").match, shapes) if match}
    stages = [block.split(".")[1] for block in blocks]
    return tuple(stages.count(str(stage)) for stage in range(len(set(stages))))


def _body(shapes: Shapes) -> Shapes:
    """A layout without what differs between models of one variant: the classifier and the channels of the image."""
    body = {name: shape for name, shape in shapes.items() if not name.startswith(("norm.", "head."))}
    for name in _FIRST_CONV:
        if name in body:
            body[name] = (body[name][0], *body[name][2:])
    return body


def _variant(shapes: Shapes, hint: object = None) -> str | None:
    """The variant with this layout, or None; where several share it, the one hinted at or else the first."""
    depths, body = _depths(shapes), _body(shapes)
    candidates = [name for name, variant in VARIANTS.items() if variant.depths == depths]
    fitting = [name for name in candidates if _body(_layout(name)) == body]
    return str(hint) if hint in fitting else next(iter(fitting), None)


def _format(contents: Mapping[str, Any], prefix: str, tensors: State, is_safetensors: bool) -> str:
    """The value of `CheckpointInfo.format`, apart from "vmamba"."""
    if is_safetensors:
        return "safetensors"
    if "pytorch-lightning_version" in contents:
        return "lightning"
    if prefix.endswith("backbone."):
        if any(".decode_head." in f".{name}" for name in tensors):
            return "mmsegmentation"
        if any(re.search(r"(?:^|\.)(?:rpn_head|roi_head|bbox_head)\.", name) for name in tensors):
            return "mmdetection"
        return "openmmlab"
    return "released" if prefix == "model." and isinstance(contents.get("model"), Mapping) else "state_dict"


def _plain(value: Any) -> Any:
    """Numbers, texts and containers of them; anything else becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | numbers.Number | None) else None


def _stored_metadata(contents: Mapping[str, Any]) -> dict[str, Any]:
    """What a torch file says about itself: its numbers and texts, and the dictionaries customary for that."""
    customary = ("config", "meta", "hyper_parameters")
    return {
        key: _plain(value)
        for key, value in contents.items()
        if isinstance(key, str) and (isinstance(value, str | numbers.Number) or key in customary)
    }


def _open(path: StrPath) -> tuple[CheckpointInfo, dict[str, State]]:
    """What a file holds, and its sets of weights under our names."""
    path = Path(path)
    contents, header = _read(path)
    sets, prefixes, tensors = _weight_sets(path, contents)
    kind = "model" if "model" in sets else "ema"
    state = sets[kind]
    metadata: dict[str, Any] = dict(header)
    file_format = _format(contents, prefixes[kind], tensors, is_safetensors=bool(header))
    if "vmamba" in header:
        file_format, metadata = "vmamba", _parse_metadata(path, header["vmamba"])
    elif not is_safetensors: metadata = _stored_metadata(contents)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    first_conv = next((shapes[name] for name in _FIRST_CONV if name in shapes), ())
    info = CheckpointInfo(
        path=path,
        format=file_format,
        variant=_variant(shapes, hint=metadata.get("variant")),
        num_classes=shapes["head.fc.weight"][0] if shapes.get("head.fc.weight") else None,
        in_chans=first_conv[1] if len(first_conv) == 4 else None,
        weights=tuple(kind for kind in ("model", "ema") if kind in sets),
        metadata=metadata,
    )
    return info, sets
