"""Shapes of the tiles that the kernels work on, by architecture, and how programs share them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """How much of a scan a program takes at a time. All numbers but registers are powers of two.

    Attributes:
        run: positions that a thread holds in registers.
        runs: such runs in a tile, one after the other.
        block: channels in a tile; the most that divides a model's is best.
        warps: warps of a program; runs·block / 64 of them give every thread two channels of one run.
        registers: the most that a thread may have in a walk with one state, on NVIDIA's cards; None leaves it open.
    """

    run: int
    runs: int
    block: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True)
class Configurations:
    """A configuration for the forward pass and one for the backward pass."""

    scan: Configuration
    gradient: Configuration


# The first entry whose number of positions is not exceeded holds. Small images get a tile that holds a whole sequence,
# which then needs one pass and no carries. With 168 registers three programs fit on a multiprocessor. Chosen by what
# the compiler makes of them (docs/kernels.md); none has been timed on a card.
Table = tuple[tuple[float, Configurations], ...]
DEFAULT: Table = (
    (64, Configurations(scan=Configuration(8, 8, 32, 4), gradient=Configuration(4, 16, 32, 8))),
    (256, Configurations(scan=Configuration(8, 32, 16, 8), gradient=Configuration(4, 8, 32, 4))),
    (math.inf, Configurations(scan=Configuration(8, 8, 32, 4, registers=168), gradient=Configuration(8, 8, 32, 4))),
)
# By compute capability ("sm_90") or AMD's name ("gfx942"), where another table than DEFAULT is known to be better.
TABLES: dict[str, Table] = {}

# A multiprocessor has four schedulers, each of which needs a second warp to turn to while one waits.
WARPS_TO_FILL_A_MULTIPROCESSOR = 8

_override: Configurations | None = None
_always_walks: bool | None = None


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


@contextmanager
def use_walks(walks: bool) -> Iterator[None]:
    """Let a program take all tiles of an axis, or one, in the `with` block and in all threads, for tuning and tests."""
    global _always_walks
    before, _always_walks = _always_walks, walks
    try:
        yield
    finally:
        _always_walks = before


def walks_for(multiprocessors: float, warps: int) -> bool:
    """Whether programs take all tiles of an axis, one after the other: where that leaves enough warps for the card.

    Args:
        multiprocessors: of the card.
        warps: that a walk has in all.
    """
    return warps >= WARPS_TO_FILL_A_MULTIPROCESSOR * multiprocessors if _always_walks is None else _always_walks
