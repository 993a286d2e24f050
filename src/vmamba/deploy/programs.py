"""Programs of torch.export: written whole, and read without running anything that a file may ask for.

`torch.export.load` trusts its file. It unpickles what is marked so, loads machine code, calls whatever a graph names
below ``torch``, and evaluates text as Python, of sizes (by sympy) and of guards. What `quantize` writes needs nothing
but operators that compute; `read` refuses a file that asks for more, before torch sees it.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vmamba.deploy.graphs import silenced
from vmamba.errors import ExportError
from vmamba.files import shown

_RECORD = re.compile(
    r"models/[^/]+\.json|data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/[^/]+_config\.json"
    r"|data/sample_inputs/[^/]+\.pt|extra/[^/]+|(\.data/)?(version|serialization_id|byteorder|archive_format|archive_version)"
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|quantized_decomposed|torchvision|vmamba)\.(\w+)\.(\w+)")
# What else a graph calls: arithmetic of sizes, and operators that take graphs, which are looked at too.
_OTHERS = re.compile(
    r"torch\.sym_\w+|math\.(?!__)\w+"
    r"|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|lshift|rshift|getitem)"
    r"|torch\.ops\.higher_order\.(scan|associative_scan|while_loop|cond|wrap_with_(set_grad_enabled|autocast))"
)
# A part of a size: sympy's classes, which begin with a capital, what is said of symbols, and their names; numbers.
_SIZE = re.compile(r"[A-Z]\w*|positive|nonnegative|integer|precision|'?[a-z]+\d+'?|'?\d+(\.\d+)?'?|[\s(),=+*-]")
_GUARD = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Constant, ast.Subscript, ast.Load,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_FUNCTION = re.compile(r"torch\.sym_\w+|math\.(?!__)\w+|max|min|abs")
_ASKED = {"size", "stride", "storage_offset", "dim"}  # of a tensor


def write(program: torch.export.ExportedProgram, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a program with the metadata as its extra file "metadata.json".

    Raises:
        OSError: there is no room, or another reason not to write.
    """
    # Not to the file itself: torch ends the process where the disk is full.
    buffer = io.BytesIO()
    with silenced("torch._export.serde.serialize"):
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    file.write_bytes(buffer.getbuffer())


def read(path: str | os.PathLike[str]) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """A program, and its metadata, as text.

    Raises:
        ExportError: it is no such file, or it asks for more than operators that compute.
    """
    from torch.export.pt2_archive._package import load_pt2

    try:
        content = Path(path).read_bytes()
        archive = torch._C.PyTorchFileReader(io.BytesIO(content))
        if not _is_read_alike(content, archive):
            raise ExportError(f"{shown(path)} is not read: Python and torch find different files in it")
        wrong = next(_asked_for(archive), None)
        if wrong is not None:
            raise ExportError(f"{shown(path)} is not read: {wrong}, which could run any code")
        # Not torch.export.load: what this cannot read, that unpickles, as files of torch 2.7 were written.
        found = load_pt2(io.BytesIO(content))
        if "model" not in found.exported_programs:
            raise ExportError(f"{shown(path)} is no torch program: it has no graph named model")
        return found.exported_programs["model"], json.loads(found.extra_files.get("metadata.json") or "{}")
    except ExportError:
        raise
    except Exception as error:  # the system's, or whatever torch says of a file that it cannot read
        raise ExportError(f"{shown(path)} cannot be read as a torch program: {error}") from error


def _is_read_alike(content: bytes, archive: Any) -> bool:
    """Whether Python, too, finds these files in the bytes; an archive can be made with two tables of contents."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return sorted(name.partition("/")[2] for name in file.namelist()) == sorted(archive.get_all_records())


def _asked_for(archive: Any) -> Iterator[str]:
    """What torch would do for this file that ours do not need."""
    for name in archive.get_all_records():
        if not _RECORD.fullmatch(name):
            yield f"it holds {name}"
        elif name.startswith("models/"):
            yield from _in_graph(json.loads(archive.get_record(name)))
        elif name.endswith(".pt"):  # of the example inputs; what this refuses, torch tries in another way
            try:
                torch.load(io.BytesIO(archive.get_record(name)), weights_only=True)
            except pickle.UnpicklingError:
                yield f"{name} is pickled"
        elif name.endswith("_config.json"):
            entries = json.loads(archive.get_record(name))["config"].items()
            yield from (f"{entry} is pickled" for entry, told in entries if told["use_pickle"])
            names = (told["path_name"] for _, told in entries)
            yield from (f"it has the object {name}" for name in names if not re.fullmatch(r"(weight|tensor)_\d+", name))


def _in_graph(part: Any) -> Iterator[str]:
    """The same of a graph, or a part of one."""
    if isinstance(part, list):
        for entry in part:
            yield from _in_graph(entry)
    elif isinstance(part, dict):
        operators = [node["target"] for node in part.get("nodes", ())]
        operators += [part["as_operator"]] if "as_operator" in part else []
        yield from (f"its graph calls {name}" for name in operators if not _is_operator(name))
        size, guards = part.get("expr_str", ""), part.get("guards_code", ())
        if not all(map(_SIZE.fullmatch, re.findall(r"'[^']*'|\d+\.\d+|\w+|\W", size))):
            yield f"it has the size {size}"
        yield from (f"it has the guard {guard}" for guard in guards if not _is_guard(ast.parse(guard, mode="eval")))
        for entry in part.values():
            yield from _in_graph(entry)


def _is_operator(name: str) -> bool:
    """Whether it computes, and does nothing else: there are operators that read and write files by their names."""
    if not (operator := _OPERATOR.fullmatch(name)):
        return bool(_OTHERS.fullmatch(name))
    package, operation, overload = operator.groups()
    for schema in torch._C._jit_get_schemas_for_operator(f"{package}::{operation}"):
        if (schema.overload_name or "default") == overload:
            return not any("file" in argument.name for argument in schema.arguments)
    return False


def _is_guard(tree: ast.AST) -> bool:
    """Whether it compares sizes of inputs, ``L['x'].size()[2] >= 3``, and does nothing else."""
    if isinstance(tree, ast.Name):
        return tree.id == "L"
    if isinstance(tree, ast.Call):
        function, is_known = tree.func, bool(_FUNCTION.fullmatch(ast.unparse(tree.func)))
        is_asked = isinstance(function, ast.Attribute) and function.attr in _ASKED and _is_guard(function.value)
        return (is_known or is_asked) and not tree.keywords and all(map(_is_guard, tree.args))
    return isinstance(tree, _GUARD) and all(map(_is_guard, ast.iter_child_nodes(tree)))
