"""The models that the page offers, and those that are loaded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from vmamba.app.texts import Language, plain
from vmamba.errors import CheckpointError, RecipeError
from vmamba.files import shown
from vmamba.models.download import download, path_of
from vmamba.models.folders import task_of
from vmamba.models.registry import ENTRIES, create_model, list_models
from vmamba.tasks import parts_of
from vmamba.tasks.detector import Detector
from vmamba.tasks.prediction import Predictor, Weights, load_weights
from vmamba.tasks.runs import RunFolder, report
from vmamba.tasks.segmenter import Segmenter

_MOST_LOADED = 3
_DENSE_SIDE = 384  # at which a visitor need not wait long for a dense model, and what is kept of its scans is small

Origin = Literal["trained", "published", "untrained"]


@dataclass(frozen=True)
class Choice:
    """One line of the list.

    Attributes:
        name: what it is called there: a run, a file or a variant.
        task: of the model.
        origin: of its weights; "trained" for those of a file.
        load: reads or makes it.
    """

    name: str
    task: str
    origin: Origin
    load: Callable[[], Weights] = field(repr=False, compare=False)

    def label(self, language: Language) -> str:
        """The line, in one language."""
        note = plain(self.task if self.origin == "trained" else self.origin, language)
        return f"{self.name} · {note}"


class Loaded(NamedTuple):
    """A model ready for use.

    Attributes:
        choice: its line in the list.
        model: in evaluation mode, on the CPU.
        predictor: what makes its prediction, of its own task; of dense models from pictures of few pixels.
        lock: held while hooks are on the model, so that two visitors do not see each other's pictures.
    """

    choice: Choice
    model: nn.Module
    predictor: Predictor
    lock: threading.Lock


class Catalogue:
    """The models to choose from; the ones used last stay loaded.

    Args:
        checkpoints: files or folders, listed first, which must be readable.
        pretrained: models whose published weights are offered, downloaded now if they are not in the cache.
        runs: a folder of runs, whose models are listed as far as they can be read.

    Raises:
        CheckpointError: one of `checkpoints` cannot be read, or published weights cannot be had.
        RecipeError: there are no published weights of a name.
    """

    def __init__(
        self, checkpoints: Sequence[str] = (), pretrained: Sequence[str] = (), runs: str | Path = "runs"
    ) -> None:
        for name in pretrained:
            if name not in ENTRIES or not (url := ENTRIES[name].url):
                raise RecipeError(f"there are no published weights of {name!r}; `vmamba models` lists the models")
            download(url)
        choices = [_of_file(path, shown(path)) for path in checkpoints]
        choices += _of_runs(Path(runs))
        choices += [_of_variant(name, "published") for name in ENTRIES if _is_cached(name)]
        choices += [_of_variant(name, "untrained") for name in list_models()]
        self.choices = {f"{choice.origin} {choice.name}": choice for choice in choices}
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def first(self) -> str:
        """The key of the model to begin with: the first that has learned something."""
        return next(iter(self.choices))

    def labels(self, language: Language) -> list[tuple[str, str]]:
        """Each line with its key, in one language."""
        return [(choice.label(language), key) for key, choice in self.choices.items()]

    def load(self, key: object) -> Loaded:
        """The model of a line.

        Raises:
            KeyError: there is no such line.
            CheckpointError: its file cannot be read.
        """
        if not isinstance(key, str):
            raise KeyError(key)
        with self._lock:
            if key not in self._loaded:
                choice = self.choices[key]
                weights = choice.load()
                predictor = _bounded(parts_of(weights.task).load("predictor").from_weights(weights))
                self._loaded[key] = Loaded(choice, weights.model, predictor, threading.Lock())
                while len(self._loaded) > _MOST_LOADED:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(key)
            return self._loaded[key]


def _bounded(predictor: Predictor) -> Predictor:
    """The same, of dense models for pictures of at most so many pixels a side."""
    if isinstance(predictor, Segmenter):
        shorter, longer = (min(side, _DENSE_SIDE) for side in predictor.pre.img_size)
        return replace(predictor, pre=replace(predictor.pre, img_size=(shorter, longer)))
    if isinstance(predictor, Detector):
        shorter, longer = (min(side, _DENSE_SIDE) for side in predictor.sides)
        return replace(predictor, sides=(shorter, longer))
    return predictor


def _of_file(path: str | Path, name: str) -> Choice:
    return Choice(name, task_of(path), "trained", lambda: load_weights(str(path)))


def _of_runs(folder: Path) -> Iterable[Choice]:
    """The models of the runs in a folder, the demo's first; a link to another run in it is not listed again."""
    files = sorted(folder.glob("*/model.safetensors"), key=lambda file: (file.parent.name != "demo", file))
    for file in files:
        run = RunFolder(file.parent).path
        if run.is_symlink() and run.resolve().parent == folder.resolve():
            continue
        try:
            yield _of_file(file, shown(run))
        except (CheckpointError, OSError) as error:
            report(f"{file} is left out: {error}")


def _of_variant(name: str, origin: Origin) -> Choice:
    def load() -> Weights:
        if origin == "published":
            return load_weights(name=name)
        with torch.random.fork_rng(devices=[]):  # the same weights in every visit, and nobody else's draws disturbed
            torch.manual_seed(0)
            return Weights(create_model(name).eval(), {}, name)

    return Choice(name, ENTRIES[name].task, origin, load)


def _is_cached(name: str) -> bool:
    """Whether a variant's published file has been downloaded already."""
    url = ENTRIES[name].url
    return url is not None and path_of(url).exists()
