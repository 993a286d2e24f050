"""What all tests share."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes that test side by side share the cores, and so do those that they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max(len(os.sched_getaffinity(0)) // workers, 1)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

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
