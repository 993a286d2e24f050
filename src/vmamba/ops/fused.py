"""What inference on the CPU computes in one call, a VSS block and a stem: at once, or as operators of a graph.

torch.compile leaves an operator as it is. A compiled network of such blocks therefore runs the network's own kernels,
and is compiled sooner. What these do not know an operator computes layer by layer; where they would be slower than what
torch makes of single layers, there is no operator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.backends.native.block import Affine, Scan
from vmamba.ops.backends.native.block import vss_block as compute_block
from vmamba.ops.backends.native.products import multiplies_fast
from vmamba.ops.backends.native.stem import conv_stem as compute_stem
from vmamba.ops.layers import is_compiled
from vmamba.ops.precision import without_autocast
from vmamba.ops.registration import define
from vmamba.ops.ss2d import ss2d_scan, watch_scans

# --- a VSS block -----------------------------------------------------------------------------------------------------


def vss_block(
    x: Tensor, norm1: Affine, in_proj: Affine, conv: Affine, scan: Scan, norm: Affine, out_proj: Affine,
    mlp: Sequence[Affine], gated: bool, dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """`backends.native.block.vss_block` as an operator of the graph that torch.compile traces; None where it cannot."""
    if x.ndim != 4 or x.dtype not in (dtype, torch.float32) or not multiplies_fast(dtype):
        return None
    norm2, fc1, fc2 = mlp or (Affine(None, None),) * 3
    layers = (norm1, in_proj, conv, norm, out_proj, norm2, fc1, fc2)
    parameters = [value for layer in layers for value in layer[:2]]
    eps = (norm1.eps, norm.eps, norm2.eps)
    y: Tensor = torch.ops.vmamba.vss_block(
        x, *scan[:-1], *parameters, scan.pattern, gated, dtype is torch.bfloat16, *eps
    )
    return y


def _unpacked(x: Tensor, *values: Any) -> tuple[Any, ...]:
    """The operator's inputs as the arguments of `vss_block`."""
    scan, parameters, (pattern, gated, is_low, eps1, eps, eps2) = values[:5], values[5:21], values[21:]
    epsilons = (eps1, 0.0, 0.0, eps, 0.0, eps2, 0.0, 0.0)
    norm1, in_proj, conv, norm, out_proj, *mlp = map(Affine, parameters[::2], parameters[1::2], epsilons)
    dtype = torch.bfloat16 if is_low else torch.float32
    has_mlp = mlp[1].weight is not None
    return x, norm1, in_proj, conv, Scan._make((*scan, pattern)), norm, out_proj, mlp if has_mlp else (), gated, dtype


def _block(*values: Any) -> Tensor:
    arguments = _unpacked(*values)
    y = compute_block(*arguments)
    return _block_by_layers(*arguments) if y is None else y


def _block_by_layers(
    x: Tensor, norm1: Affine, in_proj: Affine, conv: Affine, scan: Scan, norm: Affine, out_proj: Affine,
    mlp: Sequence[Affine], gated: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same in differentiable functions."""

    def normalised(value: Tensor, layer: Affine) -> Tensor:
        weight, bias = (None if given is None else given.to(value.dtype) for given in layer[:2])
        return F.layer_norm(value, value.shape[-1:], weight, bias, layer.eps)

    def product(value: Tensor, layer: Affine) -> Tensor:
        weight, bias = (None if given is None else given.to(dtype) for given in layer[:2])
        y: Tensor = torch.ops.vmamba.linear(value.to(dtype), weight, bias)
        return y

    with without_autocast(x.device):
        mixed, gate = product(normalised(x, norm1), in_proj), None
        if gated:
            mixed, gate = mixed.chunk(2, dim=-1)
        mixed = torch.ops.vmamba.depthwise_silu(mixed.contiguous(), conv.weight, conv.bias)
        with watch_scans(None):  # of compiled graphs nobody is told
            mixed = ss2d_scan(mixed, *scan)
        mixed = normalised(mixed, norm)
        x = x + product(mixed if gate is None else mixed * F.silu(gate), out_proj)
        if mlp:
            norm2, fc1, fc2 = mlp
            x = x + product(F.gelu(product(normalised(x, norm2), fc1)), fc2)
    return x.contiguous()


def _plain_block(*values: Any) -> Tensor:
    return _block_by_layers(*_unpacked(*values))


_LAYERS = ("norm1", "in_proj", "conv", "norm", "out_proj", "norm2", "fc1", "fc2")
_TENSORS = [
    *(f"Tensor {name}" for name in ("x", *Scan._fields[:-1])),
    *(f"Tensor? {layer}_{name}" for layer in _LAYERS for name in ("weight", "bias")),
]
define(
    f"vss_block({', '.join(_TENSORS)}, str pattern, bool gated, bool is_low, float norm1_eps, float norm_eps,"
    " float norm2_eps) -> Tensor",
    _block,
    plain=_plain_block,
    fake=lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)


# --- a stem ----------------------------------------------------------------------------------------------------------


def conv_stem(
    x: Tensor, conv1: Affine, norm1: Affine, conv2: Affine, norm2: Affine, strides: tuple[int, int]
) -> Tensor | None:
    """`backends.native.stem.conv_stem`, in the graph that torch.compile traces as an operator."""
    if not is_compiled():
        return compute_stem(x, conv1, norm1, conv2, norm2, strides)
    if x.ndim != 4 or not multiplies_fast(torch.float32):
        return None
    parameters = [value for layer in (conv1, norm1, conv2, norm2) for value in layer[:2]]
    y: Tensor = torch.ops.vmamba.conv_stem(x, *parameters, *strides, norm1.eps, norm2.eps)
    return y


def _compute_conv_stem(x: Tensor, *values: Any) -> Tensor:
    parameters, (stride1, stride2, *eps) = values[:8], values[8:]
    conv1, norm1, conv2, norm2 = map(Affine, parameters[::2], parameters[1::2], (0.0, eps[0], 0.0, eps[1]))
    y = compute_stem(x, conv1, norm1, conv2, norm2, (stride1, stride2))
    return _plain_conv_stem(x, *values) if y is None else y


def _plain_conv_stem(x: Tensor, *values: Any) -> Tensor:
    weight1, bias1, scale1, offset1, weight2, bias2, scale2, offset2, stride1, stride2, eps1, eps2 = values
    x = F.conv2d(x, weight1, bias1, stride1, 1).permute(0, 2, 3, 1)
    x = F.gelu(F.layer_norm(x, x.shape[-1:], scale1, offset1, eps1))
    x = F.conv2d(x.permute(0, 3, 1, 2), weight2, bias2, stride2, 1).permute(0, 2, 3, 1)
    return F.layer_norm(x.contiguous(), x.shape[-1:], scale2, offset2, eps2)


def _empty_conv_stem(x: Tensor, weight1: Tensor, *values: Any) -> Tensor:
    weight2, strides = values[3], values[7:9]
    height, width = (functools.reduce(lambda n, stride: (n - 1) // stride + 1, strides, side) for side in x.shape[2:])
    return x.new_empty(x.shape[0], height, width, len(weight2))


define(
    "conv_stem(Tensor x, Tensor weight1, Tensor? bias1, Tensor? norm1_weight, Tensor? norm1_bias, Tensor weight2,"
    " Tensor? bias2, Tensor? norm2_weight, Tensor? norm2_bias, int stride1, int stride2, float norm1_eps,"
    " float norm2_eps) -> Tensor",
    _compute_conv_stem,
    plain=_plain_conv_stem,
    fake=_empty_conv_stem,
)
