"""Data sets behind one interface: what timm's factory reads, checked before any work, decoded by `read_image`."""

from __future__ import annotations

import errno
import functools
import gzip
import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_wds import ReaderWds
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset

from vmamba.data.config import STREAMS, DataConfig
from vmamba.data.images import check_channels, image_files, is_hidden, is_image, read_image, standard_image
from vmamba.data.tars import members
from vmamba.errors import DataError, ImageError
from vmamba.files import replacing, shown

PADDING = -1  # the label of samples that only fill up the last validation batches of a distributed run, or have none

_NAMED = 8  # of several names in an error
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation", "test")}

_TORCH_FOLDERS = {  # what torchvision expects in data.root
    "torch/cifar10": "cifar-10-batches-py",
    "torch/cifar100": "cifar-100-python",
    "torch/fashion_mnist": "FashionMNIST/raw",
    "torch/kmnist": "KMNIST/raw",
    "torch/mnist": "MNIST/raw",
    "torch/qmnist": "QMNIST/raw",
}


@dataclass(frozen=True)
class ImageFiles:
    """Images in class folders, in a folder or a .tar file: ``root`` and, of each, its path there and its label.

    Of a .tar file, ``places`` tells where in it each image begins and how many bytes it has. Every read opens the file
    anew: no position is shared between processes.
    """

    root: str
    paths: list[str]
    targets: list[int]
    class_to_idx: dict[str, int]
    places: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file of a sample."""
        return os.path.join(self.root, self.paths[index])

    def read(self, index: int, in_chans: int) -> Image.Image:
        """The decoded image; `read_image` tells the errors."""
        if self.places is None:
            return read_image(self.name(index), in_chans)
        start, size = self.places[index]
        with open(self.root, "rb") as tar:
            tar.seek(start)
            return read_image(io.BytesIO(tar.read(size)), in_chans, self.name(index))


@dataclass(frozen=True)
class Split:
    """One opened split: our own, timm's or torchvision's data set, and what is known of it before reading an image."""

    source: Any
    class_names: list[str] | None
    where: str

    @property
    def is_stream(self) -> bool:
        """Whether samples come in a row (shards, streaming) rather than by index."""
        return isinstance(self.source, IterableImageDataset)

    @property
    def shards(self) -> int | None:
        """Of a stream whose workers share whole .tar files among them, how many there are."""
        reader = getattr(self.source, "reader", None)
        return len(reader.split_info.filenames) if isinstance(reader, ReaderWds) else None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        """The decoded image and label at an index.

        Raises:
            ImageError: the image cannot be used; the message names its file.
        """
        if isinstance(self.source, ImageFiles):
            return self.source.read(index, in_chans), self.source.targets[index]
        if isinstance(self.source, ImageDataset):
            file, label = self.source.reader[index][:2]
            with file:
                return read_image(file, in_chans, self.name(index)), PADDING if label is None else int(label)
        try:
            image, label = self.source[index]
            return standard_image(image, in_chans), int(label)
        except (OSError, ValueError) as error:
            raise ImageError(f"{self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        """The file of a sample, or where it stands in the data set, as text for messages."""
        name = None
        if isinstance(self.source, ImageFiles):
            name = self.source.name(index)
        elif isinstance(self.source, ImageDataset):
            name = self.source.reader.filename(index, absolute=True)
        elif hasattr(self.source, "samples"):  # torchvision's folders
            name = self.source.samples[index][0]
        return shown(str(name)) if name else f"{self.where}, sample {index}"

    def labels(self) -> Sequence[int] | None:
        """Every label, where they are known without reading images."""
        reader: Any = getattr(self.source, "reader", self.source)
        labels = getattr(reader, "targets", None)
        if hasattr(reader, "iter_targets"):
            labels = list(reader.iter_targets())
        elif labels is None and hasattr(reader, "samples"):
            labels = [label for _, label in reader.samples]
        if labels is None:
            return None
        if getattr(labels, "ndim", 1) == 2:  # QMNIST's, whose first column is the class
            labels = labels[:, 0]
        try:
            return [int(label) for label in labels]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the labels of {self.where} are not class numbers; name theirs with data.target_key"
            ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_split(config: DataConfig, training: bool, class_names: Sequence[str] | None = None, seed: int = 0) -> Split:
    """Open the training or the validation split.

    Args:
        class_names: of a folder or .tar file: the classes, in the order of their labels, that it may hold. By default
            the labels follow the sorted names of the class folders.
        seed: of the order in which a stream is shuffled.

    Raises:
        DataError: the split is missing, empty, holds other classes than those given, or nothing to learn from.
    """
    if config.in_chans is not None:
        check_channels(config.in_chans)
    split = config.train_split if training else config.val_split
    root = config.root if training or config.val_root is None else config.val_root
    if not config.dataset:
        root = _split_root(config, root, split)
        where = shown(root)
        source: Any = _open_files(root, where, {split, *split_names(split)}, class_names)
    else:
        where = " ".join(filter(None, (config.dataset, f"({split})", f"in {shown(root)}" if root else "")))
        source = _open_named(config, root, split, training, seed, where)
        if not len(source):
            raise DataError(
                f"how many images there are in {where} is not known: give the number after the shards, as in "
                f"'val-{{000..004}}.tar|5000', or describe the shards in an _info.json beside them"
                if isinstance(source, IterableImageDataset)
                else f"{where} is empty"
            )
    names = _class_names(source) or (names_in(Path(config.class_names)) if config.class_names else None)
    if reason := repeated(names or ()):
        raise DataError(f"{where}: {reason}")
    if training and (config.num_classes or len(names or ())) == 1:
        raise DataError(
            f"{where} has one class{f' ({names[0]})' if names else ''}: there is nothing to tell apart. Put the images "
            f"of each class in a folder of their own"
        )
    return Split(source, names, where)


def split_names(split: str) -> tuple[str, ...]:
    """The names that a split of this name may have."""
    return next((names for names in _SPLITS.values() if split in names), (split,))


def _split_root(config: DataConfig, root: str | None, split: str) -> str:
    """The folder or .tar file that holds one split."""
    if root is None:
        raise DataError("data.root is not set: name a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    where, names = shown(root), split_names(split)
    if not os.path.exists(root):
        raise DataError(f"{where}: no such folder or .tar file")
    if config.val_root is not None:
        return root
    if os.path.isfile(root):
        raise DataError(f"{where} is one file: give the other split its own with data.val_root")
    for name in (split, *names):
        for path in (os.path.join(root, name), os.path.join(root, f"{name}.tar")):
            if os.path.isdir(path) or os.path.isfile(path):
                return path
    found = sorted(shown(entry.name) for entry in os.scandir(root) if entry.is_dir() or entry.name.endswith(".tar"))
    raise DataError(
        f"{where} has no folder {' or '.join(names)}; it holds {_some(found) or 'no folders'}. Put the images under "
        f"{where}/train/CLASS and {where}/val/CLASS, or such folders into train.tar and val.tar, or name the two "
        f"places with data.root and data.val_root"
    )


def _open_files(root: str, where: str, split_names: set[str], class_names: Sequence[str] | None) -> ImageFiles:
    """A folder of class folders, or a .tar file of one: the first level is the class, whatever lies deeper."""
    places: dict[str, tuple[int, int]] = {}
    if os.path.isdir(root):
        problems: list[str] = []
        files = image_files(root, lambda error: problems.append(shown(str(error))))
        if problems:
            raise DataError(f"folders in {where} cannot be read: {_some(problems)}")
        paths = [path[len(os.path.join(root, "")) :].replace(os.sep, "/") for path in files]
        folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name)}
    elif root.lower().endswith(".tar"):
        places, folders = _tar_places(root, split_names | {Path(root).stem})
        paths = list(places)
    else:
        raise DataError(f"{where} is a file, but not a .tar file")
    if not paths:
        raise DataError(f"{where} holds no images in class folders; expected {where}/CLASS/IMAGE")
    if loose := [shown(path) for path in paths if "/" not in path]:
        raise DataError(f"{where} holds images outside of class folders: {_some(loose)}. Move them to {where}/CLASS/")
    paths.sort(key=natural_key)
    labels = [shown(path.split("/", 1)[0]) for path in paths]
    found = set(labels)
    if empty := sorted({shown(folder) for folder in folders} - found):
        raise DataError(f"class folders without a single image in {where}: {_some(empty)}")
    if class_names is None:
        class_names = sorted(sorted(found), key=natural_key)
    elif surplus := sorted(found - set(class_names)):
        missing = [name for name in class_names if name not in found]
        raise DataError(
            f"the class folders of {where} ({len(found)}) are not among the {len(class_names)} classes expected; "
            f"missing: {_some(missing) or 'none'}; unknown: {_some(surplus)}"
        )
    index = {name: i for i, name in enumerate(class_names)}
    targets = [index[label] for label in labels]
    return ImageFiles(root, paths, targets, index, [places[path] for path in paths] if places else None)


def _tar_places(root: str, wrappers: set[str]) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Of a .tar file: the images by their paths (where each begins, its size), and the folders of the first level.

    A .tar file inside counts as a folder of its name. Folders around all classes (``data/train/CLASS``) are left out if
    the last of them is named in ``wrappers``.
    """
    places: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()

    def scan(tar: Any, prefix: str, start: int) -> None:
        for name, member in members(tar, start):
            path = prefix + name
            if member.isdir() and not is_hidden(path):
                folders.add(path)
            elif member.isreg() and is_image(path):
                places[path] = start + member.offset_data, member.size
            elif member.isreg() and path.lower().endswith(".tar") and not (prefix or is_hidden(path)):
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    scan(inner, f"{path[:-4]}/", start + member.offset_data)

    try:
        with tarfile.open(root, "r:") as tar:
            scan(tar, "", 0)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{shown(root)} cannot be read as a .tar file: {error}") from error
    around = os.path.commonpath(places).split("/") if places else []
    depth = max((i + 1 for i, name in enumerate(around) if name in wrappers), default=0)
    if any(path.count("/") <= depth for path in places):  # then it is a class that happens to have such a name
        depth = 0

    def inside(path: str) -> str:
        return path.split("/", depth)[-1]

    first = {inside(folder).split("/")[0] for folder in folders if folder.count("/") >= depth}
    return {inside(path): place for path, place in places.items()}, first


