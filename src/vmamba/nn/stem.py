"""From image to grid of patches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.layers import GELU, GridConv2d, LayerNorm
from vmamba.nn.norms import Norm, norm_layer
from vmamba.ops.backends.native.block import Affine
from vmamba.ops.fused import conv_stem
from vmamba.ops.layers import applies, can_fuse, fuses_stem, product_dtype, stem


@cpu.known
class ConvStem(nn.Module):
    """Two 3×3 convolutions, each followed by a norm, a GELU between them (paper, section 4.1).

    Args:
        in_chans: channels of the image.
        dim: channels of the grid; the first convolution makes half of them.
        stride: 4, 2 or 1. The convolutions share it: 2·2, 2·1 or 1·1.
        norm: "layer", as in the paper, or "batch".
        wide: whether the first convolution is 7×7 and makes all channels.
    """

    PARTS: ClassVar = {"conv1": nn.Conv2d, "norm1": LayerNorm, "act": GELU, "conv2": GridConv2d, "norm2": LayerNorm}

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
        if not torch.is_grad_enabled() and applies(x) and cpu.as_built(self):
            y = self._infer(x)
            if y is not None:
                return y
        if self._is_one_kernel(x):
            conv, norm = self.conv1, self.norm1
            assert conv.bias is not None
            x = stem(x, conv.weight, conv.bias, norm.weight, norm.bias, conv.stride[0], norm.eps)
        else:
            x = self.act(self.norm1(_to_grid(self.conv1, x)))
        return self.norm2(self.conv2(x))

    def _is_one_kernel(self, x: Tensor) -> bool:
        """Whether all that comes before the second convolution may be one kernel of a GPU's."""
        conv, norm = self.conv1, self.norm1
        layers = ((conv, nn.Conv2d), (norm, LayerNorm), (self.act, GELU))
        if not all(cpu.is_plain(layer, kind) for layer, kind in layers):
            return False
        return cpu.is_patchwise(conv) and fuses_stem(x, conv.weight, conv.bias, norm.weight, norm.bias)

    def _infer(self, x: Tensor) -> Tensor | None:
        """The same in one call, for a stem as it was built; None where it has to be computed layer by layer."""
        convolutions = self.conv1, self.conv2
        conv1, norm1, conv2, norm2 = layers = [
            Affine.of(layer) for layer in (self.conv1, self.norm1, self.conv2, self.norm2)
        ]
        if not can_fuse(x) or product_dtype(x) != torch.float32 or not all(map(cpu.is_patchwise, convolutions)):
            return None
        norms = self.norm1, self.norm2
        if any(norm.normalized_shape != (conv.out_channels,) for conv, norm in zip(convolutions, norms, strict=True)):
            return None
        if not applies(x, *(value for layer in layers for value in layer[:2])):
            return None
        return conv_stem(x, conv1, norm1, conv2, norm2, (self.conv1.stride[0], self.conv2.stride[0]))


class SmallStem(nn.Module):
    """One 3×3 convolution, a norm and a ReLU: the stem that ResNets have for small images.

    Args:
        in_chans, dim: channels of the image and of the grid.
        stride: 2 or 1.
        norm: "layer" or "batch".
    """

    def __init__(self, in_chans: int, dim: int, stride: int = 2, norm: Norm = "layer", **dd: Any) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stem stride is {stride}; the small stem has 1 or 2")
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm1 = norm_layer(norm, dim, **dd)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, ⌈H/stride⌉, ⌈W/stride⌉, dim)."""
        y: Tensor = self.act(self.norm1(_to_grid(self.conv1, x)))
        return y


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
