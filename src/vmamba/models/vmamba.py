"""The backbone and classifier, with timm's model contract.

`VMamba` reads top-down: stem, stages, norm, head. Everything built on timm models (feature extraction, layer-wise
learning rates, optimizers, its training scripts) finds what it looks for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, to_2tuple
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from vmamba.nn import SS2D, ConvDownsample, ConvStem, LayerNorm, PatchMerging, PatchStem, SmallStem, VSSBlock
from vmamba.nn.local import LocalBlock, LocalMlp, ResidualDownsample
from vmamba.nn.norms import BatchNorm
from vmamba.ops.registration import is_tracing_for_export
from vmamba.ops.routes import Pattern, check_pattern

_STEMS: dict[str, Callable[..., nn.Module]] = {
    "conv": ConvStem,
    "wide": partial(ConvStem, wide=True),
    "small": SmallStem,
    "patch": PatchStem,
}
_DOWNSAMPLES: dict[str, Callable[..., nn.Module]] = {
    "conv": ConvDownsample,
    "residual": ResidualDownsample,
    "merge": PatchMerging,
}
# How much smaller parts that are the package's own make the grid.
_STRIDES: dict[type[nn.Module], Callable[[Any], int]] = {
    ConvStem: lambda stem: stem.conv1.stride[0] * stem.conv2.stride[0],
    SmallStem: lambda stem: stem.conv1.stride[0],
    PatchStem: lambda stem: stem.conv.stride[0],
    ConvDownsample: lambda part: part.conv.stride[0],
    ResidualDownsample: lambda part: part.stride,
    PatchMerging: lambda part: 2,
    nn.Identity: lambda part: 1,
}


class Stage(nn.Module):
    """Downsampling (except in the first stage), then blocks; all on (B, H, W, C)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, C'), or to the same size in the first stage."""
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class VMamba(nn.Module):
    """VMamba (Liu et al., NeurIPS 2024, arXiv 2401.10166).

    Args:
        img_size: height and width that the model is meant for. Kept for tools that ask; any size from the total stride
            up works, square or not, odd or even.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: pooling before the classifier, as in timm ("avg", "max", "avgmax", "catavgmax", "" for none).
        depths, dims: blocks and channels per stage.
        d_state, ssm_ratio, conv_bias, gated, init: see `vmamba.nn.SS2D`.
        pattern: the routes of the scans, as for `vmamba.nn.SS2D`: one pattern, or one for each block that scans.
        mlp_ratio, mlp: see `vmamba.nn.VSSBlock`.
        local_stages: how many of the first stages do not scan: their blocks are `vmamba.nn.local.LocalBlock`.
        norm: of stem and downsampling, before each SS2D and inside it, "layer" or "batch"; not for the vanilla models'
            parts.
        stem, stem_stride: "conv", "wide" (`vmamba.nn.ConvStem`), "small" or "patch"; 4, 2 or 1.
        downsample: "conv", "residual" (`vmamba.nn.local.ResidualDownsample`) or "merge".
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after each SS2D and in each MLP.
        drop_path_rate: stochastic depth of the last block; it grows linearly over the blocks from 0.
        output_stride: 8, 16 or 32: the coarsest grid. Downsampling that would go further keeps the grid's size; with
            the same weights, its 3×3 convolution then sees neighbours half as far apart. Not for patch merging.
        device, dtype: where and as what the parameters are made.

    Attributes:
        variant: name in `VARIANTS`, or None for a model of your own making.
        feature_info: channels and reduction of each stage.
        output_fmt: "NHWC", the layout of `forward_features`.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        gated: bool = False,
        conv_bias: bool = False,
        mlp: Literal["pixel", "local"] = "pixel",
        local_stages: int = 0,
        norm: Literal["layer", "batch"] = "layer",
        stem: Literal["conv", "wide", "small", "patch"] = "conv",
        stem_stride: Literal[1, 2, 4] = 4,
        downsample: Literal["conv", "residual", "merge"] = "conv",
        init: Literal["v0", "v1", "v2"] = "v0",
        pattern: Pattern | Sequence[Pattern] = "cross",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: Literal[8, 16, 32] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, value, known in (("stem", stem, _STEMS), ("downsample", downsample, _DOWNSAMPLES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        if len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} differ in length; expected one per stage")
        if not 0 <= local_stages < len(dims) or (local_stages and mlp_ratio <= 0):
            raise ValueError(
                f"local_stages is {local_stages} of {len(dims)} stages, mlp_ratio {mlp_ratio}; expected fewer than "
                "there are stages, and an MLP for their blocks"
            )
        if output_stride not in (8, 16, 32, None):
            raise ValueError(f"output_stride is {output_stride!r}; expected 8, 16 or 32")
        coarsest = output_stride or stem_stride * 2 ** (len(dims) - 1)
        reductions = [min(stem_stride * 2**i, coarsest) for i in range(len(dims))]
        if downsample == "merge" and len(set(reductions)) < len(dims):
            raise ValueError(
                f"output_stride is {output_stride}, but patch merging cannot keep a grid's size: choose a variant that"
                " downsamples by convolutions"
            )
        if norm != "layer" and (stem == "patch" or downsample == "merge"):
            raise ValueError(f"norm is {norm!r}; patch stem and patch merging have 'layer' alone")
        self.variant: str | None = None
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = dims[-1]
        self.total_stride = reductions[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.img_size = self._checked_size(img_size)

        norms: dict[str, Any] = {} if norm == "layer" else {"norm": norm}
        self.stem = _STEMS[stem](in_chans, dims[0], stem_stride, **norms, **dd)
        rates = (drop_path_rate * block / max(sum(depths) - 1, 1) for block in itertools.count())
        patterns = iter(_one_each(pattern, sum(depths[local_stages:])))
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            between: nn.Module = nn.Identity()
            if i:
                stride = reductions[i] // reductions[i - 1]
                between = _DOWNSAMPLES[downsample](dims[i - 1], dim, stride=stride, **norms, **dd)
            blocks: list[nn.Module] = [
                LocalBlock(dim, mlp_ratio, drop_path=rate, proj_drop=proj_drop_rate, **dd)
                if i < local_stages
                else VSSBlock(
                    dim,
                    mlp_ratio,
                    drop_path=rate,
                    proj_drop=proj_drop_rate,
                    dd=dd,
                    mlp=mlp,
                    norm=norm,
                    d_state=d_state,
                    ssm_ratio=ssm_ratio,
                    conv_bias=conv_bias,
                    gated=gated,
                    init=init,
                    pattern=next(patterns),
                )
                for rate in itertools.islice(rates, depth)
            ]
            stages.append(Stage(between, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @property
    def in_chans(self) -> int | None:
        """Channels of the images: those of the first convolution; None where the stem has none any more."""
        return next((module.in_channels for module in self.stem.modules() if isinstance(module, nn.Conv2d)), None)

    def _checked_size(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        height, width = to_2tuple(img_size)
        if min(height, width) < self.total_stride:
            raise ValueError(
                f"img_size is {height}×{width}; this model needs at least {self.total_stride} pixels a side"
            )
        return height, width

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Record the height and width that the model is meant for; nothing in the network depends on it.

        Raises:
            ValueError: a side smaller than the total stride.
        """
        if img_size is not None:
            self.img_size = self._checked_size(img_size)
            update_model_input_size(self, self.img_size)

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw every parameter anew, as a new model does; for instance after `to_empty` on a model made on "meta".

        Args:
            needs_reset: whether also those that their own modules draw when they are made.
        """
        for module in self.modules():
            reset: Any = getattr(
                module, "reset_scan_parameters" if isinstance(module, SS2D) else "reset_parameters", None
            )
            if needs_reset and reset is not None:
                reset()
            if isinstance(module, nn.Linear):
                _init_linear(module)
        for module in self.modules():  # after their parts
            if any(isinstance(child, BatchNorm) for child in module.children()):
                _init_convolutions(module)
            if isinstance(module, (LocalMlp, SS2D)):
                module.close()

    @property
    def pattern(self) -> Pattern | list[Pattern]:
        """The routes of the scans: one pattern where all blocks have the same, else one for each block."""
        patterns = [module.pattern for module in self.modules() if isinstance(module, SS2D)]
        return patterns if any(one != patterns[0] for one in patterns) else next(iter(patterns), "cross")

    def set_pattern(self, pattern: Pattern | Sequence[Pattern]) -> None:
        """Let the scans follow other routes from now on, with the same weights.

        Args:
            pattern: as for `vmamba.nn.SS2D`: one pattern, or one for each block that scans.

        Raises:
            ValueError: a pattern is unknown, or there are not as many as blocks that scan.
        """
        scans = [module for module in self.modules() if isinstance(module, SS2D)]
        for scan, its_pattern in zip(scans, _one_each(pattern, len(scans)), strict=True):
            scan.pattern = its_pattern
        if hasattr(self, "_model_args"):  # of a model that timm has built, and can save
            update_model_args(self, pattern=pattern)

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "torch.jit.script cannot compile the scans: use torch.export.export, torch.compile or torch.jit.trace"
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay beyond the one-dimensional ones: A_log, D and Δ's bias."""
        return {
            name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("A_log", "D", "dt_proj_bias")
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters by depth, for layer-wise learning rates."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Hooks, modes and backends must then be the same in both passes: whether layers are computed one by one or fused,
        which depends on them, decides what is saved.
        """
        for stage in self.stages.modules():  # which may lie in something of the user's
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes for none. `global_pool` changes the pooling as well."""
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.head.reset(
            num_classes, global_pool, in_features=self.num_features, device=reference.device, dtype=reference.dtype
        )
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool
        if isinstance(self.head.fc, nn.Linear):
            _init_linear(self.head.fc)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, as timm's method of this name gives them.

        Args:
            x: (B, in_chans, H, W).
            indices: the last n stages, the listed stages (negative ones count from the end), or all.
            norm: whether the last stage's output passes through the final LayerNorm.
            stop_early: whether to stop after the last stage asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: whether to leave out the final features.

        Returns:
            The intermediates, or (final features (B, H', W', C), intermediates).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {str(output_fmt)!r}; expected 'NCHW' or 'NHWC'")
        last = len(self.stages) - 1
        wanted, deepest = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self._stemmed(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > deepest:
                break
            x = stage(x)
            if i in wanted:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        reached_the_end = not (stop_early and deepest < last)
        return (self.norm(x) if reached_the_end else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the intermediates at `indices` do not need; returns these indices, counted from the start."""
        kept, deepest = feature_take_indices(len(self.stages), indices)
        shortened = deepest < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        self.stages = self.stages[: deepest + 1]
        if shortened:
            self.num_features = self.feature_info[deepest]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return kept

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normalised output of the last stage, (B, H', W', C)."""
        return self.norm(self.stages(self._stemmed(x)))

    def _stemmed(self, x: Tensor) -> Tensor:
        """The stem's grid of a batch of images, which are checked."""
        if _is_traced():
            return self.stem(x)
        is_large = isinstance(x, Tensor) and x.ndim == 4 and min(x.shape[2:]) >= self.total_stride
        return self.stem(_checked(x, self._channels(), 1 if is_large else self._least_side()))

    def _channels(self) -> int | None:
        """The channels that images must have; None where somebody's own parts decide."""
        stem = self.stem
        conv = stem._modules.get("conv1") or stem._modules.get("conv")
        if type(stem) not in _STRIDES or not isinstance(conv, nn.Conv2d):
            return None
        is_plain = all(not part._forward_pre_hooks and "forward" not in vars(part) for part in (stem, conv))
        return conv.in_channels if is_plain else None

    def _least_side(self) -> int:
        """Pixels that the stages' grids need a side; 1 where somebody's own parts decide."""
        if self._channels() is None:
            return 1
        parts: list[Any] = [self.stem, *(getattr(stage, "downsample", None) for stage in self.stages)]
        try:
            return math.prod(_STRIDES[type(part)](part) for part in parts)
        except (AttributeError, KeyError, TypeError):  # there are parts that have no such strides
            return 1

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H', W', C) to logits (B, num_classes), or with `pre_logits` to the pooled features (B, C)."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (B, in_chans, H, W) to logits (B, num_classes).

        Raises:
            ValueError: `x` is not such a batch, or is smaller than the total stride (32 for the published models). A
                stem of one's own is given every image, and decides.
        """
        return self.forward_head(self.forward_features(x))


def _one_each(pattern: Pattern | Sequence[Pattern], blocks: int) -> Sequence[Pattern]:
    """A known pattern for each block."""
    patterns = [pattern] * blocks if isinstance(pattern, str) or callable(pattern) else list(pattern)
    if len(patterns) != blocks:
        raise ValueError(f"pattern is {pattern!r}, {len(patterns)} patterns; expected one, or {blocks}, one a block")
    for one in patterns:
        check_pattern(one)
    return patterns


def _is_traced() -> bool:
    """Whether a graph is being traced, where a comparison would pin the very sizes that it is to leave open."""
    return torch.compiler.is_compiling() or is_tracing_for_export()


@torch.fx.wrap
def _checked(x: Tensor, in_chans: int | None, least: int) -> Tensor:
    """A batch of images, checked."""
    if not _is_traced():
        if x.ndim != 4 or in_chans not in (None, x.shape[1]):
            raise ValueError(f"the model was given {tuple(x.shape)}; expected images of shape (B, {in_chans}, H, W)")
        if min(x.shape[2:]) < least:
            raise ValueError(
                f"the images are {x.shape[2]}×{x.shape[3]} pixels; this model needs at least {least} a side:"
                " enlarge them, or choose a variant with a smaller stem stride"
            )
    return x


def _init_linear(module: nn.Linear) -> None:
    nn.init.trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _init_convolutions(module: nn.Module) -> None:
    """As He et al. draw them (2015, arXiv 1502.01852), and timm its ResNets: those of a module with a BatchNorm."""
    for child in module.children():
        if isinstance(child, nn.Conv2d) and child.groups == 1:
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
