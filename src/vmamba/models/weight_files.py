"""Files of weights from anywhere: told apart, and read without running anything in them.

A file is untrusted, and only the code here and in torch_pickle.py reads it. Tensors are views of the file mapped into
memory; before torch makes one, its description is held against the bytes really there. Time and memory are bounded by
the file's size and the constants below: no byte belongs to two records, no dictionary is walked without an end, and
what is kept beside the weights is a tree of bounded size, whatever in the file refers to whatever.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import pickle
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmamba.errors import CheckpointError, CheckpointNotFoundError, first_line
from vmamba.models.torch_pickle import MAX_OPERATIONS, Described, Machine, Pairs, RefusedError, Storage

StrPath = str | os.PathLike[str]

# Each several times what the largest published files need.
MAX_TENSORS = 1 << 14
MAX_NAME = 256  # characters of a tensor's name
MAX_NOTES = 1 << 22  # numbers, texts' characters, containers beside the weights; ImageNet-22k's names take 1 << 19
MAX_NESTING = 16  # of containers kept beside the weights
MAX_WRAPPING = 4  # dictionaries around the weights
MAX_RECORDS = 1 << 17  # of an archive
MAX_HEADER = 1 << 22  # bytes of a safetensors header
# Tensors may share data, as tied weights do, or show one number many times, as expanded ones do: in full they may take
# twice the file's bytes and these.
FREE_BYTES = 1 << 24

_TORCH_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:-1]  # the number alone
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


@dataclass(frozen=True)
class WeightFile:
    """What a file holds.

    Attributes:
        tensors: those of the file's dictionary and of the dictionaries in it, under their joined names, such as
            "model.norm.weight"; of dictionaries further inside only where there are none outside.
        notes: what a torch file says about itself: its numbers and texts, and the dictionaries customary for that, as
            numbers, texts, lists and dictionaries, with None in place of anything else.
        header: the texts in a safetensors header; None for other files.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] | None = None


def read_weight_file(path: Path) -> WeightFile:
    """Read a file that torch.save or safetensors wrote.

    Raises:
        CheckpointError: not a weight file, damaged, more inside than outside, or a pickle that asks for more than data.
    """
    with _told(path):
        data = _mapped(path)
        match _container(data):
            case "zip":
                return _from_zip(data)
            case "legacy":
                return _from_legacy(data)
            case _:
                return _from_safetensors(data)


def container_of(path: Path) -> str:
    """Which kind of weight file this is: "safetensors", or "zip" or "legacy" for torch.save's formats.

    Raises:
        CheckpointError: not a weight file; the message says what it is instead.
    """
    with _told(path):
        return _container(_mapped(path))


def check_sums(path: Path) -> None:
    """Compare the data in torch.save's archives with their checksums, which reading does not.

    Raises:
        CheckpointError: the data has changed since it was written.
    """
    with _told(path):
        data = _mapped(path)
        records = _records(data) if _container(data) == "zip" else {}
        for name, record in records.items():
            if zlib.crc32(memoryview(data)[record.begin : record.begin + record.size]) != record.checksum:
                if name.endswith("data.pkl"):  # the first record: torch was told to leave checksums out
                    return
                raise RefusedError(f"is damaged: {name} in it fails its checksum. Fetch it again.")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn all that can go wrong while reading into one printable line that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a hostile or damaged file can fail anywhere in the reader
        line = str(error)
        if not isinstance(error, RefusedError):
            reason = first_line(error)[:200]
            line = (
                f"is damaged, cut short, or in a format that is not read here ({reason}). Fetch it again, or save it"
                " again with torch.save and its defaults."
            )
        # A `RuntimeError` caused by StopIteration is to `contextmanager` that StopIteration itself.
        cause = None if isinstance(error, StopIteration) else error
        raise CheckpointError(f"{path} " + "".join(c if c.isprintable() else "?" for c in line)) from cause


