"""Boxes: anchors, the coding of one box relative to another, matching, sampling, suppression, and masks inside boxes.

A box is (x1, y1, x2, y2) in pixels, float32; a size is (height, width). The rules are those of mmdetection 3, with
which the published models were trained; they differ from torchvision's where a comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from vmamba.ops.nms import nms

NEGATIVE, LEFT_OUT = -1, -2  # in place of the number of a true box
_MAX_LOG_RATIO = math.log(1000 / 16)  # a box is at most this much larger or smaller than the one it is relative to
_SCALE, _RATIOS = 8.0, (0.5, 1.0, 2.0)  # of anchors: a square one's side in strides, and heights over widths
_ONE_RUN_BELOW = 10_000  # boxes that are suppressed in one run over all classes


def anchors(size: Sequence[int], stride: int, device: torch.device | None = None) -> Tensor:
    """The boxes from which proposals are predicted on one map, (H·W·ratios, 4): by row, column and ratio.

    Centred on (x·stride, y·stride), and neither shifted by half a pixel nor rounded, as torchvision's are.

    Args:
        size: of the map.
        stride: pixels of the picture a step on the map.
        device: where to make them.
    """
    root = torch.tensor(_RATIOS, device=device).sqrt()
    half = torch.stack([1 / root, root], 1) * (stride * _SCALE) * 0.5
    y, x = torch.meshgrid(*(torch.arange(n, device=device) * stride for n in size), indexing="ij")
    centres = torch.stack([x, y], 2)[:, :, None]
    return torch.cat([centres - half, centres + half], 3).view(-1, 4)


def inside(size: Sequence[int], stride: int, picture: Sequence[int]) -> Tensor:
    """Which of a map's `anchors` are centred in a picture that is smaller than the padded one, (H·W·ratios,) bool."""
    within = torch.zeros(*size, len(_RATIOS), dtype=torch.bool)
    within[: math.ceil(picture[0] / stride), : math.ceil(picture[1] / stride)] = True
    return within.flatten()


