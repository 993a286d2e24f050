"""Image files as real folders hold them: one function that reads any of them, or says what is wrong with one."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vmamba.errors import DataError, ImageError
from vmamba.files import shown

IMAGE_EXTENSIONS = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
    ".avif",
})  # fmt: skip

# Folders that systems and programs keep for themselves, beside those whose names begin with a dot.
_SYSTEM_FOLDERS = frozenset({
    "__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
})  # fmt: skip

# Pillow also opens formats that start other programs (EPS runs Ghostscript). A file's name says nothing about its
# content, so the formats that may be decoded are named here.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

_SECONDS = 5  # of processor time for one image, looked at between reads: what Pillow does in one call takes up to 4


def read_image(
    source: str | os.PathLike[str] | BinaryIO,
    in_chans: int = 3,
    name: str | None = None,
    most_pixels: int | None = None,
) -> Image.Image:
    """Read one image file as 8-bit RGB (``in_chans=3``) or 8-bit grey (``in_chans=1``).

    Everything a folder may hold ends as the picture a person would see in a viewer:

    - EXIF orientation is applied; an animation gives its first frame;
    - CMYK, palette, bilevel and other colour modes are converted;
    - transparent pixels are laid over white;
    - 16-bit grey is scaled to 8 bits (65535 becomes 255), not clipped; float grey is taken as 0 to 1.

    Files that attack their reader are refused: decoding takes at most 10 seconds of processor time, and at most three
    times the file's size plus 300 MB plus 28 bytes for each pixel (of which Pillow's limit allows 89 million).

    Args:
        source: a path, or a binary file object.
        in_chans: 3 for an image of mode ``RGB``, 1 for mode ``L``.
        name: what to call the file in an error; by default the path, or the file object's name.
        most_pixels: refuse larger images, before they are decoded.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt, not an image, takes too long, or is larger than
            ``most_pixels`` or Pillow's limit against decompression bombs (``PIL.Image.MAX_IMAGE_PIXELS``, a warning in
            Pillow, an error here).
        DataError: ``in_chans`` is neither 1 nor 3.
    """
    check_channels(in_chans)
    with _decoded(source, name, most_pixels) as image:
        return standard_image(image, in_chans)


def read_index_mask(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> np.ndarray:
    """Read a picture whose pixels are numbers of classes: grey of up to 16 bits, or palette indices.

    Returns:
        (H, W), uint8 or int32.

    Raises:
        ImageError: as `read_image`; or the picture has colours, whose meaning nobody knows.
    """
    with _decoded(source, name) as image:
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise ValueError(f"an index mask has one number a pixel; this picture has mode {image.mode}")
        pixels = np.asarray(image)
        return pixels.astype(np.int32 if image.mode.startswith("I") else np.uint8)


@contextmanager
def _decoded(
    source: str | os.PathLike[str] | BinaryIO, name: str | None, most_pixels: int | None = None
) -> Iterator[Image.Image]:
    """An image file opened and decoded; what goes wrong then or in the block becomes an `ImageError`."""
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", source)
    name = shown(name or str(path))
    try:
        with _opened(source) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which nobody asked for
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_Metered(file), formats=_FORMATS) as image:  # type: ignore[arg-type]
                if most_pixels is not None and image.width * image.height > most_pixels:
                    raise ValueError(f"{image.width}×{image.height} pixels, more than the {most_pixels:,} taken here")
                image.decodermaxblock = 4096  # each read looks at the clock
                stored = image.tile[0].args if image.tile else None
                image.load()
                if image.format == "PNG" and "transparency" in image.info:
                    _widen_key(image, stored, file)
                yield image
    # Decoders meet damaged files with almost any exception: OSError, SyntaxError, struct.error, EOFError ...
    except Exception as error:
        raise ImageError(f"{name}: {_reason(error)}") from error


@contextmanager
def _opened(source: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    """An image file without what would keep Pillow busy for hours, as trials showed."""
    if isinstance(source, (str, os.PathLike)):
        status = os.stat(source)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file but a FIFO, a socket or a device")
        if not status.st_size:  # also of the files in /proc, some of which never end
            raise ValueError("the file is empty (0 bytes)")
        with open(source, "rb") as file, _opened(file) as checked:
            yield checked
        return
    head = source.read(16)
    if not head:
        raise ValueError("the file is empty (0 bytes)")
    source.seek(0)
    if head[:2] in (b"P1", b"P2", b"P3"):
        if source.read().count(b"#") > 1000:  # each costs Pillow a copy of the megabyte around it
            raise ValueError("a plain PNM of more than 1000 comments")
        source.seek(0)
    elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_strips(source, head)
        source.seek(0)
    elif head[:4] == b"\xff\x4f\xff\x51" or head[4:8] == b"jP  ":
        for size in re.finditer(rb"\xff\x4f\xff\x51.{4}(.{32})", source.read(), re.DOTALL):
            width, height, _, _, across, down, left, top = struct.unpack(">8I", size[1])
            tiles = -(-(width - left) // max(across, 1)) * -(-(height - top) // max(down, 1))
            if tiles > 20_000:  # each costs OpenJPEG ten kilobytes
                raise ValueError(f"a JPEG 2000 of {tiles} tiles")
        source.seek(0)
    yield source


def _check_strips(file: BinaryIO, head: bytes) -> None:
    """Refuse a TIFF of absurdly many strips or tiles, each of which costs Pillow hundreds of bytes."""
    order, big = "<" if head[:1] == b"I" else ">", b"+" in head[:4]
    start, number, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    file.seek(struct.unpack_from(order + start, head, 8 if big else 4)[0])
    (length,) = struct.unpack(order + number, file.read(struct.calcsize(order + number)))
    entries = file.read(min(length, 65535) * struct.calcsize(order + entry))
    for tag, _, count, _ in struct.iter_unpack(order + entry, entries):
        if tag in (273, 324) and count > 200_000:  # StripOffsets, TileOffsets
            raise ValueError(f"a TIFF of {count} strips or tiles")


class _Metered:
    """A file that cannot be read on once its decoding has cost `_SECONDS` of processor time.

    Decoders cannot be stopped from outside, but all that can take for ever come back to read: progressive JPEGs of
    thousands of scans (libjpeg has no limit), chunks by the million, formats decoded in Python.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end = file, time.thread_time() + _SECONDS
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if time.thread_time() > self.end:
            raise _TooSlowError
        return self.file.read(size)


