"""Pictures in every form become the same input, and places in them are found again."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmamba
from vmamba.data.transforms import Preprocessing, resize_bilinear_uint8
from vmamba.errors import ImageError, RecipeError
from vmamba.explain.images import evaluating, preprocessing_for, see
from vmamba.explain.scans import record_scans
from vmamba.explain.stage_maps import stage_maps
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import load_model
from vmamba.tasks.inference import detect, padded
from vmamba.tasks.segmenter import network_logits

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vmamba.create_model("vmamba_femto_s2", num_classes=3)


def test_every_form_of_a_picture_gives_the_same_input(model, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    channels_first = torch.as_tensor(PIXELS).permute(2, 0, 1)
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(PIXELS), PIXELS, channels_first]
    wanted = preprocessing_for(model)
    expected = wanted.normalise(wanted.eval_transform()(Image.fromarray(PIXELS))[None])
    for form in forms:
        torch.testing.assert_close(see(model, form).images, expected, rtol=0, atol=0)
    together = see(model, forms)
    assert together.images.shape == (5, 3, 32, 32)
    assert together.names[0].endswith("a.png")
    assert together.names[2:] == ("picture 3", "picture 4", "picture 5")
    assert torch.equal(see(model, np.stack([PIXELS] * 2)).images, see(model, torch.stack([channels_first] * 2)).images)
    assert see(model, together) is together
    assert np.abs(see(model, together.images).pictures.astype(int) - together.pictures).max() <= 1
    assert see(model, PIXELS, size=(48, 40)).size == (48, 40)


def test_the_input_follows_the_model():
    many = vmamba.create_model("vmamba_femto_s2", in_chans=5).double()
    seen = see(many, torch.randn(2, 5, 36, 33))
    assert seen.images.dtype == torch.float64
    assert seen.pictures.shape == (2, 36, 33, 3)
    assert seen.pictures.min() == 0
    assert seen.pictures.max() == 255
    grey = vmamba.create_model("vmamba_femto", in_chans=1)
    seen = see(grey, PIXELS)
    assert seen.images.shape == (1, 1, 28, 28)
    assert (seen.pictures[..., 0] == seen.pictures[..., 2]).all()


def test_dense_models_see_whole_pictures_as_in_their_tests():
    segmenter = vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=3, channels=8)
    seen = see(segmenter, PIXELS, size=80)
    assert seen.size == (80, 120)
    picture = torch.as_tensor(PIXELS).permute(2, 0, 1)
    normalise = Preprocessing.from_dict(dict(segmenter.pretrained_cfg)).normalise
    torch.testing.assert_close(seen.images, normalise(resize_bilinear_uint8(picture, (80, 120))[None]))
    assert seen.locate(59, 39) == (118, 78)
    assert seen.given(118, 78) == (59, 39)
    detector = vmamba.create_model("maskrcnn", backbone="vmamba_femto_s2", num_classes=3, channels=8)
    assert preprocessing_for(detector).img_size == (800, 1333)
    assert preprocessing_for(detector, stored={"sides": [200, 300]}).img_size == (200, 300)
    assert preprocessing_for(detector, size=160).img_size == (160, 267)
    with pytest.raises(RecipeError, match="different sizes, picture 1 120×80, picture 2 80×80: give them one at a"):
        see(segmenter, [PIXELS, PIXELS[:, :40]], size=80)


def test_a_detector_sees_pictures_filled_up_and_so_do_all_who_look_into_it():
    detector = vmamba.create_model("maskrcnn", backbone="vmamba_femto_s2", num_classes=3, channels=8)
    seen = see(detector, PIXELS, size=(60, 90))  # the picture is 40×60
    batch, _ = padded(
        [resize_bilinear_uint8(torch.as_tensor(PIXELS).permute(2, 0, 1), (60, 90))], preprocessing_for(detector)
    )
    assert torch.equal(seen.images, batch)
    assert (seen.size, seen.drawn()) == ((64, 96), (60, 90))
    assert (seen.pictures[0, 60:] == [124, 116, 104]).all()
    assert (seen.pictures[0, :, 90:] == [124, 116, 104]).all()
    assert seen.locate(59, 39) == pytest.approx((88.5, 58.5))
    assert seen.given(88.5, 58.5) == pytest.approx((59, 39))
    scan = record_scans(detector, PIXELS, size=(60, 90)).scan(0)
    assert scan.grid == (32, 48)
    maps = stage_maps(detector, PIXELS, size=(60, 90)).maps
    with torch.no_grad():
        expected = detector.eval().backbone(batch)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize("size", [(3, 200), (200, 3)])
def test_a_strip_is_seen_as_in_prediction(size):
    picture = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    backbone = {"backbone": "vmamba_femto_s2", "num_classes": 3, "channels": 8}
    segmenter, detector = (vmamba.create_model(head, **backbone) for head in ("upernet", "maskrcnn"))
    tensor, given = torch.as_tensor(picture).permute(2, 0, 1), []
    hooks = [model.register_forward_pre_hook(lambda _, args: given.append(args[0])) for model in (segmenter, detector)]
    with evaluating(segmenter), evaluating(detector), torch.inference_mode():
        network_logits(segmenter, preprocessing_for(segmenter, size=64), [tensor])
        detect(detector, [tensor], (64, 160))
    for hook in hooks:
        hook.remove()
    for model, sides, images in zip((segmenter, detector), (64, (64, 160)), given, strict=True):
        assert torch.equal(see(model, picture, size=sides).images, images)


def test_a_model_sees_the_size_it_was_made_for():
    assert see(vmamba.create_model("vmamba_femto_s2", img_size=64), PIXELS).size == (64, 64)
    assert see(vmamba.create_model("vmamba_femto_s2", img_size=(48, 64)), PIXELS).size == (48, 64)
    vit = timm.create_model("test_vit", img_size=96)  # whose configuration says 160
    assert see(vit, PIXELS).size == (96, 96)
    assert see(vit, PIXELS, size=64).size == (64, 64)
    assert see(timm.create_model("test_resnet"), PIXELS).size == (160, 160)


def test_a_dense_model_sees_the_sides_it_was_trained_for(tmp_path):
    detector = vmamba.create_model("maskrcnn", backbone="vmamba_femto_s2", num_classes=3, channels=8)
    save_checkpoint(detector, tmp_path / "detector.safetensors", {"sides": [64, 100]})
    loaded, metadata = load_model(tmp_path / "detector.safetensors")
    assert preprocessing_for(loaded) == preprocessing_for(loaded, stored=metadata)
    assert see(loaded, PIXELS).size == (64, 96)
    segmenter = vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=3, channels=8, img_size=(64, 80))
    assert see(segmenter, PIXELS).size == (53, 80)


def test_what_is_no_picture_is_refused(model, tmp_path):
    with pytest.raises(ImageError, match=r"none.png: no such file"):
        see(model, tmp_path / "none.png")
    with pytest.raises(TypeError, match="int is no picture"):
        see(model, 3)
    with pytest.raises(TypeError, match=r"picture 1 is a tensor, torch.uint8 \(40, 60, 3\)"):
        see(model, torch.as_tensor(PIXELS))
    with pytest.raises(TypeError, match=r"float64 \(40, 60, 3\); expected uint8"):
        see(model, PIXELS / 255)
    with pytest.raises(TypeError, match=r"expected \(C, H, W\), or a batch"):
        see(model, torch.rand(40, 60))
    with pytest.raises(RecipeError, match="no pictures"):
        see(model, [])
    for empty in (
        PIXELS[:0],
        PIXELS[:, :0, 0],
        torch.zeros(3, 0, 9),
        torch.zeros(2, 3, 9, 0),
        Image.new("RGB", (0, 9)),
    ):
        with pytest.raises(RecipeError, match="picture 1 has no pixels, its shape is"):
            see(model, empty)


def test_a_model_is_put_back_as_it_was(model):
    model.train()
    model.stages[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.stages[1].training
