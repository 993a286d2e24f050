"""Class maps: captum's, on whatever layout a network has, of classes, masks and found objects."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmamba
from vmamba import explain
from vmamba.errors import RecipeError
from vmamba.explain.class_maps import NothingFoundError, _connected
from vmamba.tasks.detector import Detector

IMAGES = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
SWIN = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1)}


def test_the_maps_are_those_of_the_definition():
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_femto_s2", num_classes=5)
    found = explain.class_maps(model, IMAGES, target=3)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    x = model.stem(IMAGES)
    for i, stage in enumerate(model.stages):
        x = stage(x).detach().requires_grad_()
        y = model.stages[i + 1 :](x)
        logits = model.forward_head(model.norm(y))[:, 3]
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        torch.testing.assert_close(found.scores, logits.detach(), rtol=1e-4, atol=1e-5)
        cam = (gradient.mean((1, 2), keepdim=True) * x).sum(-1).relu()
        largest = float(cam.detach().max())
        torch.testing.assert_close(found.grad_cam[i], cam.detach(), rtol=1e-3, atol=1e-3 * largest)
        product = (gradient * x).sum(-1).detach()
        limit = 1e-3 * float(product.abs().max())
        torch.testing.assert_close(found.gradient_activation[i], product, rtol=1e-3, atol=limit)


@pytest.mark.parametrize(
    ("name", "options", "grids"),
    [
        ("resnet10t", {}, [(16, 16), (8, 8), (4, 4), (2, 2)]),
        ("swin_tiny_patch4_window7_224", SWIN,
         [(16, 16), (8, 8), (4, 4), (2, 2)]),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, [(4, 4)]),
    ],
)  # fmt: skip
def test_other_networks_of_timm(name, options, grids):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **options)
    images = torch.randn(2, 3, 64, 64)
    found = explain.class_maps(model, images)
    assert [tuple(cam.shape[1:]) for cam in found.grad_cam] == grids
    with torch.no_grad():
        best = model.eval()(images).max(1)
    assert found.targets == tuple(f"“class {i}”" for i in best.indices.tolist())
    torch.testing.assert_close(found.scores, best.values)
    assert all(cam.min() >= 0 for cam in found.grad_cam)
    assert all(x.abs().max() > 0 for x in found.gradient_activation)


@pytest.mark.parametrize(
    ("name", "first"), [("vit_tiny_patch16_224", 1), ("cait_xxs24_224", 0), ("xcit_nano_12_p16_224", 0)]
)
def test_tokens_are_laid_out_on_the_grid_of_the_patches(name, first):
    """Which need not be square; and of some networks the class's token comes behind the blocks only."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(32, 96), depth=2, num_classes=4).eval()
    images = torch.randn(2, 3, 32, 96)
    found = explain.class_maps(model, images, target=2)
    outputs = []
    handle = model.blocks[0].register_forward_hook(lambda _, __, y: outputs.append(y))
    logits = model(images)[:, 2]
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.sum(), outputs[0])
    expected = (gradient * outputs[0]).sum(2)[:, first:].detach().reshape(2, 2, 6)
    torch.testing.assert_close(found.scores, logits.detach())
    torch.testing.assert_close(found.gradient_activation[0], expected)