def _open_named(config: DataConfig, root: str | None, split: str, training: bool, seed: int, where: str) -> Any:
    """A data set that timm's factory knows by name."""
    if not config.dataset.startswith("hf") and root is None:
        raise DataError(f"data.root is not set: {config.dataset} needs the folder that holds the data")
    arguments: dict[str, Any] = {
        "name": config.dataset, "root": root, "split": split, "is_training": training, "seed": seed,
        "batch_size": config.batch_size, "input_key": config.input_key, "target_key": config.target_key,
    }  # fmt: skip
    if config.dataset.startswith(STREAMS):
        arguments["input_img_mode"] = ""  # as stored: `standard_image` does the rest
        arguments["num_samples"] = config.num_samples if training else None
    try:
        if folder := _TORCH_FOLDERS.get(config.dataset.lower()):
            _unpack(Path(root or ".") / folder)
        if not config.download:
            return create_dataset(**arguments)
        try:
            return create_dataset(**arguments)
        except RuntimeError:  # torchvision's answer to a data set that is not there
            os.makedirs(root or ".", exist_ok=True)
            with FileLock(os.path.join(root or ".", ".download.lock")):
                return create_dataset(**arguments, download=True)
    except ImportError as error:
        raise DataError(f"{where} needs a package that is not installed: {error}") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"{where} cannot be opened: {error}") from error
        raise DataError(
            f"{where} has to be unpacked, but its folder cannot be written ({error}). Copy it to a folder of your own "
            f"and give that as data.root"
        ) from error
    except Exception as error:  # each library has its own exceptions for data that is not there
        raise DataError(f"{where} cannot be opened: {_reason(config, root, error)}") from error


