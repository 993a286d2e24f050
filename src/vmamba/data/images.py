"""Image files as real folders hold them: one function that reads any of them, or says what is wrong with one."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vmamba.errors import ImageError

IMAGE_EXTENSIONS = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
    ".avif",
})  # fmt: skip

# Pillow also opens formats that start other programs (EPS runs Ghostscript). A file's name says nothing about its
# content, so the formats that may be decoded are named here.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")


def read_image(source: str | os.PathLike[str] | BinaryIO, in_chans: int = 3, name: str | None = None) -> Image.Image:
    """Read one image file as 8-bit RGB (``in_chans=3``) or 8-bit grey (``in_chans=1``).

    Everything a folder may hold ends as the picture a person would see in a viewer:

    - EXIF orientation is applied; an animation gives its first frame;
    - CMYK, palette, bilevel and other colour modes are converted;
    - transparent pixels are laid over white;
    - 16-bit grey is scaled to 8 bits (65535 becomes 255), not clipped; float grey is taken as 0 to 1.

    Args:
        source: a path, or a binary file object.
        in_chans: 3 for an image of mode ``RGB``, 1 for mode ``L``.
        name: what to call the file in an error; by default the path, or the file object's name.

    Raises:
        ImageError: the file is missing, empty, truncated, corrupt, not an image, or larger than Pillow's limit
            against decompression bombs (``PIL.Image.MAX_IMAGE_PIXELS``, a warning in Pillow, an error here).
        ValueError: ``in_chans`` is neither 1 nor 3.
    """
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans is {in_chans}; image files are read with 1 (grey) or 3 (RGB) channels")
    name = name or str(getattr(source, "name", source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=_FORMATS) as image:
                image.load()
                return standard_image(image, in_chans)
    # Decoders meet damaged files with almost any exception: OSError, SyntaxError, struct.error, EOFError ...
    except Exception as error:
        raise ImageError(f"{name}: {_reason(error, source)}") from error


def standard_image(image: Image.Image, in_chans: int = 3) -> Image.Image:
    """Turn an opened image of any mode into 8-bit RGB or grey, as `read_image` describes.

    Raises:
        ValueError: the pixels have no defined range (32-bit integers beyond 65535, floats beyond 0 to 1).
    """
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels: show them as they are stored
        image = image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if in_chans == 3 else "L")


def _to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"float pixels from {low} to {high}; expected 0 to 1. Save the image with 8 or 16 bits")
        return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    if low < 0 or high > 65535:
        raise ValueError(f"32-bit pixels from {low} to {high} have no defined white. Save it with 8 or 16 bits")
    return Image.fromarray(((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _reason(error: Exception, source: Any) -> str:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"{error} To read it all the same, raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty (0 bytes)" if _is_empty(source) else "not an image, or damaged beyond recognition"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return str(error) or type(error).__name__


def _is_empty(source: Any) -> bool:
    if isinstance(source, (str, os.PathLike)):
        return os.path.getsize(source) == 0
    return source.seek(0, os.SEEK_END) == 0


def find_images(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[str], list[str]]:
    """Expand files, folders (searched recursively by extension) and glob patterns into image files.

    A path that exists is taken literally, even when its name holds ``*``, ``?`` or ``[``. A file that is named
    outright is kept whatever its extension.

    Returns:
        The files, in the order given and sorted inside each folder or pattern, without repeats; and one message for
        each path that gave none.
    """
    files: dict[str, None] = {}
    problems: list[str] = []
    for path in (os.fspath(path) for path in paths):
        if os.path.exists(path):
            matches = [path]
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
        else:
            problems.append(f"{path}: no such file or folder")
            continue
        found = [file for match in matches for file in (_folder(match) if os.path.isdir(match) else [match])]
        if not found:
            problems.append(f"{path}: no image files ({' '.join(sorted(IMAGE_EXTENSIONS))})")
        files.update(dict.fromkeys(found))
    return list(files), problems


def _folder(folder: str) -> list[str]:
    return sorted(
        str(path)
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
