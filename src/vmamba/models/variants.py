"""The variants, as data: the nine published models and small ones of our own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


def release_url(tag: str, file: str) -> str:
    """Where a file of one of the authors' GitHub releases, "#v2cls" for instance, can be downloaded."""
    return f"https://github.com/MzeroMiko/VMamba/releases/download/{tag.replace('#', '%23')}/{file}"


@dataclass(frozen=True)
class Release:
    """Published weights of a variant and what was published about them.

    Attributes:
        file: name of the released checkpoint.
        tag: the GitHub release that holds it.
        params: number of parameters.
        flops: multiply-accumulates of one 224×224 image, in units of 1e9, in the convention of the paper's tables.
        top1: ImageNet-1K validation accuracy in percent.
    """

    file: str
    tag: str
    params: int
    flops: float
    top1: float

    @property
    def url(self) -> str:
        """Where the file can be downloaded."""
        return release_url(self.tag, self.file)


@dataclass(frozen=True)
class Variant:
    """What defines one model.

    Attributes:
        depths: blocks per stage.
        dims: channels per stage.
        d_state: states per channel, N.
        ssm_ratio: inner channels of SS2D over outer ones.
        mlp_ratio: hidden channels of the MLP over outer ones; 0 for blocks without MLP.
        gated: whether SS2D's output is multiplied by SiLU of a second projection.
        conv_bias: whether SS2D's depthwise convolution has a bias.
        mlp: "pixel" for an MLP at each pixel, "local" for two 3×3 convolutions in its place.
        local_stages: first stages whose blocks are such convolutions alone and do not scan.
        norm: "layer", or "batch" in stem and downsampling, before each SS2D and inside it.
        stem: "conv" for two 3×3 convolutions, "wide" for a 7×7 one before the second, "small" for one of 3×3, "patch"
            for one whose stride is its kernel.
        stem_stride: 1, 2 or 4.
        downsample: "conv" for a 3×3 convolution of stride 2, "residual" for two with a shortcut, "merge" for patch
            merging.
        drop_path_rate: stochastic depth of the published or recommended training recipe.
        img_size: height and width the variant is meant for; any other size works as well.
        release: published weights, if any.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    d_state: int = 1
    ssm_ratio: float = 1.0
    mlp_ratio: float = 4.0
    gated: bool = False
    conv_bias: bool = False
    mlp: Literal["pixel", "local"] = "pixel"
    local_stages: int = 0
    norm: Literal["layer", "batch"] = "layer"
    stem: Literal["conv", "wide", "small", "patch"] = "conv"
    stem_stride: Literal[1, 2, 4] = 4
    downsample: Literal["conv", "residual", "merge"] = "conv"
    drop_path_rate: float = 0.0
    img_size: tuple[int, int] = (224, 224)
    release: Release | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `vmamba.models.vmamba.VMamba`."""
        return {name: value for name, value in asdict(self).items() if name != "release"}


_TINY, _BASE = (96, 192, 384, 768), (128, 256, 512, 1024)


def _vanilla(depths: tuple[int, ...], dims: tuple[int, ...], drop_path_rate: float, release: Release) -> Variant:
    """The architecture of the paper's first version: gated, sixteen states, no MLP, patch stem and patch merging."""
    return Variant(
        depths, dims, d_state=16, ssm_ratio=2.0, mlp_ratio=0.0, gated=True, conv_bias=True, stem="patch",
        downsample="merge", drop_path_rate=drop_path_rate, release=release,
    )  # fmt: skip


VARIANTS: dict[str, Variant] = {
    "vmamba_tiny_s1l8": Variant(
        (2, 2, 8, 2), _TINY, drop_path_rate=0.2,
        release=Release("vssm1_tiny_0230s_ckpt_epoch_264.pth", "#v2cls", 30_249_064, 4.9, 82.6),
    ),
    "vmamba_small_s1l20": Variant(
        (2, 2, 20, 2), _TINY, drop_path_rate=0.3,
        release=Release("vssm1_small_0229s_ckpt_epoch_240.pth", "#v2cls", 49_012_840, 8.6, 83.3),
    ),
    "vmamba_base_s1l20": Variant(
        (2, 2, 20, 2), _BASE, drop_path_rate=0.5,
        release=Release("vssm1_base_0229s_ckpt_epoch_225.pth", "#v2cls", 86_614_504, 15.2, 83.8),
    ),
    "vmamba_tiny_s2l5": Variant(
        (2, 2, 5, 2), _TINY, ssm_ratio=2.0, drop_path_rate=0.2,
        release=Release("vssm_tiny_0230_ckpt_epoch_262.pth", "#v2cls", 30_705_832, 4.9, 82.5),
    ),
    "vmamba_small_s2l15": Variant(
        (2, 2, 15, 2), _TINY, ssm_ratio=2.0, drop_path_rate=0.3,
        release=Release("vssm_small_0229_ckpt_epoch_222.pth", "#v2cls", 50_147_752, 8.7, 83.6),
    ),
    "vmamba_base_s2l15": Variant(
        (2, 2, 15, 2), _BASE, ssm_ratio=2.0, drop_path_rate=0.6,
        release=Release("vssm_base_0229_ckpt_epoch_237.pth", "#v2cls", 88_557_800, 15.4, 83.9),
    ),
    "vanilla_vmamba_tiny": _vanilla(
        (2, 2, 9, 2), _TINY, 0.2,
        Release("vssmtiny_dp01_ckpt_epoch_292.pth", "#v0cls", 22_893_448, 5.6, 82.2),
    ),
    "vanilla_vmamba_small": _vanilla(
        (2, 2, 27, 2), _TINY, 0.3,
        Release("vssmsmall_dp03_ckpt_epoch_238.pth", "#v0cls", 44_417_416, 11.2, 83.5),
    ),
    "vanilla_vmamba_base": _vanilla(
        (2, 2, 27, 2), _BASE, 0.6,
        Release("vssmbase_dp06_ckpt_epoch_241.pth", "#v0cls", 76_254_056, 18.0, 83.7),
    ),
    # Ours. `nano` is for photographs on a CPU, the others for small images; `s2` marks a stem of stride 2.
    "vmamba_nano": Variant((2, 2, 6, 2), (48, 96, 192, 384), drop_path_rate=0.05),
    "vmamba_pico_s2": Variant((1, 2, 4, 1), (48, 96, 192, 256), stem_stride=2, img_size=(64, 64)),
    "vmamba_femto_s2": Variant((1, 2, 1), (48, 96, 192), stem_stride=2, img_size=(32, 32)),
    "vmamba_femto": Variant((1, 2), (64, 160), img_size=(28, 28)),
    # And with neighbours in every part, which learns in less time (docs/learning.md).
    "vmamba_pico_local": Variant(
        (2, 1, 1, 1), (32, 64, 128, 232), mlp_ratio=1.0, mlp="local", local_stages=3, norm="batch", stem="wide",
        downsample="residual", img_size=(64, 64),
    ),
    "vmamba_femto_local": Variant(
        (2, 1, 1), (32, 64, 128), mlp_ratio=1.0, mlp="local", local_stages=2, norm="batch", stem="small", stem_stride=2,
        downsample="residual", img_size=(28, 28),
    ),
}  # fmt: skip
