"""Launches, and what they have to know of a card; on the CPU, where kernels are interpreted, what stands for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_WITHOUT_CARD = 128
_MOST_COMPILED = 4096
_HERE = nullcontext()
_compiled: dict[Any, tuple[Callable[..., None], list[Any]]] = {}  # what launches, and the arguments after tensors


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


class Numbers(dict[str, Any]):
    """What a kernel is given beside tensors: numbers, constants and the compiler's options. Nobody changes one.

    Two are equal only if they are one object, which makes it quick to find what was compiled for it.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def launch(kernel: Any, grid: int, x: Tensor, tensors: Mapping[str, Tensor | None], numbers: Numbers) -> None:
    """kernel[(grid,)](**tensors, **numbers) on the card that `x` is on; once that is compiled, in less time.

    Triton looks at every argument of every launch to find what it compiled, and asks the driver about every pointer.
    Here it is found by the same things at once, dtypes, whether memory is aligned to 16 bytes, and the numbers, which
    are to be the same object each time; and the kernel is given addresses. On AMD's cards Triton looks at the size of
    memory too, so it is left to that.

    Args:
        kernel: with its tensors before all other arguments.
        grid: programs.
        x: any tensor.
        tensors: all of the kernel's, in its order.
        numbers: all others, in any order.
    """
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    device, all_bits = x.device, 0
    for tensor in tensors.values():
        if tensor is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = tensor.data_ptr()
            all_bits |= address
            addresses.append(address)
            dtypes.append(tensor.dtype)
    key = kernel, grid, numbers, device, *dtypes
    if all_bits % 16 == 0 and (found := _compiled.get(key)) is not None:
        run, values = found
        with _on(device):
            run(*addresses, *values)
        return
    with _on(device):
        compiled = kernel[(grid,)](**tensors, **numbers)
    # Interpreted kernels are no such.
    if all_bits % 16 == 0 and isinstance(compiled, CompiledKernel) and not torch.version.hip:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        others = kernel.arg_names[len(tensors) :]
        assert [*tensors, *others] == list(kernel.arg_names)
        _compiled[key] = compiled[(grid, 1, 1)], [numbers[name] for name in others]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A block whose launches go to this card."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
