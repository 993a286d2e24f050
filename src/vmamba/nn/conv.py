"""Convolution over channels-last grids."""

from __future__ import annotations

from torch import Tensor, nn


class GridConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` from (B, H, W, C) to (B, H', W', C'): the same weights, no copy on the way in or out."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, H, W, C) to (B, H', W', C')."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
