"""Files by path or by address: local ones as they are, those of S3, Google Cloud Storage and others through fsspec."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vmamba.errors import BatchError, in_one_line, needing
from vmamba.files import atomic_write, shown

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of this package: with what fsspec needs besides itself


def is_remote(address: str) -> bool:
    """Whether an address is anything else than a path of this machine's file system."""
    return bool(_ADDRESS.match(address)) and not address.startswith(("file://", "local://"))


def plain(address: str | os.PathLike[str]) -> str:
    """An address, or the path of a local file without ``file://``."""
    address = os.fspath(address)
    return address if is_remote(address) else re.sub("^(file|local)://", "", address)


def file_system(address: str) -> Any:
    """The fsspec file system that an address belongs to.

    Raises:
        ImportError: the package that reads such addresses is missing.
        BatchError: there are no such addresses.
    """
    with needing("scale", "addresses need one more package"):
        import fsspec
    protocol = address.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        how = f'pip install "vmamba[{_EXTRAS[protocol]}]"' if protocol in _EXTRAS else error
        raise ImportError(f"addresses of {protocol}:// need one more package: {how}") from error
    except ValueError as error:
        raise BatchError(f"{address}: there are no addresses of {protocol}://: {error}") from error


def join(folder: str, *names: str) -> str:
    """The address of something in a folder."""
    return posixpath.join(folder, *names) if is_remote(folder) else os.path.join(folder, *names)


def open_file(address: str) -> BinaryIO:
    """A file to be read, from anywhere in it.

    Raises:
        OSError: it cannot be opened.
    """
    if is_remote(address):
        file: BinaryIO = file_system(address).open(address, "rb")
        return file
    return open(address, "rb")


def read(address: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_remote(address):
        content: bytes = file_system(address).cat_file(address)
        return content
    return Path(address).read_bytes()


def write(address: str, content: bytes) -> None:
    """Write a file whole or not at all: under another name first, or in one request, which object stores keep whole."""
    if is_remote(address):
        file_system(address).pipe_file(address, content)
        return
    with atomic_write(address) as file:
        file.write(content)


def make_folder(address: str) -> None:
    """Make a folder, and those it lies in, where there are such things; but no bucket, whose name may be misspelt.

    Raises:
        BatchError: there is no such bucket.
        OSError: it cannot be made.
    """
    if is_remote(address):
        files = file_system(address)
        if hasattr(files, "split_path"):  # there are buckets, which `makedirs` would make
            bucket = files.split_path(address)[0]
            if not files.exists(bucket):
                raise BatchError(
                    f"{shown(address)}: there is no bucket {shown(bucket)}, or none that these keys may look at; "
                    "make it first, or correct the name"
                )
        files.makedirs(address, exist_ok=True)
    else:
        os.makedirs(address, exist_ok=True)


def names_in(folder: str) -> list[str]:
    """The names of what a folder holds, none where there is no such folder."""
    if not is_remote(folder):
        return os.listdir(folder) if os.path.isdir(folder) else []
    files = file_system(folder)
    files.invalidate_cache()
    try:
        return [posixpath.basename(path.rstrip("/")) for path in files.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def exists(address: str) -> bool:
    """Whether there is such a file."""
    if is_remote(address):
        files = file_system(address)
        files.invalidate_cache()
        return bool(files.exists(address))
    return os.path.exists(address)


def remove(address: str) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    if is_remote(address):
        if exists(address):
            file_system(address).rm(address, recursive=True)
    elif os.path.isdir(address):
        shutil.rmtree(address)
    else:
        Path(address).unlink(missing_ok=True)


def found(address: str) -> Sequence[str]:
    """The files that a remote address names: itself, those in a folder and the folders in it, or those of a pattern.

    Raises:
        BatchError: it cannot be looked at.
    """
    files = file_system(address)
    try:
        is_pattern = any(mark in address for mark in "*?[") and not files.exists(address)
        matches = files.glob(address, detail=True) if is_pattern else {address: files.info(address)}
        folders = {path: info["type"] == "directory" for path, info in sorted(matches.items())}
        paths = [inner for path in folders for inner in (sorted(files.find(path)) if folders[path] else [path])]
        return [files.unstrip_protocol(path) for path in paths]
    except ImportError:
        raise
    except Exception as error:  # clients have exceptions of their own for refused keys and missing buckets
        raise BatchError(f"{shown(address)} cannot be looked at: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, FileNotFoundError):  # fsspec's, which hold nothing but the name
        return "no such file"
    return shown(in_one_line(error))
