"""The names and shapes that published files give to our parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from vmamba.ops.routes import ROUTES

__all__ = ["to_our_names", "without_wrappers"]

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_RENAMED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^patch_embed\.(?:0|proj)\.", "stem.conv1."),
        (r"^patch_embed\.(?:2|norm)\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
        # Theirs ends a stage with the downsampling that begins our next one.
        (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.downsample\.1\.", ".downsample.conv."),
        (r"\.downsample\.3\.", ".downsample.norm."),
        (r"(\.blocks\.\d+)\.(?:norm|ln_1)\.", r"\1.norm1."),
        (r"\.(?:op|self_attention)\.", ".ss2d."),
        (r"\.ss2d\.conv2d\.", ".ss2d.conv."),
        (r"\.ss2d\.out_norm\.", ".ss2d.norm."),
        (r"\.ss2d\.x_proj\.weight$", ".ss2d.x_proj_weight"),
        (r"\.ss2d\.dt_projs[._](weight|bias)$", r".ss2d.dt_proj_\1"),
        (r"\.ss2d\.A_logs$", ".ss2d.A_log"),
        (r"\.ss2d\.Ds$", ".ss2d.D"),
        (r"^classifier\.norm\.", "norm."),
        (r"^(?:classifier\.)?head\.(weight|bias)$", r"head.fc.\1"),
    )
)
_LINEAR = re.compile(r"\.(?:in_proj|out_proj|fc1|fc2|reduction|fc)\.weight$")


def without_wrappers(name: str) -> str:
    """A parameter's name without what torch.compile, activation checkpointing and FSDP put into it."""
    return _WRAPPERS.sub("", name)


def to_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors under the names and in the shapes they have in this package.

    Ours pass through unchanged, and so does what is not recognised. The norms on the stages' outputs, outnorm0..3, are
    left out: they belong to the segmentation or detection head that reads them.

    Raises:
        ValueError: two tensors are the same parameter of ours.
    """
    patch_stem = not any(name.startswith(("patch_embed.5.", "stem.conv2.")) for name in state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("outnorm"):
            continue
        ours = _our_name(name, patch_stem)
        if ours in renamed:
            raise ValueError(f"{name} is there twice, under names old and new")
        renamed[ours] = _in_our_shape(name, ours, tensor)
    return renamed


def _our_name(name: str, patch_stem: bool) -> str:
    renamed = name
    for theirs, ours in _RENAMED:
        renamed = theirs.sub(ours, renamed)
    if patch_stem and name.startswith("patch_embed."):
        return renamed.replace("stem.conv1.", "stem.conv.").replace("stem.norm1.", "stem.norm.")
    return renamed


def _in_our_shape(name: str, ours: str, tensor: Tensor) -> Tensor:
    """Routes in a dimension of their own, Linear weights two-dimensional."""
    shape = tensor.shape
    if _LINEAR.search(ours) and shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    if ".ss2d." not in ours or tensor.ndim == 0 or shape[0] % ROUTES:
        return tensor
    leaf = ours.rpartition(".")[2]
    if leaf in ("D", "dt_proj_bias") and tensor.ndim == 1:
        return tensor.reshape(ROUTES, -1)
    if leaf == "A_log" and tensor.ndim == 2:
        return tensor.reshape(ROUTES, -1, shape[1])
    if name.endswith((".x_proj.weight", ".dt_projs.weight")) and shape[2:] == (1,):
        return tensor.reshape(ROUTES, -1, shape[1])
    return tensor
