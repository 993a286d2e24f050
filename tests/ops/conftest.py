"""Fixtures of the tests of the C++ library."""

from __future__ import annotations

import pytest
import torch

from vmamba.ops.backends import native


def _usable(*names: str) -> list[str]:
    chosen = native.kernels()
    if chosen is None:
        return []
    usable = [name for name in names if native.choose_kernels(name)]
    native.choose_kernels(chosen)
    return usable


def _chosen(request):
    """Runs a test once with each instruction set that this machine has."""
    before = native.kernels()
    native.choose_kernels(request.param)
    yield request.param
    native.choose_kernels(before)


_KERNELS = ("avx512", "avx2", "baseline")

kernels = pytest.fixture(_chosen, params=_usable(*_KERNELS))
product_kernels = pytest.fixture(_chosen, params=_usable("amx_bf16", "avx512_bf16", *_KERNELS))


@pytest.fixture
def threads():
    """Sets the number of threads for the rest of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
