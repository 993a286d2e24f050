"""From image to grid of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vmamba.nn.layers import GELU, GridConv2d, LayerNorm
from vmamba.nn.local import Norm, norm_layer


class ConvStem(nn.Module):
    """Two 3×3 convolutions, each followed by a norm, a GELU between them (paper, section 4.1).

    Args:
        in_chans: channels of the image.
        dim: channels of the grid; the first convolution makes half of them.
        stride: 4, 2 or 1. The convolutions share it: 2·2, 2·1 or 1·1.
        norm: "layer", as in the paper, or "batch".
        wide: whether the first convolution is 7×7 and makes all channels.
    """

    def __init__(
        self, in_chans: int, dim: int, stride: int = 4, norm: Norm = "layer", wide: bool = False, **dd: Any
    ) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stem stride is {stride}; expected 1, 2 or 4")
        hidden, side = (dim, 7) if wide else (dim // 2, 3)
        self.conv1 = nn.Conv2d(in_chans, hidden, side, stride=2 if stride > 1 else 1, padding=side // 2, **dd)
        self.norm1 = norm_layer(norm, hidden, **dd)
        self.act = GELU()
        self.conv2 = GridConv2d(hidden, dim, 3, stride=2 if stride > 2 else 1, padding=1, **dd)
        self.norm2 = norm_layer(norm, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ⌈H/stride⌉, ⌈W/stride⌉, dim)."""
        x = self.act(self.norm1(_to_grid(self.conv1, x)))
        return self.norm2(self.conv2(x))


class PatchStem(nn.Module):
    """One convolution over non-overlapping patches and a LayerNorm (the vanilla models)."""

    def __init__(self, in_chans: int, dim: int, stride: int = 4, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, stride, stride=stride, **dd)
        self.norm = LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ⌊H/stride⌋, ⌊W/stride⌋, dim)."""
        return self.norm(_to_grid(self.conv, x))


def _to_grid(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of an image (B, C, H, W), as a grid (B, H', W', C')."""
    return conv(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
