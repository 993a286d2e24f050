"""One worker: reads the images of a unit, has the network see them in full batches, and writes the unit's part."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import socket
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
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
from vmamba.errors import BatchError, ImageError, in_one_line
from vmamba.files import shown

_FETCHING = 16  # files that are asked for at the same time, where each answer takes a while
_BLAMED = 2  # times that a worker dies over one image before the image is left out
_SHORT = re.compile("out of memory|allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)

A = TypeVar("A")
B = TypeVar("B")


class LostError(Exception):
    """A worker is of no more use, and another must take its place."""


class Done(NamedTuple):
    """A unit that is done: how many images it had, and how many of them could not be used."""

    unit: int
    images: int
    bad: int


class _Sample(NamedTuple):
    """What the network is to see of an image, or why there is nothing; the image's name and its place in the unit."""

    place: int
    name: str
    value: Any


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
            LostError: memory ran short; the accelerator has failed.
        """
        try:
            return self._done(unit, deaths)
        except MemoryError as error:
            raise LostError(f"memory ran short: {in_one_line(error)[:300]}") from None
        except torch.AcceleratorError as error:
            raise LostError(f"its accelerator failed: {in_one_line(error)[:300]}") from None

    def _done(self, unit: int, deaths: int) -> Done:
        part = self.journal.part(unit)
        if deaths and places.exists(part):  # the last worker died between writing it and saying so
            with places.open_file(part) as file:
                images, bad = (int(pq.read_schema(file).metadata[name]) for name in (b"images", b"bad"))
            return Done(unit, images, bad)
        items = itertools.chain.from_iterable(images_of(each, self.column) for each in self.journal.segments(unit))
        rows = self._carefully(unit, items) if deaths >= _BLAMED else self._rows(items)
        bad = sum(row["error"] is not None for row in rows)
        content = io.BytesIO()
        facts = {"images": str(len(rows)), "bad": str(bad), "worker": f"{socket.gethostname()} {os.getpid()}"}
        pq.write_table(pa.Table.from_pylist(rows, self.schema.with_metadata(facts)), content, compression="zstd")
        places.write(part, content.getvalue())
        return Done(unit, len(rows), bad)

    def _rows(self, items: Iterable[Item]) -> list[dict[str, Any]]:
        """A row for each item, in order; those of one kind go through the network together."""
        rows: dict[int, dict[str, Any]] = {}
        waiting: dict[Hashable, list[_Sample]] = {}  # by kind, less than a batch of each
        here = ahead(self.fetching, Item.fetched, items, _FETCHING, lambda item: item.is_remote)
        for sample in ahead(self.decoding, self._sample, enumerate(here), self.work.batch_size + self.threads):
            if isinstance(sample.value, ImageError):
                rows |= self._error(sample, sample.value)
                continue
            group = waiting.setdefault(self.work.kind(sample.value), [])
            group.append(sample)
            if not self._is_full(group):
                if not self._is_full(itertools.chain(*waiting.values()), 2):
                    continue
                group = max(waiting.values(), key=len)
            rows |= self._batch(group)
            group.clear()
        for group in filter(None, waiting.values()):
            rows |= self._batch(group)
        return [rows[place] for place in sorted(rows)]

    def _is_full(self, samples: Iterable[_Sample], batches: int = 1) -> bool:
        return self.work.is_full([sample.value for sample in samples], batches)

    def _sample(self, numbered: tuple[int, Item]) -> _Sample:
        place, item = numbered
        try:
            return _Sample(place, item.name, self.work.sample(item.read(self.work.in_chans)))
        except ImageError as error:
            return _Sample(place, item.name, error)

    def _batch(self, samples: list[_Sample], again: bool = True) -> dict[int, dict[str, Any]]:
        """The rows of samples, by place. One that the network cannot take costs no other its row.

        Raises:
            MemoryError: it is too short for any image.
            AcceleratorError: it has failed.
        """
        most = self.work.batch_size
        if len(samples) > most:
            return self._batch(samples[:most]) | self._batch(samples[most:])
        try:
            found = self.work.rows([sample.value for sample in samples])
            return {s.place: self._row(s.name, values) for s, values in zip(samples, found, strict=True)}
        except torch.AcceleratorError:  # after which nothing works any more
            raise
        except (RuntimeError, MemoryError, ValueError) as error:
            reason = in_one_line(error)[:300]
            is_short = isinstance(error, MemoryError) or bool(_SHORT.search(str(error)))
        # Not above, where the error holds on to what was in memory.
        if len(samples) > 1:
            half = len(samples) // 2
            rows = self._batch(samples[:half]) | self._batch(samples[half:])
            if is_short and not any(row["error"] for row in rows.values()):  # it was not one image's fault
                self.work.batch_size = min(half, self.work.batch_size)
            return rows
        if is_short and again:
            try:
                self.work.fits()
            except BatchError:
                raise MemoryError(reason) from None
            return self._batch(samples, again=False)
        return self._error(samples[0], f"{shown(samples[0].name)}: the network cannot take it: {reason}")

    def _error(self, sample: _Sample, why: object) -> dict[int, dict[str, Any]]:
        return {sample.place: self._row(sample.name, {"error": str(why)})}

    def _row(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        return {"file": shown(name), "error": None, **values, "model": self.model, "version": __version__}

    def _carefully(self, unit: int, items: Iterable[Item]) -> list[dict[str, Any]]:
        """The same, one image after another, having noted which one it is before anything is done with it."""
        notes = self.journal.place("attempts", f"{unit:08}")
        places.make_folder(self.journal.place("attempts"))
        died = json.loads(places.read(notes)) if places.exists(notes) else []
        times = Counter(died)  # the last of them is what the worker before this one was at
        rows: dict[int, dict[str, Any]] = {}
        for place, item in enumerate(items):
            if times[place] >= _BLAMED:
                message = "a worker died each time it was tried: it takes too much memory, or breaks a library"
                rows |= self._error(_Sample(place, item.name, None), f"{shown(item.name)}: {message}")
                continue
            places.write(notes, json.dumps([*died, place]).encode())
            sample = self._sample((place, item))
            is_bad = isinstance(sample.value, ImageError)
            rows |= self._error(sample, sample.value) if is_bad else self._batch([sample])
        places.remove(notes)
        return [*rows.values()]


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