def _mapped(path: Path) -> mmap.mmap:
    """A regular file mapped into memory, copied where written to. Anything else is refused without waiting for it."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())  # another file may have taken its place
                if stat.S_ISREG(status.st_mode) and status.st_size:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, ValueError) or error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise CheckpointNotFoundError(f"{path}: there is no such file") from error
        raise RefusedError(f"cannot be read: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode):
        raise RefusedError("is empty (0 bytes): a failed copy or download. Fetch it again.")
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise RefusedError(f"is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}; name the weight file itself")


def _container(data: mmap.mmap) -> str:
    size, head = len(data), data[:512]
    if not head.strip(b"\0"):
        raise RefusedError(
            f"is nothing but zeros at its start ({size} bytes): a failed copy or download. Fetch it again."
        )
    if head.startswith(b"PK\x03\x04"):
        _check_archive(data)
        return "zip"
    if head.startswith(b"\x80") and _TORCH_LEGACY in head[:32]:
        return "legacy"
    if head[8:9] == b"{":
        if int.from_bytes(head[:8], "little") + 8 <= size:
            return "safetensors"
        raise RefusedError(f"is cut short: its {size} bytes are fewer than its header says. Fetch it again.")
    for beginning, what in _NOT_WEIGHTS:
        if head.lstrip().lower().startswith(beginning):
            raise RefusedError(f"is {what}. {_EXPECTED}")
    if head[257:262] == b"ustar":
        raise RefusedError(f"is a tar archive: unpack it first. {_EXPECTED}")
    raise RefusedError(f"is not a weight file; it starts with the bytes {head[:8]!r}. {_EXPECTED}")


# --- Tensors ---------------------------------------------------------------------------------------------------------

# What a model's weights can be converted from: quantized numbers, and those of less than a byte, cannot.
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
}  # fmt: skip
_Ranges = Mapping[str, tuple[int, int]]  # of every record, where its bytes begin and how many they are


def _tensors(data: mmap.mmap, ranges: _Ranges, described: Mapping[str, Described]) -> dict[str, Tensor]:
    """The tensors described. The ranges must not overlap, so that copying them takes no more than the file's size."""
    if len(described) > MAX_TENSORS:
        raise RefusedError(f"holds more than {MAX_TENSORS} tensors: save the state dict alone")
    room, tensors = 2 * len(data) + FREE_BYTES, dict[str, Tensor]()
    records: dict[tuple[str, bool], Tensor] = {}
    for name, (storage, offset, shape, strides, dtype, instead) in described.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise RefusedError(f"is damaged: {name[:40]!r} is no name of a tensor")
        sizes = _counts(shape)
        if not instead and dtype not in _DTYPES:
            instead = str(dtype)
        if not instead:
            room -= math.prod(max(size, 1) for size in sizes) * dtype.itemsize
            if room < 0:
                instead = f"with those before it, it claims more than twice the file's {len(data)} bytes"
        if instead:
            raise RefusedError(f"cannot be used: {name} {sizes} is no plain tensor stored in full ({instead})")
        steps, (offset, first, count) = _counts(strides), _counts((offset, storage.first, storage.count))
        if storage.key not in ranges:
            raise ValueError(f"the data of {name} are not in it")
        begin, available = ranges[storage.key]
        skipped, stored = first * storage.dtype.itemsize, count * storage.dtype.itemsize
        reach = (offset + 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))) * dtype.itemsize
        if 0 in sizes:
            tensors[name] = torch.empty(sizes, dtype=dtype)
        elif reach > stored or skipped + stored > available:
            raise ValueError(f"{name} {sizes} reaches beyond its data")
        else:
            key = storage.key, begin % min(dtype.itemsize, 8) > 0  # whether numbers could not lie where it lies
            if key not in records:
                record = torch.frombuffer(data, dtype=torch.uint8, count=available, offset=begin)
                records[key] = record.clone() if key[1] else record
            tensors[name] = records[key][skipped : skipped + reach].view(dtype).as_strided(sizes, steps, offset)
    return tensors


def _counts(given: Any) -> tuple[int, ...]:
    """What must be a short tuple of numbers from 0 on that torch can take."""
    if type(given) is tuple and len(given) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in given):
        return given
    raise ValueError("a tensor's shape, strides or place are no counts")


# --- safetensors -----------------------------------------------------------------------------------------------------

