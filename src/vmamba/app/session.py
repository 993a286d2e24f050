"""What one visitor looks at: a model, a picture, a place in the network and a patch."""

from __future__ import annotations

import base64
import binascii
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vmamba.app.guard import MOST_BYTES
from vmamba.app.models import Loaded
from vmamba.data.images import read_image
from vmamba.errors import CheckpointError, ImageError, RecipeError
from vmamba.explain.images import see
from vmamba.explain.scans import Recording, place_of, record_scans

MOST_PIXELS = 40_000_000  # of a picture that is sent in
_KEPT_SIDE = 1600  # what its long side is brought down to


_numbers = itertools.count(1)


class RefusedError(Exception):
    """What the visitor asked for cannot be done: the key of a text, the values in it, and a reason in English."""

    def __init__(self, key: str, reason: object = "", **values: Any) -> None:
        super().__init__(key, reason, values)
        self.key, self.reason, self.values = key, str(reason), values


def received_picture(sent: Any) -> Image.Image:
    """The picture in an event: its name, its size in bytes and, unless it is too large, its content in base64.

    Raises:
        RefusedError: there is no such picture, or `read_image` refuses it.
    """
    sent = sent if isinstance(sent, dict) else {}
    size = sent.get("size")
    if isinstance(size, int) and size > MOST_BYTES:
        raise RefusedError("too_large", size=size / 1e6, most=MOST_BYTES / 1e6)
    try:
        data = base64.b64decode(sent["data"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise RefusedError("no_data") from None
    if len(data) > MOST_BYTES:
        raise RefusedError("too_large", size=len(data) / 1e6, most=MOST_BYTES / 1e6)
    return kept_picture(io.BytesIO(data), str(sent.get("name") or "picture")[:80])


def kept_picture(source: Path | io.BytesIO, name: str) -> Image.Image:
    """A picture in RGB, no larger than the page has use for.

    Raises:
        RefusedError: `read_image` refuses it.
    """
    try:
        picture = read_image(source, name=name, most_pixels=MOST_PIXELS)
    except ImageError as error:
        raise RefusedError("bad_picture", error) from error
    picture.thumbnail((_KEPT_SIDE, _KEPT_SIDE))
    return picture


@dataclass(frozen=True, eq=False)
class Session:
    """One visitor's choices, and the one pass of the picture through the model from which every click is answered.

    Attributes:
        loaded: the model.
        picture: RGB, as it was sent.
        number: of the picture, unlike that of any other.
        recording: what the scans of all blocks were given and returned.
        stages: names of the blocks of each stage that scans.
        stage, block: the block that is looked into, its place in `stages`, from 0.
        row, column: the patch, on that block's grid.
    """

    loaded: Loaded
    picture: Image.Image
    number: int
    recording: Recording
    stages: tuple[tuple[str, ...], ...]
    stage: int
    block: int
    row: int = 0
    column: int = 0

    @classmethod
    def begin(cls, loaded: Loaded, picture: Image.Image, number: int | None = None) -> Session:
        """A picture in a network, looked into where there is most to see: at the end of the last stage but one.

        Raises:
            RefusedError: there is nothing to look into.
        """
        recording = _recorded(loaded, picture)
        stages = _by_stage(recording.blocks)
        stage = max(len(stages) - 2, 0)
        number = next(_numbers) if number is None else number
        session = cls(loaded, picture, number, recording, stages, stage, len(stages[stage]) - 1)
        return session._centred()

    @property
    def name(self) -> str:
        """Of the block that is looked into."""
        return self.stages[self.stage][self.block]

    @property
    def stage_numbers(self) -> list[int]:
        """Which of the network's stages `stages` are, from 0: the first may be convolutions, without a scan."""
        return [_stage_of(names[0]) for names in self.stages]

    @property
    def stage_number(self) -> int:
        """That of the stage that is looked into."""
        return self.stage_numbers[self.stage]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the patches of each stage."""
        return [self.recording.scan(names[0]).grid for names in self.stages]

    @property
    def grid(self) -> tuple[int, int]:
        """Those of the block that is looked into."""
        return self.recording.scan(self.name).grid

    @property
    def cell(self) -> tuple[float, float]:
        """Height and width of its patches, in pixels of the picture as the network sees it."""
        return self.recording.cell(self.name)

    @property
    def seen(self) -> Image.Image:
        """The picture as the network sees it."""
        return Image.fromarray(self.recording.seen.pictures[0])

    def with_model(self, loaded: Loaded) -> Session:
        """The same picture in another network."""
        return Session.begin(loaded, self.picture, self.number)

    def with_picture(self, picture: Image.Image) -> Session:
        """Another picture in the same place of the network."""
        recording = _recorded(self.loaded, picture)
        return replace(self, picture=picture, number=next(_numbers), recording=recording)._centred()

    def with_block(self, stage: Any, block: Any) -> Session:
        """Another block; the patch stays where it is in the picture.

        Raises:
            RefusedError: there is no such block.
        """
        stage = _index(stage, len(self.stages))
        moved = replace(self, stage=stage, block=_index(block, len(self.stages[stage])))
        return moved._at((self.column + 0.5) * self.cell[1], (self.row + 0.5) * self.cell[0])

    def with_patch(self, row: Any, column: Any) -> Session:
        """Another patch.

        Raises:
            RefusedError: there is no such patch.
        """
        rows, columns = self.grid
        return replace(self, row=_index(row, rows), column=_index(column, columns))

    def _centred(self) -> Session:
        """The same with the patch in the middle."""
        width, height = self.seen.size
        return self._at(width / 2, height / 2)

    def _at(self, x: float, y: float) -> Session:
        """The same with the patch at a place, in pixels; beyond the picture, where a patch is cut off, its last one."""
        width, height = self.seen.size
        row, column = self.recording.patch((min(x, width - 1), min(y, height - 1)), self.name)
        return replace(self, row=row, column=column)


def _recorded(loaded: Loaded, picture: Image.Image) -> Recording:
    pre, size = (getattr(loaded.predictor, name, None) for name in ("pre", "sides"))
    try:
        with loaded.lock:
            return record_scans(loaded.model, see(loaded.model, picture, size, pre))
    except (CheckpointError, RecipeError) as error:
        raise RefusedError("bad_model", error) from error


def _by_stage(blocks: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Names of blocks, those of each stage together."""
    stages: dict[int, list[str]] = {}
    for name in blocks:
        stages.setdefault(_stage_of(name), []).append(name)
    return tuple(map(tuple, stages.values()))


def _stage_of(block: str) -> int:
    """The number of a block's stage, from 0, as its name has it."""
    return place_of(block)[0] or 0


def _index(value: Any, length: int) -> int:
    """A number from 0 to one below `length`, as a visitor sent it."""
    if isinstance(value, (int, str)) and len(text := str(value)) < 9 and text.isdecimal() and int(text) < length:
        return int(text)
    raise RefusedError("bad_choice")
