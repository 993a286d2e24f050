"""Non-maximum suppression by whole vectors of boxes (`csrc/nms.cpp`).

The boxes that stay are those of `torchvision.ops.nms`, whose overlaps are computed in the same way in every bit. The
function needs the library (`reason_unavailable`).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends.native.library import compute_function, fields, reason_unavailable

__all__ = ["nms", "reason_unavailable"]

_BLOCK = 16  # NMS_BLOCK of csrc/nms.h


class _Suppression(ctypes.Structure):
    """`struct Suppression` of csrc/nms.h."""

    _fields_ = fields(sizes="count size found", pointers="boxes areas gone kept", floats="iou")


_call_nms = compute_function("vmamba_nms", _Suppression)


def nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Boxes that no better one overlaps by more than `iou`, the better ones first; of equal scores the first is better.

    Args:
        boxes: (n, 4), float32: x1, y1, x2, y2.
        scores: (n,), float32.
        iou: intersection over union, above which a box goes.

    Returns:
        Indices of those that stay, int64.

    Raises:
        TypeError: another dtype.
        ValueError: a shape that does not fit, or a tensor that is not on the CPU.
        RuntimeError: the library is missing.
    """
    checks.shape("boxes", boxes, (None, 4), "(n, 4)")
    count = len(boxes)
    checks.shape("scores", scores, (count,), "(n,)")
    for name, value in (("boxes", boxes), ("scores", scores)):
        if not value.is_cpu:
            raise ValueError(f"{name} are on {value.device}; this suppression runs on the CPU only")
        if value.dtype is not torch.float32:
            raise TypeError(f"{name} have dtype {value.dtype}; this suppression supports float32")
    order = scores.sort(stable=True, descending=True).indices
    size = -(-count // _BLOCK) * _BLOCK
    sides = boxes.new_zeros(5, size)  # and areas
    sides[:4, :count] = boxes.detach()[order].t()
    gone, kept = boxes.new_zeros(size, dtype=torch.int32), boxes.new_empty(count, dtype=torch.int64)
    call = _Suppression(
        count=count, size=size, boxes=sides.data_ptr(), areas=sides[4].data_ptr(), gone=gone.data_ptr(),
        kept=kept.data_ptr(), iou=_not_above(iou),
    )  # fmt: skip
    if count:
        _call_nms(call)
    return order[kept[: call.found]]


def _not_above(value: float) -> float:
    """The largest number of float32 that is not above `value`: what exceeds the one exceeds the other."""
    nearest = torch.tensor(value, dtype=torch.float32, device="cpu")
    return (nearest if nearest.item() <= value else nearest.nextafter(nearest.new_tensor(-torch.inf))).item()