class _TooSlowError(Exception):
    """Decoding takes too long."""


def check_channels(in_chans: int) -> None:
    """Refuse a number of channels that image files cannot give.

    Raises:
        DataError: it is neither 1 nor 3.
    """
    if in_chans not in (1, 3):
        raise DataError(f"in_chans is {in_chans}; image files are read with 1 (grey) or 3 (RGB) channels")


def _widen_key(image: Image.Image, stored: Any, file: BinaryIO) -> None:
    """Make PNG's transparent colour fit the pixels: it is given in the file's bits, and Pillow turns those into 8."""
    if stored in ("L;2", "L;4"):
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}[stored]
    elif stored == "RGB;16B":
        high, low = np.divmod(image.info.pop("transparency"), 256)
        with Image.open(_Metered(file), formats=("PNG",)) as other:  # type: ignore[arg-type]
            other.tile = [other.tile[0]._replace(args="RGB;16L")]  # the lower bytes, which Pillow leaves out
            hidden = (np.asarray(image) == high) & (np.asarray(other) == low)
        image.putalpha(Image.fromarray(~hidden.all(2)).convert("L"))


# By EXIF's orientation, what makes a picture upright.
_TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def standard_image(image: Image.Image, in_chans: int = 3) -> Image.Image:
    """Turn an opened image of any mode into 8-bit RGB or grey, as `read_image` describes.

    Raises:
        ValueError: the pixels have no defined range (32-bit integers beyond 65535, floats beyond 0 to 1).
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    # A damaged EXIF block says nothing about the pixels: they are shown as they are stored.
    except Exception as error:
        if isinstance(error, _TooSlowError):
            raise
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _as_mode(image, "RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        image = background
    return _as_mode(image, "RGB" if in_chans == 3 else "L")


def any_image(image: str | os.PathLike[str] | Image.Image | np.ndarray, in_chans: int = 3) -> Image.Image:
    """A picture in any form that Python code may hold it in, as 8-bit RGB or grey.

    Args:
        image: a file, a PIL image of any mode, or an array, uint8 (H, W, 3) in RGB or (H, W) in grey.
        in_chans: 3 for an image of mode ``RGB``, 1 for mode ``L``.

    Raises:
        ImageError: the file cannot be used.
        TypeError: an array of another dtype or shape.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise TypeError(f"the array is {image.dtype} {image.shape}; expected uint8 (H, W, 3) or (H, W)")
        image = Image.fromarray(image)
    return standard_image(image, in_chans) if isinstance(image, Image.Image) else read_image(image, in_chans)


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # `convert` alone would copy it all the same


