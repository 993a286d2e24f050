"""Stage maps and what is in them: edges in the shallow ones, classes in the deep ones."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vmamba
from vmamba import explain
from vmamba.errors import DataError, RecipeError
from vmamba.explain.depth import linear_probe
from vmamba.explain.stage_maps import StageMaps, stage_outputs

FEATURES = {"features_only": True}

SWIN = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "options", "size", "shapes"),
    [
        ("vmamba_femto_s2", {}, (33, 40), [(48, 17, 20), (96, 9, 10), (192, 5, 5)]),
        ("vmamba_femto_s2", FEATURES, (33, 40), [(48, 17, 20), (96, 9, 10), (192, 5, 5)]),
        ("resnet10t", {}, (64, 64), [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("resnet10t", FEATURES, (64, 64), [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("swin_tiny_patch4_window7_224", SWIN,
         (64, 64), [(12, 16, 16), (24, 8, 8), (48, 4, 4), (96, 2, 2)]),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, (64, 64), [(192, 4, 4)]),
    ],
)  # fmt: skip
def test_every_backbone_gives_its_stages_channels_first(name, options, size, shapes):
    torch.manual_seed(0)
    images = torch.randn(2, 3, *size)
    model = timm.create_model(name, **options)
    maps = stage_outputs(model, images)
    assert [tuple(x.shape[1:]) for x in maps] == shapes
    assert model.training
    if name.startswith("vmamba") and not options:
        x = model.eval().stem(images)
        torch.testing.assert_close(maps[0], model.stages[0](x).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_dense_models_give_the_maps_of_their_heads_and_others_say_why_not():
    torch.manual_seed(0)
    model = vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=3, channels=8).eval()
    found = explain.stage_maps(model, torch.randn(1, 3, 40, 40))
    assert [tuple(x.shape) for x in found.maps] == [(1, 48, 20, 20), (1, 96, 10, 10), (1, 192, 5, 5)]
    with torch.no_grad():
        torch.testing.assert_close(found.maps[1], model.backbone(found.seen.images)[1])
    with pytest.raises(RecipeError, match="Conv2d gives no maps of its stages"):
        explain.stage_maps(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8))


def test_components_energy_and_strongest_channels_by_hand():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    spread = torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    rows = torch.randn(2 * 12 * 10, 6, generator=generator) * spread @ directions.T + 7
    x = rows.unflatten(0, (2, 12, 10)).movedim(3, 1)
    maps = StageMaps("x", explain.see(nn.Linear(1, 1), torch.zeros(2, 3, 24, 20)), (x,))
    found = maps.components()[0].movedim(1, 3).flatten(0, 2)
    wanted = (rows - rows.mean(0)) @ directions[:, :3]
    for k in range(3):
        assert abs(torch.corrcoef(torch.stack([found[:, k], wanted[:, k]]))[0, 1]) > 0.98
    assert (found.std(0).diff() < 0).all()
    low, high = np.quantile(found.numpy(), (0.02, 0.98), axis=0)
    colours = np.clip((found.numpy() - low) / (high - low), 0, 1).reshape(2, 12, 10, 3)
    for image in range(2):
        np.testing.assert_allclose(maps.colours(image)[0].movedim(0, 2).numpy(), colours[image], atol=1e-5)
    shifted = StageMaps("x", maps.seen, (x + 100,))
    torch.testing.assert_close(shifted.energy()[0], maps.energy()[0], rtol=1e-3, atol=1e-3)
    scaled = x * torch.tensor([1.0, 1, 1, 900, 1, 40]).view(1, 6, 1, 1)
    assert StageMaps("x", maps.seen, (scaled,)).strongest(2)[0].tolist() == [3, 5]


def test_edges_tell_a_map_of_edges_from_one_of_anything_else():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:40, 20:52] = 255
    grey = torch.as_tensor(pixels[..., 0]).float()[None, None] / 255
    pooled = nn.functional.avg_pool2d(grey, 2)
    generator = torch.Generator().manual_seed(0)
    noise = nn.functional.interpolate(torch.randn(1, 1, 5, 5, generator=generator), 16, mode="bilinear")
    flat = torch.ones(1, 2, 8, 8)
    seen = explain.see(nn.Linear(1, 1), torch.zeros(1, 3, 64, 64))
    seen = type(seen)(seen.images, pixels[None], seen.names, seen.parts, seen.sizes)
    found = StageMaps("x", seen, (torch.cat([pooled, -2 * pooled], 1), noise, flat)).edges()[0]
    assert found[0] > 0.9
    assert abs(found[1]) < 0.4
    assert found[2] == 0


def test_a_linear_probe_answers_what_it_has_not_seen():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    centres = 3 * torch.randn(4, 30, generator=generator)
    features = centres[labels] + torch.randn(200, 30, generator=generator)
    accuracy, deviation = linear_probe(features * torch.logspace(-3, 3, 30), labels + 10)
    assert accuracy > 0.98
    assert deviation < 0.05
    # More features than pictures: what fits the known ones perfectly says nothing about the others.
    accuracy, _ = linear_probe(torch.randn(200, 500, generator=generator), labels)
    assert abs(accuracy - 0.25) < 0.12
    with pytest.raises(DataError, match="8 pictures of 4 classes; expected 10"):
        linear_probe(features[:8], labels[:8])


def test_depth_profiles_of_several_models(tmp_path):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(60):
        pixels = generator.integers(0, 100, (32, 32, 3), dtype=np.uint8)
        pixels[..., number % 3] += 60
        pairs.append((pixels, number % 3))
    models = {"ours": vmamba.create_model("vmamba_femto_s2"), "ResNet": timm.create_model("resnet10t")}
    found = explain.depth_profiles(models, pairs, limit=45, size=32, batch_size=20)
    assert [(profile.name, len(profile.edges), profile.pictures) for profile in found] == [
        ("ours", 3, 45),
        ("ResNet", 4, 45),
    ]
    assert found[0].classes == 3
    assert found[0].accuracy[0] > 0.9  # colours are easy, even without training
    figure = explain.draw_depth(found)
    lines = figure.axes[1].get_lines()
    assert lines[0].get_ydata().tolist() == list(found[0].accuracy)
    assert figure.axes[0].get_lines()[1].get_ydata().tolist() == list(found[1].edges)
    with pytest.raises(DataError, match="0 pictures of 0 classes"):
        linear_probe(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_patches_are_where_the_scans_have_them():
    """Where the last row and column reach beyond the picture, too."""
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_femto_s2", num_classes=2)
    seen = explain.see(model, torch.randn(1, 3, 33, 41))
    found, classes, recording = (
        look(model, seen) for look in (explain.stage_maps, explain.class_maps, explain.record_scans)
    )
    assert [tuple(x.shape[2:]) for x in found.maps] == [(17, 21), (9, 11), (5, 6)]
    assert found.cells == classes.cells == ((2, 2), (4, 4), (8, 8))
    assert [recording.cell(f"stages.{i}.blocks.0") for i in range(3)] == list(found.cells)
    assert [entry["stride"] for entry in found.numbers()] == [2, 4, 8]
    last = found.figure().axes[7].images[0].get_array()  # the energy of stage 3
    assert last.shape == (33, 41)
    assert (last[:8, :8] == found.energy()[2][0, 0, 0].numpy()).all()
    assert (last[32, 40], last[31, 39]) == tuple(found.energy()[2][0, [4, 3], [5, 4]].numpy())
    over = classes.figure().axes[3].images[1]
    assert over.get_extent() == [0, 48, 40, 0]
    assert over.axes.get_xlim() == (0, 41)


def test_figure_and_numbers(tmp_path):
    torch.manual_seed(0)
    found = explain.stage_maps(vmamba.create_model("vmamba_femto_s2"), torch.randn(2, 3, 36, 44))
    numbers = found.numbers(1)
    assert [entry["shape"] for entry in numbers] == [[48, 18, 22], [96, 9, 11], [192, 5, 6]]
    assert numbers[0]["edges"] == pytest.approx(float(found.edges()[1, 0]))
    figure = found.figure(1)
    assert [axes.get_title(loc="left") for axes in figure.axes if "stage" in axes.get_title(loc="left")] == [
        "stage 1: 18×22, 48 channels", "stage 2: 9×11, 96 channels", "stage 3: 5×6, 192 channels",
    ]  # fmt: skip
    found.save(tmp_path / "a.png", channels=(0, 100))
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 400
