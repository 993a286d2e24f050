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
import statistics
import torch
from vmamba.tasks.memory import memory_kept

def pages(rounds, count=2**24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(count).add(1)  # 64 MB, twice
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds

def size():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

before = pages(2), size()
with memory_kept():
    pages(6)
    print(before[0], statistics.median(pages(1) for _ in range(9)))
print(size() - before[1])
print(pages(2, 2**26), size() - before[1])  # larger than any piece in the block, so that no free one will do
"""


def test_memory_is_used_again_in_the_block_and_given_back_after_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    plain, kept, more, mapped, finally_more = map(float, done.stdout.split())
    assert kept < 100 < plain / 100  # of most rounds: a piece whose place is taken is made anew
    assert more < 8
    assert mapped > 2 * plain
    assert finally_more < 8


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    with memory.memory_kept():
        pass