def _to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"float pixels from {low} to {high}; expected 0 to 1. Save the image with 8 or 16 bits")
        return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    if low < 0 or high > 65535:
        raise ValueError(f"32-bit pixels from {low} to {high} have no defined white. Save it with 8 or 16 bits")
    grey = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in image.info:
        grey[image.info["transparency"]] = 255
    return Image.fromarray(grey[pixels])


def _reason(error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"{error} To read it all the same, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, _TooSlowError):
        return f"decoding it takes more than {_SECONDS} seconds of processor time"
    if isinstance(error, struct.error):
        return "truncated or damaged"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged beyond recognition"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return shown(str(error) or type(error).__name__)


def is_hidden(path: str) -> bool:
    """Whether a path, with ``/``, is some system's or program's own: ``._x.png``, ``.ipynb_checkpoints/x.png`` ..."""
    return any(name.startswith(".") or name in _SYSTEM_FOLDERS for name in path.split("/"))


def is_image(path: str) -> bool:
    """Whether a path, with ``/``, inside a folder or archive counts as an image: by its ending, and not hidden."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS and not is_hidden(path)


def image_files(
    folder: str, on_error: Callable[[OSError], None], wanted: Callable[[str], bool] = is_image
) -> list[str]:
    """The images in a folder and in all folders inside it, sorted, as training and prediction see them.

    Links are followed. A folder that several paths lead to is entered once, by the shortest of them (of equal ones the
    first in the order of names): so links in a circle end, and each picture is met once. A link to a file counts as a
    file. What is no picture behind its name (a broken link, a FIFO) is listed, for `read_image` to say so.

    Args:
        folder: its own name is not judged.
        on_error: is told of each folder that cannot be read.
        wanted: tells by a file's name whether it counts.
    """
    files, entered, folders = [], set(), [folder]
    for path in folders:
        if (real := os.path.realpath(path)) in entered:
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            on_error(error)
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                folders.append(entry.path)
            elif wanted(entry.name):
                files.append(entry.path)
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False also of a link that cannot be followed."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_images(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[str], list[str]]:
    """Expand files, folders (searched by `image_files`) and glob patterns into image files.

    A path that exists is taken literally, even when its name holds ``*``, ``?`` or ``[``. A file that is named
    outright is kept whatever its name; of those that a pattern finds, `is_image` decides.

    Returns:
        The files, in the order given and sorted inside each folder or pattern, without repeats; and one message for
        each path that gave none, and for each folder that cannot be read.
    """
    files: dict[str, None] = {}
    problems: list[str] = []

    def unreadable(error: OSError) -> None:
        problems.append(f"{shown(error.filename)}: {_reason(error)}")

    for path in (os.fspath(path) for path in paths):
        told = len(problems)
        if os.path.exists(path):
            found = image_files(path, unreadable) if os.path.isdir(path) else [path]
        elif glob.has_magic(path):
            found = []
            for match in sorted(glob.glob(path, recursive=True)):
                if os.path.isdir(match) and not is_hidden(os.path.basename(match)):
                    found += image_files(match, unreadable)
                elif is_image(os.path.basename(match)):
                    found.append(match)
        else:
            problems.append(f"{shown(path)}: no such file or folder")
            continue
        if not found and len(problems) == told:
            problems.append(f"{shown(path)}: no image files ({' '.join(sorted(IMAGE_EXTENSIONS))})")
        files.update(dict.fromkeys(found))
    return list(files), problems
