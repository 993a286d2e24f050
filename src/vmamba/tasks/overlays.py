"""What a dense model found, drawn over the picture: tinted regions with outlines, a legend below, sheets of several."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vmamba.files import atomic_write, shown

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Okabe and Ito's colours, for lines: people with any colour vision can tell them apart.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LUMA = (0.299, 0.587, 0.114)  # what red, green and blue are worth in grey
INK, GREY, WHITE = (34, 34, 34), (118, 118, 118), (255, 255, 255)

_TINT = 0.45  # share of an object's colour in the mixture with the picture
_LONGEST = 28  # letters of a class's name
_SMALLEST, _LARGEST = 720, 1600  # what the long side of a drawing is brought between


class Entry(NamedTuple):
    """One line of a legend."""

    colour: Colour
    name: str
    note: str = ""


@functools.cache
def palette(number: int) -> list[Colour]:
    """Colours that are far from each other to the eye, none of them nearly grey, black or white.

    The distance is OKLab's with lightness at half, because a tint takes on that of the picture. Each colour is the
    farthest from all before it, so those of a few classes begin those of many.
    """
    steps = np.linspace(0, 255, 18).round()
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    pleasant = (lab[:, 0] > 0.48) & (lab[:, 0] < 0.86) & (chroma > 0.07) & (chroma < 0.21)
    rgb, lab = rgb[pleasant], lab[pleasant] * (0.5, 1, 1)
    chosen = [int(np.abs(rgb - (0, 114, 178)).sum(1).argmin())]  # a blue to begin with
    distance = np.full(len(rgb), np.inf)
    while len(chosen) < number:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return [(int(r), int(g), int(b)) for r, g, b in rgb[chosen[:number]]]


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB from 0 to 255 (n, 3) to OKLab (Ottosson, 2020)."""
    linear = np.where(rgb > 10.31, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    lms = linear @ np.array([
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ])  # fmt: skip
    return np.cbrt(lms) @ np.array([
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ])  # fmt: skip


@functools.cache
def font(size: int) -> Font:
    """Matplotlib's, which knows European letters; else the one that comes with Pillow, which knows English ones."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)


def easel(picture: Image.Image) -> Image.Image:
    """The picture in RGB at a size that is good to look at and to draw on."""
    longest = max(picture.size)
    factor = min(max(longest, _SMALLEST), _LARGEST) / longest
    size = max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)


def painted(
    picture: Image.Image, labels: NDArray[np.integer], colours: Sequence[Colour], share: float = 0.5
) -> Image.Image:
    """The picture with each region tinted, and a light line with dark sides between regions.

    Args:
        picture: of any size; RGB.
        labels: (h, w), of any size; -1 where nothing is tinted, and the picture is dimmed instead.
        colours: one a label.
        share: of the tint in the mixture.
    """
    indices = Image.fromarray(labels.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST)
    at = np.asarray(indices)
    tints = np.array([*colours, (60, 60, 60)], np.float32)[at]
    mixed = (np.asarray(picture, np.float32) * (1 - share) + tints * share).round().astype(np.uint8)
    width = max(max(picture.size) // 800, 1)
    for size, colour, strength in ((2 * width + 3, (20, 20, 20), 0.35), (2 * width - 1, WHITE, 0.85)):
        borders = _borders(at)
        if size > 1:  # some versions of Pillow crash at 1
            borders = borders.filter(ImageFilter.MaxFilter(size))
        line = np.asarray(borders)[..., None] / 255 * strength
        mixed = (mixed * (1 - line) + np.array(colour) * line).round().astype(np.uint8)
    return Image.fromarray(mixed)


def _borders(labels: NDArray[np.integer]) -> Image.Image:
    """White where the label differs from that of the pixel to the right or below."""
    edges = np.zeros(labels.shape, bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    return Image.fromarray(edges.astype(np.uint8) * 255)


def named(image: Image.Image, labels: NDArray[np.integer], names: Sequence[str]) -> Image.Image:
    """The image with the name of each label in the middle of its largest region, where it has room.

    Args:
        image: of any size.
        labels: (h, w), of any size.
        names: one a label.
    """
    size = min(max(image.width // 48, 12), 26)
    letters = font(size)
    draw = ImageDraw.Draw(image)
    coarse = image.width / 120, image.height / (rows := max(round(120 * image.height / image.width), 1))
    small = np.asarray(Image.fromarray(labels.astype(np.int32)).resize((120, rows), Image.Resampling.NEAREST))
    for index in np.unique(small[small >= 0]):
        y, x, radius = _middle(small == index)
        text = name_of(names[index])
        half = draw.textlength(text, letters) / 2
        if half < 1.5 * radius * coarse[0] and size < 2 * radius * coarse[1]:
            across = min(max((x + 0.5) * coarse[0], half + 4), image.width - half - 4)
            draw.text(
                (across, (y + 0.5) * coarse[1]), text, WHITE, letters, anchor="mm", stroke_width=2, stroke_fill=INK
            )
    return image


def _middle(region: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Of the pixels farthest from a region's border the one in their midst, row and column, and how far that is."""
    left, radius = region, 0
    while left.any():
        core, radius, p = left, radius + 1, np.pad(left, 1)
        left = left & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    places = np.argwhere(core)
    row, column = places[np.square(places - places.mean(0)).sum(1).argmin()]
    return int(row), int(column), radius


def boxed(
    image: Image.Image,
    size: tuple[int, int],
    boxes: NDArray[np.float32],
    colours: Sequence[Colour],
    texts: Sequence[str],
    masks: NDArray[np.bool_] | None = None,
) -> Image.Image:
    """The image with objects: tinted and outlined masks, boxes in their colours, and on each a label with its text.

    Large objects are drawn first, so that small ones lie on top; labels look for a place where no other is.

    Args:
        image: of any size; RGB.
        size: width and height of the picture that boxes and masks are for.
        boxes: (n, 4), x and y of two corners.
        colours, texts: one an object.
        masks: (n, H, W).
    """
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable").tolist()
    scale = np.array([image.width / size[0], image.height / size[1]] * 2)
    edges = np.round(boxes * scale).astype(int)
    width = max(max(image.size) // 480, 2)
    if masks is not None:
        pixels = np.array(image, np.float32)
        for i in order:
            _tint(pixels, masks[i], edges[i], colours[i], _TINT, width)
        image = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    points = min(max(image.width // 72, 11), 20)
    for i in order:
        x0, y0, x1, y1 = edges[i].tolist()
        draw.rectangle((x0 - 1, y0 - 1, max(x1, x0) + 1, max(y1, y0) + 1), outline=INK, width=width + 2)
        draw.rectangle((x0, y0, max(x1, x0), max(y1, y0)), outline=colours[i], width=width)
    taken: list[tuple[float, float, float, float]] = []
    for i in order[::-1]:  # the smallest have the fewest places to choose from
        _label(draw, edges[i].tolist(), texts[i], colours[i], points, image.size, taken)
    return image


def _tint(
    pixels: NDArray[np.float32],
    mask: NDArray[np.bool_],
    box: NDArray[np.int_],
    colour: Colour,
    share: float,
    width: int,
) -> None:
    """Mix a colour into an image (h, w, 3) where the mask, of any size, is set, and draw its outline."""
    height, columns = pixels.shape[:2]
    margin = 3 * width
    left, top = np.maximum(box[:2] - margin, 0)
    right, bottom = np.minimum(box[2:] + margin, (columns, height))
    if right <= left or bottom <= top:
        return
    factor = mask.shape[1] / columns, mask.shape[0] / height
    source = (left * factor[0], top * factor[1], right * factor[0], bottom * factor[1])
    shape = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (int(right - left), int(bottom - top)), Image.Resampling.BILINEAR, source
    )
    inside = np.asarray(shape)[..., None] / 255 * share
    part = pixels[top:bottom, left:right]
    part += (np.array(colour, np.float32) - part) * inside
    whole = shape.point(lambda value: 255 * (value > 127))
    for grown, ink, strength in ((2 * width + 1, (20, 20, 20), 0.6), (width | 1, colour, 1.0)):
        line = np.asarray(whole.filter(ImageFilter.MaxFilter(grown)), np.float32) - np.asarray(
            whole.filter(ImageFilter.MinFilter(width | 1)), np.float32
        )
        part += (np.array(ink, np.float32) - part) * (line[..., None] / 255 * strength)


def _label(
    draw: ImageDraw.ImageDraw,
    box: Sequence[int],
    text: str,
    colour: Colour,
    points: int,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write on a coloured ground at a corner of the box, at the first that lies on no label among those taken."""
    x0, y0, x1, y1 = box
    letters, height = font(points), round(1.35 * points)
    width = round(draw.textlength(text, letters)) + height // 2
    corners = ((x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0 - height), (x1 - width, y1), (x0, y1 - height))
    inside = [(min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)) for x, y in corners]

    def free(place: tuple[int, int]) -> bool:
        x, y = place
        return all(
            x >= right or x + width <= left or y >= bottom or y + height <= top for left, top, right, bottom in taken
        )

    x, y = next(filter(free, inside), inside[0])
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    light = sum(share * value for share, value in zip(LUMA, colour, strict=True)) > 140
    draw.text((x + width / 2, y + height / 2), text, INK if light else WHITE, letters, anchor="mm")


def with_legend(image: Image.Image, entries: Sequence[Entry], most: int = 32) -> Image.Image:
    """The image with a legend below it, on a ground of its own; of more than ``most`` entries the rest is counted.

    The result is as wide as the image, or as one entry where that is wider.
    """
    if not entries:
        return image
    if len(entries) > most:
        entries = [*entries[: most - 1], Entry(WHITE, f"and {len(entries) - most + 1} more")]
    size = min(max(image.width // 52, 12), 24)
    letters, line = font(size), round(1.75 * size)
    texts = [(name_of(entry.name), entry.note) for entry in entries]
    widths = [letters.getlength(name) + letters.getlength(f"  {note}") for name, note in texts]
    column = round(max(widths) + 2.9 * size)
    width = max(image.width, column)
    columns = max((width - round(size)) // column, 1)
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (width, image.height + rows * line + round(1.2 * size)), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for place, (entry, (name, note)) in enumerate(zip(entries, texts, strict=True)):
        x = round(0.8 * size) + place // rows * column
        y = image.height + round(0.6 * size) + place % rows * line
        draw.rounded_rectangle((x, y + 0.35 * size, x + 1.1 * size, y + 1.45 * size), size / 4, fill=entry.colour)
        middle = y + 0.9 * size
        draw.text((x + 1.6 * size, middle), name, INK, letters, anchor="lm")
        draw.text((x + 1.6 * size + letters.getlength(f"{name}  "), middle), note, GREY, letters, anchor="lm")
    return sheet


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], width: int = 420) -> Image.Image:
    """Pictures in rows, each scaled to one width, under the titles of their columns."""
    size, gap = 18, 8
    scaled = [[cell.resize((width, max(round(cell.height * width / cell.width), 1))) for cell in row] for row in rows]
    heights = [max(cell.height for cell in row) for row in scaled]
    top = 2 * size
    total = top + sum(heights) + gap * len(rows)
    whole = Image.new("RGB", (len(titles) * (width + gap) + gap, total), "white")
    draw = ImageDraw.Draw(whole)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), top / 2), title, INK, font(size), anchor="lm")
    for row, height in zip(scaled, heights, strict=True):
        for column, cell in enumerate(row):
            whole.paste(cell, (gap + column * (width + gap), top))
        top += height + gap
    return whole


def bars(entries: Sequence[Entry], values: Sequence[float], title: str) -> Image.Image:
    """A line for each entry: its name, a bar whose length is a value from 0 to 1, and its note."""
    size, line, names, full = 14, 24, 230, 420
    image = Image.new("RGB", (names + full + 90, line * len(entries) + 60), "white")
    draw = ImageDraw.Draw(image)
    draw.text((12, 26), title, INK, font(18), anchor="lm")
    for place, (entry, value) in enumerate(zip(entries, values, strict=True)):
        y = 50 + place * line
        draw.text((names - 12, y + line / 2), name_of(entry.name), INK, font(size), anchor="rm")
        draw.rectangle((names, y + 3, names + full, y + line - 3), (240, 240, 240))
        draw.rectangle((names, y + 3, names + full * value, y + line - 3), entry.colour)
        draw.text((names + full + 10, y + line / 2), entry.note, GREY, font(size), anchor="lm")
    return image


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        image.save(file, "png")


def name_of(name: str) -> str:
    """A class name as a picture can show it: any bytes, no longer than so many letters."""
    name = shown(name).encode(errors="backslashreplace").decode()
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
