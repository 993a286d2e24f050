"""Files: writing one whole or not at all, whatever happens meanwhile, values as JSON, and showing the name of any."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block has succeeded, safely on the disk."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file whose content takes the place of what `path` held, all of it or nothing."""
    with replacing(Path(path)) as partial, partial.open("wb") as file:
        yield file


def json_bytes(value: Any) -> bytes:
    """A value as JSON for a file, with null for numbers that are not finite, which JSON has not.

    What is left of names that are not UTF-8 becomes an escape, which JSON reads back.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def why_unwritable(path: str | os.PathLike[str]) -> str | None:
    """Why no file can be put there, to be found out before there is anything to put; None where one can."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        return f"{shown(target)} is a folder; give the name of a file in it"
    if not folder.is_dir():
        return f"{shown(folder)} is no folder; make it first"
    if (target.exists() and not target.is_file()) or (target.is_symlink() and _is_of_devices(folder)):
        return (
            f"{shown(target)} is no file but a device, pipe or socket, whose place a file would take; name a file, or"
            " leave the option out"
        )
    if not os.access(folder, os.W_OK):
        return f"{shown(folder)} cannot be written to"
    return None


def _is_of_devices(folder: Path) -> bool:
    """Whether the links in it stand for what is open: /dev/stdout may lead to a file, and is none."""
    where = folder.resolve()
    return where == Path("/dev") or Path("/proc") in (where, *where.parents)


def shown(path: str | os.PathLike[str]) -> str:
    """A file's name as text that any terminal, table or file can hold.

    Bytes that are not UTF-8, which Python keeps as lone surrogates that nothing can encode, and control characters
    become backslash escapes: ``caf\\xe9.png``. Every other name stays as it is.
    """
    return re.sub("[\x00-\x1f\x7f-\x9f\udc80-\udcff]", lambda m: f"\\x{ord(m[0]) & 0xFF:02x}", os.fspath(path))