def test_tokens_in_another_order_are_refused():
    model = timm.create_model("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1))
    with pytest.raises(RecipeError, match="Hiera puts out 256 tokens; expected those of 16 rows of 16 patches"):
        explain.class_maps(model, torch.randn(1, 3, 64, 64))


def test_layouts_are_told_from_the_channels():
    model = timm.create_model("volo_d1_224", img_size=64)  # (B, H, W, C), and does not say so
    found = explain.class_maps(model, torch.randn(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in found.grad_cam] == [(8, 8), (4, 4)]


@pytest.mark.parametrize(("name", "words"), [
    ("pit_ti_224", "puts out a tuple; expected"),
    ("twins_svt_small", "does not say where its stages are"),
    ("coat_lite_tiny", "does not compute the stages that its feature_info names"),
])  # fmt: skip
def test_stages_that_cannot_be_looked_at_are_told(name, words):
    model = timm.create_model(name)
    with pytest.raises(RecipeError, match=words):
        explain.class_maps(model, torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("name", ["vmamba_femto_s2", "maskrcnn"])
def test_maps_are_the_same_in_inference_mode(name):
    torch.manual_seed(0)
    kwargs = {} if name != "maskrcnn" else {"backbone": "vmamba_femto_s2", "channels": 8, "hidden": 16, "score_thr": 0}
    model = vmamba.create_model(name, num_classes=2, **kwargs)
    expected = explain.class_maps(model, IMAGES[:1])
    with torch.inference_mode():
        found = explain.class_maps(model, IMAGES[:1].clone())  # the clone belongs to inference mode
    assert all(torch.equal(a, b) for a, b in zip(found.grad_cam, expected.grad_cam, strict=True))


def test_masks_and_regions():
    torch.manual_seed(0)
    model = vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=4, channels=8).eval()
    image = IMAGES[:1]
    with torch.no_grad():
        logits = model(image)
    labels = logits.argmax(1)[0]
    found = explain.class_maps(model, image, place=(30, 20), class_names=list("abcd"))
    target = int(labels[20, 30])
    region = found.regions[0]
    assert region[20, 30]
    assert (labels[region] == target).all()
    around = torch.nn.functional.max_pool2d(region[None].float(), 3, 1, 1)[0] > 0
    assert (labels[around & ~region] != target).all()  # all that hangs together
    assert found.targets == (f"mask of “{'abcd'[target]}”",)
    assert float(found.scores) == pytest.approx(float(logits[0, target][region].mean()), rel=1e-4)
    chosen = torch.zeros(32, 40, dtype=torch.bool)
    chosen[:4, :6] = True
    given = explain.class_maps(model, image, target=target, region=chosen, stages=[2])
    assert given.stages == (2,)
    assert len(given.grad_cam) == 1
    assert given.grad_cam[0].shape == (1, 8, 10)
    weight = torch.nn.functional.adaptive_avg_pool2d(chosen[None].float(), (8, 10))[0]
    share = float((given.grad_cam[0][0] * weight).sum() / given.grad_cam[0].sum())
    assert given.inside() == pytest.approx([share])
    corner = torch.zeros(32, 40, dtype=torch.bool)
    corner[:, 36:] = True  # of 38 columns of pixels the last two: all that there is of the last patches
    cut = explain.class_maps(model, image[..., :38], target=target, region=corner[:, :38], stages=[2])
    assert cut.cells == ((4, 4),)
    assert cut.inside() == pytest.approx([float(cut.grad_cam[0][0, :, 9].sum() / cut.grad_cam[0].sum())])
    nothing = dataclasses.replace(found, grad_cam=(torch.zeros_like(found.grad_cam[0]), *found.grad_cam[1:]))
    assert nothing.inside() == [None, *found.inside()[1:]]
    assert nothing.numbers()["stages"][0]["inside"] is None
    titles = [axes.get_title(loc="left") for axes in nothing.figure().axes[1:3]]
    assert titles[0] == "stage 1: 16×20\nnothing spoke for it"
    assert titles[1].endswith("inside")
    with pytest.raises(RecipeError, match="one at a time"):
        explain.class_maps(model, IMAGES)
    with pytest.raises(RecipeError, match=r"region is \(3, 3\); expected \(32, 40\)"):
        explain.class_maps(model, image, region=chosen[:3, :3])
    for same in (chosen.numpy(), chosen.double(), chosen.numpy().astype("uint8")):
        again = explain.class_maps(model, image, target=target, region=same, stages=[2])
        assert torch.equal(again.grad_cam[0], given.grad_cam[0])
    assert explain.class_maps(model, image, region=chosen.float()).scores.isfinite().all()
    with pytest.raises(RecipeError, match="no pixel is in the region"):
        explain.class_maps(model, image, region=torch.zeros(32, 40))
    other = int(labels[labels != target][0])
    with pytest.raises(RecipeError, match=rf"pixel at \(30, 20\) .* is “class {target}”, not “class {other}”: give"):
        explain.class_maps(model, image, target=other, place=(30, 20))


def test_what_hangs_together_does_so_over_corners_and_not_over_gaps():
    mask = torch.zeros(1, 4, 7, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 1, 3] = True
    assert _connected(mask, 0, 0)[0].nonzero().tolist() == [[0, 0], [1, 1]]
    assert _connected(mask, 3, 1)[0].nonzero().tolist() == [[1, 3]]
    assert not _connected(mask, 2, 1).any()


def test_objects():
    torch.manual_seed(0)
    model = vmamba.create_model(
        "maskrcnn", backbone="vmamba_femto_s2", num_classes=2, channels=8, hidden=16, score_thr=0.0, max_per_img=5
    ).eval()
    with torch.no_grad():
        objects = model(IMAGES[:1])[0]
    found = explain.class_maps(model, IMAGES[:1], target=1)
    assert float(found.scores.sigmoid()) == pytest.approx(float(objects["scores"][1]), rel=1e-4)
    assert found.targets == (f"“class {int(objects['labels'][1])}”, object 1",)
    assert [x.abs().max() > 0 for x in found.gradient_activation] == [True] * 3
    assert [tuple(x.shape[1:]) for x in found.grad_cam] == [(16, 20), (8, 10), (4, 5)]
    with pytest.raises(RecipeError, match="no object number 5; the model finds 5 objects"):
        explain.class_maps(model, IMAGES[:1], target=5)
    model.score_thr = 1.0
    with pytest.raises(NothingFoundError, match="finds no object in picture 1"):
        explain.class_maps(model, IMAGES[:1])
    for asked in ({"target": 0}, {"place": (3, 4)}):
        with pytest.raises(RecipeError, match="the model finds 0 objects") as raised:
            explain.class_maps(model, IMAGES[:1], **asked)
        assert not isinstance(raised.value, NothingFoundError)


def test_the_object_at_a_place_is_the_one_with_the_smallest_box():
    torch.manual_seed(0)
    kwargs = {"num_classes": 2, "channels": 8, "hidden": 16, "score_thr": 0.0, "max_per_img": 30}
    model = vmamba.create_model("maskrcnn", backbone="vmamba_femto_s2", **kwargs).eval()
    with torch.no_grad():
        boxes = model(IMAGES[:1])[0]["boxes"]
    x, y = 20.0, 16.0
    holds = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).masked_fill(~holds, torch.inf)
    assert 1 < holds.sum() < len(boxes)
    found = explain.class_maps(model, IMAGES[:1], place=(x, y), stages=[1])
    assert found.targets[0].endswith(f", object {int(areas.argmin())}")
    assert found.regions[0].any()


def test_objects_are_those_of_the_prediction():
    """Of a picture whose sides are no multiples of 32."""
    torch.manual_seed(3)
    kwargs = {"channels": 8, "hidden": 16, "score_thr": 0.0, "max_per_img": 6}
    model = vmamba.create_model("maskrcnn", backbone="vmamba_femto_s2", num_classes=3, **kwargs).eval()
    picture = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    expected = Detector(model, (40, 52), ["a", "b", "c"], [1, 2, 3], "").detect(picture, threshold=0.0)
    assert len(expected) == 6
    for number, each in enumerate(expected.objects):
        found = explain.class_maps(model, picture, number, size=(40, 52), class_names=["a", "b", "c"])
        assert found.targets == (f"“{each.name}”, object {number}",)
        assert float(found.scores.sigmoid()) == pytest.approx(each.score, rel=1e-5)
        mask = torch.from_numpy(expected.masks[number])
        if mask.any():
            assert torch.equal(found.regions[0, :40, :52], mask)
            assert found.regions[0].sum() == mask.sum()


def test_wrong_questions_and_the_figure(tmp_path):
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_femto_s2", num_classes=3)
    with pytest.raises(RecipeError, match="no class 3; the model has classes 0 to 2"):
        explain.class_maps(model, IMAGES, target=3)
    with pytest.raises(RecipeError, match="no stage 4; this model has stages 1 to 3"):
        explain.class_maps(model, IMAGES, stages=[4])
    with pytest.raises(RecipeError, match="no classes"):
        explain.class_maps(vmamba.create_model("vmamba_femto_s2", num_classes=0), IMAGES)
    found = explain.class_maps(model, IMAGES, target=2, class_names=["a", "b", "$c^"])
    figure = found.figure(1)
    assert figure._suptitle.get_text() == r"What made this “\$c^”"
    assert [axes.get_title(loc="left") for axes in figure.axes[1:4]] == [
        "stage 1: 16×20",
        "stage 2: 8×10",
        "stage 3: 4×5",
    ]
    found.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 400
    numbers = found.numbers(1)
    assert numbers["score"] == float(found.scores[1])
    assert numbers["stages"][1]["grad_cam"] == found.grad_cam[1][1].tolist()
