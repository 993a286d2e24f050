"""Running ONNX files here, to see what they compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import onnxruntime  # type: ignore[import-untyped]


def runner(model: str | os.PathLike[str] | bytes, threads: int = 0, spins: bool = True) -> Callable[[Any], list[Any]]:
    """A call of ONNX Runtime on the CPU: from an array, for the one input, to the outputs' arrays.

    Args:
        model: a file, or what is in one.
        threads: how many compute; 0 for as many as ONNX Runtime takes.
        spins: whether they keep a core busy while they wait for the next call.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if not spins:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else os.fspath(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda batch: session.run(None, {given.name: batch})
