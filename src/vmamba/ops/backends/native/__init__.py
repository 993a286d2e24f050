"""The CPU kernel in C++ (`csrc/`).

The library has a plain C interface and is loaded through ctypes, so one build serves every version of Python and torch,
and calls release the GIL. Here every shape is checked before a pointer is handed over.

Results do not depend on the number of threads, which is torch's (`torch.set_num_threads`). The threads are those of
torch's own OpenMP runtime where that can be found; a process forked from one that has used them works with one thread.
"""

from vmamba.ops.backends.native.library import choose_kernels, kernels, unavailable, warn_once_if_missing
from vmamba.ops.backends.native.scan import selective_scan, selective_scan_backward, ss2d_scan, ss2d_scan_backward

__all__ = [
    "choose_kernels", "kernels", "selective_scan", "selective_scan_backward", "ss2d_scan", "ss2d_scan_backward",
    "unavailable", "warn_once_if_missing",
]  # fmt: skip
