"""Walking through .tar files."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any


def members(tar: Any, start: int = 0) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """What is in an open `tarfile.TarFile` from where it stands on: paths, relative and without detours, and members.

    Args:
        tar: it is read to its end.
        start: where in another file it begins, for the message.

    Raises:
        tarfile.TarError, OSError, ValueError: it is damaged.
    """
    while (member := tar.next()) is not None:
        tar.members = []  # they would fill the memory: there may be millions
        yield posixpath.normpath(member.name).lstrip("/"), member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes this for the end
        raise tarfile.ReadError(f"damaged or cut off at byte {start + tar.offset}")
