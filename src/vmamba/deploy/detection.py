"""Mask R-CNN as one graph: the network, the choice among what it proposes, and the masks in the pictures.

What `MaskRCNN.forward` does picture by picture is done here for a whole batch at once, by the same rules and in the
same order of rounding, with no branch on what is found. Results have a row for each detection in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision.ops
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from vmamba.models import boxes as bx
from vmamba.models.detection import BOX_CELLS, BOX_STDS, MASK_CELLS, PROPOSALS, PROPOSALS_IOU, Detections, MaskRCNN
from vmamba.ops.nms import nms
from vmamba.tasks.inference import filled_up

OUTPUTS = ("boxes", "scores", "labels", "picture", "masks")


@torch.library.custom_op("vmamba::suppress_all", mutates_args=())
def suppress_all(boxes: Tensor, scores: Tensor, most: int, iou: float) -> Tensor:
    """Non-maximum suppression of several sets of boxes and scores, as ONNX's `NonMaxSuppression` does it.

    Args:
        boxes: (B, n, 4).
        scores: (B, C, n); boxes with a negative score take no part.
        most: how many boxes may stay for each (image, class).
        iou: intersection over union, above which the worse box goes.

    Returns:
        (m, 3), int64: image, class and number of each box that stays, by image, class and falling score.
    """
    found = [torch.zeros(0, 3, dtype=torch.int64)]
    for image in range(scores.shape[0]):
        for label in range(scores.shape[1]):
            taking_part = (scores[image, label] >= 0).nonzero().flatten()
            kept = nms(boxes[image, taking_part], scores[image, label, taking_part].contiguous(), iou)[:most]
            number = taking_part[kept]
            found.append(torch.stack([torch.full_like(number, image), torch.full_like(number, label), number], 1))
    return torch.cat(found)


@suppress_all.register_fake
def _(boxes: Tensor, scores: Tensor, most: int, iou: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), 3, dtype=torch.int64)


@torch.library.custom_op("vmamba::paste_all", mutates_args=())
def paste_all(probabilities: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
    """`boxes.paste_masks` in pictures of the size of `images` (B, C, H, W): (n, H, W), bool."""
    return bx.paste_masks(probabilities, boxes, images.shape[2:])


@paste_all.register_fake
def _(probabilities: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
    return boxes.new_empty(boxes.shape[0], *images.shape[2:], dtype=torch.bool)


class DetectionGraph(nn.Module):
    """A model for detection between images and results that are tensors.

    Images, results and all that is done between the heads are float32, whatever the layers compute in.

    Args:
        model: whose layers, thresholds and counts are taken as they are.
        dtype: of its parameters.
    """

    def __init__(self, model: MaskRCNN, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detections of a batch, by picture and falling score.

        Args:
            images: (B, 3, H, W), normalised, without padding, which is added here.

        Returns:
            "boxes" (n, 4) in pixels, "scores" (n,), "labels" (n,), int64, "picture" (n,), int64: which of the batch;
            and with a mask head "masks" (n, H, W), bool.
        """
        model = self.model
        height, width = (torch.full((1,), side, dtype=torch.float32) for side in images.shape[2:])
        limits = torch.cat([width, height, width, height])
        maps = model.neck(model.backbone(filled_up(images).to(self.dtype)))
        boxes, scores, levels = self._candidates(maps, limits)
        maps = [x.float() for x in maps]
        largest = torch.where(scores >= 0, boxes.amax(2), -1.0).amax(1)
        shifted = bx.apart(boxes, levels, largest[:, None])
        chosen = suppress_all(shifted, scores[:, None], PROPOSALS, PROPOSALS_IOU)
        picture, number = chosen[:, 0], chosen[:, 2]
        regions = boxes[picture, number]

        logits, deltas = model.roi_head.bbox_head(self._pool(maps, picture, regions, BOX_CELLS))
        probabilities = logits.softmax(1)[:, :-1]
        region, label = (probabilities > model.score_thr).nonzero(as_tuple=True)
        score, picture = probabilities[region, label], picture[region]
        found = _clipped(bx.decode(regions[region], deltas[region, label], BOX_STDS), limits)
        # Pictures are kept apart as classes of the suppression, and classes, as in the model, by a shift.
        largest = torch.zeros(images.shape[:1]).scatter_reduce(0, picture, found.amax(1), "amax")[picture]
        shifted = bx.apart(found, label, largest)
        of_picture = torch.arange(images.shape[0])[:, None] == picture
        kept = suppress_all(
            shifted[None], torch.where(of_picture, score, -1.0)[None], model.max_per_img, model.nms_iou
        )[:, 2]
        found, score, label, picture = found[kept], score[kept], label[kept], picture[kept]
        if model.roi_head.mask_head is None:
            return found, score, label, picture
        masks = model.roi_head.mask_head(self._pool(maps, picture, found, MASK_CELLS))
        own = masks[torch.arange(label.shape[0]), label].float()
        return found, score, label, picture, paste_all(own.sigmoid(), found, images)

    def _candidates(self, maps: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every map the best anchors, moved: (B, n, 4), their scores (B, n), -1 without area, and maps (n,)."""
        boxes, scores, levels = [], [], []
        for level, (x, stride) in enumerate(zip(maps, self.model.strides, strict=True)):
            score, delta = self.model.rpn_head(x)
            # As many more without area, since a small map may have fewer than are to be taken.
            score = F.pad(score.sigmoid(), (0, PROPOSALS), value=-1.0)
            delta, anchors = (F.pad(value, (0, 0, 0, PROPOSALS)) for value in (delta, bx.anchors(x.shape[2:], stride)))
            best, order = score.topk(PROPOSALS, dim=1)
            delta = delta.gather(1, order[:, :, None].expand(-1, -1, 4))
            moved = bx.decode(anchors[order].flatten(0, 1), delta.flatten(0, 1))
            boxes.append(_clipped(moved, limits).view(best.shape[0], -1, 4))
            scores.append(best)
            levels.append(torch.full_like(best[0], level))
        found, best = torch.cat(boxes, 1), torch.cat(scores, 1)
        has_area = (found[:, :, 2:] > found[:, :, :2]).all(2)
        return found, torch.where(has_area, best, -1.0), torch.cat(levels)

    def _pool(self, maps: Sequence[Tensor], picture: Tensor, boxes: Tensor, side: int) -> Tensor:
        """As `MaskRCNN.pool`, of maps in float32."""
        rows = torch.cat([picture[:, None].to(boxes), boxes], 1)
        levels = bx.region_levels(boxes, len(maps) - 1, finest=14 * self.model.strides[0])
        parts, members = [], []
        for level, (x, stride) in enumerate(zip(maps[:-1], self.model.strides, strict=False)):
            here = (levels == level).nonzero().flatten()
            members.append(here)
            parts.append(torchvision.ops.roi_align(x, rows[here], side, 1 / stride, sampling_ratio=0, aligned=True))
        order = torch.cat(members)
        places = torch.zeros_like(picture).scatter(0, order, torch.arange(order.shape[0]))
        return torch.cat(parts)[places].to(self.dtype)


def _clipped(boxes: Tensor, limits: Tensor) -> Tensor:
    """Boxes (n, 4) inside a picture; limits are its width, height, width and height."""
    return torch.minimum(boxes.clamp(min=0), limits)


def in_rows(detections: Sequence[Detections]) -> list[Tensor]:
    """What a model gives for each picture, as a graph gives it for all."""
    names = [name for name in OUTPUTS if name in detections[0] or name == "picture"]
    numbered = [found | {"picture": torch.full_like(found["labels"], i)} for i, found in enumerate(detections)]
    return [torch.cat([found[name] for found in numbered]) for name in names]


def drift(found: Sequence[Any], expected: Sequence[Any]) -> tuple[Tensor, Tensor, int]:
    """How far the detections of two models in the same pictures are apart.

    From the highest score down, each is paired with the one of the same picture and label whose box overlaps most, if
    boxes, and masks if there are any, overlap by half. One that is left alone counts with its score, and one of each
    pair with the difference of the two scores.

    Args:
        found, expected: as a graph gives them.

    Returns:
        What each detection of both counts (n,); their scores (n,); and how many have a pair.
    """
    one, other = ([torch.as_tensor(value) for value in rows] for rows in (found, expected))
    overlap = box_iou(one[0], other[0]) * ((one[2][:, None] == other[2]) & (one[3][:, None] == other[3]))
    counts, counts_2, pairs = one[1].clone(), other[1].clone(), 0
    for i in one[1].argsort(descending=True).tolist() if len(other[1]) else ():
        share, j = overlap[i].max(0)
        if len(one) > 4 and share >= 0.5:
            share = (one[4][i] & other[4][j]).sum() / (one[4][i] | other[4][j]).sum().clamp(min=1)
        if share >= 0.5:
            counts[i], counts_2[j] = (one[1][i] - other[1][j]).abs(), 0
            overlap[:, j] = 0
            pairs += 1
    return torch.cat([counts, counts_2]), torch.cat([one[1], other[1]]), 2 * pairs


def unmatched(
    found: Sequence[Any], expected: Sequence[Any], score: float = 1e-3, box: float = 0.99, mask: float = 0.95
) -> float:
    """The share of detections, of both, for which the other has none in the same place.

    Two are the same if picture and label are, the scores differ by less than `score`, and boxes and masks overlap by
    `box` and `mask`, or the masks differ in fewer than five pixels. The order of scores that are almost equal decides
    which of the boxes stay, and rounding decides that order, so that single ones may differ.
    """
    one, other = ([torch.as_tensor(value) for value in rows] for rows in (found, expected))
    if not len(one[0]) + len(other[0]):
        return 0.0
    same = box_iou(one[0].double(), other[0].double()) > box
    same &= (one[1][:, None] - other[1]).abs() < score
    same &= (one[2][:, None] == other[2]) & (one[3][:, None] == other[3])
    if len(one) > 4:
        for i, j in same.nonzero().tolist():
            differing = (one[4][i] ^ other[4][j]).sum()
            same[i, j] = bool(differing < 5 or differing <= (1 - mask) * (one[4][i] | other[4][j]).sum())
    alone = (~same.any(1)).sum() + (~same.any(0)).sum()
    return float(alone) / (len(one[0]) + len(other[0]))
