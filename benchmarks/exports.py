"""The models of the package, written in every format and checked: which cannot be, how long it takes, how near it is.

    python benchmarks/exports.py [--formats onnx torch] [--models NAME ...] [--seconds 600]

Random weights, one thread, each in a process of its own that is ended after `--seconds`. Results go to
results/exports.md, in the place of those of the same models and formats; the status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from page import sentence, table
from runner import RESULTS, describe

from vmamba.models.registry import ENTRIES

PAGE = """# Models, written

{machine}. Written by `python benchmarks/exports.py`.

Processor time on one thread, checks included. The difference is the largest from the model, on three batches of other
sizes, in ONNX Runtime or, of a torch program, as it is read back.

"""
HEADERS = ("model", "format", "s", "nodes", "difference")
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


def write(name: str, form: str, seconds: float) -> list[str]:
    """A row of the table; that of a model that could not be written has no time, and says why."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", ONE, name, form, str(Path(folder) / "model.pt2")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return [name, form, "", "", f"not written in {seconds:.0f} s"]
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return [name, form, *(said[0].split("|") if done.returncode == 0 else ["", "", *said])]


def read(page: Path) -> dict[tuple[str, str], list[str]]:
    """The rows of a page, by model and format."""
    lines = page.read_text().splitlines() if page.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {(row[0], row[1]): row for row in rows[2:]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch"], choices=["onnx", "torch", "aoti"])
    every = [name for name in ENTRIES if name not in ("upernet", "maskrcnn")]
    parser.add_argument("--models", nargs="+", default=every)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    page, failed = options.output / "exports.md", 0
    for name in options.models:
        for form in options.formats:
            if ENTRIES[name].task == "detection" and form != "onnx":
                continue
            row = write(name, form, options.seconds)
            failed += not row[2]
            print(" | ".join(row), flush=True)
            rows = read(page) | {(name, form): row}
            order = sorted(rows, key=lambda key: ([*ENTRIES].index(key[0]), key[1]))
            text = PAGE.format(machine=sentence(describe())) + "\n".join(table(HEADERS, (rows[key] for key in order)))
            page.write_text(text + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