_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "C64": torch.complex64,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def _from_safetensors(data: mmap.mmap) -> WeightFile:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise RefusedError(f"has a header of {length} bytes; more than {MAX_HEADER} are not read")
    entries = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    header = entries.pop("__metadata__", {})
    if any(type(text) is not str for text in header.values()):
        raise ValueError("its metadata are no texts")
    described, ranges = {}, {}
    for name, entry in entries.items():
        begin, end = _counts(tuple(entry["data_offsets"]))
        shape, dtype = _counts(tuple(entry["shape"])), _SAFETENSORS.get(entry["dtype"])
        ranges[name] = 8 + length + begin, end - begin
        if dtype is None:
            described[name] = Described(None, 0, shape, (), None, str(entry["dtype"])[:20])
            continue
        count = math.prod(shape)
        if count * dtype.itemsize != end - begin:
            raise ValueError(f"{name} {shape} has {end - begin} bytes")
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        described[name] = Described(Storage(name, dtype, 0, count), 0, shape, strides, dtype)
    expected = 8 + length
    for begin, size in sorted(ranges.values()):
        if begin != expected:
            raise ValueError("its tensors overlap or leave gaps")
        expected += size
    if expected != len(data):
        raise ValueError(f"{expected} bytes expected, {len(data)} there")
    return WeightFile(_tensors(data, ranges, described), header=header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a name comes twice in its header")
    return unique


# --- torch.save ------------------------------------------------------------------------------------------------------


def _from_zip(data: mmap.mmap) -> WeightFile:
    records = _records(data)
    root = next(name for name in records if name.endswith("data.pkl")).removesuffix("data.pkl")
    order, contents = records.get(f"{root}byteorder"), records[f"{root}data.pkl"]
    if order and data[order.begin : order.begin + 3] == b"big":
        raise RefusedError("was written on a big-endian machine: save it as .safetensors there")
    top = Machine(memoryview(data)[contents.begin : contents.begin + contents.size]).load()
    folder = f"{root}data/"
    ranges = {name.removeprefix(folder): (r.begin, r.size) for name, r in records.items() if name.startswith(folder)}
    return _from_pickle(data, ranges, top)


def _from_legacy(data: mmap.mmap) -> WeightFile:
    """torch.save's format before torch 1.6: five pickles, then each storage's count of numbers and its bytes."""
    machine = Machine(memoryview(data))
    _magic, version, _system, top, keys = (machine.load() for _ in range(5))
    if version != torch.serialization.PROTOCOL_VERSION or type(keys) is not list:
        raise ValueError("another version of the format")
    ranges, end = {}, machine.position
    for key in keys:
        if type(key) is not str:
            raise ValueError("a storage without a name")
        (count,), begin = struct.unpack_from("<Q", data, end), end + 8
        end = begin + count * machine.dtypes[key].itemsize
        if end > len(data):
            raise ValueError("a storage reaches beyond its end")
        ranges[key] = begin, end - begin
    return _from_pickle(data, ranges, top)


def _from_pickle(data: mmap.mmap, ranges: _Ranges, top: object) -> WeightFile:
    if type(top) is not Pairs:
        kind = type(top).__name__ if type(top) in (list, tuple, str, int, float) else "tensor or another object"
        raise RefusedError(f"holds a {kind}; expected a dictionary of weights.")
    described: dict[str, Described] = {}
    level, left = [("", top)], MAX_OPERATIONS
    for depth in range(1 + MAX_WRAPPING):
        inside = []
        for prefix, pairs in level:
            left -= len(pairs)  # a dictionary can be in many places, with as many names for its tensors
            if left < 0:
                raise RefusedError("holds dictionaries within dictionaries without end: save the state dict alone")
            for key, value in pairs.named().items():
                name = prefix + key if len(key) <= MAX_NAME else key
                if isinstance(value, Described) and len(described) <= MAX_TENSORS:
                    described[name] = value
                elif type(value) is Pairs and len(name) <= MAX_NAME:
                    inside.append((f"{name}.", value))
        if described and depth:
            break
        level = inside
    return WeightFile(_tensors(data, ranges, described), _notes(top))


def _notes(top: Pairs) -> dict[str, Any]:
    """`WeightFile.notes`, cut off where they grow too large."""
    left = MAX_NOTES

    def plain(value: Any, depth: int = MAX_NESTING) -> Any:
        nonlocal left
        container = type(value) in (Pairs, list, tuple)
        left -= 1 + (len(value) if container or type(value) is str else 0)
        if left < 0 or (container and not depth):
            return None
        if type(value) is Pairs:
            pairs = zip(value[::2], value[1::2], strict=True)
            return {str(k): plain(v, depth - 1) for k, v in pairs if isinstance(k, str | int | float)}
        if container:
            return [plain(item, depth - 1) for item in value]
        return value if isinstance(value, str | int | float) else None

    customary = ("config", "meta", "hyper_parameters")
    kept = {k: v for k, v in top.named().items() if isinstance(v, str | int | float) or k in customary}
    return {key: plain(value) for key, value in sorted(kept.items(), key=lambda item: item[0] in customary)}


class _Record(NamedTuple):
    """A file in a zip archive: where its bytes are, their checksum, and whether they are there as they are."""

    begin: int
    size: int
    checksum: int
    plain: bool


def _check_archive(data: mmap.mmap) -> None:
    """Check that a zip archive is whole and one of torch.save's."""
    try:
        records = _records(data)
    except Exception as error:  # a damaged archive can fail in many ways
        raise RefusedError(
            f"is cut short or damaged: its table of contents, which comes last, cannot be read ({error})."
            f" It has {len(data)} bytes; fetch it again."
        ) from error
    names = [name.rpartition("/")[2] for name in records]
    if "constants.pkl" in names:
        raise RefusedError("is a TorchScript program: save torch.jit.load(path).state_dict() instead")
    if "data.pkl" not in names:
        what = "a NumPy .npz archive" if any(name.endswith(".npy") for name in names) else "an ordinary zip archive"
        raise RefusedError(f"is {what}. {_EXPECTED}")
    if not all(record.plain for record in records.values()):
        raise RefusedError("was unpacked and packed again. Use the file as torch.save wrote it.")


def _records(data: mmap.mmap) -> dict[str, _Record]:
    """The files in a zip archive, by its table of contents; no two of them share a byte."""
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - 65_557))
    if end < 0:
        raise ValueError("it is missing")
    count, table = struct.unpack_from("<H4xI", data, end + 10)
    if end >= 20 and data[end - 20 : end - 16] == b"PK\x06\x07":  # there is a wider one, for archives of over 4 GB
        (wide,) = struct.unpack_from("<Q", data, end - 12)
        count, table = struct.unpack_from("<Q8xQ", data, wide + 32)
    if count > MAX_RECORDS:
        raise ValueError(f"it lists {count} files")
    records, spans, entry = dict[str, _Record](), [(table, table)], table
    for _ in range(count):
        signature, flags, method, checksum, packed, size, named, extra, comment, header = struct.unpack_from(
            "<4s4xHH4xIIIHHH8xI", data, entry
        )
        name = data[entry + 46 : entry + 46 + named].decode()
        entry += 46 + named + extra + comment
        tag, short = 1, (size, packed, header).count(0xFFFFFFFF)
        if short:  # what does not fit into 32 bits follows
            tag, *wider = struct.unpack_from(f"<H2x{short}Q", data, entry - extra - comment)
            size, packed, header = (wider.pop(0) if n == 0xFFFFFFFF else n for n in (size, packed, header))
        local, local_named, local_extra = struct.unpack_from("<4s22xHH", data, header)
        if (signature, local, tag) != (b"PK\x01\x02", b"PK\x03\x04", 1) or name in records:
            raise ValueError(f"{name[:40]} is damaged or listed twice")
        begin = header + 30 + local_named + local_extra
        records[name] = _Record(begin, size, checksum, plain=method == 0 and not flags & 1 and packed == size)
        spans.append((header, begin + packed))
    spans.sort()
    if spans[-1][0] > table or any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans)):
        raise ValueError("its files overlap")
    return records
