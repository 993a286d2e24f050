"""Between two stages: half the height and width, more channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.nn.layers import GridConv2d, LayerNorm, Linear
from vmamba.nn.norms import Norm, norm_layer
from vmamba.ops.registration import is_tracing_for_export


class ConvDownsample(nn.Module):
    """A 3×3 convolution of stride 2 and a norm, "layer" or "batch"; with `stride=1` the grid keeps its size."""

    def __init__(self, dim: int, out_dim: int, stride: int = 2, norm: Norm = "layer", **dd: Any) -> None:
        super().__init__()
        self.conv = GridConv2d(dim, out_dim, 3, stride=stride, padding=1, **dd)
        self.norm = norm_layer(norm, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, ⌈H/stride⌉, ⌈W/stride⌉, out_dim)."""
        return self.norm(self.conv(x))


class PatchMerging(nn.Module):
    """Each 2×2 patch becomes one pixel of 4·dim channels, normalised and projected (the vanilla models).

    Raises:
        ValueError: a stride other than 2, which would need overlapping patches.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2, **dd: Any) -> None:
        super().__init__()
        if stride != 2:
            raise ValueError(f"patch merging halves the grid and cannot have stride {stride}; expected 2")
        self.norm = LayerNorm(4 * dim, **dd)
        self.reduction = Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, ⌈H/2⌉, ⌈W/2⌉, out_dim); an odd side gets a row or column of zeros at its end."""
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        if is_tracing_for_export():  # where the lengths of the slices below cannot be shown to be equal
            rows, columns = (2 * torch.arange((size + 1) // 2, device=x.device) for size in (height, width))
            corners = [
                x.index_select(1, rows + row).index_select(2, columns + column) for column in (0, 1) for row in (0, 1)
            ]
        else:
            corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))
