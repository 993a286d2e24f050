"""One worker: reads the images of a unit, has the network see them in full batches, and writes the unit's part."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vmamba import __version__
from vmamba.deploy.batch import places
from vmamba.deploy.batch.journal import Journal
from vmamba.deploy.batch.sources import Item, images_of
from vmamba.deploy.batch.work import Work
from vmamba.errors import ImageError
from vmamba.files import shown

_FETCHING = 16  # files that are asked for at the same time, where each answer takes a while
_BLAMED = 2  # times that a worker dies over one image before the image is left out

A = TypeVar("A")
B = TypeVar("B")


class Done(NamedTuple):
    """A unit that is done: how many images it had, and how many of them could not be used."""

    unit: int
    images: int
    bad: int


class Worker:
    """What an actor is.

    Args:
        work: the network and what to do with it.
        output: the folder of the results.
        model: what the results call the network.
        column: of Parquet sources: where the images are.
        threads: cores to use.
        device: where the network is to be.
    """

    def __init__(
        self, work: Work, output: str, model: str, column: str | None = None, threads: int = 1, device: str = "cpu"
    ) -> None:
        self.work, self.model, self.column, self.threads = work, model, column, threads
        self.journal = Journal(output)
        torch.set_num_threads(threads)
        work.to(device)
        # A thread beside the network's own helps only where that does not compute on the same core.
        self.decoding = ThreadPoolExecutor(threads) if threads > 1 or device != "cpu" else None
        self.fetching = ThreadPoolExecutor(_FETCHING)
        about = [("model", pa.string()), ("version", pa.string())]
        self.schema = pa.schema([("file", pa.string()), ("error", pa.string()), *work.columns, *about])

    def ready(self) -> bool:
        """Answers as soon as the worker can be given something to do."""
        return True

    def do(self, unit: int, deaths: int = 0) -> Done:
        """Compute a unit and write its part; one that is there already is left as it is.

        Args:
            unit: its number.
            deaths: how many workers have died over it. From the second on each image is taken alone, and one that two
                workers died over is left out, with an error in its row.

        Raises:
            OSError: the part cannot be written.
        """
        part = self.journal.part(unit)
        if deaths and places.exists(part):  # the last worker died between writing it and saying so
            with places.open_file(part) as file:
                images, bad = (int(pq.read_schema(file).metadata[name]) for name in (b"images", b"bad"))
            return Done(unit, images, bad)
        items = itertools.chain.from_iterable(images_of(each, self.column) for each in self.journal.segments(unit))
        rows = list(self._carefully(unit, items) if deaths >= _BLAMED else self._rows(items))
        bad = sum(row["error"] is not None for row in rows)
        content = io.BytesIO()
        facts = {"images": str(len(rows)), "bad": str(bad), "worker": f"{socket.gethostname()} {os.getpid()}"}
        pq.write_table(pa.Table.from_pylist(rows, self.schema.with_metadata(facts)), content, compression="zstd")
        places.write(part, content.getvalue())
        return Done(unit, len(rows), bad)

    def _rows(self, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """A row for each item, in order."""
        waiting: list[tuple[str, Any]] = []  # a batch of samples, and the items in error between them
        samples = 0
        here = ahead(self.fetching, Item.fetched, items, _FETCHING, lambda item: item.is_remote)
        for name, sample in ahead(self.decoding, self._sample, here, self.work.batch_size + self.threads):
            waiting.append((name, sample))
            samples += not isinstance(sample, ImageError)
            if samples == self.work.batch_size:
                yield from self._batch(waiting)
                waiting, samples = [], 0
        yield from self._batch(waiting)

    def _sample(self, item: Item) -> tuple[str, Any]:
        try:
            return item.name, self.work.sample(item.read(self.work.in_chans))
        except ImageError as error:
            return item.name, error

    def _batch(self, waiting: list[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        good = [(name, sample) for name, sample in waiting if not isinstance(sample, ImageError)]
        found = iter(self._found(good) if good else ())
        for name, sample in waiting:
            values = sample if isinstance(sample, ImageError) else next(found)
            values = {"error": str(values)} if isinstance(values, ImageError) else values
            yield {"file": shown(name), "error": None, **values, "model": self.model, "version": __version__}

    def _found(self, good: list[tuple[str, Any]]) -> list[Any]:
        """What the network makes of samples, or of one that it cannot take, as when memory is too small, why not."""
        try:
            return self.work.rows([sample for _, sample in good])
        except torch.AcceleratorError:  # after which nothing works any more
            raise
        except (RuntimeError, MemoryError, ValueError) as error:
            if len(good) > 1:
                return [self._found([each])[0] for each in good]
            message = " ".join(str(error).split())[:300] or type(error).__name__
            return [ImageError(f"{shown(good[0][0])}: the network cannot take it: {message}")]

    def _carefully(self, unit: int, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """The same, one image after another, having noted which one it is before anything is done with it."""
        notes = self.journal.place("attempts", f"{unit:08}")
        places.make_folder(self.journal.place("attempts"))
        died = json.loads(places.read(notes)) if places.exists(notes) else []
        times = Counter(died)  # the last of them is what the worker before this one was at
        for number, item in enumerate(items):
            if times[number] >= _BLAMED:
                message = "a worker died each time it was tried: it takes too much memory, or breaks a library"
                yield from self._batch([(item.name, ImageError(f"{shown(item.name)}: {message}"))])
                continue
            places.write(notes, json.dumps([*died, number]).encode())
            yield from self._batch([self._sample(item)])
        places.remove(notes)


def ahead(
    pool: Executor | None, function: Callable[[A], B], values: Iterable[A], most: int,
    wanted: Callable[[A], bool] = lambda _: True,
) -> Iterator[Any]:  # fmt: skip
    """The function of each value, in order, computed by a pool so many values ahead; in this thread without one.

    Values that are not wanted are given as they are.
    """
    if pool is None:
        yield from map(function, values)
        return
    waiting: deque[Any] = deque()
    for value in values:
        waiting.append(pool.submit(function, value) if wanted(value) else value)
        if len(waiting) > most or not isinstance(waiting[0], Future):
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _result(value: Any) -> Any:
    return value.result() if isinstance(value, Future) else value
