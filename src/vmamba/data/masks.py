"""Pictures with a class for each pixel: ADE20K's layout, or any two folders of pictures and index masks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.tv_tensors import Image, Mask

from vmamba.data.images import image_files, read_image, read_index_mask
from vmamba.data.sources import names_in, refuse, repeated, split_names
from vmamba.data.transforms import IGNORED
from vmamba.errors import DataError, ImageError
from vmamba.files import shown


@dataclass(frozen=True)
class MaskedPictures:
    """A data set for semantic segmentation.

    Attributes:
        where: the folder, for messages.
        class_names: in the order of their labels.
        pictures: files.
        masks: of each picture, the file whose pixels are numbers of classes.
        reduce_zero: whether 0 stands for what is ignored, and the first class is 1.
        ignored: another number that stands for what is ignored.
    """

    where: str
    class_names: list[str]
    pictures: list[str]
    masks: list[str]
    reduce_zero: bool = False
    ignored: int = 255

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        """The file of a picture."""
        return self.pictures[index]

    def read(self, index: int) -> tuple[Image, Mask]:
        """One picture, uint8 (3, H, W), and the label of each of its pixels, int16 (H, W), `IGNORED` where none counts.

        Raises:
            ImageError: a file cannot be read, their sizes differ, or the mask holds a number that is no class.
        """
        picture = read_image(self.pictures[index])
        numbers = read_index_mask(self.masks[index])
        name = shown(self.masks[index])
        if numbers.shape != (picture.height, picture.width):
            raise ImageError(
                f"{name}: {numbers.shape[1]}×{numbers.shape[0]}, but its picture is {picture.width}×{picture.height}"
            )
        return Image(pil_to_tensor(picture)), Mask(self._labels(numbers, name))

    def check_labels(self) -> None:
        """Look for a pixel that has a class: most often the first mask has some.

        Raises:
            DataError: all pixels are ignored.
            ImageError: see `read`.
        """
        if not any((self.read(index)[1] != IGNORED).any() for index in range(len(self))):
            zero = " or 0" if self.reduce_zero else ""
            raise DataError(
                f"{self.where}: no pixel of the {len(self)} masks has a class: all have the ignored value "
                f"{self.ignored}{zero}; data.ignored is to be the number of pixels that stand for no class"
            )

    def _labels(self, numbers: np.ndarray, name: str) -> Tensor:
        first, classes = int(self.reduce_zero), len(self.class_names)
        found = np.unique(numbers)
        no_class = (found < first) | (found >= first + classes)
        wrong = found[no_class & (found != self.ignored) & ~((found == 0) & self.reduce_zero)]
        if len(wrong):
            count = int(np.isin(numbers, wrong).sum())
            raise ImageError(
                f"{name}: {count} pixels of value {', '.join(map(str, wrong[:8]))}, outside of the {classes} classes "
                f"{first} to {first + classes - 1} and of the ignored value {self.ignored}"
            )
        labels = numbers.astype(np.int16) - np.int16(first)
        labels[(numbers == self.ignored) | (labels < 0)] = IGNORED
        return torch.from_numpy(labels)


def open_masks(
    root: str | os.PathLike[str], split: str, class_names: list[str] | None = None, ignored: int = 255
) -> MaskedPictures:
    """Open a split of a folder with ``images/SPLIT`` and ``annotations/SPLIT``.

    ADE20K is known by its ``objectInfo150.txt``, which names the classes; its 0 is ignored. Else ``classes.txt`` in the
    same folder names a class on each line, the first being number 0.

    Args:
        root: the folder.
        split: its name, or "train" or "val" for any of their synonyms (training, validation ...).
        class_names: instead of the file's.
        ignored: the number in the masks that stands for no class.

    Raises:
        DataError: folders, masks or names are missing; each is named.
    """
    names = (split, *split_names(split))
    folders = [Path(root, kind) for kind in ("images", "annotations")]
    found = next((name for name in names if all((folder / name).is_dir() for folder in folders)), None)
    if found is None:
        raise DataError(f"{shown(root)} has no folders images/{split} and annotations/{split}")
    ade = Path(root, "objectInfo150.txt")
    if class_names is None:
        class_names = _ade_names(ade) if ade.exists() else names_in(Path(root, "classes.txt"))
    pictures, masks = folders
    return pair(pictures / found, masks / found, class_names, reduce_zero=ade.exists(), ignored=ignored)


def pair(
    pictures: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    class_names: list[str],
    reduce_zero: bool = False,
    ignored: int = 255,
) -> MaskedPictures:
    """Pair the files of two folders by their paths inside them, endings aside.

    Raises:
        DataError: there are no pictures, a picture has no mask, several files could be meant, or several classes have
            one name.
    """
    problems: list[str] = []

    def listed(folder: str | os.PathLike[str]) -> dict[str, str]:
        files: dict[str, str] = {}
        start = len(os.path.join(os.fspath(folder), ""))
        for path in image_files(os.fspath(folder), lambda error: problems.append(shown(str(error)))):
            key = os.path.splitext(path[start:])[0]
            if key in files:
                problems.append(f"{shown(path)} and {shown(files[key])}: which of them is meant?")
            files[key] = path
        return files

    of_pictures, of_masks = listed(pictures), listed(masks)
    where = shown(pictures)
    problems += [
        f"{shown(of_pictures[key])}: no mask in {shown(masks)}" for key in of_pictures.keys() - of_masks.keys()
    ]
    refuse(sorted(problems), len(of_pictures), "pictures", where)
    if not of_pictures:
        raise DataError(f"{where} holds no images")
    if not class_names:
        raise DataError(f"{where}: there are no classes")
    if reason := repeated(class_names):
        raise DataError(f"{where}: {reason}")
    keys = list(of_pictures)
    return MaskedPictures(
        where, class_names, [of_pictures[k] for k in keys], [of_masks[k] for k in keys], reduce_zero, ignored
    )


def _ade_names(file: Path) -> list[str]:
    """The first name of each class in ADE20K's table, whose columns are parted by tabs."""
    rows = [line.split("\t") for line in names_in(file)]
    return [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()]
