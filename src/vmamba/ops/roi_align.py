"""RoIAlign as a function: features of regions of a map (He et al., arXiv 1703.06870, section 3).

On the CPU it takes several threads and reads channels-last memory as it lies (`backends/native/roi_align.py`);
everywhere else it is torchvision's operator, whose results are the same in every bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision.ops
from torch import Tensor

from vmamba.ops.backends.native import roi_align as native
from vmamba.ops.layers import applies, is_compiled, records
from vmamba.ops.registration import define

# With fewer channels than a vector has lanes, torchvision's loop over single numbers is faster.
_LEAST_CHANNELS = 16


def roi_align(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Features of regions, aligned and averaged over as many samples to a bin as it has cells.

    Args:
        x: map, (B, C, H, W), floating-point.
        rois: (n, 5) in x's dtype: number of the image, then x1, y1, x2, y2.
        side: bins of the result, across and down.
        scale: cells of the map in a unit of the regions.

    Returns:
        (n, C, side, side) in x's dtype; differentiable with respect to `x`.
    """
    if not _is_native(x) or rois.dtype != x.dtype or not rois.is_cpu:
        return _plain(x, rois, side, scale)
    image = x.permute(0, 2, 3, 1)
    if is_compiled() or records(x):
        return torch.ops.vmamba.roi_align(image, rois, side, scale)
    return native.roi_align(image, rois, side, scale)


def laid_out(x: Tensor) -> Tensor:
    """A map (B, C, H, W) in the order of memory that `roi_align` reads, for maps that several calls are to read."""
    return x.contiguous(memory_format=torch.channels_last if _is_native(x) else torch.contiguous_format)


def _is_native(x: Tensor) -> bool:
    is_wide = x.dtype == torch.float32 and x.shape[1] >= _LEAST_CHANNELS
    return is_wide and applies(x) and native.reason_unavailable() is None


def _plain(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    return torchvision.ops.roi_align(x, rois, side, scale, sampling_ratio=0, aligned=True)


def _plain_grid(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    return _plain(x.permute(0, 3, 1, 2), rois, side, scale)


def _plain_backward(grad: Tensor, rois: Tensor, size: Sequence[int], scale: float) -> Tensor:
    (batch, height, width, channels), side = size, grad.shape[-1]
    backward = torch.ops.torchvision._roi_align_backward
    return backward(grad, rois, scale, side, side, batch, channels, height, width, 0, True).permute(0, 2, 3, 1)


define(
    "roi_align(Tensor x, Tensor rois, SymInt side, float scale) -> Tensor",
    native.roi_align,
    plain=_plain_grid,
    gradient=lambda ctx, grad: [
        torch.ops.vmamba.roi_align_backward(grad, ctx.saved_tensors[1], ctx.saved_tensors[0].shape, ctx.options[1]),
        None,
    ],
    fake=lambda x, rois, side, scale: x.new_empty(rois.shape[0], x.shape[3], side, side),
)
define(
    "roi_align_backward(Tensor grad, Tensor rois, SymInt[] size, float scale) -> Tensor",
    native.roi_align_backward,
    plain=_plain_backward,
    gradient=lambda ctx, grad: [
        torch.ops.vmamba.roi_align(grad, ctx.saved_tensors[1], ctx.saved_tensors[0].shape[-1], ctx.options[1]),
        None,
    ],
    fake=lambda grad, rois, size, scale: grad.new_empty(size),
)
