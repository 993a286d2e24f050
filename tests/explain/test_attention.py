"""Attention matrices of networks whose attention is not, or not everywhere, between all patches."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from vmamba import explain
from vmamba.errors import RecipeError
from vmamba.explain.resolution import at_size


def test_attention_in_windows_is_refused():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1), embed_dim=12, num_heads=(1, 1), window_size=4
    )
    with pytest.raises(RecipeError, match="SwinTransformer has 2 blocks of attention, of which number -1 was asked"):
        explain.vit_attention(swin, torch.randn(1, 3, 64, 64))


def test_attention_of_a_class_token_alone_is_refused():
    cait = timm.create_model("cait_xxs24_224", img_size=(32, 48), depth=2)
    images = torch.randn(1, 3, 32, 48)
    with pytest.raises(RecipeError, match="Cait has 4 blocks of attention, of which number -1 was asked"):
        explain.vit_attention(cait, images)
    found = explain.vit_attention(cait, images, block=1)
    assert (found.grid, found.values.shape) == ((2, 3), (6, 6))
    assert found.row((47, 31)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}, (5, 6)),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 1)}, (10, 12)),
    ],
)
def test_networks_of_one_size_see_another(name, options, grid):
    """As they do where their receptive field is measured: with their positions interpolated."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    picture = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    found = explain.stage_maps(model, picture, size=(80, 96))
    assert tuple(found.maps[-1].shape[2:]) == grid
    classes = explain.class_maps(model, picture, target=1, size=(80, 96))
    assert tuple(classes.grad_cam[-1].shape[1:]) == grid
    with torch.no_grad():
        logit = at_size(model, (80, 96))(classes.seen.images)[0, 1]
    torch.testing.assert_close(classes.scores[0], logit)
    assert model.patch_embed.img_size == (224, 224)
    if name.startswith("vit"):
        assert explain.vit_attention(model, picture, size=(80, 96)).grid == grid


def test_sizes_that_a_network_does_not_take_are_told():
    cait = timm.create_model("cait_xxs24_224", depth=2)
    picture = np.zeros((40, 40, 3), np.uint8)
    for look in (explain.stage_maps, explain.class_maps, explain.vit_attention):
        with pytest.raises(RecipeError, match=r"cait_xxs24_224 was made for images of 224×224 pixels; those given are"):
            look(cait, picture, size=64)


@pytest.mark.parametrize("block", [2, -3])
def test_blocks_that_are_not_there(block):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(RecipeError, match=f"VisionTransformer has 2 blocks of attention, of which number {block} was"):
        explain.vit_attention(vit, torch.randn(1, 3, 32, 32), block=block)
