"""What a job keeps beside its results: what it is to do, and so, from the results that are there, what is left of it.

In the folder of the results::

    part-00000000.parquet     results, one file for each unit of the plan, written whole
    _job/job.json             the settings, the model's digest
    _job/plan.parquet         the segments of the sources; row group k is unit k

Nothing else decides: a part that is there is done, one that is not is to be computed, so that no row is ever written
twice and a job can be stopped at any moment.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vmamba.deploy.batch import places
from vmamba.deploy.batch.sources import Extent, Segment
from vmamba.errors import BatchError
from vmamba.files import shown

FORMAT = 1  # of what is written here
_SCHEMA = pa.schema([
    ("kind", pa.string()), ("path", pa.binary()), ("start", pa.int64()), ("images", pa.int64()), ("error", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)
class Journal:
    """The journal of the job whose results are in a folder, given by path or address."""

    output: str
    _lazy: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def place(self, *names: str) -> str:
        """The address of a file of the journal."""
        return places.join(self.output, "_job", *names)

    # --- what the job is

    def goes_on(self, about: dict[str, Any], overwrite: bool = False) -> bool:
        """Whether the folder holds this very job, which goes on where it was; nothing of it is touched yet.

        Args:
            about: all that its results depend on, as JSON can hold it.
            overwrite: another job's results may go, and those of this one if it is finished.

        Raises:
            BatchError: the folder holds results of something else.
        """
        about, parts = _plain(about), self.parts()
        try:
            before = self._before()
        except BatchError:
            if not overwrite:
                raise
            before = {}
        if before == about:
            return not (overwrite and self.is_done)
        if overwrite:
            return False
        if before and (parts or self.is_planned):  # else nothing is lost
            changes = "; ".join(
                f"{name}: {_brief(before.get(name))} -> {_brief(about.get(name))}"
                for name in sorted({*before, *about})
                if before.get(name) != about.get(name)
            )
            raise self._refusal(f"another job: {changes}")
        if parts:
            raise self._refusal("results of an unknown job")
        return False

    def begin(self, about: dict[str, Any]) -> None:
        """Make the folder ready for a new job: what it holds of another is deleted."""
        for name in ("job.json", "plan.parquet", "attempts"):  # without the first, nothing of the rest counts
            places.remove(self.place(name))
        for unit in self.parts():
            places.remove(self.part(unit))
        places.make_folder(places.join(self.output, "_job"))
        places.write(self.place("job.json"), json.dumps(_plain(about), indent=2).encode())

    def clear_partial(self) -> None:
        """Delete what workers that were killed while they wrote have left."""
        for name in places.names_in(self.output):
            if name.startswith(".part-") and name.endswith(".partial"):
                places.remove(places.join(self.output, name))

    def _before(self) -> dict[str, Any]:
        try:
            before: dict[str, Any] = json.loads(places.read(self.place("job.json")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise self._refusal(f"a damaged _job/job.json ({error})") from error
        return before

    def _refusal(self, what: str) -> BatchError:
        return BatchError(f"{shown(self.output)} holds {what}. Choose another --output, or give --overwrite true")

    # --- the plan

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan."""
        return places.exists(self.place("plan.parquet"))

    def plan(self, extents: Sequence[Extent], part_size: int) -> None:
        """Write the plan: units of ``part_size`` images, cut without regard to where a file ends."""
        total = sum(map(len, extents))
        facts = {"images": str(total), "part_size": str(part_size)}
        content = io.BytesIO()
        with pq.ParquetWriter(content, schema := _SCHEMA.with_metadata(facts), compression="zstd") as writer:
            for unit in _units(extents, part_size):
                # Names of files are bytes: not all of them are text.
                rows = [{**row._asdict(), "path": row.path.encode(errors="surrogateescape")} for row in unit]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        places.write(self.place("plan.parquet"), content.getvalue())
        self._lazy.clear()  # a plan of another job

    @property
    def _plan(self) -> pq.ParquetFile:
        if "plan" not in self._lazy:
            self._lazy["plan"] = pq.ParquetFile(io.BytesIO(places.read(self.place("plan.parquet"))))
        return self._lazy["plan"]

    @property
    def images(self) -> int:
        """How many images the job is about."""
        return int(self._plan.schema_arrow.metadata[b"images"])

    @property
    def units(self) -> int:
        """How many units its plan has."""
        return self._plan.num_row_groups

    def size(self, unit: int) -> int:
        """How many images a unit has: as many as the others, or what is left for the last."""
        part_size = int(self._plan.schema_arrow.metadata[b"part_size"])
        return min(part_size, self.images - unit * part_size)

    def segments(self, unit: int) -> list[Segment]:
        """What a unit is to read."""
        rows = self._plan.read_row_group(unit).to_pylist()
        return [Segment(**{**row, "path": row["path"].decode(errors="surrogateescape")}) for row in rows]

    # --- the results

    def part(self, unit: int) -> str:
        """The address of a unit's results."""
        return places.join(self.output, f"part-{unit:08}.parquet")

    @property
    def done(self) -> list[int]:
        """The units of the plan whose results are there."""
        return [unit for unit in self.parts() if unit < self.units]

    @property
    def is_done(self) -> bool:
        """Whether there is a plan, and all of its results."""
        return self.is_planned and len(self.done) == self.units

    def parts(self) -> list[int]:
        """The units whose results are there."""
        names = map(re.compile(r"part-(\d{8,})\.parquet").fullmatch, places.names_in(self.output))
        return sorted(int(match[1]) for match in names if match)


def _plain(about: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **about}))
    return plain


def _units(extents: Sequence[Extent], part_size: int) -> Iterator[list[Segment]]:
    unit: list[Segment] = []
    room = part_size
    for extent in extents:
        first = 0
        while first < len(extent):
            count = min(room, len(extent) - first)
            unit.append(extent.part(first, count))
            first, room = first + count, room - count
            if not room:
                yield unit
                unit, room = [], part_size
    if unit:
        yield unit


def part_size_for(images: int, most: int, workers: int, batch_size: int) -> int:
    """A part's number of images: so few that every worker gets several parts to do, in whole batches, up to a limit."""
    batches = math.ceil(images / (4 * max(workers, 1)) / batch_size)
    return max(min(most, batches * batch_size), 1)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
