"""What launches have to know of a card; on the CPU, where kernels are interpreted, something that stands for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_WITHOUT_CARD = 128


def multiprocessors(x: Tensor) -> int:
    """How many the card that `x` is on has; where there is none, as if it had so many."""
    is_on_card = x.device.type == "cuda"
    return torch.cuda.get_device_properties(x.device).multi_processor_count if is_on_card else _WITHOUT_CARD


def launching_at(x: Tensor) -> AbstractContextManager[object]:
    """A block whose launches go to the card that `x` is on."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
