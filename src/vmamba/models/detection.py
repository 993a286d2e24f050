"""Mask R-CNN with a feature pyramid: detection and instance segmentation on any backbone (He et al., arXiv 1703.06870).

Without masks it is Faster R-CNN. Names and numbers are those of mmdetection 3, with which the published models were
trained; `boxes.py` has its rules for boxes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.models import boxes as bx
from vmamba.models.feature_maps import DenseModel, FeatureMaps, check_images, conv_block
from vmamba.nn import Conv2d, Linear
from vmamba.ops.roi_align import laid_out, roi_align

Size = Sequence[int]  # height, width
Losses = dict[str, Tensor]
Detections = dict[str, Tensor]
Target = Mapping[str, Tensor]

BOX_STDS = (0.1, 0.1, 0.2, 0.2)  # units of what the box head says of a region
PROPOSALS, PROPOSALS_IOU = 1000, 0.7  # of a picture after their suppression, and before it of each map
BOX_CELLS, MASK_CELLS = 7, 14  # a side of what the two heads see of a region


class FPN(nn.Module):
    """Feature pyramid: every map carries what the coarser ones know (Lin et al., arXiv 1612.03144)."""

    def __init__(self, in_chans: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv_block(chans, channels, 1) for chans in in_chans)
        self.fpn_convs = nn.ModuleList(conv_block(channels, channels, 3) for _ in in_chans)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, H, W), finest first, to as many of equal width and one more: every second cell of the last."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            finer = laterals[i - 1]
            laterals[i - 1] = F.interpolate(laterals[i], finer.shape[2:], mode="nearest").add_(finer)
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]
        return [*outputs, outputs[-1][:, :, ::2, ::2]]


class RPNHead(nn.Module):
    """Is there an object at this anchor, and where exactly: asked at every cell of every map."""

    def __init__(self, channels: int = 256, ratios: int = 3) -> None:
        super().__init__()
        self.rpn_conv = Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, ratios, 1)
        self.rpn_reg = nn.Conv2d(channels, ratios * 4, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            _init_normal(conv, 0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map (B, C, H, W) to scores before the sigmoid (B, H·W·ratios) and deltas (B, H·W·ratios, 4)."""
        x = F.relu(self.rpn_conv(x), inplace=True)
        scores, deltas = self.rpn_cls(x).permute(0, 2, 3, 1), self.rpn_reg(x).permute(0, 2, 3, 1)
        return scores.flatten(1).float(), deltas.reshape(x.shape[0], -1, 4).float()


