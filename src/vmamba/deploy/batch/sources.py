"""Where many images come from: files, folders, patterns, .tar shards and Parquet files, here or behind an address.

An `Extent` is what a source was found to hold, without the images themselves; a `Segment` is a stretch of one, as a
plan holds it; `images_of` reads a segment and gives an `Item` for each image that the plan counts on, whatever happens.
"""

from __future__ import annotations

import glob
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from vmamba.data.images import image_files, is_hidden, is_image, read_image
from vmamba.data.tars import members
from vmamba.deploy.batch import places
from vmamba.errors import BatchError, ImageError
from vmamba.files import shown
from vmamba.tasks.runs import report

_MOST_BYTES = 1 << 28  # of one image that is read as a whole
_SHARDS = (".tar", ".parquet")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "url", "uri")
# What a path in a Parquet file may be an address of, besides what the Parquet file is itself: it is data, which may
# come from anywhere, and must not send us to places that only this machine can reach.
_PATH_PROTOCOLS = ("s3", "s3a", "gs", "gcs")
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, EOFError)


class Segment(NamedTuple):
    """A stretch of a source.

    Attributes:
        kind: "file", "tar", "parquet", "bad" for what cannot be read at all, or "none" for what holds no images.
        path: of the file.
        start: byte where the first image's header begins (tar), or row (parquet).
        images: how many.
        error: why it cannot be read (bad), or is left out (none).
    """

    kind: str
    path: str
    start: int = 0
    images: int = 1
    error: str | None = None


@dataclass(frozen=True)
class Extent:
    """A file that holds images.

    Attributes:
        segment: all of it.
        starts: of a .tar file, int64, the byte at which each image's header begins.
    """

    segment: Segment
    starts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self.segment.images

    def part(self, first: int, count: int) -> Segment:
        """The stretch of ``count`` images from this one on."""
        start = first if self.starts is None else int(self.starts[first])
        return self.segment._replace(start=start, images=count)