def encode(boxes: Tensor, targets: Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """What `decode` turns into `targets`, given `boxes`; both (n, 4), of positive width and height."""
    sides, target_sides = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = ((targets[:, :2] + targets[:, 2:]) * 0.5 - (boxes[:, :2] + boxes[:, 2:]) * 0.5) / sides
    return torch.cat([shift, (target_sides / sides).log()], 1) / boxes.new_tensor(stds)


def decode(
    boxes: Tensor, deltas: Tensor, stds: Sequence[float] = (1, 1, 1, 1), size: Sequence[int] | None = None
) -> Tensor:
    """Move and stretch boxes: centre by (dx, dy) of their sides, sides by exp(dw) and exp(dh).

    dw and dh are limited on both sides, to a factor of 62.5; torchvision limits growth only.

    Args:
        boxes: (n, 4).
        deltas: (n, 4), in units of `stds`.
        stds: units of dx, dy, dw, dh.
        size: of the picture that the result is clipped to, if any.
    """
    deltas = deltas * deltas.new_tensor(stds)
    sides = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + sides * deltas[:, :2]
    half = sides * deltas[:, 2:].clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp() * 0.5
    decoded = torch.cat([centre - half, centre + half], 1)
    if size is None:
        return decoded
    height, width = size
    return torch.stack([decoded[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], 1)


def region_levels(boxes: Tensor, levels: int, finest: float = 56.0) -> Tensor:
    """Which map a box is pooled from, (n,) int64 from 0: the one on which it is about 14 to 28 cells wide.

    Args:
        boxes: (n, 4).
        levels: number of maps.
        finest: a box of this side, or smaller than twice that, belongs to the finest map, and so does one that is not
            a number.
    """
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    # 1e-6 inside the logarithm, not outside as in torchvision: it decides for sides just below a power of two.
    return (scale / finest + 1e-6).log2().floor().nan_to_num(0.0).clamp(0, levels - 1).long()


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, iou: float) -> Tensor:
    """Non-maximum suppression within each class: indices of the boxes that stay, by falling score.

    A box goes if its intersection over union with a better one of its class is above `iou`.
    """
    if not len(boxes):
        return classes.new_zeros(0)
    boxes, scores = boxes.float(), scores.float()
    shifted = apart(boxes, classes, boxes.max())
    if len(boxes) < _ONE_RUN_BELOW:
        return nms(shifted, scores, iou)
    members = [(classes == label).nonzero().flatten() for label in classes.unique()]
    kept = torch.cat([group[nms(shifted[group], scores[group], iou)] for group in members]).sort().values
    return kept[scores[kept].argsort(descending=True)]


def apart(boxes: Tensor, classes: Tensor, largest: Tensor) -> Tensor:
    """Boxes (..., n, 4), each shifted by its class (..., n), so that none overlaps one of another class.

    By more than the largest coordinate, in float32: the rounding decides in close cases, so it is part of the published
    models. The largest may be of fewer boxes than these, and is then of any shape that goes with the classes'.
    """
    return boxes + (classes.to(boxes) * (largest + 1))[..., None]


def match(boxes: Tensor, truths: Tensor, positive: float, negative: float, rescue: float) -> Tensor:
    """The true box each box is to learn, (n,) int64: its number, or `NEGATIVE`, or `LEFT_OUT`.

    Args:
        boxes: (n, 4).
        truths: (m, 4).
        positive: at least this intersection over union makes a match.
        negative: less than this with every true box makes a negative.
        rescue: a true box's best boxes match it if they overlap by at least this much, whatever else they match.
    """
    matched = torch.full((len(boxes),), LEFT_OUT, dtype=torch.int64, device=boxes.device)
    if not len(truths) or not len(boxes):
        return matched.fill_(NEGATIVE)
    overlaps = box_iou(truths, boxes)
    best, which = overlaps.max(0)
    matched[best < negative] = NEGATIVE
    matched = torch.where(best >= positive, which, matched)
    of_truth = overlaps.max(1).values
    rescued = (overlaps == of_truth[:, None]) & (of_truth >= rescue)[:, None]
    last = len(truths) - 1 - rescued.flip(0).int().argmax(0)  # should several rescue a box, the last has it
    return torch.where(rescued.any(0), last, matched)


def sample(matched: Tensor, count: int, positives: float) -> tuple[Tensor, Tensor]:
    """A random choice of `count` boxes, of which at most the share `positives` match: (indices of these, of others)."""
    chosen_positive = _choice(matched >= 0, int(count * positives))
    return chosen_positive, _choice(matched == NEGATIVE, count - len(chosen_positive))


def _choice(among: Tensor, count: int) -> Tensor:
    indices = among.nonzero().flatten()
    return indices[torch.randperm(len(indices), device=indices.device)[:count]] if len(indices) > count else indices


def paste_masks(probabilities: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks of a whole picture from what was predicted inside boxes.

    Sampled bilinearly at the centre of every pixel, with the box as it is and zero around it; torchvision rounds the
    box to whole pixels.

    Args:
        probabilities: (n, h, w), stretched over the boxes.
        boxes: (n, 4).
        size: of the picture.

    Returns:
        (n, H, W) bool: where the probability is 0.5 or more.
    """
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for mask, probability, box, (x1, y1, x2, y2) in zip(masks, probabilities, boxes, boxes.tolist(), strict=True):
        if not (max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)):
            continue
        left, right = max(math.floor(x1) - 1, 0), min(math.ceil(x2) + 1, width)
        top, bottom = max(math.floor(y1) - 1, 0), min(math.ceil(y2) + 1, height)
        x = torch.arange(left, right, device=boxes.device) + 0.5
        y = torch.arange(top, bottom, device=boxes.device) + 0.5
        x, y = (x - box[0]) / (box[2] - box[0]) * 2 - 1, (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], 2)
        sampled = F.grid_sample(probability[None, None], grid[None], align_corners=False)
        mask[top:bottom, left:right] = sampled[0, 0] >= 0.5
    return masks
