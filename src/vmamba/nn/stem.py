"""From image to grid of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.conv import GridConv2d


class ConvStem(nn.Module):
    """Two 3×3 convolutions, each followed by a LayerNorm, a GELU between them (paper, section 4.1).

    Args:
        in_chans: channels of the image.
        dim: channels of the grid; the first convolution makes half of them.
        stride: 4, 2 or 1. The convolutions share it: 2·2, 2·1 or 1·1.
    """

    def __init__(self, in_chans: int, dim: int, stride: int = 4, **dd: Any) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stem stride is {stride}; expected 1, 2 or 4")
        self.conv1 = GridConv2d(in_chans, dim // 2, 3, stride=2 if stride > 1 else 1, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.conv2 = GridConv2d(dim // 2, dim, 3, stride=2 if stride > 2 else 1, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_chans) to (B, ⌈H/stride⌉, ⌈W/stride⌉, dim)."""
        call, unwatched = cpu.caller(self, x), cpu.is_unwatched(self)
        x = call(self.norm1, call(self.conv1, x), "gelu", overwrite=unwatched)
        return call(self.norm2, call(self.conv2, x), overwrite=unwatched)


class PatchStem(nn.Module):
    """One convolution over non-overlapping patches and a LayerNorm (the vanilla models)."""

    def __init__(self, in_chans: int, dim: int, stride: int = 4, **dd: Any) -> None:
        super().__init__()
        self.conv = GridConv2d(in_chans, dim, stride, stride=stride, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_chans) to (B, ⌊H/stride⌋, ⌊W/stride⌋, dim)."""
        call = cpu.caller(self, x)
        return call(self.norm, call(self.conv, x), overwrite=cpu.is_unwatched(self))
