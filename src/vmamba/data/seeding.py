"""Randomness as a pure function of where training stands, so that a run that was killed can be replayed exactly.

Nothing random is carried from one step to the next: every sample and every step starts from a seed derived from the
run's seed and its own position. Then no generator's state has to be saved, and neither the number of loader workers
nor an interruption changes what is drawn.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*position: int) -> int:
    """A 32-bit seed that depends on every one of the integers and on their order."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_sample(seed: int) -> None:
    """Seed the generators a CPU transform draws from: Python's, NumPy's and torch's for the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the generators a training step draws from: those of `seed_sample` and torch's for ``device``."""
    seed_sample(seed)
    if device.type != "cpu":
        torch.manual_seed(seed)
