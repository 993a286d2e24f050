"""Read many hostile files in child processes: PYTHONPATH=tests python -m models.fuzz [COUNT] [--first SEED].

For every file `identify_checkpoint`, `load_checkpoint` and `load_model` must return or raise a `CheckpointError` of one
printable line (the list of what does not fit may have more), without running anything, within SECONDS of computing and
three times the file's size plus MEMORY.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models.hostile import MARKER, make

import vmamba
from vmamba.errors import CheckpointError
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import load_model

SECONDS = 10.0
MEMORY = 300 << 20  # bytes
BATCH = 250  # files in one process
FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "exec", "compile",
    "socket.connect", "shutil.rmtree", "os.remove", "os.rename", "os.mkdir", "ctypes.dlopen",
}  # fmt: skip
Line = dict[str, Any]


def fuzz(first: int, count: int, told: Callable[[Line], object] = bool) -> tuple[list[Line], list[str]]:
    """Measurements for each file, and what was wrong, a line for each fault; `told` gets every measurement at once."""
    lines: list[Line] = []
    faults: list[str] = []
    model = vmamba.create_model("vmamba_femto_s2", num_classes=10, in_chans=3)
    readers = (vmamba.identify_checkpoint, lambda path: vmamba.load_checkpoint(model, path), load_model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights")
        save_checkpoint(model, path)
        for reader in readers:  # what is imported and remembered at the first time is not a file's doing
            reader(path)
        seed = first
        while seed < first + count:
            receiving, sending = os.pipe()
            child = os.fork()
            if not child:
                try:
                    os.chdir(folder)
                    _measure(range(seed, min(seed + BATCH, first + count)), readers, path, sending)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            os.close(sending)
            with open(receiving) as pipe:
                for text in pipe:
                    lines.append(line := json.loads(text))
                    told(line)
                    faults += [f"{seed} {line['kind']}: {fault}" for fault in line["faults"]]
                    seed += 1
            _, status = os.waitpid(child, 0)
            if status:
                faults.append(f"{seed} {make(seed)[0]}: ended the process with {os.waitstatus_to_exitcode(status)}")
                seed += 1
        if os.listdir(folder) != [path.name]:
            faults.append(f"left behind: {os.listdir(folder)}")
    return lines, faults


def _measure(seeds: range, readers: tuple[Callable[[Path], Any], ...], path: Path, sending: int) -> None:
    """Read each seed's file with every reader and send what it cost, a JSON line each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # the collector need not look again at what was there before
    events: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if watching and (written or event in FORBIDDEN):
            events.append(f"did {event} {arguments!r}"[:300])

    sys.addaudithook(watch)
    for seed in seeds:
        kind, content = make(seed)
        path.write_bytes(content)
        size = len(content)
        del content
        faults: list[str] = []
        outcomes, seconds, growth = [], 0.0, 0
        # Far above what is allowed, to spare the machine; the signals end what never returns.
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 8 * size + (4 << 30), resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 60, resource.RLIM_INFINITY))
        signal.alarm(500)
        for reader in readers:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, start = resident(), time.process_time()
            watching = True
            try:
                reader(path)
                outcomes.append("read")
            except CheckpointError as error:
                text, *_ = str(error).split("\n", 1)
                outcomes.append(text.removeprefix(f"{path}")[:60])
                if not text.isprintable() or str(path) not in text or len(str(error)) > 4000:
                    faults.append(f"said {str(error)[:200]!r}")
            except BaseException as error:
                faults.append(f"raised {type(error).__name__}: {str(error)[:200]}")
            watching = False
            seconds = max(seconds, time.process_time() - start)
            growth = max(growth, _memory("VmHWM") - before)
        faults += events
        events.clear()
        if Path(MARKER).exists():
            faults.append("was run")
        if seconds > SECONDS:
            faults.append(f"took {seconds:.1f} s")
        if growth > 3 * size + MEMORY:
            faults.append(f"took {growth >> 20} MiB for {size} bytes")
        line = {
            "kind": kind,
            "size": size,
            "seconds": seconds,
            "growth": growth,
            "outcomes": outcomes,
            "faults": faults,
        }
        os.write(sending, json.dumps(line).encode() + b"\n")


def resident() -> int:
    """Bytes of this process in memory."""
    return _memory("VmRSS")


def _memory(what: str) -> int:
    """A line of this process's status in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    lines, faults = fuzz(arguments.first, arguments.count, lambda line: line["faults"] and print(line, flush=True))
    kinds: dict[str, list[Line]] = collections.defaultdict(list)
    for line in lines:
        kinds[line["kind"]].append(line)
    for kind, some in sorted(kinds.items()):
        read = sum("read" in line["outcomes"] for line in some)
        seconds, growth, size = (max(line[key] for line in some) for key in ("seconds", "growth", "size"))
        told = f"{len(some)} files of up to {size / 2**20:.1f} MiB, {read} of them read"
        print(f"{kind}: {told}, at most {seconds:.2f} s and {growth / 2**20:.0f} MiB")
    print(*faults, f"{len(lines)} files, {len(faults)} faults", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
