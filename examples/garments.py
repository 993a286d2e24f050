"""Garments of Fashion-MNIST scattered over floors and cloths: pictures with boxes, masks and classes.

    python examples/garments.py runs/garments

writes pictures, index masks and COCO's JSON as `vmamba train` reads them for segmentation and detection. Everything
follows from the seed. Training pictures show garments of Fashion-MNIST's training set alone, those for validation
garments of its test set: none is in both.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from rich.progress import track

from vmamba.data.coco import encode_masks
from vmamba.tasks.overlays import palette

CLASSES = ("top", "trousers", "dress", "shoe", "bag")
KINDS = (0, 1, 0, 2, 0, 3, 0, 3, 4, 3)  # of Fashion-MNIST's ten labels: four kinds of tops, three of shoes
SANDAL = 5  # its label
HEIGHT, WIDTH = 256, 320
SIDES = 28, 96  # pixels, of the square that a garment comes in
LEAST, MOST = 3, 18  # garments in a picture
VISIBLE = 0.5  # share of every garment that no other one covers, and that lies inside the picture
FASHION_MNIST = Path(__file__).parent / "FashionMNIST" / "raw"

Rng = np.random.Generator
Floats = NDArray[np.floating]

# ---------------------------------------------------------------------------------------------------------------------
# Garments

TINTS = ("#d1495b", "#e07a3f", "#edae49", "#7a9e5f", "#2f7f86", "#3a6ea5", "#6d597a", "#b56576", "#8c6a4f", "#4a5568",
         "#c9c3b8", "#33373d")  # fmt: skip


def read_fashion_mnist(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (n, 28, 28) and labels (n,) of "train" or "t10k"."""
    pixels = gzip.decompress((FASHION_MNIST / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def silhouette(pixels: NDArray[np.uint8], label: int) -> Image.Image:
    """Where an image on black shows the garment. Dark places inside belong to it, except between a sandal's straps."""
    empty = np.pad(pixels <= 16, 1, constant_values=True)
    outside, grown = np.zeros_like(empty), empty if label == SANDAL else np.zeros_like(empty)
    grown[0] = True
    while (grown != outside).any():  # from the edge, step by step, until nothing is reached any more
        outside, grown = grown, grown.copy()
        grown[1:] |= outside[:-1]
        grown[:-1] |= outside[1:]
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= empty
    return Image.fromarray((~outside[1:-1, 1:-1] * 255).astype(np.uint8))


def garment(pixels: NDArray[np.uint8], label: int, side: int, angle: float, tint: str) -> Image.Image:
    """A tinted garment, RGBA, enlarged, turned and cut out along its outline."""
    shape, grey = silhouette(pixels, label), Image.fromarray(pixels)
    # The outermost pixels are half black; there goes the brightest neighbour.
    grey = Image.composite(grey, grey.filter(ImageFilter.MaxFilter(3)), shape.filter(ImageFilter.MinFilter(3)))
    picture = Image.merge("LA", (grey, shape))
    grey, alpha = picture.resize((side, side), Image.Resampling.BICUBIC).rotate(
        angle, Image.Resampling.BICUBIC, expand=True
    ).split()  # fmt: skip
    light = Image.blend(Image.new("RGB", (1, 1), tint), Image.new("RGB", (1, 1), "white"), 0.5).getpixel((0, 0))
    coloured = ImageOps.colorize(grey, "#101014", light, tint, midpoint=150)
    coloured.putalpha(alpha.point(lambda value: min(max(2 * value - 128, 0), 255)))  # of a softly enlarged edge
    return coloured


# ---------------------------------------------------------------------------------------------------------------------
# What they lie on: functions of a place (u, v) in pixels, (H, W) each, to a tone from 0 to 1 of each of three colours

GROUNDS = (
    ("#e8dcc8", "#c2a884", "#7d6247"), ("#d9d4cc", "#a9a29a", "#6f6a66"), ("#cfd8d3", "#8fa79b", "#4d6a60"),
    ("#efe6dd", "#d3a588", "#8f4f3d"), ("#d7dde6", "#8b9db8", "#3f5277"), ("#eee3c5", "#d9b56c", "#8a6a35"),
    ("#c6b8a9", "#8a6f5a", "#4b382c"), ("#e4d3d7", "#b58a98", "#6a4457"),
)  # fmt: skip


def noise(rng: Rng, rows: int, columns: int) -> Floats:
    """Smooth noise from 0 to 1, of so many cells."""
    cells = Image.fromarray(rng.random((rows, columns)).astype(np.float32))
    return np.asarray(cells.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).clip(0, 1)


def planks(rng: Rng, u: Floats, v: Floats) -> Floats:
    """Floorboards with grain."""
    wide = rng.uniform(16, 30)
    board = np.floor(v / wide).astype(int)
    tones, shifts = rng.random(256), rng.uniform(0, 500, 256)
    grain = np.sin((v + 5 * np.sin((u + shifts[board]) / rng.uniform(20, 45))) * rng.uniform(0.9, 1.6))
    gap = (v % wide < 1.2) | ((u + shifts[board]) % 130 < 1.2)
    return 0.25 + 0.4 * tones[board] + 0.1 * grain + 0.4 * gap


def tartan(rng: Rng, u: Floats, v: Floats) -> Floats:
    """Bands that cross, woven."""
    period = int(rng.integers(30, 56))
    bands = np.repeat(rng.choice([0.0, 0.35, 0.7, 1.0], period // 2 + 1), rng.integers(2, 5))
    across, along = bands[(u % period).astype(int)], bands[(v % period).astype(int)]
    return np.where((u + v) % 3 < 1.5, across, along) * 0.6 + (across + along) * 0.2


def tiles(rng: Rng, u: Floats, v: Floats) -> Floats:
    """Tiles in two tones, with joints."""
    side = rng.uniform(18, 36)
    x, y = np.floor(u / side).astype(int), np.floor(v / side).astype(int)
    tones = rng.uniform(0, 0.18, (64, 64))
    joint = (u % side < 1.5) | (v % side < 1.5)
    return np.where(joint, 0.9, (x + y) % 2 * rng.uniform(0, 0.5) + tones[x % 64, y % 64])


def terrazzo(rng: Rng, u: Floats, v: Floats) -> Floats:
    """Chips of stone in a pale floor."""
    side, reach = rng.uniform(11, 18), rng.uniform(0.25, 0.5)
    x, y = u / side, v / side
    near, tone = np.full(u.shape, np.inf), np.zeros(u.shape)
    jitter, tones = rng.random((2, 64, 64)), rng.uniform(0.3, 1, (64, 64))
    stretch = rng.uniform(0.5, 1.5, (64, 64))
    for down, right in np.ndindex(3, 3):  # the chips of the cells around
        i, j = np.floor(x).astype(int) + right - 1, np.floor(y).astype(int) + down - 1
        at = i % 64, j % 64
        distance = np.hypot((x - i - jitter[0][at]) * stretch[at], (y - j - jitter[1][at]) / stretch[at])
        near, tone = np.minimum(near, distance), np.where(distance < near, tones[at], tone)
    return np.where(near < reach * tone, tone, 0.08)


def chevrons(rng: Rng, u: Floats, v: Floats) -> Floats:
    """A rug with zigzags."""
    period = rng.uniform(24, 44)
    zigzag = np.abs(u % period - period / 2)
    return np.array([0.0, 0.5, 0.15, 0.9])[(np.floor((v + zigzag) / (period / 3)) % 4).astype(int)]


def carpet(rng: Rng, u: Floats, v: Floats) -> Floats:
    """Soft clouds of colour."""
    return 0.6 * noise(rng, 5, 6) + 0.3 * noise(rng, 14, 18) + 0.25 * noise(rng, HEIGHT // 2, WIDTH // 2)


GROUND_KINDS: tuple[Callable[[Rng, Floats, Floats], Floats], ...] = (planks, tartan, tiles, terrazzo, chevrons, carpet)


def ground(rng: Rng) -> Image.Image:
    """A floor or cloth at some angle, in one of several sets of colours."""
    angle, (y, x) = rng.uniform(0, np.pi), np.mgrid[:HEIGHT, :WIDTH]
    u, v = x * np.cos(angle) - y * np.sin(angle) + 500, x * np.sin(angle) + y * np.cos(angle) + 500
    tone = GROUND_KINDS[rng.integers(len(GROUND_KINDS))](rng, u, v) + 0.15 * (noise(rng, HEIGHT, WIDTH) - 0.5)
    grey = Image.fromarray((tone.clip(0, 1) * 255).astype(np.uint8))
    light, middle, dark = GROUNDS[rng.integers(len(GROUNDS))]
    return ImageOps.colorize(grey, light, dark, middle).filter(ImageFilter.GaussianBlur(0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def scene(rng: Rng, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[Image.Image, list[int], NDArray]:
    """A picture of garments, later ones over earlier ones.

    Returns:
        The picture; of each garment its class; and which garment each pixel shows, int (H, W), -1 for none.
    """
    picture, found, owner = ground(rng), list[int](), np.full((HEIGHT, WIDTH), -1)
    whole: list[int] = []  # pixels of each garment, hidden ones included
    wanted = rng.integers(LEAST, MOST + 1)
    for _ in range(4 * MOST):
        if len(found) == wanted:
            break
        index, side = rng.integers(len(images)), round(np.exp(rng.uniform(*np.log(SIDES))))
        tint, angle = TINTS[rng.integers(len(TINTS))], rng.uniform(-30, 30)
        piece = garment(images[index], labels[index], side, angle, tint)
        left, top = (
            int(rng.integers(-own // 4, full - own + own // 4 + 1))
            for own, full in zip(piece.size, picture.size, strict=True)
        )
        alpha = Image.new("L", picture.size)
        alpha.paste(piece.getchannel("A"), (left, top))
        after = np.where(np.asarray(alpha) > 127, len(found), owner)
        sizes = [*whole, int((np.asarray(piece.getchannel("A")) > 127).sum())]
        if (np.bincount(after.ravel() + 1, minlength=len(sizes) + 1)[1:] < VISIBLE * np.array(sizes)).any():
            continue
        found, owner, whole = [*found, KINDS[labels[index]]], after, sizes
        shadow = ImageOps.expand(piece.getchannel("A"), side // 4).filter(ImageFilter.GaussianBlur(side / 20))
        at = left - side // 4 + side // 24 + 1, top - side // 4 + side // 16 + 1
        picture.paste("#14100c", at, shadow.point(lambda value: value * 0.55))
        picture.paste(piece, (left, top), piece)
    lamp = 0.72 + 0.45 * noise(rng, 2, 2)[..., None]  # light falls in from somewhere
    return Image.fromarray((np.asarray(picture) * lamp).clip(0, 255).astype(np.uint8)), found, owner


def write_split(folder: Path, split: str, count: int, seed: list[int], images: Any, labels: Any) -> None:
    """Write a split's pictures, index masks (0 for what is no garment) and COCO file."""
    for kind in ("images", "annotations"):
        (folder / kind / split).mkdir(parents=True)
    colours = [0, 0, 0, *(value for colour in palette(len(CLASSES)) for value in colour)]
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in track(range(1, count + 1), f"{split} pictures", disable=not sys.stderr.isatty()):
        picture, found, owner = scene(np.random.default_rng([*seed, number]), images, labels)
        picture.save(folder / "images" / split / f"{number:04}.jpg", quality=92)
        index = Image.fromarray(np.array([*(label + 1 for label in found), 0], np.uint8)[owner])
        index.putpalette(colours)
        index.save(folder / "annotations" / split / f"{number:04}.png")
        pictures.append({"id": number, "file_name": f"{split}/{number:04}.jpg", "height": HEIGHT, "width": WIDTH})
        masks = owner == np.arange(len(found))[:, None, None]
        for label, mask, runs in zip(found, masks, encode_masks(masks), strict=True):
            (left, right), (upper, lower) = (
                (int(places.min()), int(places.max()) + 1) for places in np.nonzero(mask.T)
            )
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0,
                "area": int(mask.sum()), "bbox": [left, upper, right - left, lower - upper], "segmentation": runs,
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    coco = {"images": pictures, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(coco))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data set into a new folder, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--train", type=int, default=500, help="pictures for training")
    parser.add_argument("--val", type=int, default=100, help="pictures for validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuning", action="store_true", help="validate on garments held out of the training set: to "
                        "choose settings by, so that those of the test set stay unseen")  # fmt: skip
    given = parser.parse_args(arguments)
    folder: Path = given.folder
    if folder.exists():
        sys.exit(f"{folder} exists already: delete it, or name another folder")
    images, labels = read_fashion_mnist("train")
    known = slice(50_000) if given.tuning else slice(None)
    held_out = (images[50_000:], labels[50_000:]) if given.tuning else read_fashion_mnist("t10k")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        made = Path(partial, "data")
        write_split(made, "train", given.train, [given.seed, 0], images[known], labels[known])
        write_split(made, "val", given.val, [given.seed, 1], *held_out)
        (made / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")
        made.rename(folder)


if __name__ == "__main__":
    main()
