"""RoIAlign of channels-last maps on several threads (`csrc/roi_align.cpp`).

Results are those of `torchvision.ops.roi_align` in every bit, and do not depend on the number of threads, which is
torch's. The functions need the library (`reason_unavailable`) and are not recorded for autograd.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends.native.library import compute_function, fields, reason_unavailable

__all__ = ["reason_unavailable", "roi_align", "roi_align_backward"]


class _RoIAlign(ctypes.Structure):
    """`struct RoIAlign` of csrc/roi_align.h."""

    _fields_ = fields(
        sizes="batch height width channels regions side tasks",
        pointers="x rois y grad grad_x",
        floats="scale",
        flags="threads",
    )


_call_roi_align = compute_function("vmamba_roi_align", _RoIAlign)
_call_roi_align_backward = compute_function("vmamba_roi_align_backward", _RoIAlign)


def roi_align(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Features of regions, averaged over as many samples to a bin as it has cells.

    Args:
        x: (B, H, W, C), float32.
        rois: (n, 5), float32: number of the image, then x1, y1, x2, y2.
        side: bins of the result, across and down.
        scale: cells of the map in a unit of the regions.

    Returns:
        (n, C, side, side), float32, contiguous.

    Raises:
        TypeError: another dtype.
        ValueError: a shape that does not fit, an image that is not there, or a tensor that is not on the CPU.
        RuntimeError: the library is missing, or memory ran out.
    """
    _require("x", x)
    checks.ndim("x", x, 4, "(B, H, W, C)")
    y = x.new_empty(len(rois), x.shape[3], side, side)
    rois = _checked(rois, x.shape)
    x = x.contiguous()
    if y.numel():
        _call_roi_align(_arguments(rois, x.shape, side, scale, x=x.data_ptr(), y=y.data_ptr()))
    return y


def roi_align_backward(grad: Tensor, rois: Tensor, size: Sequence[int], scale: float) -> Tensor:
    """Gradient of `roi_align`'s map from that of its result.

    Args:
        grad: (n, C, side, side), float32.
        rois: (n, 5), float32.
        size: of the map: B, H, W, C.
        scale: as in `roi_align`.

    Returns:
        (B, H, W, C), float32, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `roi_align`.
    """
    _require("grad", grad)
    side = grad.shape[-1]
    checks.shape("grad", grad, (len(rois), size[3], side, side), "(n, C, side, side)")
    grad_x = grad.new_zeros(size)
    rois = _checked(rois, size)
    grad = grad.contiguous()
    if grad.numel():
        _call_roi_align_backward(_arguments(rois, size, side, scale, grad=grad.data_ptr(), grad_x=grad_x.data_ptr()))
    return grad_x


def _arguments(rois: Tensor, size: Sequence[int], side: int, scale: float, **pointers: int) -> _RoIAlign:
    batch, height, width, channels = size
    return _RoIAlign(
        batch=batch, height=height, width=width, channels=channels, regions=len(rois), side=side, scale=scale,
        rois=rois.data_ptr(), threads=torch.get_num_threads(), **pointers,
    )  # fmt: skip


def _checked(rois: Tensor, size: Sequence[int]) -> Tensor:
    _require("rois", rois)
    checks.shape("rois", rois, (len(rois), 5), "(n, 5)")
    if len(rois) and not ((rois[:, 0] >= 0) & (rois[:, 0] < size[0])).all():
        raise ValueError(f"rois are of images {rois[:, 0].unique().tolist()}; expected 0 to {size[0] - 1}")
    return rois.contiguous()


def _require(name: str, value: Tensor) -> None:
    if not value.is_cpu:
        raise ValueError(f"{name} is on {value.device}; this RoIAlign runs on the CPU only")
    if value.dtype is not torch.float32:
        raise TypeError(f"{name} has dtype {value.dtype}; this RoIAlign supports float32")
