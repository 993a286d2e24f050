"""The maps of a backbone's stages, as segmentation and detection heads read them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch
from timm.models import FeatureInfo, group_parameters
from torch import Tensor, nn

from vmamba.nn import Conv2d, LayerNorm, cpu
from vmamba.ops.layers import applies, is_compiled, product_dtype, records

for _kind in (nn.Conv2d, nn.BatchNorm2d):
    cpu.known(_kind)


class FeatureMaps(nn.Module):
    """A backbone's feature extractor with a LayerNorm on every map.

    The maps are (B, C, H, W) in channels-last memory, finest first: a view of what a channels-last backbone computes,
    so that nothing is copied between backbone, norm and the heads' convolutions.

    Args:
        extractor: what `vmamba.create_model(..., features_only=True)` or timm's function of that name makes.
        norm: whether to put a LayerNorm on each map, as the published dense models do (eps 1e-5). Backbones that end
            every stage with a norm and an activation, such as ResNet, need none.

    Attributes:
        channels, strides: of each map, finest first.

    Raises:
        ValueError: not such an extractor.
    """

    def __init__(self, extractor: nn.Module, norm: bool = True) -> None:
        super().__init__()
        info: Any = getattr(extractor, "feature_info", None)
        if not isinstance(info, FeatureInfo):
            raise ValueError(
                f"{type(extractor).__name__} is no feature extractor; expected a backbone made with features_only=True,"
                " for instance vmamba.create_model('vmamba_tiny_s1l8', features_only=True)"
            )
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = list(info.reduction())
        if len(self.strides) < 2 or any(a > b for a, b in itertools.pairwise(self.strides)):
            raise ValueError(f"the backbone's maps have strides {self.strides}; expected two or more, finest first")
        self.extractor = extractor
        self.channels_last = getattr(extractor, "output_fmt", "NCHW") == "NHWC"
        self.normalised = norm
        if norm:
            for i, channels in enumerate(self.channels):
                setattr(self, f"outnorm{i}", LayerNorm(channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to one (B, C, H / stride, W / stride) for each stage."""
        maps: list[Tensor] = list(self.extractor(images))
        if not self.channels_last:
            maps = [x.permute(0, 2, 3, 1) for x in maps]
        if self.normalised:
            maps = [self.get_submodule(f"outnorm{i}")(x) for i, x in enumerate(maps)]
        return [x.permute(0, 3, 1, 2) for x in maps]


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm and ReLU; in inference on the CPU the norm overwrites what the convolution gave.

    Fresh memory is what a norm costs there: it takes longer to obtain than to fill.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        if [*self._modules] != ["conv", "bn", "relu"] or not may_overwrite(self.conv, self.bn, x):
            return super().forward(x)
        relu: nn.Module = self.get_submodule("relu")
        return relu(normalise_(self.conv(x), self.bn))


def may_overwrite(conv: nn.Conv2d, bn: nn.BatchNorm2d, *inputs: Tensor) -> bool:
    """Whether nobody will miss what `conv` gives to `bn`, and `normalise_` is that norm.

    Other modules may be in the places of both.
    """
    if is_compiled() or not (cpu.is_plain(bn, nn.BatchNorm2d) and type(conv) in (nn.Conv2d, Conv2d)):
        return False
    values = (*inputs, *conv.parameters(), *bn.parameters(), bn.running_mean, bn.running_var)
    return (
        not (bn.training or bn.running_mean is None or bn.running_var is None or records(*values))
        and all(applies(x, *values) and product_dtype(x) == x.dtype == torch.float32 for x in inputs)
        and cpu.as_built(conv)
    )


def normalise_(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """BatchNorm with running statistics of x (B, C, H, W), in its memory."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = (bn.running_var + bn.eps).rsqrt()
    scale = scale if bn.weight is None else scale * bn.weight
    offset = -bn.running_mean * scale if bn.bias is None else bn.bias - bn.running_mean * scale
    return torch.addcmul(offset[:, None, None], x, scale[:, None, None], out=x)


def conv_block(in_chans: int, out_chans: int, kernel: int, *, norm: bool = False, relu: bool = False) -> ConvBlock:
    """Convolution of the same output size, with a bias or BatchNorm, and ReLU; weights drawn as OpenMMLab's are."""
    conv = Conv2d(in_chans, out_chans, kernel, padding=kernel // 2, bias=not norm)
    conv.to(memory_format=torch.channels_last)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[tuple[str, nn.Module]] = [("conv", conv)]
    if norm:
        layers.append(("bn", nn.BatchNorm2d(out_chans)))
    if relu:
        layers.append(("relu", nn.ReLU(inplace=True)))
    return ConvBlock(OrderedDict(layers))


class DenseModel(nn.Module):
    """What networks on `FeatureMaps` have in common.

    Attributes:
        task: what they are for.
        optional: names of the heads that may be None.
        backbone: the feature maps.
        num_classes: number of classes.
        class_names: their names, if known.
        variant, in_chans, img_size, pretrained_cfg: see `vmamba.models.registry`; of models made by name.
    """

    task: str
    optional: tuple[str, ...] = ()
    backbone: FeatureMaps
    num_classes: int
    class_names: tuple[str, ...] | None = None
    variant: str | None = None
    in_chans: int | None = None
    img_size: tuple[int, int] | None = None
    pretrained_cfg: Mapping[str, Any] = MappingProxyType({})

    def from_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors without those of a head that this model was made without."""
        absent = tuple(f"{name}." for name in self.optional if attrgetter(name)(self) is None)
        return {name: tensor for name, tensor in state.items() if not name.startswith(absent)}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        able = (module for module in self.backbone.modules() if hasattr(module, "set_grad_checkpointing"))
        backbone: Any = next(able, None)
        if backbone is None:
            raise ValueError(f"{type(self.backbone.extractor).__name__} cannot recompute its blocks")
        backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """timm's grouping of parameters by depth, for layer-wise learning rates: the backbone's, then all that is new.

        Raises:
            ValueError: the backbone has none.
        """
        places = self.backbone.extractor.named_modules(prefix="backbone.extractor")
        prefix, source = next(((place, m) for place, m in places if hasattr(m, "group_matcher")), ("", None))
        if source is None:
            name = type(self.backbone.extractor).__name__
            raise ValueError(f"the layers of {name} are in no known order: layer_decay cannot be used")
        groups = group_parameters(source, source.group_matcher(coarse), reverse=True)
        last = max(groups.values()) + 1
        return lambda name: groups.get(name.removeprefix(f"{prefix}."), last)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay beyond the one-dimensional ones: the backbone's."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.backbone.named_modules(prefix="backbone")
            if hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless `images` is a batch of images, (B, C, H, W) of floating-point numbers."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"the model was given {tuple(images.shape)} of {images.dtype}; expected normalised images (B, 3, H, W)"
        )
