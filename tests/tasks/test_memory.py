"""Memory of training on the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from vmamba.tasks import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

# In a process of its own, whose heap holds nothing else. Pages that are touched for the first time are counted.
PROGRAM = """
import resource
import torch
from vmamba.tasks.memory import memory_kept

def pages(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(2**22).add(1)  # 16 MB, twice
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds

def size():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

pages(2)
before = size()
with memory_kept():
    pages(4)
    print(pages(8))
print(pages(8), size() - before)
"""


def test_memory_is_used_again_in_the_block_and_given_back_after_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    kept, given_back, more = map(float, done.stdout.split())
    assert kept < 100
    assert given_back > 1000  # as without the block: 32 MB are 8192 pages
    assert more < 8


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    with memory.memory_kept():
        pass
