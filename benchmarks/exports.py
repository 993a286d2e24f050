"""Every model of the package, written in every format and checked: which cannot be, how long it takes, how near it is.

    python benchmarks/exports.py [--formats onnx torch] [--models NAME ...] [--seconds 600]

Random weights, one thread, each in a process of its own that is ended after `--seconds`. Results go to
results/exports.md; the status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vmamba.models.registry import ENTRIES

RESULTS = Path(__file__).parent / "results/exports.md"
HEAD = """# Every model, written

Processor time on one thread, checks included. Written by `python benchmarks/exports.py`.

| model | format | s | nodes | difference |
| --- | --- | --- | --- | --- |"""
ONE = """
import resource, sys
import torch
import vmamba
from vmamba import deploy

torch.set_num_threads(1)
torch.manual_seed(0)
name, form, path = sys.argv[1:]
written = getattr(deploy, f"export_{form}")(vmamba.create_model(name), path)
used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(f"{used:.0f}|{written.nodes or ''}|{max(written.differences.values()):.0e} {written.unit}")
"""


def write(name: str, form: str, seconds: float) -> tuple[bool, str]:
    """Whether a model could be written, and a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", ONE, name, form, str(Path(folder) / "model.pt2")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False, f"{name}|{form}|||not written in {seconds:.0f} s"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return done.returncode == 0, f"{name}|{form}|{said[0] if done.returncode == 0 else '||' + ''.join(said)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch"], choices=["onnx", "torch", "aoti"])
    every = [name for name in ENTRIES if name not in ("upernet", "maskrcnn")]
    parser.add_argument("--models", nargs="+", default=every)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    rows, failed = [], 0
    for name in options.models:
        for form in options.formats:
            if ENTRIES[name].task == "detection" and form != "onnx":
                continue
            written, row = write(name, form, options.seconds)
            failed += not written
            rows.append(f"| {' | '.join(row.split('|'))} |")
            print(rows[-1], flush=True)
            RESULTS.write_text("\n".join([HEAD, *rows, ""]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
