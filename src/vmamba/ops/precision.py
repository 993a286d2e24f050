"""In what precision the operators compute: float32 states whatever the inputs are, also under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vmamba.ops.registration import is_exporting


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the recurrence: float32, or float64 as soon as one argument is float64."""
    is_double = any(value is not None and value.dtype == torch.float64 for value in tensors)
    return torch.float64 if is_double else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast leaves the dtypes alone.

    An exported graph gets none: there it would become an operator of its own that other runtimes do not know.
    """
    if is_exporting() or not _has_autocast(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.compiler.assume_constant_result  # torch.compile of torch 2.11 cannot trace the call
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
