"""How much of a scan a program of the kernels takes, by architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Configuration:
    """How much of a scan a program takes at a time. All numbers but registers are powers of two.

    Attributes:
        run: positions that a thread holds in registers, a chunk.
        block: channels of a program; the most that divides a model's is best.
        warps: of a program; block / 16 of them give every thread two channels of one segment.
        segment: positions of a segment at most; fewer where a batch has too few programs for the card.
        registers: the most that a thread may have with one state, on NVIDIA's cards; None leaves it open.
    """

    run: int
    block: int
    warps: int
    segment: int = 64
    registers: int | None = None


@dataclass(frozen=True)
class Configurations:
    """A configuration for the forward pass and one for the backward pass."""

    scan: Configuration
    gradient: Configuration


# The first entry whose number of positions is not exceeded holds. On an H100 this one is the best of those tried on the
# grids of 224² images, or within 4 % of it.
Table = tuple[tuple[float, Configurations], ...]
DEFAULT: Table = ((math.inf, Configurations(scan=Configuration(8, 64, 4), gradient=Configuration(8, 64, 4))),)
# By compute capability ("sm_90") or AMD's name ("gfx942"), where another table than DEFAULT is known to be better.
TABLES: dict[str, Table] = {}

# A multiprocessor has four schedulers, each of which needs other warps to turn to while one waits.
WARPS_TO_FILL_A_MULTIPROCESSOR = 16
# A walk computes nothing twice, and waits for each chunk after the other: one may take as many for every warp that a
# multiprocessor has. On an H100 25 chunks with six warps win, with three they lose, and so do 98 with six.
CHUNKS_A_WARP = 5

# How a scan is cut up: into segments of a chunk, into segments as long as the configuration allows, or into none, where
# there are two routes of one state along an axis, one of which runs backwards (else as "long").
Plan = Literal["short", "long", "walk"]

_override: Configurations | None = None
_plan: Plan | None = None


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
def use_plan(plan: Plan) -> Iterator[None]:
    """Cut scans up in this way in the `with` block and in all threads, whatever the batch, for tests."""
    global _plan
    before, _plan = _plan, plan
    try:
        yield
    finally:
        _plan = before


def plan_in_use() -> Plan | None:
    """What `use_plan` says; None where nothing is said."""
    return _plan


def walks(chunks: int, warps: float, multiprocessors: int, plan: Plan | None = None) -> bool:
    """Whether routes are walked from end to end.

    Args:
        chunks: of a route.
        warps: that there are then.
        multiprocessors: of the card, 0 where there is none to fill.
        plan: the one that is asked for.
    """
    if plan is not None:
        return plan == "walk"
    return multiprocessors > 0 and chunks * multiprocessors <= CHUNKS_A_WARP * warps


def segments_limited(longest: int, warps: float, multiprocessors: int, plan: Plan | None = None) -> int:
    """Chunks of a segment: as many as they may be, unless that leaves too few warps for the card.

    Args:
        longest: that the configuration allows.
        warps: that there are if every segment is a chunk.
        multiprocessors: of the card, 0 where there is none to fill.
        plan: as many in any case, or one.
    """
    if plan is not None:
        return 1 if plan == "short" else longest
    wanted = multiprocessors * WARPS_TO_FILL_A_MULTIPROCESSOR
    return min(longest, max(1, int(warps / wanted))) if wanted else longest
