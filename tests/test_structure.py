"""How the package's files import each other: one way only, from the higher rooms to the lower ones."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmamba

ROOT = Path(vmamba.__file__).parent
FLOORS = (
    {"errors", "files", "lazy"},
    {"ops"},
    {"nn"},
    {"models"},
    {""},  # the public face, which defines nothing
    {"data", "tasks", "explain", "deploy"},
    {"app", "cli"},
)


def name_of(file: Path) -> str:
    """vmamba.nn.ss2d, for instance, and vmamba.nn for its __init__.py."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(file): file for file in ROOT.rglob("*.py")}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a file imports, at its top or later; not what is for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inner & MODULES.keys()
            if inner - MODULES.keys():
                yield node.module
        yield from imports_of(node)


GRAPH = {name: set(imports_of(ast.parse(file.read_text()))) for name, file in MODULES.items()}


def floor_of(module: str) -> int:
    room = f"{module}..".split(".")[1]
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def test_the_imports_are_found() -> None:
    assert "vmamba.ops" in GRAPH["vmamba.nn.ss2d"]
    assert "vmamba.models.checkpoints" in GRAPH["vmamba.models.registry"]
    assert not any(node.level for f in MODULES.values() for node in ast.walk(ast.parse(f.read_text()))
                   if isinstance(node, ast.ImportFrom))  # fmt: skip


def test_no_files_import_each_other() -> None:
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", GRAPH)
def test_no_room_imports_a_higher_one(module: str) -> None:
    assert [name for name in GRAPH[module] if floor_of(name) > floor_of(module)] == []
