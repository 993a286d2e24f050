"""Parts that look at neighbours and at the batch: for small models that have to learn in minutes (docs/learning.md)."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn.layers import GridConv2d
from vmamba.nn.norms import BatchNorm
from vmamba.ops.registration import is_tracing_for_export


class ConvNormSiLU(nn.Module):
    """Depthwise 3×3 convolution, BatchNorm, SiLU: what `vmamba.nn.ConvSiLU` is in SS2D, with a norm inside."""

    def __init__(self, dim: int, bias: bool = False, **dd: Any) -> None:
        super().__init__()
        self.conv = GridConv2d(dim, dim, 3, padding=1, groups=dim, bias=bias, **dd)
        self.norm = BatchNorm(dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


class LocalMlp(nn.Module):
    """The channel mixer that sees neighbours: 3×3 convolution, BatchNorm, ReLU, 3×3 convolution, BatchNorm, dropout.

    It needs no norm before it. With as many hidden channels as outer ones it is the branch of a ResNet block, and like
    that begins as nothing: the weight of the last norm is 0.

    Args:
        dim, hidden: channels that come in, and between the convolutions.
        drop: rate of the dropout.
        out_dim: channels that go out, `dim` by default.
        stride: of the first convolution.
    """

    def __init__(
        self, dim: int, hidden: int, drop: float = 0.0, out_dim: int | None = None, stride: int = 1, **dd: Any
    ) -> None:
        super().__init__()
        out_dim = out_dim or dim
        self.conv1 = GridConv2d(dim, hidden, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm1 = BatchNorm(hidden, **dd)
        self.act = nn.ReLU()
        self.conv2 = GridConv2d(hidden, out_dim, 3, padding=1, bias=False, **dd)
        self.norm2 = BatchNorm(out_dim, **dd)
        self.drop = nn.Dropout(drop)
        self.close()

    def close(self) -> None:
        """Let the branch be nothing, as at the beginning, if it ends in a BatchNorm."""
        if isinstance(self.norm2, BatchNorm):
            nn.init.zeros_(self.norm2.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, ⌈H/stride⌉, ⌈W/stride⌉, out_dim)."""
        return self.drop(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


class LocalBlock(nn.Module):
    """ReLU(x + LocalMlp(x)): a block that does not scan, for the first stages, where neighbours say most.

    With as many hidden channels as outer ones, this is a ResNet's basic block.

    Args:
        dim: channels.
        mlp_ratio: hidden channels over `dim`.
        drop_path: probability of skipping the branch, per sample, in training.
        proj_drop: rate of the dropout at the end of the branch.
    """

    def __init__(
        self, dim: int, mlp_ratio: float = 1.0, drop_path: float = 0.0, proj_drop: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.mlp = LocalMlp(dim, int(mlp_ratio * dim), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to the same."""
        y: Tensor = self.act(x + self.drop_path(self.mlp(x)))
        return y


class ResidualDownsample(nn.Module):
    """ReLU(shortcut(x) + LocalMlp(x)): the block with which a ResNet's stage begins, half the grid and more channels.

    The shortcut takes the mean of 2×2 pixels, a 1×1 convolution and BatchNorm (ResNet-D; He et al., CVPR 2019, Bag of
    Tricks, section 4). With `stride=1` the grid keeps its size, and there is no mean.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2, norm: Literal["batch"] = "batch", **dd: Any) -> None:
        super().__init__()
        if norm != "batch":
            raise ValueError(f"norm is {norm!r}; residual downsampling has 'batch' alone")
        self.mlp = LocalMlp(dim, out_dim, out_dim=out_dim, stride=stride, **dd)
        self.stride = stride
        self.proj = GridConv2d(dim, out_dim, 1, bias=False, **dd)
        self.norm = BatchNorm(out_dim, **dd)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, ⌈H/stride⌉, ⌈W/stride⌉, out_dim)."""
        y: Tensor = self.act(self.norm(self.proj(_means(x, self.stride))) + self.mlp(x))
        return y


def _means(x: Tensor, side: int) -> Tensor:
    """Means of squares of pixels (B, H, W, C), at the ends of those that there are."""
    if side == 1:
        return x
    image = x.permute(0, 3, 1, 2)
    if side == 2 and is_tracing_for_export():  # where sides must come out as those of a convolution do, odd or even
        image = F.pad(image, (0, 1, 0, 1), mode="replicate")  # which even sides leave over
        means = F.avg_pool2d(image, 2)
    else:
        means = F.avg_pool2d(image, side, ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1)
