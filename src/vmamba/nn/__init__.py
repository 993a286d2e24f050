"""The modules a VMamba is built of. They work on channels-last grids, (B, H, W, C), but for `Conv2d`, the heads'."""

from vmamba.nn.block import VSSBlock
from vmamba.nn.downsample import ConvDownsample, PatchMerging
from vmamba.nn.layers import GELU, Conv2d, ConvSiLU, GridConv2d, LayerNorm, Linear
from vmamba.nn.mlp import Mlp
from vmamba.nn.ss2d import SS2D
from vmamba.nn.stem import ConvStem, PatchStem, SmallStem

__all__ = [
    "GELU",
    "SS2D",
    "Conv2d",
    "ConvDownsample",
    "ConvSiLU",
    "ConvStem",
    "GridConv2d",
    "LayerNorm",
    "Linear",
    "Mlp",
    "PatchMerging",
    "PatchStem",
    "SmallStem",
    "VSSBlock",
]
