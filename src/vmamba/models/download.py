"""Downloading weight files, whole or not at all."""

from __future__ import annotations

import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch

from vmamba.errors import CheckpointError
from vmamba.files import replacing
from vmamba.models.weight_files import StrPath, container_of

__all__ = ["download", "path_of"]

_DROPPED = (ConnectionError, TimeoutError, HTTPException)
_ATTEMPTS = 4
_RETRY_AFTER = 0.5  # seconds; twice as long each time


def download(url: str, folder: StrPath | None = None, *, progress: bool = True, timeout: float = 30.0) -> Path:
    """Download a weight file once; later calls return the file that is there.

    The file arrives under a temporary name and gets its own when all of it is there, so that neither a dropped
    connection nor a second process leaves a broken one behind. A dropped connection is taken up again a few times.

    Args:
        url: where the file is; http or https.
        folder: where to put it; by default torch's cache, `$TORCH_HOME/hub/checkpoints`.
        progress: whether to show a progress bar on standard error.
        timeout: seconds without an answer after which a connection counts as dropped.

    Returns:
        The file's path.

    Raises:
        CheckpointError: the file cannot be had, or what came is no weight file.
    """
    path = path_of(url, folder)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            _fetch(url, partial, path.name, progress, timeout)
            container_of(partial)
        except (urllib.error.URLError, CheckpointError, *_DROPPED) as error:
            reason = str(error).replace(str(partial), "what the server sent")
            raise CheckpointError(
                f"cannot download {url}: {reason}. Nothing was kept. Get the file another way, with a browser for"
                f" instance, and put it at {path}, or anywhere and pass checkpoint=PATH instead of pretrained=True."
            ) from error
    return path


def path_of(url: str, folder: StrPath | None = None) -> Path:
    """Where `download` puts the file of an address, or has put it.

    Raises:
        ValueError: it is no address of a file.
    """
    address = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(address.path).rpartition("/")[2]
    if address.scheme not in ("http", "https") or not name.strip("."):
        raise ValueError(f"url is {url!r}; expected http(s)://.../FILE")
    return Path(folder if folder is not None else Path(torch.hub.get_dir()) / "checkpoints") / name


def _fetch(url: str, partial: Path, name: str, progress: bool, timeout: float) -> None:
    """Write what `url` holds to `partial`, taking up a dropped connection where it broke off if the server can."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar, partial.open("wb") as file:
        task, etag = bar.add_task(name, total=None), None
        for attempt in range(_ATTEMPTS):
            # Without an ETag, what is there now may be another file than the one begun.
            resume: dict[str, str] = {"Range": f"bytes={file.tell()}-", "If-Range": etag} if etag else {}
            request = urllib.request.Request(url, headers={"User-Agent": "vmamba", **resume})
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    have = file.tell() if response.status == 206 else 0
                    etag, length = response.headers["ETag"], response.headers["Content-Length"]
                    total = have + int(length) if length else None
                    file.seek(have)
                    file.truncate()
                    bar.update(task, completed=have, total=total)
                    while chunk := response.read(1 << 16):
                        file.write(chunk)
                        bar.advance(task, len(chunk))
                    if total is not None and file.tell() != total:
                        raise ConnectionError(f"the connection broke off after {file.tell()} of {total} bytes")
                    return
            except (urllib.error.URLError, *_DROPPED) as error:
                if attempt + 1 == _ATTEMPTS or not _may_pass(error):
                    raise
            time.sleep(_RETRY_AFTER * 2**attempt)


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: not if the server has answered no, nor if there is no such server."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 429) or error.code >= 500
    return not isinstance(error, urllib.error.URLError) or isinstance(error.reason, _DROPPED)
