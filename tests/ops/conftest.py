"""Fixtures of the tests of the C++ library."""

from __future__ import annotations

import pytest
import torch

from vmamba.ops.backends import native


def _usable_kernels() -> list[str]:
    chosen = native.kernels()
    if chosen is None:
        return []
    usable = [name for name in ("avx512", "avx2", "baseline") if native.choose_kernels(name)]
    native.choose_kernels(chosen)
    return usable


@pytest.fixture(params=_usable_kernels())
def kernels(request):
    """Runs a test once with each instruction set."""
    chosen = native.kernels()
    native.choose_kernels(request.param)
    yield request.param
    native.choose_kernels(chosen)


@pytest.fixture
def threads():
    """Sets the number of threads for the rest of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