class BoxHead(nn.Module):
    """What is in this region, and where exactly."""

    def __init__(self, num_classes: int, channels: int = 256, hidden: int = 1024, side: int = BOX_CELLS) -> None:
        super().__init__()
        sides = (channels * side**2, hidden, hidden)
        self.shared_fcs = nn.ModuleList(Linear(*pair) for pair in itertools.pairwise(sides))
        self.fc_cls = Linear(hidden, num_classes + 1)
        self.fc_reg = Linear(hidden, num_classes * 4)
        for fc in self.shared_fcs.modules():
            if isinstance(fc, nn.Linear):
                nn.init.xavier_uniform_(fc.weight)
                nn.init.zeros_(fc.bias)
        _init_normal(self.fc_cls, 0.01)
        _init_normal(self.fc_reg, 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled regions (n, C, 7, 7) to logits (n, classes + 1), background last, and deltas (n, classes, 4)."""
        x = x.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x))
        return self.fc_cls(x).float(), self.fc_reg(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """The shape of the object in a region, if it were of this class: of every class."""

    def __init__(self, num_classes: int, channels: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(conv_block(channels, channels, 3, relu=True) for _ in range(depth)))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for conv in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Pooled regions (n, C, 14, 14) to logits (n, classes, 28, 28)."""
        return self.conv_logits(F.relu(self.upsample(self.convs(x)), inplace=True))


class RoIHeads(nn.Module):
    """The heads that look at regions; `mask_head` may be None."""

    def __init__(self, bbox_head: BoxHead, mask_head: MaskHead | None) -> None:
        super().__init__()
        self.bbox_head = bbox_head
        self.mask_head = mask_head


class MaskRCNN(DenseModel):
    """Mask R-CNN with FPN; Faster R-CNN with `masks=False`.

    The published models are this on VMamba's four stages with the arguments' defaults and 80 classes, in mmdetection.

    Args:
        backbone: a feature extractor, see `FeatureMaps`; timm's as well as ours, if each map has half the size of the
            one before.
        num_classes: number of classes, without background.
        channels: width of the feature pyramid and the heads.
        masks: whether there is a mask head.
        hidden: width of the box head's two hidden layers.
        out_norm: whether a LayerNorm follows each stage of the backbone.
        score_thr: detections have a higher score than this.
        max_per_img: the best so many detections of a picture are given.
        nms_iou: of two boxes of one class that overlap more, the better one is given.
        regions: of so many in each picture the heads learn; fewer make a step cheaper, most of all with narrow heads.

    Attributes:
        num_classes, score_thr, max_per_img, nms_iou, regions: as given; all but the first may be changed at any time.

    Raises:
        ValueError: the backbone's maps do not halve from one to the next.
    """

    task, optional = "detection", ("roi_head.mask_head",)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 256,
        masks: bool = True,
        hidden: int = 1024,
        out_norm: bool = True,
        score_thr: float = 0.05,
        max_per_img: int = 100,
        nms_iou: float = 0.5,
        regions: int = 512,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.score_thr, self.max_per_img, self.nms_iou, self.regions = score_thr, max_per_img, nms_iou, regions
        self.backbone = FeatureMaps(backbone, out_norm)
        strides = self.backbone.strides
        if any(coarser != 2 * finer for finer, coarser in itertools.pairwise(strides)):
            raise ValueError(
                f"the backbone's maps have strides {strides}; detection needs each to be twice the one before, as in a"
                " hierarchical backbone (choose the maps with out_indices=)"
            )
        self.strides = [*strides, 2 * strides[-1]]
        self.neck = FPN(self.backbone.channels, channels)
        self.rpn_head = RPNHead(channels)
        self.roi_head = RoIHeads(
            BoxHead(num_classes, channels, hidden), MaskHead(num_classes, channels) if masks else None
        )

    def forward(
        self,
        images: Tensor,
        targets: Sequence[Target] | None = None,
        *,
        sizes: Sequence[Size] | None = None,
        file_sizes: Sequence[Size] | None = None,
        least_score: float = 0.0,
    ) -> list[Detections] | Losses:
        """Detect objects, or with `targets` compute the losses.

        Args:
            images: (B, 3, H, W), normalised; smaller pictures are padded below and to the right with zeros.
            targets: for each picture "boxes" (n, 4), float, of positive width and height, in pixels of `images`;
                "labels" (n,), int64 from 0; and if known "masks" (n, H, W), bool or uint8, of the padded or true size.
            sizes: height and width of each picture without padding; by default that of `images`.
            file_sizes: height and width of each picture before it was resized to `sizes`; detections are then in pixels
                of that size.
            least_score: detections of a lower score are left out, before the mask head looks at them.

        Returns:
            Without targets for each picture "boxes" (n, 4), "scores" (n,), falling, "labels" (n,), int64 from 0, and
            with a mask head "masks" (n, H, W), bool, of `file_sizes` or else `sizes`. With targets scalars to be added
            up: "rpn_cls", "rpn_reg", "cls", "reg" and, if there are masks and a head for them, "mask".

        Raises:
            ValueError: images that are no batch of images; more or fewer targets or sizes than images.
        """
        check_images(images)
        for name, given in (("targets", targets), ("sizes", sizes), ("file_sizes", file_sizes)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{len(given)} {name} for {len(images)} images; expected one each")
        sizes = [images.shape[2:]] * len(images) if sizes is None else sizes
        maps = self.neck(self.backbone(images))
        predicted = [self.rpn_head(x) for x in maps]
        scores, deltas = zip(*predicted, strict=True)
        anchors = [bx.anchors(x.shape[2:], s, device=x.device) for x, s in zip(maps, self.strides, strict=True)]
        maps = [laid_out(x) for x in maps]  # once for both heads
        keep = PROPOSALS if targets is None else 2 * PROPOSALS
        with torch.no_grad():
            proposals = [
                self.propose([s[i] for s in scores], [d[i] for d in deltas], anchors, size, keep)[0]
                for i, size in enumerate(sizes)
            ]
        if targets is None:
            return self._detect(maps, proposals, sizes, file_sizes or sizes, least_score)
        inside = [self._inside(maps, size).to(images.device) for size in sizes]
        losses = rpn_losses(torch.cat(scores, 1), torch.cat(deltas, 1), torch.cat(anchors), inside, targets)
        return losses | self._roi_losses(maps, proposals, targets)

    def forward_fixed(self, images: Tensor, regions: int = PROPOSALS, masks: int = 100) -> None:
        """Run every layer on fixed numbers of proposals and detections in all, which is what published costs count.

        Args:
            images: (B, 3, H, W); on the meta device as well.
            regions: how many the box head sees.
            masks: how many the mask head sees.
        """
        maps = self.neck(self.backbone(images))
        for x in maps:
            self.rpn_head(x)
        channels = maps[0].shape[1]
        self.roi_head.bbox_head(maps[0].new_empty(regions, channels, BOX_CELLS, BOX_CELLS))
        if self.roi_head.mask_head is not None:
            self.roi_head.mask_head(maps[0].new_empty(masks, channels, MASK_CELLS, MASK_CELLS))

    def _inside(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Which anchors of all maps lie in a picture, padded to a multiple of the coarsest stage's stride."""
        whole = self.strides[-2]
        padded = [-(-side // whole) * whole for side in size]
        return torch.cat([bx.inside(x.shape[2:], s, padded) for x, s in zip(maps, self.strides, strict=True)])

    def propose(
        self, scores: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor], size: Size, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Proposals of one picture, best first: at most 1000 boxes (n, 4), and their scores (n,).

        Args:
            scores, deltas, anchors: of each map, (n,), (n, 4) and (n, 4); see `RPNHead` and `boxes.anchors`.
            size: height and width without padding.
            keep: how many of each map's best take part in the suppression.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for level, (score, delta, anchor) in enumerate(zip(scores, deltas, anchors, strict=True)):
            # By probability, not by logit: where it saturates, that is another order. And only if some are to go.
            probability = score.sigmoid()
            if len(score) > keep:
                order = probability.sort(descending=True).indices[:keep]
                probability, delta, anchor = probability[order], delta[order], anchor[order]
            boxes = bx.decode(anchor, delta, size=size)
            found.append((boxes, probability, torch.full_like(probability, level, dtype=torch.int64)))
        boxes, probabilities, levels = (torch.cat(parts) for parts in zip(*found, strict=True))
        valid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1).nonzero().flatten()
        boxes, probabilities, levels = boxes[valid], probabilities[valid], levels[valid]
        kept = bx.suppress(boxes, probabilities, levels, PROPOSALS_IOU)[:PROPOSALS]
        return boxes[kept], probabilities[kept]

    def pool(self, maps: Sequence[Tensor], regions: Sequence[Tensor], side: int) -> Tensor:
        """Features of regions, (n, C, side, side): each from the map that suits its size, by RoIAlign.

        Args:
            maps: of the feature pyramid, (B, C, H, W); the last one is not used.
            regions: of each picture, (n, 4).
            side: cells of the result.
        """
        boxes = torch.cat(list(regions))
        picture = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(regions)])
        rows = torch.cat([picture, boxes], 1)
        levels = bx.region_levels(boxes, len(maps) - 1, finest=14 * self.strides[0])
        pooled = maps[0].new_empty(len(rows), maps[0].shape[1], side, side)
        for level, (x, stride) in enumerate(zip(maps[:-1], self.strides, strict=False)):
            here = (levels == level).nonzero().flatten()
            # In float32, for half the digits would not tell one place from the next.
            pooled.index_copy_(0, here, roi_align(x.float(), rows[here], side, 1 / stride).to(x.dtype))
        return pooled

    def _detect(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[Size],
        file_sizes: Sequence[Size],
        least_score: float,
    ) -> list[Detections]:
        counts = [len(boxes) for boxes in proposals]
        logits, deltas = self.roi_head.bbox_head(self.pool(maps, proposals, BOX_CELLS))
        detections, regions = [], []
        for i, (logit, delta) in enumerate(zip(logits.split(counts), deltas.split(counts), strict=True)):
            found, at = self._classify(proposals[i], logit, delta, sizes[i], file_sizes[i], least_score)
            detections.append(found)
            regions.append(at)
        if self.roi_head.mask_head is not None:
            labels = torch.cat([found["labels"] for found in detections])
            masks = _own_class(self.roi_head.mask_head(self.pool(maps, regions, MASK_CELLS)), labels).sigmoid()
            for i, mask in enumerate(masks.split([len(at) for at in regions])):
                found = detections[i]
                found["masks"] = bx.paste_masks(mask, found["boxes"], file_sizes[i])
        return detections

    def _classify(
        self, proposals: Tensor, logits: Tensor, deltas: Tensor, size: Size, file_size: Size, least_score: float
    ) -> tuple[Detections, Tensor]:
        """Detections of one picture in pixels of the file, and their boxes in pixels of the network's picture."""
        scores = logits.softmax(1)[:, :-1]
        region, label = ((scores > self.score_thr) & (scores >= least_score)).nonzero(as_tuple=True)
        scores = scores[region, label]
        boxes = bx.decode(proposals[region], deltas[region, label], BOX_STDS, size)
        kept = bx.suppress(boxes, scores, label, self.nms_iou)[: self.max_per_img]
        # Of the rounded sizes: the two factors of a picture differ.
        factor = boxes.new_tensor([size[1] / file_size[1], size[0] / file_size[0]]).repeat(2)
        return {"boxes": boxes[kept] / factor, "scores": scores[kept], "labels": label[kept]}, boxes[kept]

    def _roi_losses(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Target]) -> Losses:
        """Losses of box and mask head on `regions` of each picture, a quarter of them, at most, with an object."""
        regions, labels, deltas, masked, mask_labels, shapes = [], [], [], [], [], []
        for proposed, target in zip(proposals, targets, strict=True):
            truths = target["boxes"].to(proposed)
            candidates = torch.cat([truths, proposed])
            matched = bx.match(proposed, truths, 0.5, 0.5, 0.5)
            matched = torch.cat([torch.arange(len(truths)).to(matched), matched])
            positive, negative = bx.sample(matched, self.regions, 0.25)
            which, chosen = matched[positive], candidates[positive]
            label = target["labels"][which]
            regions.append(torch.cat([chosen, candidates[negative]]))
            labels += [label, label.new_full((len(negative),), self.num_classes)]
            deltas.append(bx.encode(chosen, truths[which], BOX_STDS))
            known = len(chosen) if "masks" in target else 0
            masked.append(chosen[:known])
            mask_labels.append(label[:known])
            if known:
                shapes.append(_mask_targets(target["masks"], chosen, which))

        logits, predicted = self.roi_head.bbox_head(self.pool(maps, regions, BOX_CELLS))
        label = torch.cat(labels)
        positive = (label < self.num_classes).nonzero().flatten()
        count = max(len(label), 1)
        losses = {
            "cls": F.cross_entropy(logits, label, reduction="sum") / count,
            "reg": F.l1_loss(predicted[positive, label[positive]], torch.cat(deltas), reduction="sum") / count,
        }
        if shapes and self.roi_head.mask_head is not None:
            own = _own_class(self.roi_head.mask_head(self.pool(maps, masked, MASK_CELLS)), torch.cat(mask_labels))
            losses["mask"] = F.binary_cross_entropy_with_logits(own, torch.cat(shapes))
        return losses


def rpn_losses(
    scores: Tensor, deltas: Tensor, anchors: Tensor, inside: Sequence[Tensor], targets: Sequence[Target]
) -> Losses:
    """Losses of the proposals on 256 anchors a picture, half of them, at most, with an object.

    Args:
        scores, deltas: of all maps, (B, n) and (B, n, 4).
        anchors: (n, 4).
        inside: of each picture, which anchors take part, (n,) bool.
        targets: of each picture; see `MaskRCNN`.
    """
    cls, reg, count = scores.new_zeros(()), scores.new_zeros(()), 0
    for score, delta, within, target in zip(scores, deltas, inside, targets, strict=True):
        here = within.nonzero().flatten()
        truths = target["boxes"].to(anchors)
        matched = bx.match(anchors[here], truths, 0.7, 0.3, 0.3)
        positive, negative = bx.sample(matched, 256, 0.5)
        wanted = bx.encode(anchors[here[positive]], truths[matched[positive]])
        chosen = score[here[torch.cat([positive, negative])]]
        is_object = (torch.arange(len(chosen), device=chosen.device) < len(positive)).to(chosen)
        cls = cls + F.binary_cross_entropy_with_logits(chosen, is_object, reduction="sum")
        reg = reg + F.l1_loss(delta[here[positive]], wanted, reduction="sum")
        count += len(chosen)
    return {"rpn_cls": cls / max(count, 1), "rpn_reg": reg / max(count, 1)}


def _mask_targets(masks: Tensor, boxes: Tensor, which: Tensor) -> Tensor:
    """What of the true masks (m, H, W) is inside boxes (n, 4): (n, 28, 28) of 0 and 1, of mask `which` (n,)."""
    rows = torch.cat([which[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].to(boxes), rows, 28, 1.0)[:, 0] >= 0.5).to(boxes)


def _own_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Of mask logits (n, classes, H, W) those of each region's class (n,): (n, H, W), float32."""
    return logits[torch.arange(len(labels), device=labels.device), labels].float()


def _init_normal(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
