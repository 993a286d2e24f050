"""Attention matrices of networks whose attention is not, or not everywhere, between all patches."""

from __future__ import annotations

import pytest
import timm
import torch

from vmamba import explain
from vmamba.errors import RecipeError


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


@pytest.mark.parametrize("block", [2, -3])
def test_blocks_that_are_not_there(block):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(RecipeError, match=f"VisionTransformer has 2 blocks of attention, of which number {block} was"):
        explain.vit_attention(vit, torch.randn(1, 3, 32, 32), block=block)
