"""Receptive fields with known answers, and those of real networks."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import vmamba
from vmamba.errors import ImageError, RecipeError
from vmamba.explain.receptive_field import (
    ReceptiveField,
    draw_receptive_fields,
    receptive_field,
    stage_map,
    untrained,
)

EXAMPLES = Path(__file__).parents[2] / "examples/images"
BACKBONES = {
    "vmamba": lambda: vmamba.create_model("vmamba_femto_s2", in_chans=3),
    "resnet": lambda: timm.create_model("resnet10t"),
    "convnext": lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
    "swin": lambda: timm.models.SwinTransformer(
        img_size=64, depths=(1, 1), embed_dim=24, num_heads=(2, 2), window_size=4
    ),
    "vit": lambda: timm.models.VisionTransformer(img_size=64, depth=2, embed_dim=32, num_heads=2),
}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- known answers ---------------------------------------------------------------------------------------------------


def test_one_convolution_hears_its_kernel():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    found = receptive_field(conv, noise(5, 2, 9, 11))
    weight = conv.weight.detach().double().sum(0).abs().sum(0)
    expected = np.zeros((9, 11))
    expected[3:6, 4:7] = weight / weight.sum()
    np.testing.assert_allclose(found.contributions, expected, rtol=1e-6)
    assert (found.images, found.name) == (5, "Conv2d")
    nn.init.ones_(conv.weight)
    found = receptive_field(conv, noise(1, 2, 9, 11))
    assert found.centre == (4.5, 5.5)
    assert [found.side(share) for share in (0.1, 0.5, 1)] == [1, 3, 3]
    assert [round(found.area(share) * 99) for share in (0.1, 0.5, 0.9, 1)] == [1, 5, 9, 9]


def test_an_identity_hears_one_pixel():
    found = receptive_field(nn.Identity(), noise(2, 3, 8, 8))
    assert found.contributions[4, 4] == 1
    assert found.contributions.sum() == 1
    assert (found.side(0.5), found.side(0.9), found.area(0.9)) == (1, 1, 1 / 64)


def test_a_mean_over_the_image_hears_all_pixels_alike():
    found = receptive_field(nn.AdaptiveAvgPool2d(1), noise(2, 3, 10, 20))
    np.testing.assert_allclose(found.contributions, 1 / 200)
    assert found.area(0.5) == pytest.approx(0.5)
    assert found.area(0.9) == pytest.approx(0.9)
    assert found.centre == (5, 10)
    sides, shares = found.within()
    np.testing.assert_allclose(shares, np.minimum(sides, 10) * sides / 200)
    assert found.numbers() == {
        "name": "AdaptiveAvgPool2d", "images": 2, "img_size": [10, 20], "centre": [5, 10],
        "side_50": 10, "side_90": 18, "area_50": 0.5, "area_90": pytest.approx(0.9),
    }  # fmt: skip


def test_strides_and_depth_widen_a_field():
    two = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 1, 3, 2, 1))
    for conv in two:
        nn.init.ones_(conv.weight)
    found = receptive_field(two, noise(1, 1, 28, 28))
    rows, columns = found.contributions.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 15, 9, 15)  # 7 pixels around 12
    assert found.centre == (12.5, 12.5)
    assert found.side(0.5) <= found.side(0.9) <= found.side(1) == 7


def test_the_squares_lie_on_the_field_of_a_resnet():
    """As it is drawn its blocks begin as skips, so that the last map hears one strided convolution after another."""
    found = receptive_field(timm.create_model("resnet18"), noise(4, 3, 224, 224))
    rows, columns = found.contributions.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (91, 101, 91, 101)
    assert found.side(0.5) < found.side(0.9) <= 11
    squares = draw_receptive_fields([found]).subfigs[0].axes[0].patches
    for square, share in zip(squares, (0.5, 0.9), strict=True):
        left, top, right, bottom = square.get_bbox().extents
        assert right - left == bottom - top == found.side(share)
        assert 91 <= min(left, top) < max(right, bottom) <= 102


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_the_gradient_of_every_backbone(name: str):
    """Against autograd on what timm's own method gives for the last stage; the model is left as it was."""
    model = BACKBONES[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = noise(3, 3, 64, 64)
    found = receptive_field(model, images, batch_size=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    x = images.clone().requires_grad_()
    features = model.eval().forward_intermediates(x, indices=1, intermediates_only=True)[0]
    middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2].sum()
    expected = torch.autograd.grad(middle, x)[0].double().abs().sum((0, 1))
    np.testing.assert_allclose(found.contributions, expected / expected.sum(), rtol=1e-3, atol=1e-9)
    assert found.contributions.sum() == pytest.approx(1)


def test_every_stage_hears_further_than_the_one_before():
    model = vmamba.VMamba(depths=(1, 1, 1), dims=(16, 24, 32), stem_stride=2)
    sides = [receptive_field(model, noise(2, 3, 64, 64), stage=stage).side(0.5) for stage in range(3)]
    assert sides[0] < sides[1] < sides[2]
    with pytest.raises(ValueError, match="stage is 3; VMamba has 3"):
        receptive_field(model, noise(1, 3, 64, 64), stage=3)


def test_vmamba_reaches_all_pixels_where_convolutions_do_not():
    images = noise(1, 3, 97, 128)
    ours = receptive_field(vmamba.VMamba(depths=(1,), dims=(16,), stem_stride=4), images)
    theirs = receptive_field(timm.models.ConvNeXt(depths=(1, 0, 0, 0), dims=(16, 16, 16, 16)), images, stage=0)
    assert (ours.contributions > 0).mean() == 1
    assert [np.ptp(places) + 1 for places in theirs.contributions.nonzero()] == [28, 28]  # 7 patches of 4 pixels


def test_what_somebody_did_to_a_model_counts():
    model = vmamba.create_model("vmamba_femto_s2")
    images = noise(1, 3, 32, 32)
    plain = receptive_field(model, images)
    model.stages[2].blocks[0].ss2d = nn.Identity()
    changed = receptive_field(model, images)
    assert not np.allclose(plain.contributions, changed.contributions)
    handle = model.stages[2].register_forward_hook(lambda module, inputs, output: 0 * output + inputs[0].mean())
    assert receptive_field(model, images).area(0.9) != changed.area(0.9)
    handle.remove()
    np.testing.assert_array_equal(receptive_field(model, images).contributions, changed.contributions)


def test_others_can_use_the_model_meanwhile():
    """In another thread, while the stage is listened to."""
    model = vmamba.create_model("vmamba_femto_s2", num_classes=5).eval()
    images, answers = noise(1, 3, 32, 32), []
    expected = receptive_field(model, images)

    def use(*_: object) -> None:
        handle.remove()
        other = Thread(target=lambda: answers.append(model(images)))
        other.start()
        other.join()

    handle = model.stem.register_forward_pre_hook(use)
    found = receptive_field(model, images)
    assert np.array_equal(found.contributions, expected.contributions)
    assert answers[0].shape == (1, 5)


def test_dense_models_and_feature_extractors():
    images = noise(1, 3, 64, 64)
    for model in (
        vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=3),
        timm.create_model("vmamba_femto_s2", features_only=True, in_chans=3),
        timm.create_model("convnext_atto", features_only=True),
    ):
        with torch.no_grad():
            assert stage_map(model.eval(), images, 1).shape[2:] == (16, 16) if "VMamba" in repr(model) else (8, 8)
        assert receptive_field(model, images).contributions.shape == (64, 64)