class Item(NamedTuple):
    """One image: its name, and its path, its content, or why there is none."""

    name: str
    content: str | bytes | ImageError

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched."""
        return isinstance(self.content, str) and places.is_remote(self.content)

    def fetched(self) -> Item:
        """The same with its content, or with why that cannot be had."""
        assert isinstance(self.content, str)
        try:
            return Item(self.name, places.read(self.content))
        except Exception as error:  # clients have exceptions of their own
            return Item(self.name, ImageError(f"{shown(self.name)}: {places.reason(error)}"))

    def read(self, in_chans: int) -> Image.Image:
        """The decoded image.

        Raises:
            ImageError: it cannot be used; see `read_image`.
        """
        content = self.fetched().content if self.is_remote else self.content
        if isinstance(content, ImageError):
            raise content
        if isinstance(content, str):
            return read_image(content, in_chans)
        if len(content) > _MOST_BYTES:
            raise _too_large(self.name, len(content))
        return read_image(io.BytesIO(content), in_chans, self.name)


def find(
    sources: Sequence[str], column: str | None = None, each: Callable[..., Iterable[list[Extent]]] = map
) -> list[Extent]:
    """What sources hold, in the order given and sorted inside each, no file twice.

    Args:
        sources: image files, .tar files of images, Parquet files, folders of any of these, patterns of their names; as
            paths or as addresses such as ``s3://bucket/folder``.
        column: of Parquet files: where the images are, as bytes or paths.
        each: calls a function with the path of every .tar and Parquet file, and more; as `map` does.

    Raises:
        BatchError: a source is not there, or holds no images; of a Parquet file it is not clear where they are.
        ImportError: the package that reads such addresses is missing.
    """
    files: dict[str, None] = {}
    problems: list[str] = []
    named = set(map(places.plain, sources))
    for source in map(places.plain, sources):
        names, told = (_behind(source), []) if places.is_remote(source) else _local(source)
        if not names and not told:
            told = [f"{shown(source)}: no images, .tar or Parquet files"]
        problems += told
        files.update(dict.fromkeys(names))
    if problems:
        raise BatchError("\n".join(problems))
    shards = [name for name in files if name.lower().endswith(_SHARDS)]
    lists = each(extents_of, shards, [column] * len(shards), [name in named for name in shards])
    inside = dict(zip(shards, lists, strict=True))
    all_of_them = [extent for name in files for extent in inside.get(name, [Extent(Segment("file", name))])]
    found = [extent for extent in all_of_them if len(extent)]
    if remarks := [str(extent.segment.error) for extent in all_of_them if extent.segment.kind == "none"]:
        if not found:
            raise BatchError("\n".join(remarks))
        more = f" So are {len(remarks) - 1:,} more." if remarks[1:] else ""
        report(f"A Parquet file is left out. {remarks[0]}.{more}")
    return found


def _is_wanted(path: str) -> bool:
    """Whether a path inside a folder counts: an image, or a shard of images."""
    return is_image(path) or (path.lower().endswith(_SHARDS) and not is_hidden(path))


def _behind(source: str) -> list[str]:
    """The files that an address names."""
    names = places.found(source)
    wanted = [name for name in names if name == source or _is_wanted(name.removeprefix(source).lstrip("/"))]
    return _without_results(wanted)


def _local(source: str) -> tuple[list[str], list[str]]:
    """The files of a path or a pattern, and what is wrong with it."""
    if os.path.isfile(source):
        return [source], []
    matches = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    names: list[str] = []
    problems = [] if matches else [f"{shown(source)}: no such file or folder"]

    def unreadable(error: OSError) -> None:
        problems.append(f"{shown(error.filename)}: {places.reason(error)}")

    for match in matches:
        if not os.path.isdir(match):
            names += [match] if _is_wanted(os.path.basename(match)) or match == source else []
            continue
        names += _without_results(image_files(match, unreadable, _is_wanted))
    return names, problems


def _without_results(names: list[str]) -> list[str]:
    """The names without the Parquet files that jobs like this one have written."""
    jobs = {name.rpartition("/_job/")[0] for name in names if "/_job/" in name}
    mine = {name for name in names if name.endswith(".parquet") and posixpath.dirname(name) in jobs}
    return [name for name in names if "/_job/" not in name and name not in mine]


def extents_of(path: str, column: str | None, is_named: bool = True) -> list[Extent]:
    """What a .tar or Parquet file holds. Of a file that is damaged: what comes before, and a bad segment.

    A Parquet file without images is nothing to stop for if it is not named, but was met in a folder.

    Raises:
        BatchError: a Parquet file has no column of images, or several.
    """
    try:
        if path.lower().endswith(".parquet"):
            return [_parquet_extent(path, column)]
        return _tar_extents(path)
    except _NoColumnError as error:
        if is_named:
            raise
        return [Extent(Segment("none", path, images=0, error=str(error)))]
    except (BatchError, ImportError):
        raise
    except Exception as error:  # pyarrow's, the client's, the system's
        return [Extent(Segment("bad", path, error=f"{shown(path)}: {places.reason(error)}"))]


# ---------------------------------------------------------------------------------------------------------------------
# .tar


def _tar_extents(path: str) -> list[Extent]:
    starts: list[int] = []
    error = None
    with places.open_file(path) as file:
        try:
            for _, member in _tar_images(file):
                starts.append(member.offset)  # of a long name's own header, where there is one
        except _TAR_ERRORS as problem:
            error = f"{shown(path)} cannot be read to its end as a .tar file: {places.reason(problem)}"
    extents = [Extent(Segment("tar", path, images=len(starts)), np.array(starts, np.int64))]
    return [*extents, Extent(Segment("bad", path, error=error))] if error else extents


def _tar_images(file: Any) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The images of a .tar file from where it stands on, by their paths.

    Raises:
        tarfile.TarError, OSError, ValueError: it is damaged.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for path, member in members(tar):
            if member.isreg() and is_image(path):
                yield path, member


def _tar_items(segment: Segment) -> Iterator[Item]:
    with places.open_file(segment.path) as file:
        file.seek(segment.start)
        for path, member in _tar_images(file):
            name = places.join(segment.path, path)
            if member.size > _MOST_BYTES:
                yield Item(name, _too_large(name, member.size))
                continue
            file.seek(member.offset_data)
            yield Item(name, file.read(member.size))


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


class _NoColumnError(BatchError):
    """No column holds images."""


def _parquet_extent(path: str, column: str | None) -> Extent:
    with places.open_file(path) as file:
        parquet = pq.ParquetFile(file)
        _column(parquet.schema_arrow, column, path)
        return Extent(Segment("parquet", path, images=parquet.metadata.num_rows))


def _column(schema: pa.Schema, column: str | None, path: str) -> str:
    """The column that holds images.

    Raises:
        BatchError: there is none, several could be meant, or the one that is named holds something else.
    """

    def holds(field: pa.Field) -> str:
        kind = field.type
        if pa.types.is_struct(kind):  # as Hugging Face stores images
            inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            return "bytes" if "bytes" in inner and _is_bytes(inner["bytes"]) else ""
        return "bytes" if _is_bytes(kind) else "paths" if _is_text(kind) else ""

    kinds = {field.name: holds(field) for field in schema}
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if column is not None:
        if not kinds.get(column):
            raise _NoColumnError(f"{shown(path)} has no column {column!r} of bytes or paths; its columns are {listed}")
        return column
    found = [name for name, kind in kinds.items() if kind == "bytes"]
    found = found or [name for name, kind in kinds.items() if kind == "paths" and name.lower() in _PATH_COLUMNS]
    if len(found) != 1:
        which = f"{' or '.join(found)} could hold the images" if found else "no column holds images"
        kind = BatchError if found else _NoColumnError
        raise kind(f"{shown(path)}: {which}; name the column with --column. Its columns are {listed}")
    return found[0]


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _parquet_items(segment: Segment, column: str | None) -> Iterator[Item]:
    with places.open_file(segment.path) as file:
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        name = _column(parquet.schema_arrow, column, segment.path)
        size = 4096 if _is_text(parquet.schema_arrow.field(name).type) else 16  # rows in memory
        row = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if row + rows <= segment.start:
                row += rows
                continue
            for batch in parquet.iter_batches(size, row_groups=[group], columns=[name]):
                if row + len(batch) > segment.start:
                    first = max(segment.start - row, 0)
                    for place, value in enumerate(batch.column(0)[first:].to_pylist(), start=row + first):
                        yield _row_item(segment.path, place, value)
                row += len(batch)


def _row_item(path: str, row: int, value: Any) -> Item:
    name = f"{path}#{row}"
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value.get("path")
    if value is None:
        return Item(name, ImageError(f"{shown(name)}: there is no image in this row"))
    if isinstance(value, bytes):
        return Item(name, value)
    if places.is_remote(value):
        protocol = value.partition("://")[0]
        if "::" in value or (protocol not in _PATH_PROTOCOLS and not path.startswith(f"{protocol}://")):
            return Item(value, ImageError(f"{shown(value)}: paths in a Parquet file may not be addresses of this kind"))
        return Item(value, value)
    target = places.join(posixpath.dirname(path), places.plain(value))
    if places.is_remote(path) and not places.is_remote(target):
        return Item(value, ImageError(f"{shown(value)}: a Parquet file elsewhere may not name files of this machine"))
    return Item(target, target)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def images_of(segment: Segment, column: str | None = None) -> Iterator[Item]:
    """As many items as the segment counts. If the file is not what it was any more, the rest of them say so."""
    if segment.kind in ("file", "bad"):
        content = ImageError(segment.error) if segment.error is not None else segment.path
        yield Item(segment.path, content)
        return
    given, reason = 0, "the file ends before this image; it was longer when the job began"
    items = _tar_items(segment) if segment.kind == "tar" else _parquet_items(segment, column)
    try:
        for item in items:
            yield item
            given += 1
            if given == segment.images:
                return
    except GeneratorExit:
        raise
    except Exception as error:  # as in `extents_of`
        reason = places.reason(error)
    for missing in range(given, segment.images):
        name = (
            f"{segment.path}#{segment.start + missing if segment.kind == 'parquet' else f'{segment.start}+{missing}'}"
        )
        yield Item(name, ImageError(f"{shown(name)}: {reason}"))


def _too_large(name: str, size: int) -> ImageError:
    return ImageError(f"{shown(name)}: {size:,} bytes, more than the {_MOST_BYTES:,} that one image may have")
