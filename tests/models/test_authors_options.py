"""Models that somebody built with the authors' class and own options load into ours, of any width and depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vmamba
from vmamba.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]

# The authors' arguments, and ours for the same network; docs/from-the-authors-code.md has the whole table.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "their defaults with patch merging": (
        {"depths": [1, 2, 1, 1], "dims": 24, "downsample_version": "v1"},
        {"depths": (1, 2, 1, 1), "dims": (24, 48, 96, 192), "d_state": 16, "ssm_ratio": 2.0, "gated": True,
         "conv_bias": True, "stem": "patch", "downsample": "merge"},
    ),
    "two stages, five channels, patches of two": (
        {"depths": [3, 1], "dims": [20, 36], "in_chans": 5, "num_classes": 7, "patch_size": 2, "mlp_ratio": 0.0,
         "downsample_version": "v1", "ssm_d_state": 4, "ssm_ratio": 1.0, "norm_layer": "LN2D"},
        {"depths": (3, 1), "dims": (20, 36), "in_chans": 5, "num_classes": 7, "stem_stride": 2, "mlp_ratio": 0.0,
         "d_state": 4, "ssm_ratio": 1.0, "gated": True, "conv_bias": True, "stem": "patch", "downsample": "merge"},
    ),
    "six stages of convolutions": (
        {"depths": [1, 1, 1, 1, 1, 2], "dims": [16, 16, 24, 24, 32, 40], "ssm_d_state": 1, "ssm_ratio": 1.5,
         "ssm_conv_bias": False, "forward_type": "v05_noz", "mlp_ratio": 2.0, "downsample_version": "v3",
         "patchembed_version": "v2"},
        {"depths": (1, 1, 1, 1, 1, 2), "dims": (16, 16, 24, 24, 32, 40), "d_state": 1, "ssm_ratio": 1.5,
         "mlp_ratio": 2.0},
    ),
    "no convolution bias, gated, one route four times": (
        {"depths": [2], "dims": [32], "ssm_conv_bias": False, "forward_type": "v31d", "patchembed_version": "v2"},
        {"depths": (2,), "dims": (32,), "d_state": 16, "ssm_ratio": 2.0, "gated": True, "pattern": "unidirectional"},
    ),
}  # fmt: skip


def authors_shapes(
    depths: list[int], dims: int | list[int], in_chans: int = 3, num_classes: int = 1000, patch_size: int = 4,
    ssm_d_state: int = 16, ssm_ratio: float = 2.0, ssm_conv_bias: bool = True, forward_type: str = "v2",
    mlp_ratio: float = 4.0, downsample_version: str = "v2", patchembed_version: str = "v1", norm_layer: str = "LN",
) -> Shapes:  # fmt: skip
    """Names and shapes in the state dict of the authors' VSSM, by its constructor's arguments."""
    dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else dims
    shapes: Shapes = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    if patchembed_version == "v1":
        layer("patch_embed.0", dims[0], in_chans, patch_size, patch_size)
        layer("patch_embed.2", dims[0])
    else:
        side = patch_size // 2 + 1  # of a kernel of that stride
        layer("patch_embed.0", dims[0] // 2, in_chans, side, side)
        layer("patch_embed.2", dims[0] // 2)
        layer("patch_embed.5", dims[0], dims[0] // 2, side, side)
        layer("patch_embed.7", dims[0])
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        inner, rank = int(ssm_ratio * dim), math.ceil(dim / 16)
        for block in (f"layers.{stage}.blocks.{number}" for number in range(depth)):
            layer(f"{block}.norm", dim)
            shapes[f"{block}.op.x_proj_weight"] = (4, rank + 2 * ssm_d_state, inner)
            shapes[f"{block}.op.dt_projs_weight"] = (4, inner, rank)
            shapes[f"{block}.op.dt_projs_bias"] = (4, inner)
            shapes[f"{block}.op.A_logs"] = (4 * inner, ssm_d_state)
            shapes[f"{block}.op.Ds"] = (4 * inner,)
            layer(f"{block}.op.out_norm", inner)
            layer(f"{block}.op.in_proj", inner if forward_type.endswith("noz") else 2 * inner, dim, bias=False)
            layer(f"{block}.op.conv2d", inner, 1, 3, 3, bias=ssm_conv_bias)
            layer(f"{block}.op.out_proj", dim, inner, bias=False)
            if mlp_ratio:
                layer(f"{block}.norm2", dim)
                layer(f"{block}.mlp.fc1", int(mlp_ratio * dim), dim)
                layer(f"{block}.mlp.fc2", dim, int(mlp_ratio * dim))
        if stage + 1 < len(depths):
            down, out = f"layers.{stage}.downsample", dims[stage + 1]
            if downsample_version == "v1":
                layer(f"{down}.norm", 4 * dim)
                layer(f"{down}.reduction", out, 4 * dim, bias=False)
            else:
                layer(f"{down}.1", out, dim, *{"v2": (2, 2), "v3": (3, 3)}[downsample_version])
                layer(f"{down}.3", out)
    layer("classifier.norm", dims[-1])
    layer("classifier.head", num_classes, dims[-1])
    return shapes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("inside", ["", "model", "state_dict"])
def test_their_state_dict_loads_whatever_the_widths_and_depths(case: str, inside: str, tmp_path: Path):
    theirs, ours = CASES[case]
    state = {name: 0.1 * torch.randn(shape) for name, shape in authors_shapes(**theirs).items()}
    torch.save({inside: state} if inside else state, path := tmp_path / "theirs.pth")

    model = vmamba.VMamba(**ours)
    info = vmamba.load_checkpoint(model, path)
    assert (info.in_chans, info.num_classes) == (ours.get("in_chans", 3), ours.get("num_classes", 1000))
    loaded = model.state_dict()
    assert len(loaded) == len(state)
    assert sorted(t.flatten()[0].item() for t in loaded.values()) == sorted(
        t.flatten()[0].item() for t in state.values()
    )
    last = len(ours["depths"]) - 1
    block, name = model.stages[last].blocks[-1], f"layers.{last}.blocks.{ours['depths'][-1] - 1}"
    torch.testing.assert_close(block.ss2d.A_log.flatten(0, 1), state[f"{name}.op.A_logs"], rtol=0, atol=0)
    torch.testing.assert_close(block.ss2d.in_proj.weight, state[f"{name}.op.in_proj.weight"], rtol=0, atol=0)
    if last:
        key = "norm" if theirs.get("downsample_version") == "v1" else "3"
        torch.testing.assert_close(
            model.stages[last].downsample.norm.weight, state[f"layers.{last - 1}.downsample.{key}.weight"]
        )
    assert model.eval()(torch.zeros(1, ours.get("in_chans", 3), 128, 128)).isfinite().all()


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            {"downsample_version": "v2"},
            r"downsample\.conv\.weight \(32, 16, 2, 2\) torch\.float32, expected \(32, 16, 3, 3\)",
        ),
        ({"forward_type": "v2"}, r"in_proj\.weight \(64, 16\) torch\.float32, expected \(32, 16\)"),
        ({"mlp_ratio": 0.0}, r"missing: .*mlp\.fc1\.weight|missing: .*norm2\.weight"),
    ],
)
def test_what_differs_is_refused_by_name(theirs: dict[str, Any], words: str, tmp_path: Path):
    options = {"depths": [1, 1], "dims": [16, 32], "forward_type": "v3noz", "ssm_conv_bias": False,
               "downsample_version": "v3", "patchembed_version": "v2"}  # fmt: skip
    state = {name: torch.zeros(shape) for name, shape in authors_shapes(**{**options, **theirs}).items()}
    torch.save(state, path := tmp_path / "theirs.pth")
    model = vmamba.VMamba(depths=(1, 1), dims=(16, 32), d_state=16, ssm_ratio=2.0)
    with pytest.raises(CheckpointError, match=words):
        vmamba.load_checkpoint(model, path)
