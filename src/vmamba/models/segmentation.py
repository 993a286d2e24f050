"""UPerNet: semantic segmentation on any backbone (Xiao et al., ECCV 2018, arXiv 1807.10221)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.models.feature_maps import (
    ConvBlock,
    DenseModel,
    FeatureMaps,
    check_images,
    conv_block,
    may_overwrite,
    normalise_,
)
from vmamba.nn import cpu
from vmamba.ops.backends.native import enlarging as native
from vmamba.ops.backends.native.convolution import convolution
from vmamba.ops.layers import product

# Products that are enlarged at a time, 16 MB.
_STRETCH = 2**22
IGNORED = -1  # the label of pixels that belong to no class, and that neither loss nor metrics count


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) at another height and width, bilinearly."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all, and a classifier of the finest map's pixels.

    Args:
        in_chans: channels of the maps, finest first.
        num_classes: channels of the logits.
        channels: of everything in between.
        pool_scales: sides of the grids that the coarsest map is pooled to.
        drop_rate: share of channels dropped before the classifier in training.
    """

    def __init__(
        self,
        in_chans: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        *finer, coarsest = in_chans
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _block(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = _block(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_block(chans, channels, 1) for chans in finer)
        self.fpn_convs = nn.ModuleList(_block(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = FusionBlock(len(in_chans) * channels, channels)
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W), finest first, to logits (B, num_classes, H, W) at the finest map's size."""
        *finer, coarsest = maps
        pooled = [resized(module(coarsest), coarsest.shape[2:]) for module in self.psp_modules]
        x = self.bottleneck(torch.cat([coarsest, *pooled], 1))
        pyramid = [x]
        for x_finer, lateral in zip(reversed(finer), reversed(self.lateral_convs), strict=True):
            x = resized(x, x_finer.shape[2:]).add_(lateral(x_finer))
            pyramid.insert(0, x)
        for i, conv in enumerate(self.fpn_convs):
            pyramid[i] = conv(pyramid[i])
        return self.conv_seg(self.dropout(self.fpn_bottleneck(pyramid)))


class FusionBlock(nn.Module):
    """Convolution, BatchNorm and ReLU on maps that are enlarged to the first one's size and put side by side.

    The convolution mixes channels and enlarging mixes pixels, so they can change places: a coarse map goes through the
    convolution's taps at its own size, and what comes out is enlarged and shifted, both at once. In inference on the
    CPU that is done, since it takes a third of the multiplications.
    """

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        parts: Any = _block(in_chans, out_chans, 3)
        self.conv: nn.Conv2d
        self.conv, self.bn, self.relu = parts

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W), the finest first, to (B, out_chans, H, W) of the finest."""
        finest, *coarser = maps
        if self._may_enlarge_later(maps):
            weight = self.conv.weight[:, : finest.shape[1]]
            grid = convolution(finest.permute(0, 2, 3, 1), weight, None, 1)
            x = F.conv2d(finest, weight, padding=1) if grid is None else grid.permute(0, 3, 1, 2)
            x = x.contiguous(memory_format=torch.channels_last)
            weights = self.conv.weight[:, finest.shape[1] :].split([y.shape[1] for y in coarser], 1)
            for y, weight in zip(coarser, weights, strict=True):
                _add_enlarged_convolution(x, y, weight)
            return self.relu(normalise_(x, self.bn))
        x = self.conv(torch.cat([finest, *(resized(y, finest.shape[2:]) for y in coarser)], 1))
        return self.relu(self.bn(x))

    def _may_enlarge_later(self, maps: Sequence[Tensor]) -> bool:
        conv = self.conv
        if native.reason_unavailable() is not None or not may_overwrite(conv, self.bn, *maps):
            return False
        return cpu.is_patchwise(conv) and conv.stride == (1, 1) and conv.bias is None


def _add_enlarged_convolution(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Add to x (B, O, H, W) the 3×3 convolution with `weight` (O, C, 3, 3) of y (B, C, h, w) enlarged to (H, W)."""
    grid, pixels = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    channels = max(16, _STRETCH // (9 * y[:, 0].numel()) // 16 * 16)
    for first in range(0, len(weight), channels):
        taps = weight[first : first + channels].permute(2, 3, 0, 1).flatten(0, 2)  # (3·3·channels, C)
        native.add_enlarged(grid, product(pixels, taps).unflatten(3, (3, 3, -1)), first)


class FCNHead(nn.Module):
    """One convolution and a classifier on one map: the auxiliary head that only training looks at."""

    def __init__(self, in_chans: int, num_classes: int, channels: int = 256, drop_rate: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(_block(in_chans, channels, 3))
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = _classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, num_classes, H, W)."""
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(DenseModel):
    """A backbone with UPerNet's head, and in training an auxiliary head on the last map but one.

    The published models are this on VMamba's four stages with the arguments' defaults, 150 classes, in mmsegmentation;
    its SyncBN is BatchNorm here (`nn.SyncBatchNorm.convert_sync_batchnorm` makes it so again).

    Args:
        backbone: a feature extractor, see `FeatureMaps`; timm's as well as ours, of any strides.
        num_classes: number of classes.
        channels: width of the head.
        auxiliary_channels: width of the auxiliary head; 0 for none.
        out_norm: whether a LayerNorm follows each stage of the backbone.
        drop_rate: share of channels dropped before the classifiers in training.

    Attributes:
        num_classes: number of classes.
        auxiliary_weight: weight of the auxiliary head's loss, 0.4 in the published recipe.
    """

    task, optional = "segmentation", ("auxiliary_head",)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 512,
        auxiliary_channels: int = 256,
        out_norm: bool = True,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.auxiliary_weight = 0.4
        self.backbone = FeatureMaps(backbone, out_norm)
        chans = self.backbone.channels
        self.decode_head = UPerHead(chans, num_classes, channels, drop_rate=drop_rate)
        self.auxiliary_head = (
            FCNHead(chans[-2], num_classes, auxiliary_channels, drop_rate) if auxiliary_channels else None
        )

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Segment images, or with `targets` compute the losses.

        Args:
            images: (B, 3, H, W), normalised, of any size; not padded, for padding changes the result.
            targets: (B, H, W), of any integer dtype, the class of each pixel from 0; -1 where there is none.

        Returns:
            Without targets the logits, (B, num_classes, H, W). With them scalars to be added up: "decode", the cross
            entropy of the logits, and "auxiliary", that of the auxiliary head times its weight. Both are means over all
            pixels, those without a class counting as 0, as in mmsegmentation.

        Raises:
            ValueError: images or targets of other shapes.
        """
        check_images(images)
        size = images.shape[2:]
        maps = self.backbone(images)
        if targets is None:
            return resized(self.decode_head(maps), size)
        if targets.shape != (len(images), *size):
            raise ValueError(f"targets are {tuple(targets.shape)}; expected {(len(images), *size)}, one class a pixel")
        losses = {"decode": _cross_entropy(self.decode_head(maps), targets)}
        if self.auxiliary_head is not None:
            losses["auxiliary"] = self.auxiliary_weight * _cross_entropy(self.auxiliary_head(maps[-2]), targets)
        return losses


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    full = resized(logits.float(), targets.shape[1:])
    return F.cross_entropy(full, targets.long(), ignore_index=IGNORED, reduction="sum") / targets.numel()


def _block(in_chans: int, out_chans: int, kernel: int) -> ConvBlock:
    return conv_block(in_chans, out_chans, kernel, norm=True, relu=True)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
