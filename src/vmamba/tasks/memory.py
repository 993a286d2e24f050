"""Memory of training on the CPU, which the process keeps from step to step.

The C library gives large pieces back to the system as soon as they are free, and obtains them anew, page by page, in
the next step: of a training step on the CPU that takes 5 to 30 %. Kept, they are used again, and the process never
needs much more than it did at its peak.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h, and what they are in a process that has used large pieces: glibc raises its thresholds up to
# these, by itself and until somebody sets one.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = 64 << 20, 32 << 20, 65536


@contextmanager
def memory_kept() -> Iterator[None]:
    """What is freed in the `with` block stays with the process until its end; with glibc only, elsewhere nothing."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_MAX, 0)  # no piece is mapped by itself
    library.mallopt(_M_TRIM_THRESHOLD, -1)  # nothing at the end of the heap is given back
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.malloc_trim(0)
