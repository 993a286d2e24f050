"""Launches, and what they have to know of a card; on the CPU, where kernels are interpreted, what stands for it."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_WITHOUT_CARD = 128
_MOST_COMPILED = 4096
_compiled: dict[Any, CompiledKernel] = {}


def multiprocessors(x: Tensor) -> int:
    """How many the card that `x` is on has; where there is none, as if it had so many."""
    return _multiprocessors(x.device) if x.device.type == "cuda" else _WITHOUT_CARD


@functools.cache  # as below: torch asks the card each time
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" or "gfx942"; "" where there is no card."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def ceiling(number: int, by: int) -> int:
    """number / by, rounded up; Triton's own takes ten times as long, and launches are many."""
    return -(-number // by)


def launch(kernel: Any, grid: int, x: Tensor, given: dict[str, Any]) -> None:
    """kernel[(grid,)](**given) on the card that `x` is on; once that is compiled in a fraction of the time.

    Triton looks at every argument of every launch to find what it compiled. Here it is found by the same things at
    once: dtypes, whether memory is aligned to 16 bytes, and all numbers. A kernel is to be given its arguments in one
    order. On AMD's cards Triton looks at the size of memory too, so it is left to that.
    """
    with _on(x.device):
        seen = tuple(
            [(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value for value in given.values()]
        )
        key = kernel, x.device, seen
        if (compiled := _compiled.get(key)) is not None:
            compiled[(grid, 1, 1)](*[given[name] for name in kernel.arg_names])
            return
        compiled = kernel[(grid,)](**given)
        if isinstance(compiled, CompiledKernel) and not torch.version.hip:  # interpreted kernels are none
            if len(_compiled) >= _MOST_COMPILED:
                _compiled.clear()
            _compiled[key] = compiled


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A block whose launches go to this card."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
