"""The convolution of an enlarged map, whose products were taken before it was enlarged (`csrc/enlarging.cpp`).

The function needs the library (`reason_unavailable`) and is not recorded for autograd. Results do not depend on the
number of threads, which is torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends.native.library import compute_function, fields, reason_unavailable

__all__ = ["add_enlarged", "reason_unavailable"]


class _Enlarging(ctypes.Structure):
    """`struct Enlarging` of csrc/enlarging.h."""

    _fields_ = fields(sizes="batch height width channels rows columns first count", pointers="z y", flags="threads")


_call_add_enlarged = compute_function("vmamba_add_enlarged", _Enlarging)


def add_enlarged(y: Tensor, z: Tensor, first: int = 0) -> None:
    """Add to y the 3×3 convolution, padded with zeros, of a map that is enlarged bilinearly to y's size.

    Convolution and enlarging change places: the one mixes channels, the other pixels.

    Args:
        y: (B, H, W, C), float32, contiguous; it is changed.
        z: (B, h, w, 3, 3, c), float32, contiguous: at every pixel of the map its products with the weight of each tap,
            vertical and horizontal, for c of the channels.
        first: the first of these channels.

    Raises:
        TypeError: another dtype.
        ValueError: a shape that does not fit, or a tensor that is not contiguous or not on the CPU.
        RuntimeError: the library is missing, or memory ran out.
    """
    checks.ndim("y", y, 4, "(B, H, W, C)")
    checks.shape("z", z, (len(y), None, None, 3, 3, None), "(B, h, w, 3, 3, c)")
    for name, value in (("y", y), ("z", z)):
        if not value.is_cpu or not value.is_contiguous():
            raise ValueError(
                f"{name} is on {value.device} with strides {value.stride()}; expected contiguous on the CPU"
            )
        if value.dtype is not torch.float32:
            raise TypeError(f"{name} has dtype {value.dtype}; expected float32")
    (batch, height, width, channels), (_, rows, columns, _, _, count) = y.shape, z.shape
    if not 0 <= first <= channels - count:
        raise ValueError(f"z has channels {first} to {first + count} of y, which has {channels}")
    if y.numel() and z.numel():
        _call_add_enlarged(
            _Enlarging(
                batch=batch, height=height, width=width, channels=channels, rows=rows, columns=columns, first=first,
                count=count, z=z.data_ptr(), y=y.data_ptr(), threads=torch.get_num_threads(),
            )
        )  # fmt: skip
