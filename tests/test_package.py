"""The package as a whole: what it costs to import, and who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vmamba

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vmamba"

# A room may import those before it, never those after it; rooms of one line do not know each other.
FLOORS = [{"ops"}, {"nn"}, {"models"}, {"data"}, {"tasks"}, {"cli"}]


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True)


def test_importing_costs_little_more_than_timm():
    """At most a tenth more; measured in one process, so that a busy machine slows both."""
    log = run_python("import timm, vmamba", "-X", "importtime").stderr
    cumulative = {}
    for line in log.splitlines()[1:]:
        _, microseconds, name = line.removeprefix("import time:").split("|")
        cumulative.setdefault(name.strip(), int(microseconds))
    assert cumulative["vmamba"] < 0.1 * cumulative["timm"]


def test_importing_brings_in_no_optional_part():
    code = "import sys, json, vmamba; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    modules = set(json.loads(run_python(code).stdout))
    assert not modules & {"lightning", "pytorch_lightning", "matplotlib", "torchmetrics", "jsonargparse", "datasets"}


def test_public_names_exist_and_are_documented():
    for name in vmamba.__all__:
        assert getattr(vmamba, name).__doc__, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    def floor(room: str) -> int | None:
        return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)

    own = floor(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    if own is None:  # vmamba/__init__.py, the public face
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            other = floor(parts[1]) if parts[0] == "vmamba" and len(parts) > 1 else None
            assert other is None or other <= own, f"{name} is above {path.name}"
