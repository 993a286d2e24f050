"""Shapes of the tiles that the kernels work on, by architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """How much of a scan a program takes at a time. All are powers of two.

    Attributes:
        run: positions that a thread holds in registers.
        runs: such runs in a tile, one after the other.
        block: channels in a tile. A warp should lie along channels: 32 or more, where there are as many.
        warps: warps of a program; runs·block / 32 of them give every thread one channel of one run.
    """

    run: int
    runs: int
    block: int
    warps: int


@dataclass(frozen=True)
class Configurations:
    """A configuration for the forward pass and one for the backward pass."""

    scan: Configuration
    gradient: Configuration


# The first entry whose number of positions is not exceeded holds. Small images get a tile that holds a whole sequence,
# which then needs one pass and no carries. These shapes are the largest that compile without register spills; none has
# been timed on a card.
Table = tuple[tuple[float, Configurations], ...]
DEFAULT: Table = (
    (64, Configurations(scan=Configuration(8, 8, 32, 8), gradient=Configuration(8, 8, 32, 8))),
    (256, Configurations(scan=Configuration(16, 16, 16, 8), gradient=Configuration(8, 4, 32, 4))),
    (math.inf, Configurations(scan=Configuration(16, 4, 32, 4), gradient=Configuration(8, 4, 32, 4))),
)
# By compute capability ("sm_90") or AMD's name ("gfx942"), where another table than DEFAULT is known to be better.
TABLES: dict[str, Table] = {}

_override: Configurations | None = None


@contextmanager
def use_configurations(configurations: Configurations) -> Iterator[None]:
    """Use these in the `with` block, in all threads (backward passes have their own), for tuning and tests."""
    global _override
    before, _override = _override, configurations
    try:
        yield
    finally:
        _override = before


def configurations_for(architecture: str, positions: int) -> Configurations:
    """The configurations in use on an architecture for images of H·W positions."""
    if _override is not None:
        return _override
    return next(value for limit, value in TABLES.get(architecture, DEFAULT) if positions <= limit)
