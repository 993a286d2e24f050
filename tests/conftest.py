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

# The files that take longest, longest first: a worker is given whole files, and one begun late leaves the others idle.
LONGEST = (
    "test_readme", "deploy/test_documentation", "tasks/test_resume", "models/test_export", "ops/test_operators",
    "test_benchmarks", "ops/backends/test_proving", "ops/backends/test_triton", "ops/test_selective_scan",
    "ops/test_ss2d", "nn/test_changes", "nn/test_compiled", "deploy/test_onnx", "deploy/test_aoti", "test_package",
)  # fmt: skip

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def golden_ops() -> dict[str, torch.Tensor]:
    """Operators of the authors' implementation on odd sizes; see tests/golden/README.md."""
    with np.load(GOLDEN / "ops.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
