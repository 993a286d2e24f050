"""Layers as functions, as fast as the CPU computes them; where that does not apply they are torch's own.

On the CPU, in float32 and bfloat16, products read the weight as it lies in memory (`backends/native/products.py`), and
chains of layers are one pass over memory (`backends/native/layers.py`); on a GPU LayerNorm and the depthwise
convolution with SiLU are one too (`backends/triton/{normalisation,convolution}.py`). All of them compute from the
parameters given and keep nothing. To torch.compile they are operators, which it leaves alone, but for LayerNorm, which
is torch's own there and fused with what is beside it; an exported graph has torch's own layers, unless the kernels
travel with it (`exporting.operators_kept`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vmamba.ops.backends import choose_backend
from vmamba.ops.backends.native import convolution as patches
from vmamba.ops.backends.native import layers as native
from vmamba.ops.backends.native import products
from vmamba.ops.backends.native.library import require_memory
from vmamba.ops.exporting import keeps_layers
from vmamba.ops.operators import runs_eagerly
from vmamba.ops.precision import without_autocast
from vmamba.ops.registration import define, is_exporting, pull_back, records

_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)

# --- which way -------------------------------------------------------------------------------------------------------


def applies(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether what is computed at once on the CPU may stand in for a layer called with `x` that has these parameters.

    They are plain tensors there in float32 or bfloat16, with their numbers in memory as they are, and nothing traces or
    transforms the call but what keeps operators (`is_compiled`).

    Raises:
        RuntimeError: the memory of a parameter has been freed.
    """
    is_traced = is_compiled()
    if (
        not (is_traced or runs_eagerly(x))
        or not x.is_cpu
        or x.layout is not torch.strided
        or not x.numel()
        or (not is_traced and (x.is_nested or x.is_neg() or x._is_zerotensor()))
    ):
        return False
    dtype, is_cast = product_dtype(x), torch.is_autocast_enabled("cpu")
    does_apply = dtype in (torch.float32, torch.bfloat16) and all(
        is_plain_tensor(value)
        and value.is_cpu
        and value.layout is torch.strided
        and (value.dtype == dtype or (is_cast and value.dtype in (torch.float32, torch.bfloat16)))
        for value in parameters
        if value is not None
    )
    if does_apply and parameters and not is_traced:
        require_memory(*parameters)
    return does_apply


def is_plain_tensor(value: Tensor) -> bool:
    """Whether a tensor is of no class of its own, or what torch.export traces in its place."""
    return type(value) in (Tensor, nn.Parameter) or (keeps_layers() and type(value) is FakeTensor)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies `x`, on the CPU or a GPU, autocast considered."""
    kind = x.device.type
    is_cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


def is_compiled() -> bool:
    """Whether the call is traced for a graph that runs with this package, or at least its kernels: torch.compile's."""
    return (torch.compiler.is_compiling() and not is_exporting()) or keeps_layers()


def can_fuse(x: Tensor) -> bool:
    """Whether the library of fused kernels is there and knows the dtype of `x`."""
    return x.dtype in (torch.float32, torch.bfloat16) and native.reason_unavailable() is None


