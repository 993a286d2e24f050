"""Between two stages: half the height and width, more channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.conv import GridConv2d


class ConvDownsample(nn.Module):
    """A 3×3 convolution of stride 2 and a LayerNorm."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = GridConv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, ⌈H/2⌉, ⌈W/2⌉, out_dim)."""
        call = cpu.caller(self, x)
        return call(self.norm, call(self.conv, x), overwrite=cpu.is_unwatched(self))


class PatchMerging(nn.Module):
    """Each 2×2 patch becomes one pixel of 4·dim channels, normalised and projected (the vanilla models)."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, ⌈H/2⌉, ⌈W/2⌉, out_dim); an odd side gets a row or column of zeros at its end."""
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        call = cpu.caller(self, x)
        return call(self.reduction, call(self.norm, torch.cat(corners, dim=-1)))