def test_half_precision_and_no_grad():
    model = vmamba.create_model("vmamba_femto_s2").to(torch.bfloat16)
    with torch.inference_mode():
        found = receptive_field(model, noise(1, 3, 40, 33))
    assert found.contributions.dtype == np.float64
    assert found.contributions.shape == (40, 33)


# --- pictures, and what cannot be ------------------------------------------------------------------------------------


def test_pictures_of_any_kind_are_prepared_as_the_model_expects():
    model = vmamba.create_model("vmamba_femto_s2", img_size=(32, 48), in_chans=3)
    files = sorted(EXAMPLES.glob("*.png"))[:2]
    fields = [receptive_field(model, each) for each in (files, [Image.open(file) for file in files],
              [np.asarray(Image.open(file).convert("RGB")) for file in files])]  # fmt: skip
    for field in fields:
        assert (field.contributions.shape, field.images) == ((32, 48), 2)
        np.testing.assert_array_equal(field.contributions, fields[0].contributions)
    assert receptive_field(model, EXAMPLES, img_size=32).images == 10
    swin = BACKBONES["swin"]()
    assert receptive_field(swin, files[0], img_size=96).contributions.shape == (96, 96)
    assert swin.patch_embed.img_size == (64, 64)


def test_errors_say_what_to_do(tmp_path: Path):
    model = BACKBONES["vmamba"]()
    with pytest.raises(ImageError, match="no such file or folder"):
        receptive_field(model, tmp_path / "absent.png")
    with pytest.raises(RecipeError, match="no images"):
        receptive_field(model, [])
    with pytest.raises(TypeError, match="normalised"):
        receptive_field(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no output of shape"):
        receptive_field(nn.Flatten(), noise(1, 3, 8, 8))
    with pytest.raises(RecipeError, match="add up to 0"):
        receptive_field(nn.Threshold(100.0, 0.0), noise(1, 3, 8, 8))


def test_before_training_is_drawn_anew():
    model = vmamba.create_model("vmamba_femto_s2", num_classes=4)
    nn.init.zeros_(model.stages[0].blocks[0].mlp.fc1.weight)
    fresh = untrained(model)
    assert 0.015 < fresh.stages[0].blocks[0].mlp.fc1.weight.std() < 0.025
    assert model.stages[0].blocks[0].mlp.fc1.weight.abs().sum() == 0
    other = timm.create_model("resnet10t", num_classes=3)
    assert untrained(other).fc.weight.shape == other.fc.weight.shape
    with pytest.raises(RecipeError, match="how this Conv2d was drawn"):
        untrained(nn.Conv2d(1, 1, 1))
    detector = vmamba.create_model("maskrcnn", backbone="resnet10t", num_classes=3, channels=8)
    with pytest.raises(RecipeError, match=r"how this MaskRCNN was drawn .* expected a model with a VMamba"):
        untrained(detector)


def test_a_field_is_a_value():
    field = ReceptiveField("x", np.full((2, 2), 0.25), (1.0, 1.0), 1)
    assert field.side(1) == 2
    with pytest.raises(AttributeError):
        field.name = "y"  # type: ignore[misc]
