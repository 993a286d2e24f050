"""Triton's kernels compiled for cards that need not be there, and graphs that torch.compile makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.fx import GraphModule


def results_of(program: str, *arguments: object) -> list[Any]:
    """What a program prints, a line of JSON each, in a process without Triton's interpreter.

    Args:
        program: Python; its sys.argv[1] are the arguments as JSON.
        arguments: that JSON knows.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def usage_of(compiled: Any) -> dict[str, int]:
    """Registers and bytes of stack of a thread of a kernel for NVIDIA's cards, told by the tool that Triton brings."""
    import triton  # which not every machine has

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return dict(zip(("registers", "stack"), map(int, found.groups()), strict=True))


def kept_graphs() -> tuple[Callable[..., Any], list[GraphModule]]:
    """A backend for torch.compile, and the list of the graphs that it is given."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return keep, graphs


def operators_in(graph: GraphModule) -> list[str]:
    """This package's operators that a graph calls, in order."""
    return [str(node.target) for node in graph.graph.nodes if "vmamba" in str(node.target)]
