"""What the compiler makes of the scan's Triton kernels for Hopper: instructions, registers, bytes, and a floor in time.

Needs no card: the kernels are compiled for one that is not there, and the machine code is counted. A floor is what the
issue of instructions, the special functions or the memory allow at data-sheet rates, whichever is longest, summed over
the launches. Waiting (for memory, for other warps, for launches) is not in it, and nothing is timed.

    python benchmarks/scan_counts.py                               # batch 1 and 128, stage 1 of VMamba-T
    python benchmarks/scan_counts.py --grid 28 --channels 192 --rank 12 --dtypes bfloat16
    python benchmarks/scan_counts.py --tile 16,32,2,64             # other tiles than the default
    python benchmarks/scan_counts.py --kernels                     # every launch by itself
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vmamba.ops.arguments import SS2DArguments
from vmamba.ops.backends import triton as backend
from vmamba.ops.backends.triton import Configuration, Configurations, kernels, launch, use_configurations

# An H100 SXM by its data sheet, at the clock that it keeps under load and with the memory's rate that copies reach.
ARCHITECTURE, MULTIPROCESSORS, CLOCK, BYTES_A_SECOND = 90, 132, 1.75e9, 3e12
SCHEDULERS, SPECIAL_LANES = 4, 16  # of a multiprocessor
REGISTERS, SHARED, WARPS = 65536, 228 * 1024, 64  # of a multiprocessor
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(NamedTuple):
    """A kernel with what it is called with."""

    kernel: Any
    programs: int
    warps: int
    registers: int | None  # the most that a thread may have
    given: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).removesuffix("_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that the kernel is compiled for."""
        return {n: v for n, v in self.given.items() if v is None or (n.isupper() and n != "A")}

    @property
    def signature(self) -> dict[str, str]:
        return {
            n: "constexpr" if n in self.constants else TYPES[v.dtype] if isinstance(v, torch.Tensor) else "i32"
            for n, v in self.given.items()
        }

    @property
    def routes(self) -> int:
        """Those that it is for, as bits."""
        if self.name == "walk":
            return 1 << self.given["FORTH"] | 1 << self.given["BACK"]
        return int(self.given["ROUTES"])

    @property
    def trips(self) -> int:
        """How often a program goes through its loop over tiles."""
        if self.name == "chain":
            return int(triton.cdiv(self.given["segments"], self.given["CHUNK"]))
        return int(self.given["chunks" if self.name == "walk" else "length"])

    @property
    def bytes(self) -> int:
        """Of the tensors, each read or written once; of those with a part for each route, these routes' parts."""
        share = self.routes.bit_count() / self.constants.get("K", 4)
        total = 0.0
        for name, value in self.given.items():
            if isinstance(value, torch.Tensor):
                whole = name in ("u", "grad_y", "delta", "partial", "y", "grad_u", "grad_delta", "skip", "grad_skip")
                total += value.numel() * value.element_size() * (1 if whole else share)
        return round(total)