def _reason(config: DataConfig, root: str | None, error: Exception) -> str:
    """Why a data set cannot be opened, and what to do."""
    said = str(error).rstrip(".") or type(error).__name__
    if config.download:
        return said
    if "num_samples not specified" in said:
        return "the number of its images is not known: set data.num_samples"
    if isinstance(error, AssertionError) and config.dataset.startswith("torch/"):
        return f"{said}; there are {', '.join(_TORCH_FOLDERS)} and some larger ones"
    hint = "If it has to be downloaded first, train with data.download set to true"
    folder = _TORCH_FOLDERS.get(config.dataset.lower())
    if folder is None or root is None or os.path.isdir(looked := os.path.join(root, folder)):
        return f"{said}. {hint}"
    given = Path(os.path.abspath(root))
    found = next((place for place in (*given.parents, *given.glob("*")) if (place / folder).is_dir()), None)
    if found is None:
        return f"there is no {shown(looked)}; give the folder that holds {folder}. {hint}"
    instead = found if os.path.isabs(root) else os.path.relpath(found)
    return f"there is no {shown(looked)}; give {shown(instead)}, which holds {folder}, instead of {shown(root)}"


def names_in(file: Path) -> list[str]:
    """The lines of a file that names a class on each; blank ones do not count.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(file)} should name a class on each line: {error}") from error


def repeated(names: Sequence[str]) -> str | None:
    """Which names stand for several classes, whose results could not be told apart; None where each stands for one."""
    several = [name for name, count in Counter(names).items() if count > 1]
    return f"several classes are called {_some(several)}: give each a name of its own" if several else None


def _unpack(folder: Path) -> None:
    """Unpack what torchvision's MNIST family was given as .gz files: it opens only files that it packed itself.

    Each file appears whole or not at all, so that processes which do this at the same time, or are killed, do no harm.
    """
    for packed in folder.glob("*.gz"):
        target = packed.with_suffix("")
        if not target.exists():
            with gzip.open(packed) as source, replacing(target) as partial, partial.open("wb") as file:
                shutil.copyfileobj(source, file)


def _class_names(source: Any) -> list[str] | None:
    mapping = getattr(getattr(source, "reader", source), "class_to_idx", None)
    if not mapping:
        return None
    return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def number_of_classes(config: DataConfig, split: Split) -> int:
    """How many classes a split has, from its names or the configuration; every known label is checked against it.

    Raises:
        DataError: the number is unknown, contradictory, or some label is outside of it.
    """
    known = len(split.class_names) if split.class_names else None
    number = config.num_classes or known
    if number is None:
        raise DataError(f"{split.where} does not say how many classes it has: set data.num_classes")
    if known and number < known:
        raise DataError(f"data.num_classes is {number}, but {split.where} has {known} classes")
    labels = split.labels()
    if labels is not None and len(labels) and not (min(labels) >= 0 and max(labels) < number):
        bad = next(i for i, label in enumerate(labels) if not 0 <= label < number)
        raise DataError(f"{split.name(bad)} has label {labels[bad]}, outside of 0 to {number - 1} ({number} classes)")
    return number


def check_same_classes(train: Split, val: Split) -> None:
    """Refuse splits whose classes differ.

    Raises:
        DataError: naming the classes that only one of them has.
    """
    if train.class_names is None or val.class_names is None or train.class_names == val.class_names:
        return
    only_train = [name for name in train.class_names if name not in set(val.class_names)]
    only_val = [name for name in val.class_names if name not in set(train.class_names)]
    raise DataError(
        f"the classes of {train.where} and {val.where} differ; only in the first: {_some(only_train) or 'none'}; "
        f"only in the second: {_some(only_val) or 'none'}"
        + ("" if only_train or only_val else "; they are the same but in another order")
    )


def refuse(problems: Sequence[str], number: int, kind: str, where: str, most: int = 50) -> None:
    """End with a list of what is wrong with some of ``number`` things, if anything is.

    Raises:
        DataError: there are problems; the first ``most`` of them are listed.
    """
    if problems:
        listed = [*problems[:most], *([f"and {len(problems) - most} more"] if len(problems) > most else [])]
        lines = "\n  ".join(listed)
        raise DataError(f"{len(problems)} of {number} {kind} in {where} cannot be used:\n  {lines}")


class _Check(Dataset[str]):
    def __init__(self, length: int, read: Callable[[int], Any]) -> None:
        self.length, self.read = length, read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        try:
            self.read(index)
        except (ImageError, DataError) as error:
            return str(error)
        return ""


def check_all(length: int, read: Callable[[int], Any], where: str, workers: int = 0) -> None:
    """Read every sample, by ``read`` of its index, with a progress bar on stderr.

    Raises:
        DataError: listing every file that cannot be used.
    """
    loader: DataLoader[str] = DataLoader(_Check(length, read), batch_size=32, num_workers=workers, collate_fn=list)
    problems = [message for batch in tracked(loader, f"checking {where}") for message in batch if message]
    refuse(problems, length, "images", where, most=len(problems))


def tracked(work: Any, description: str, transient: bool = False) -> Any:
    """The same iterable, with a progress bar on stderr if that is a terminal; one that goes at the end if wanted."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(work, description, console=console, transient=transient, disable=not console.is_terminal)


def check_files(split: Split, in_chans: int, workers: int = 0) -> None:
    """Decode every image of a split, with a progress bar on stderr.

    Raises:
        DataError: listing every file that cannot be used.
    """
    if split.is_stream:
        raise DataError(f"data.check_files needs images that can be read one by one; {split.where} is a stream")
    check_all(len(split), functools.partial(split.read, in_chans=in_chans), split.where, workers)
