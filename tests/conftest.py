"""What all tests share."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

# torch.export writes its trace to this logger, at length, and pytest would keep it all.
logging.getLogger("torch.__trace").propagate = False

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_ops() -> dict[str, torch.Tensor]:
    """Operators of the authors' implementation on odd sizes; see tests/golden/README.md."""
    with np.load(GOLDEN / "ops.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