@dataclass(frozen=True)
class Code:
    """Machine code of a kernel, and what a multiprocessor must have for it."""

    lines: tuple[str, ...]  # opcodes, "label:" and "-> label" for jumps
    registers: int
    shared: int
    stack: int

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last line of each jump backwards."""
        labels = {line[:-1]: i for i, line in enumerate(self.lines) if line.endswith(":")}
        jumps = ((labels[line[3:]], i) for i, line in enumerate(self.lines) if line[:3] == "-> ")
        return [(to, i) for to, i in jumps if to < i - 1]  # the code ends with a jump to itself

    def count(self, trips: int, opcode: str = "") -> int:
        """Instructions (with this opcode) that a warp issues, if it goes through the longest loop so often."""
        first, last = max(self.loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))

        def issued(lines: tuple[str, ...]) -> int:
            return sum(not line.endswith(":") and line != "NOP" and line.startswith(opcode) for line in lines)

        inside = issued(self.lines[first : last + 1])
        return issued(self.lines) + (trips - 1) * inside

    @property
    def spills(self) -> int:
        return sum(line == "STL" for line in self.lines)

    def resident(self, warps: int) -> int:
        """Programs on a multiprocessor at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps)
        return int(min(by_registers, SHARED // (self.shared + 1024), WARPS // warps, 32))


class Cost(NamedTuple):
    """Of one launch or of several; seconds are floors."""

    instructions: float
    special: float
    bytes: float
    by_issue: float
    by_special: float
    by_memory: float
    floor: float


@contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Kernels do nothing in the `with` block but to be noted."""

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            def record(
                *values: Any, num_warps: int, num_stages: int = 1, maxnreg: int | None = None, **named: Any
            ) -> None:
                names = self.kernel.arg_names
                given = dict(zip(names, values, strict=False)) | named
                launches.append(Launch(self.kernel, grid[0], num_warps, maxnreg, {name: given[name] for name in names}))

            return record

    with ExitStack() as stack:
        for name, value in list(vars(kernels).items()):
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(kernels, name, Recorder(value)))
        yield


def record(
    batch: int, height: int, width: int, channels: int, rank: int, states: int, dtype: torch.dtype,
    configurations: Configurations | None,
) -> tuple[list[Launch], list[Launch]]:  # fmt: skip
    """The launches of a forward and of a backward pass."""
    u = torch.empty(batch, height, width, channels, device="meta", dtype=dtype)
    # The projection of a bfloat16 image is bfloat16, of a float16 one float32.
    projected = torch.float32 if dtype == torch.float16 else dtype
    K, size = 4, rank + 2 * states
    shapes = [(K, channels, rank), (K, channels), (K, channels, states), (K, channels)]
    arguments = SS2DArguments(
        u, torch.empty(batch, height, width, K, size, device="meta", dtype=projected),
        *(torch.empty(shape, device="meta") for shape in shapes), "cross",
    )  # fmt: skip
    forward: list[Launch] = []
    backward: list[Launch] = []
    with ExitStack() as stack:
        kind = launch._kind
        of_card = mock.patch.object(launch, "_kind", lambda p: kind(p)._replace(multiprocessors=MULTIPROCESSORS))
        stack.enter_context(of_card)
        if configurations is not None:
            stack.enter_context(use_configurations(configurations))
        with recording(forward):
            backend.ss2d_scan(arguments)
        with recording(backward):
            backend.ss2d_scan_backward(u, arguments)
    return forward, backward


_compiled: dict[Any, Code] = {}


def compile_for_hopper(launch: Launch) -> Code:
    """A launch's machine code, compiled once."""
    key = launch.name, tuple(launch.signature.items()), tuple(launch.constants.items()), launch.warps, launch.registers
    if key not in _compiled:
        attributes = {
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(launch.signature.values()) if kind[0] == "*"
        }
        source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
        options = {"num_warps": launch.warps, "num_stages": 1, "maxnreg": launch.registers}
        compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _run(TOOLS / "cuobjdump", "-res-usage", file.name)
            code = _run(TOOLS / "nvdisasm", "-c", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        registers, stack = map(int, found.groups())
        _compiled[key] = Code(tuple(_lines(code)), registers, compiled.metadata.shared, stack)
    return _compiled[key]


def _run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def _lines(code: str) -> Iterator[str]:
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", line):
            yield f"{label[1]}:"
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", line):
            target = re.search(r"\((\.L_[\w.]+)\)", instruction[2])
            yield f"-> {target[1]}" if instruction[1] == "BRA" and target else instruction[1]


def cost_of(launch: Launch) -> Cost:
    """What a launch costs at least: the busiest scheduler issues one instruction a clock."""
    code = compile_for_hopper(launch)
    issued, special = code.count(launch.trips), code.count(launch.trips, "MUFU")
    warps = launch.programs * launch.warps
    # Programs are dealt out evenly, and the warps of each to the four schedulers.
    rounds = math.ceil(launch.programs / MULTIPROCESSORS) * max(launch.warps / SCHEDULERS, 1 / SCHEDULERS)
    busiest = max(rounds, math.ceil(warps / (MULTIPROCESSORS * SCHEDULERS)))
    seconds = (
        busiest * issued / CLOCK, busiest * special * 32 * SCHEDULERS / SPECIAL_LANES / CLOCK,
        launch.bytes / BYTES_A_SECOND,
    )  # fmt: skip
    return Cost(warps * issued, warps * special, launch.bytes, *seconds, max(seconds))


def add_up(costs: list[Cost]) -> Cost:
    return Cost(*map(sum, zip(*costs, strict=True)))


# --- tables ----------------------------------------------------------------------------------------------------------


def print_table(head: str, rows: list[list[str]]) -> None:
    names = head.split(";")
    for cells in (names, ["---"] * len(names), *rows):
        print("| " + " | ".join(cells) + " |")
    print()


def summary(cells: list[str], launches: list[Launch], elements: int) -> list[str]:
    """A row: all launches of a pass."""
    cost = add_up([cost_of(launch) for launch in launches])
    issued, moved = cost.instructions * 32 / elements, cost.bytes / elements
    times = (cost.by_issue, cost.by_special, cost.by_memory, cost.floor)
    return [*cells, str(len(launches)), f"{issued:.1f}", f"{moved:.1f}", *(f"{1e6 * t:.1f}" for t in times)]


def detail(cells: list[str], launch: Launch, elements: int) -> list[str]:
    """A row: one launch."""
    code, cost = compile_for_hopper(launch), cost_of(launch)
    resident = code.resident(launch.warps)
    names = {5: "rows", 10: "columns", 1: "rows", 2: "columns", 4: "rows", 8: "columns"}
    tile = ", ".join(str(launch.given[n]) for n in ("RUN", "BLOCK", "length") if n in launch.given)
    return [
        *cells, f"{launch.name}, {names[launch.routes]}", f"{tile}, {launch.warps}" if tile else "–",
        str(launch.programs), str(code.registers), str(code.spills), str(resident),
        f"{min(resident * launch.warps, launch.programs * launch.warps / MULTIPROCESSORS):.1f}",
        f"{cost.instructions * 32 / elements:.1f}", f"{cost.special * 32 / elements:.1f}",
        f"{cost.bytes / elements:.1f}", f"{1e6 * cost.floor:.1f}",
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,128")
    parser.add_argument("--grid", type=int, default=56)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--passes", default="forward,backward")
    parser.add_argument("--tile", help="run,block,warps,segment of all kernels instead of the default")
    parser.add_argument("--kernels", action="store_true", help="every launch by itself")
    given = parser.parse_args(arguments)
    configurations = None
    if given.tile:
        configuration = Configuration(*map(int, given.tile.split(",")))
        configurations = Configurations(configuration, configuration)
    rows, details = [], []
    for dtype in given.dtypes.split(","):
        for batch in map(int, given.batches.split(",")):
            elements = batch * given.grid**2 * given.channels * 4
            passes = record(
                batch, given.grid, given.grid, given.channels, given.rank, given.states, getattr(torch, dtype),
                configurations,
            )  # fmt: skip
            for name, launches in zip(("forward", "backward"), passes, strict=True):
                if name in given.passes.split(","):
                    cells = [dtype, str(batch), name]
                    rows.append(summary(cells, launches, elements))
                    details += [detail(cells, launch, elements) for launch in launches]
    print(
        f"{given.grid}×{given.grid} positions, {given.channels} channels, R {given.rank}, N {given.states}; per element"
        " of (pixel, channel, route); floors in µs, from counts and data-sheet rates of an H100; nothing was timed\n"
    )
    print_table("dtype;batch;pass;launches;instructions;bytes;by issue;by special functions;by memory;floor", rows)
    if given.kernels:
        print_table(
            "dtype;batch;pass;kernel;tile;programs;registers;spills;programs a multiprocessor;"
            "warps a multiprocessor;instructions;special;bytes;floor", details
        )  # fmt: skip


if __name__ == "__main__":
    main()