# --- products --------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, faster on the CPU where that `applies`.

    Args:
        x: (..., C).
        weight: (C', C).
        bias: (C',) or None.

    Returns:
        (..., C'), in the dtype that `F.linear` gives, autocast considered; differentiable twice.
    """
    if not applies(x, weight, bias) or x.shape[-1] != weight.shape[-1] or not is_one_each(bias, weight):
        return F.linear(x, weight, bias)
    dtype = product_dtype(x)
    if is_compiled() or records(x, weight, bias):
        return torch.ops.vmamba.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return product(x.to(dtype), weight, bias)


def is_one_each(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether a product's bias has a number for each output, and is not one of a shape that torch broadcasts."""
    return bias is None or bias.shape == weight.shape[:1]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x · weightᵀ + bias) on the CPU, without autograd; see `native.products.linear`.

    Args:
        x: (..., C).
        weight: (C', C), like the bias in x's dtype, or in float32 where x is bfloat16.
        bias: (C',) or None.
        activation: "none" or "gelu".
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if weight.is_contiguous() and products.wins(rows, weight.shape[1], weight.shape[0], x.dtype):
        return products.linear(x, weight, bias, activation)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.dtype in _product_dtypes() and torch.backends.mkldnn.enabled and x.numel():
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")
    else:
        y = F.linear(x, weight, bias)
    return gelu(y) if activation == "gelu" else y


@functools.cache
def _product_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


def _product_gradient(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    (x, weight, _), needed = ctx.saved_tensors, ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return [
        torch.ops.vmamba.linear(grad, weight.t(), None) if needed[0] else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None,
        rows.sum(0) if needed[2] else None,
    ]


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: product(x, weight, bias),
    plain=F.linear,
    gradient=_product_gradient,
    unsaved=2,
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


# --- whose fused kernels ---------------------------------------------------------------------------------------------


# On what device.
_FUSING = {"cpu": "native", "cuda": "triton"}


def is_on_gpu(x: Tensor) -> bool:
    """Whether `x` is where fused kernels are Triton's."""
    return _FUSING.get(x.device.type) == "triton"


def _fuses_on_gpu(x: Tensor, dtype: torch.dtype, *parameters: Tensor | None) -> bool:
    """Whether Triton computes, in `dtype`, layers called with `x` that have these parameters."""
    if not (is_compiled() or runs_eagerly(x)) or x.layout is not torch.strided or not x.numel():
        return False
    is_cast = torch.is_autocast_enabled(x.device.type)
    return (
        dtype in _HALF_AND_SINGLE
        and all(
            type(value) in (Tensor, nn.Parameter)
            and value.device == x.device
            and value.layout is torch.strided
            and (value.dtype == dtype or (is_cast and value.dtype in _HALF_AND_SINGLE))
            for value in parameters
            if value is not None
        )
        and choose_backend(None, x.device, dtype, "cross").name == "triton"
    )


# --- depthwise convolution -------------------------------------------------------------------------------------------


def fuses_depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `depthwise_silu` may stand in for a layer called with `x` that has these parameters.

    On the CPU the library has to be there, on a GPU the backend for `x` has to be Triton (`choose_backend`).
    """
    kind, channels = _FUSING.get(x.device.type), x.shape[-1:]
    if weight.shape != (*channels, 1, 3, 3) or (bias is not None and bias.shape != channels):
        return False
    if kind == "native":
        return applies(x, weight, bias) and can_fuse(x)
    return kind is not None and _fuses_on_gpu(x, product_dtype(x), weight, bias)


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a depthwise 3×3 convolution with padding 1, in one pass; for callers that know that it is fused.

    Args:
        x: (B, H, W, C).
        weight: (C, 1, 3, 3).
        bias: (C,) or None.

    Returns:
        (B, H, W, C), in the dtype of the product; differentiable twice.
    """
    x = x.to(product_dtype(x))
    if is_compiled() or records(x, weight, bias):
        return torch.ops.vmamba.depthwise_silu(x, weight, bias)
    return _convolutions(x).depthwise_silu(x, weight, bias)


def _convolutions(x: Tensor) -> Any:
    """What has `depthwise_silu` and its backward where `x` is."""
    if _FUSING[x.device.type] == "native":
        return native
    from vmamba.ops.backends.triton import convolution  # imports Triton, which only GPUs need

    return convolution


def _plain_depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image, low_bias = x.permute(0, 3, 1, 2), None if bias is None else bias.to(x.dtype)
    y = F.conv2d(image, weight.to(x.dtype), low_bias, padding=1, groups=weight.shape[0])
    return F.silu(y.permute(0, 2, 3, 1))


def _plain_depthwise_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grads = pull_back(
        _plain_depthwise_silu, (x, weight, weight.new_zeros(len(weight)) if bias is None else bias), [grad]
    )
    return tuple(value for value in grads if value is not None)  # type: ignore[return-value]


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


define(
    "depthwise_silu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: _convolutions(x).depthwise_silu(x, weight, bias),
    plain=_plain_depthwise_silu,
    gradient=lambda ctx, grad: torch.ops.vmamba.depthwise_silu_backward(grad, *ctx.saved_tensors),
    fake=lambda x, weight, bias: _empty(x),
)
define(
    "depthwise_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, weight, bias: _convolutions(x).depthwise_silu_backward(grad, x, weight, bias),
    plain=_plain_depthwise_silu_backward,
    fake=lambda grad, x, weight, bias: (
        _empty(x), _empty(weight), (weight if bias is None else bias).new_empty(weight.shape[0])
    ),
)  # fmt: skip


# --- convolution in compiled graphs ----------------------------------------------------------------------------------


def separates_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, by_patches: bool) -> bool:
    """Whether `convolution` may stand in for a layer called with `x` that has these parameters.

    That is in what torch.compile traces: for a GPU, and on the CPU in inference where the library computes it by
    patches (`by_patches`: whether it is 3×3 with padding 1 and a stride above 1). Dtypes that torch's own refuses are
    left to it.
    """
    if not is_compiled() or x.ndim != 4:
        return False
    if not is_on_gpu(x):
        is_usual = by_patches and applies(x, weight, bias) and not records(x, weight, bias)
        return is_usual and products.multiplies_fast(product_dtype(x))
    dtypes = _HALF_AND_SINGLE if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    parameters = (weight,) if bias is None else (weight, bias)
    are_usual = all(type(value) in (Tensor, nn.Parameter) and value.dtype in dtypes for value in parameters)
    return are_usual and x.dtype in dtypes


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """`F.conv2d` of a grid as an operator, which torch.compile leaves alone, and a sum, which it fuses.

    Around a convolution that it knows inductor lays every tensor of four dimensions out for convolutions, and takes the
    channels of a grid (B, H, W, C) to be H. Each LayerNorm and sum after it then reads memory across.

    Args:
        x: (B, H, W, C).
        weight: (C', C / groups, kernel height, kernel width).
        bias: (C',) or None.
        stride, padding, dilation: of height and width.
        groups: of channels.

    Returns:
        (B, H', W', C'), in the dtype of the product; differentiable twice.
    """
    dtype = product_dtype(x)
    y = torch.ops.vmamba.grid_convolution(x.to(dtype), weight.to(dtype), stride, padding, dilation, groups)
    return y if bias is None else y + bias.to(dtype)


def _plain_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return y.permute(0, 2, 3, 1).contiguous()


def _compute_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    is_patchwise = groups == 1 and (*padding, *dilation) == (1, 1, 1, 1) and stride[0] == stride[1]
    y = patches.convolution(x, weight, None, stride[0]) if is_patchwise and x.is_cpu and can_fuse(x) else None
    return _plain_convolution(x, weight, stride, padding, dilation, groups) if y is None else y


def _convolution_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.options
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, stride, padding, dilation, False, [0, 0], groups,
        [*ctx.needs_input_grad[:2], False],
    )  # fmt: skip
    return None if grad_x is None else grad_x.permute(0, 2, 3, 1), grad_weight


def _empty_convolution(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    height, width = (
        (x.shape[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return x.new_empty(x.shape[0], height, width, weight.shape[0])


define(
    "grid_convolution(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    _compute_convolution,
    plain=_plain_convolution,
    gradient=_convolution_gradient,
    fake=_empty_convolution,
)

# --- LayerNorm -------------------------------------------------------------------------------------------------------

_MAX_CHANNELS = 4096  # on a GPU
# Of x, there. On an H100 torch's own kernel takes 13 µs for a million numbers and is launched faster than Triton's.
_WORTHWHILE = 2**22


def fuses_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `layer_norm` may stand in for a layer called with `x` that has these parameters.

    Not in what torch.compile traces, which fuses torch's own with its neighbours. On the CPU the library has to be
    there, and nothing be recorded; on a GPU the backend for `x` has to be Triton (`choose_backend`), and x so large
    that it is worth a launch from Python.
    """
    if is_compiled() or not runs_eagerly(x):
        return False
    kind = _FUSING.get(x.device.type)
    if kind == "native":
        return applies(x, weight, bias) and can_fuse(x) and not records(x, weight, bias)
    if kind is None or weight is None or bias is None or x.dtype not in _HALF_AND_SINGLE or not x.ndim:
        return False
    if x.numel() < _WORTHWHILE:
        return False
    is_usual = weight.shape == bias.shape == x.shape[-1:] and x.shape[-1] <= _MAX_CHANNELS and x.stride(-1) == 1
    # Under autocast the verdict on the kernels is that for the layers beside it, whose dtype is the product's.
    return is_usual and _fuses_on_gpu(x, product_dtype(x), weight, bias)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in one pass; for callers that know that it is fused.

    Args:
        x: (..., C).
        weight, bias: (C,); None on the CPU only.
        eps: added to the variance.

    Returns:
        x's shape, and its dtype; on a GPU float32 under autocast. There differentiable twice.
    """
    if _FUSING[x.device.type] == "native":
        return native.layer_norm(x, weight, bias, eps)
    is_single = torch.is_autocast_enabled(x.device.type)
    if records(x, weight, bias):
        return torch.ops.vmamba.layer_norm(x, weight, bias, eps, is_single)
    return _compute_layer_norm(x, weight, bias, eps, is_single)


def _compute_layer_norm(x: Tensor, weight: Any, bias: Any, eps: float, is_single: bool) -> Tensor:
    from vmamba.ops.backends.triton import normalisation  # imports Triton, which only GPUs need

    return normalisation.layer_norm(x, weight, bias, eps, torch.float32 if is_single else x.dtype)


def _compute_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from vmamba.ops.backends.triton import normalisation

    return normalisation.layer_norm_backward(grad, x, weight, bias, eps)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, is_single: bool) -> Tensor:
    with without_autocast(x.device):
        y = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y if is_single else y.to(x.dtype)


def _plain_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _plain_layer_norm(x, weight, bias, eps, grad.dtype == torch.float32)

    return tuple(pull_back(forward, (x, weight, bias), [grad]))  # type: ignore[return-value]


define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool is_single) -> Tensor",
    _compute_layer_norm,
    plain=_plain_layer_norm,
    gradient=lambda ctx, grad: torch.ops.vmamba.layer_norm_backward(grad, *ctx.saved_tensors, ctx.options[0]),
    fake=lambda x, weight, bias, eps, is_single: _empty(x, torch.float32 if is_single else None),
)
define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _compute_layer_norm_backward,
    plain=_plain_layer_norm_backward,
    fake=lambda grad, x, weight, bias, eps: (_empty(x), _empty(weight), _empty(bias)),
)


# --- GELU ------------------------------------------------------------------------------------------------------------


def gelu(h: Tensor) -> Tensor:
    """The exact GELU; without autograd."""
    return native.gelu(h) if can_fuse(h) else F.gelu(h)


def gelu_backward(grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(h) and the gradient of h, which may take the memory of `grad`; without autograd."""
    if can_fuse(h):
        return native.gelu_backward(grad, h, overwrite=True)
    return F.gelu(h), torch.ops.aten.gelu_backward(grad, h)


# --- product and GELU on a GPU ---------------------------------------------------------------------------------------


def fuses_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_gelu` may stand in for layers called with `x` that have these parameters.

    That is in inference on a GPU, in half precision, where the backend for `x` is Triton (`choose_backend`).
    """
    if not is_on_gpu(x) or bias is None or bias.shape != weight.shape[:1] or records(x, weight, bias):
        return False
    dtype = product_dtype(x)
    is_half = dtype in (torch.float16, torch.bfloat16)
    return is_half and x.shape[-1] == weight.shape[-1] and _fuses_on_gpu(x, dtype, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The exact GELU of `F.linear`, in one pass; for callers that know that it is fused.

    Args:
        x: (..., C).
        weight: (C', C).
        bias: (C',).

    Returns:
        (..., C'), in the dtype of the product; differentiable twice in compiled graphs.
    """
    dtype = product_dtype(x)
    x, weight, bias = (value.to(dtype) for value in (x, weight, bias))
    if is_compiled():
        return torch.ops.vmamba.linear_gelu(x, weight, bias)
    return _compute_linear_gelu(x, weight, bias)


def _compute_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from vmamba.ops.backends.triton import linear  # imports Triton, which only GPUs need

    return linear.linear_gelu(x, weight, bias)


def _plain_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _compute_linear_gelu,
    plain=_plain_linear_gelu,
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


# --- a stem's first half on a GPU ------------------------------------------------------------------------------------

_MAX_STEM = 7, 128  # channels of the image and of the grid: what a program of the kernel can have at once


def fuses_stem(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether `stem` may stand in for a 3×3 convolution, LayerNorm and GELU of `x` with these parameters.

    That is in inference on a GPU, in half precision, where the backend for `x` is Triton (`choose_backend`).
    """
    if not is_on_gpu(x) or x.ndim != 4 or records(x, weight, *others):
        return False
    if any(value is None or value.shape != weight.shape[:1] for value in others):
        return False
    if x.shape[1] != weight.shape[1] or x.dtype not in _HALF_AND_SINGLE:
        return False
    is_small = weight.shape[1] <= _MAX_STEM[0] and weight.shape[0] <= _MAX_STEM[1] and x.numel() < 2**31
    dtype = product_dtype(x)
    return is_small and dtype in (torch.float16, torch.bfloat16) and _fuses_on_gpu(x, dtype, weight, *others)


def stem(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor, stride: int, eps: float) -> Tensor:
    """GELU(LayerNorm(convolution)) of an image in one pass; for callers that know that it is fused.

    Args:
        x: (B, C, H, W).
        weight: (C', C, 3, 3), of the convolution with padding 1.
        bias, scale, offset: (C',), of the convolution and of the norm.
        stride: of the convolution.
        eps: of the norm.

    Returns:
        (B, ⌈H/stride⌉, ⌈W/stride⌉, C'), in the dtype of the product; differentiable twice in compiled graphs.
    """
    weight = weight.to(product_dtype(x))
    if is_compiled():
        return torch.ops.vmamba.stem(x, weight, bias, scale, offset, stride, eps)
    return _compute_stem(x, weight, bias, scale, offset, stride, eps)


def _compute_stem(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    from vmamba.ops.backends.triton import stem  # imports Triton, which only GPUs need

    return stem.stem(x, weight, *others)


def _plain_stem(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor, stride: int, eps: float
) -> Tensor:
    y = F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), stride, 1).permute(0, 2, 3, 1).float()
    return F.gelu(F.layer_norm(y, scale.shape, scale.float(), offset.float(), eps)).to(weight.dtype).contiguous()


define(
    "stem(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor offset, int stride, float eps) -> Tensor",
    _compute_stem,
    plain=_plain_stem,
    fake=lambda x, weight, bias, scale, offset, stride, eps: weight.new_empty(
        x.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1, weight.shape[0]
    ),
)
