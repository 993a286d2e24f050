"""torch's layers, each with its own fast path on the CPU (`vmamba.nn.cpu`), for grids (B, H, W, C).

`LayerNorm` and `ConvSiLU` have one on GPUs too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.ops.backends.native import convolution as native
from vmamba.ops.layers import (
    applies,
    can_fuse,
    convolution,
    depthwise_silu,
    fuses_depthwise_silu,
    fuses_layer_norm,
    gelu,
    is_compiled,
    layer_norm,
    linear,
    product_dtype,
    records,
    separates_convolution,
)
from vmamba.ops.operators import runs_eagerly
from vmamba.ops.registration import is_tracing_for_export


@cpu.known
class Linear(nn.Linear):
    """`torch.nn.Linear` on the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not cpu.is_unpatched(Linear):
            return super().forward(x)
        return linear(x, self.weight, self.bias)


@cpu.known
class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`; one pass over memory on GPUs, and in inference on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        if not fuses_layer_norm(x, self.weight, self.bias):
            return super().forward(x)
        if self.normalized_shape != x.shape[-1:] or not cpu.is_unpatched(LayerNorm):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


@cpu.known
class GELU(nn.GELU):
    """`torch.nn.GELU`; in inference one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """x·Φ(x) of any shape, with Φ the normal distribution, or its approximation by tanh."""
        if is_compiled() or self.approximate != "none" or not applies(x) or records(x) or not cpu.is_unpatched(GELU):
            return super().forward(x)
        return gelu(x) if x.is_contiguous() else super().forward(x)  # which keeps the strides


def _convolves_as(layer: nn.Conv2d, kind: type[nn.Conv2d]) -> bool:
    """Whether a layer of this class, or of one that inherits from it, convolves as the class was written to."""
    is_torch_s = type(layer)._conv_forward is nn.Conv2d._conv_forward and "_conv_forward" not in vars(layer)
    return is_torch_s and cpu.is_unpatched(kind)


def _convolved(layer: nn.Conv2d, kind: type[nn.Conv2d], x: Tensor) -> Tensor | None:
    """What a layer of this class makes of a grid (B, H, W, C); None where it is left to torch."""
    parameters = layer.weight, layer.bias
    is_usual = applies(x, *parameters) and _convolves_as(layer, kind) and not is_compiled()
    if is_usual and can_fuse(x) and cpu.is_patchwise(layer) and not records(x, *parameters):
        return native.convolution(x.to(product_dtype(x)), *parameters, layer.stride[0])
    return None


def _is_operator(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether a layer of this class, or of one that inherits from it, is an operator in the graph that is compiled."""
    if not is_compiled():  # which is most of the time
        return False
    by_patches = cpu.is_patchwise(layer) and layer.stride[0] > 1
    is_separate = separates_convolution(x, layer.weight, layer.bias, by_patches)
    return is_separate and layer.padding_mode == "zeros" and _convolves_as(layer, GridConv2d)


def _is_misread(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether torch computes garbage from an image x (B, C, H, W).

    In bfloat16, on processors with a matrix unit (AMX), oneDNN's convolutions with a stride read wrong memory where
    their result has one column, and so does the gradient of their weight.
    """
    stride, padding = layer.stride, layer.padding
    if stride == (1, 1) or not isinstance(x, Tensor) or x.ndim != 4:  # torch.fx traces with something else
        return False
    if x.device.type != "cpu" or product_dtype(x) != torch.bfloat16:
        return False
    if not (isinstance(stride, tuple) and isinstance(padding, tuple) and layer.padding_mode == "zeros"):
        return False
    if is_tracing_for_export():  # which leaves the width open
        return False
    covered = layer.dilation[1] * (layer.kernel_size[1] - 1) + 1
    return x.shape[3] + 2 * padding[1] - covered < stride[1]


def _convolved_by_torch(convolve: Callable[[Tensor], Tensor], layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What `convolve`, torch's forward of this layer, makes of an image (B, C, H, W); see `_is_misread`."""
    if not _is_misread(layer, x):
        return convolve(x)
    return convolve(F.pad(x, (0, layer.stride[1])))[..., :1].clone()  # of a second column, which is not wanted


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch takes (B, C, H, W) to lie channels last, and then gives a result that does too."""
    return x.stride(1) == 1 and x.stride(2) >= x.stride(3) and not x.is_contiguous()


@cpu.known
class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`; 3×3 ones are faster in inference on the CPU where `x` or the weight lies channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', H', W')."""
        is_last = x.ndim == 4 and cpu.is_patchwise(self) and (_is_channels_last(x) or _is_channels_last(self.weight))
        y = _convolved(self, Conv2d, x.permute(0, 2, 3, 1)) if is_last else None
        return _convolved_by_torch(super().forward, self, x) if y is None else y.permute(0, 3, 1, 2)


@cpu.known
class GridConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` from (B, H, W, C) to (B, H', W', C'): the same weights, no copy on the way in or out."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, H, W, C) to (B, H', W', C')."""
        image = x.permute(0, 3, 1, 2)
        if _is_operator(self, x) and not isinstance(self.padding, str) and not _is_misread(self, image):
            return convolution(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        y = _convolved(self, GridConv2d, x)
        return _convolved_by_torch(super().forward, self, image).permute(0, 2, 3, 1) if y is None else y


@cpu.known
class ConvSiLU(GridConv2d):
    """A convolution from (B, H, W, C) to (B, H', W', C') and SiLU; one pass if it is 3×3 and depthwise, on GPUs too."""

    def forward(self, x: Tensor) -> Tensor:
        """SiLU of the convolution of (B, H, W, C)."""
        weight, bias = self.weight, self.bias
        is_usual = (is_compiled() or runs_eagerly(x)) and x.ndim == 4 and _convolves_as(self, ConvSiLU)
        if is_usual and cpu.is_depthwise_silu(self, x.shape[-1]) and fuses_depthwise_silu(x, weight, bias):
            return depthwise_silu(x, weight, bias)
        return F.silu(super().forward(x))
