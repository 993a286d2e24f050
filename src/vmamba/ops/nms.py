"""Non-maximum suppression as a function: by vectors on the CPU, elsewhere torchvision's, with the same results."""

from __future__ import annotations

import torch
import torchvision.ops
from torch import Tensor

from vmamba.ops.backends.native import nms as native
from vmamba.ops.layers import applies, is_compiled


def nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Boxes that no better one overlaps by more than `iou`, the better ones first.

    Args:
        boxes: (n, 4), floating-point: x1, y1, x2, y2.
        scores: (n,), in their dtype.
        iou: intersection over union, above which a box goes.

    Returns:
        Indices of those that stay, int64.
    """
    is_usual = boxes.dtype == scores.dtype == torch.float32 and scores.is_cpu and not is_compiled()
    if is_usual and applies(boxes) and applies(scores) and native.reason_unavailable() is None:
        return native.nms(boxes, scores, iou)
    return torchvision.ops.nms(boxes, scores, iou)
