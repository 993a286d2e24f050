"""Activation maps are exact, in every stage and on every route, whatever the model; and are put where they belong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vmamba
from vmamba import explain
from vmamba.errors import RecipeError
from vmamba.explain.scans import Scan
from vmamba.nn import SS2D
from vmamba.ops import selective_scan

SMALL = {"depths": (1, 2, 1), "dims": (16, 24, 32), "stem_stride": 2}


def network(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = vmamba.VMamba(num_classes=3, **(SMALL | options)).to(dtype)
    for module in model.modules():
        if isinstance(module, SS2D):  # as trained ones are: no longer all alike
            for parameter in (module.A_log, module.D, module.dt_proj_bias):
                nn.init.normal_(parameter, std=0.7)
    return model


OPTIONS = {
    "N = 1": {},
    "N = 16, gated": {"d_state": 16, "gated": True, "ssm_ratio": 2.0, "stem": "patch", "downsample": "merge"},
    "bidirectional": {"pattern": "bidirectional", "d_state": 2},
    "diagonal": {"pattern": "diagonal"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_contributions_and_skip_add_up_to_what_the_scan_returned(options, dtype, tolerance):
    recording = explain.record_scans(network(dtype, **options), torch.randn(2, 3, 37, 45, dtype=dtype))
    assert len(recording.blocks) == 4
    for block in recording.blocks:
        for query in ((0.0, 0.0), (20.0, 11.0), (44.0, 36.0)):
            maps = recording.maps([query, (30.0, 30.0)], block)
            total = maps.contributions.sum((1, 2, 3)) + maps.skip.sum(1)
            assert maps.contributions.dtype == dtype
            assert (total - maps.returned).abs().max() <= tolerance * maps.returned.abs().max()
            assert maps.error <= tolerance


def test_each_route_is_the_scan_of_its_sequence():
    """Route by route against the operator on one sequence, which knows nothing of weights."""
    recording = explain.record_scans(network(d_state=3), torch.randn(1, 3, 26, 34, dtype=torch.float64))
    scan: Scan = recording.scan(1)
    for k, order in enumerate(scan.orders):
        B, C = (values[:, k, order].transpose(1, 2) for values in (scan.B, scan.C))
        u, delta = scan.u[:, order].transpose(1, 2), scan.delta[:, k, order].transpose(1, 2)
        y = selective_scan(u, delta, scan.A[k], B, C, scan.D[k], backend="reference")[0]
        for step in (0, 5, len(order) - 1):
            maps = recording.maps(None, 1)
            weights = scan.weights(int(order[step]), 0)[k]
            own = (weights * scan.u[0]).sum(0) + scan.D[k] * scan.u[0, order[step]]
            torch.testing.assert_close(own, y[:, step], rtol=1e-9, atol=1e-12)
            later = order[step + 1 :]
            assert not weights[later].any()
    assert maps.visited[0, 0].sum() + maps.visited[0, 2].sum() == len(order) + 1  # there and back meet at the query


def test_an_early_patch_is_forgotten_without_loss_of_digits():
    """Weights of patches long gone come from sums that start at the query, not from differences of large ones."""
    scan = explain.record_scans(network(torch.float32), torch.randn(1, 3, 64, 64)).scan(0)
    query = int(scan.orders[0][-1])
    double = Scan(scan.block, type(scan.arguments)._make(
        value.double() if isinstance(value, torch.Tensor) else value for value in scan.arguments
    ), scan.y, scan.orders, scan.grid)  # fmt: skip
    single, exact = scan.weights(query, 0)[0], double.weights(query, 0)[0]
    faint = (exact.abs() > 1e-30) & (exact.abs() < 1e-12)
    assert faint.sum() > 500
    assert ((single - exact) / exact)[faint].abs().max() < 1e-4


def test_changed_models_give_their_own_numbers():
    model, images = network(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = explain.record_scans(model, images)

    class Slow(SS2D):
        def scan(self, u):
            self.dt_proj_bias.data -= 1
            return super().scan(u) * 1.0

    model.stages[0].blocks[0].ss2d.__class__ = Slow
    model.stages[1].blocks[0].ss2d.conv.register_forward_hook(lambda _, __, u: 2 * u)
    model.stages[1].blocks[1].ss2d.pattern = lambda height, width: torch.stack(
        [torch.arange(height * width).roll(k) for k in range(4)]
    )
    after = explain.record_scans(model, images)
    assert after.blocks == before.blocks
    assert (after.scan(0).delta < before.scan(0).delta).all()
    assert after.scan(2).orders[1, 0] == before.scan(2).orders[0, -1]
    for block in after.blocks:
        assert after.maps((9.0, 9.0), block).error < 1e-9
    assert model.training
    assert not any(module._forward_hooks for name, module in model.named_modules() if not name.endswith(".conv"))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_any_backend_and_any_network(backend):
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), ChannelsLast(), SS2D(8), SS2D(8)).double()
    with vmamba.use_backend(backend):
        recording = explain.record_scans(mine, torch.randn(1, 3, 20, 28, dtype=torch.float64))
    assert recording.blocks == ("2", "3")
    assert recording.cell(0) == (4, 4)
    assert recording.maps((27.0, 0.0), "3").error < 1e-9
    segmenter = vmamba.create_model("upernet", backbone="vmamba_femto_s2", num_classes=3, channels=8)
    found = explain.record_scans(segmenter, torch.randn(1, 3, 64, 48))
    assert [found.scan(i).label for i in range(2)] == ["stage 1, block 1", "stage 2, block 1"]


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def test_shares_and_maps_in_pixels():
    maps = explain.record_scans(network(), torch.randn(1, 3, 37, 45, dtype=torch.float64)).maps((44.0, 36.0), 1)
    assert maps.queries == ((9, 11),)
    assert maps.cell == (4, 4)
    assert maps.frame() == (44, 36, 1, 1)  # the last patch reaches beyond the picture
    share = maps.routes("share").sum() + maps.skip_share
    assert share.item() == pytest.approx(1, abs=1e-9)
    merged = maps.merged()
    pixels = maps.in_pixels(merged)
    assert pixels.shape == (1, 37, 45)
    assert pixels[0, 36, 44] == merged[0, 9, 11]
    assert pixels[0, 7, 12] == merged[0, 1, 3]
    assert (maps.routes().sum(1) >= merged - 1e-12).all()  # the triangle inequality
    assert not maps.routes("weight")[~maps.visited].any()
    with pytest.raises(ValueError, match="'size', 'share' or 'weight'"):
        maps.routes("length")


def test_the_reach_is_the_mean_distance_of_what_arrives():
    maps = explain.record_scans(network(), torch.randn(2, 3, 24, 48, dtype=torch.float64)).maps([(1, 9), (40, 20)], 1)
    for image, (row, column) in enumerate(maps.queries):
        assert row != column
        for k, sizes in enumerate(maps.routes()[image]):
            total = sum(
                float(size) * 4 * math.hypot(i - row, j - column)
                for i, line in enumerate(sizes)
                for j, size in enumerate(line)
            )
            assert maps.reach()[image, k].item() == pytest.approx(total / float(sizes.sum()), rel=1e-9)
            reached = maps.numbers(image)["routes"][k]["reach"]
            assert reached == pytest.approx(maps.reach()[image, k].item())


def test_queries_are_in_pixels_of_the_picture_given(tmp_path):
    model = vmamba.create_model("vmamba_femto_s2", num_classes=3, img_size=32)  # sees the middle, after resizing
    pixels = np.random.default_rng(0).integers(0, 255, (200, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for picture in (tmp_path / "a.png", Image.fromarray(pixels), pixels):
        seen = explain.see(model, picture)
        across = 100 / 36  # pixels of the picture in one of the view: the short side becomes 32 / 0.875
        assert seen.locate(50, 100) == pytest.approx((16, 16), abs=1e-6)
        assert seen.parts[0].width == pytest.approx(32 * across)
        query = 50 + 10.5 * across, 100 - 3.5 * across
        maps = explain.activation_maps(model, picture, query, block=0)
        assert maps.queries == ((6, 13),)
    with pytest.raises(RecipeError, match=r"\(50, 3\) of .*a.png is in the margin"):
        explain.activation_maps(model, tmp_path / "a.png", (50, 3))
    with pytest.raises(RecipeError, match=r"outside .*100×200"):
        explain.activation_maps(model, tmp_path / "a.png", (100, 3))
    with pytest.raises(RecipeError, match=r"no block 'stages\.9'; expected a number from 0 to"):
        explain.activation_maps(model, pixels, block="stages.9")
    with pytest.raises(RecipeError, match=r"no block 1\.0; expected a number"):
        explain.activation_maps(model, pixels, block=1.0)
    assert torch.equal(maps.weights, explain.activation_maps(model, pixels, query, block=np.int64(0)).weights)
    recording = explain.record_scans(model, [pixels] * 3)
    for places in ([(3.0, 4.0)] * 2, [], np.ones((4, 2))):
        with pytest.raises(RecipeError, match=f"{len(places)} places were given for 3 pictures"):
            recording.maps(places)
    with pytest.raises(RecipeError, match="ResNet computed no selective scan"):
        explain.activation_maps(timm.create_model("resnet10t"), torch.randn(1, 3, 64, 64))


def test_memory_by_the_definition():
    recording = explain.record_scans(network(d_state=2), torch.randn(1, 3, 20, 24, dtype=torch.float64))
    found, scan = recording.selectivity(0, share=0.5), recording.scan(0)
    order = scan.orders[1]
    delta = scan.delta[0, 1, order]
    for step in (0, 40, len(order) - 1):
        left = torch.ones(*scan.A[1].shape, dtype=torch.float64)
        lengths = torch.full_like(left, math.inf)
        for later in range(step + 1, len(order)):
            left = left * torch.exp(delta[later, :, None] * scan.A[1])
            lengths[(left <= 0.5) & lengths.isinf()] = later - step
        row, column = divmod(int(order[step]), scan.grid[1])
        assert found.steps[0, 1, row, column] == lengths.flatten().sort().values[(lengths.numel() - 1) // 2]
        assert found.kept[0, 1, row, column] == pytest.approx(float(lengths.isinf().double().mean()))
    places = [divmod(int(patch), scan.grid[1]) for patch in order]
    aslant = 0
    for step, (row, column) in enumerate(places):
        if (steps := found.steps[0, 1, row, column]).isfinite():
            down, across = places[step + int(steps)][0] - row, places[step + int(steps)][1] - column
            expected = math.hypot(down * found.cell[0], across * found.cell[1])
            assert found.pixels[0, 1, row, column].item() == pytest.approx(expected)
            aslant += down != 0 != across
    assert aslant > 5
    decay = torch.exp(scan.delta[0, 1, :, :, None] * scan.A[1]).mean((1, 2)).unflatten(0, scan.grid)
    torch.testing.assert_close(found.decay[0, 1], decay)
    finite = found.steps.isfinite()
    assert 0 < finite.float().mean() < 1
    assert (found.pixels[finite] >= 2).all()
    assert found.numbers()["routes"][0]["kept"] == pytest.approx(float(found.kept[0, 0].mean()))
    with pytest.raises(RecipeError, match="between 0 and 1"):
        recording.selectivity(0, share=1.5)


def test_the_matrix_holds_every_map_and_a_vit_its_attention():
    recording = explain.record_scans(network(), torch.randn(1, 3, 16, 24, dtype=torch.float64))
    matrix = recording.matrix(0)
    maps = recording.maps((9.0, 7.0), 0)
    torch.testing.assert_close(matrix.row((9.0, 7.0)), maps.merged()[0])
    torch.testing.assert_close(matrix.routes[:, 3 * 12 + 4], maps.routes()[0].flatten(1))
    with pytest.raises(RecipeError, match="4096 patches, whose matrix has 16,777,216 entries"):
        explain.record_scans(network(torch.float32), torch.randn(1, 3, 128, 128)).matrix(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    found = explain.vit_attention(vit, torch.randn(1, 3, 32, 32), block=0)
    assert found.values.shape == (4, 4)
    assert (found.values.sum(1) < 1).all()  # the rest is the class token's
    assert (found.values.sum(1) > 0.5).all()
    assert all(block.attn.fused_attn for block in vit.blocks)


def test_figures_have_the_maps(tmp_path):
    recording = explain.record_scans(vmamba.create_model("vmamba_femto_s2"), torch.randn(1, 3, 36, 44))
    maps = recording.maps((3.0, 5.0), 1)
    figure = maps.figure()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.partition("\n")[0] for title in titles[:6]] == [
        "the patch asked about", "rows →", "columns ↓", "all routes together", "rows ← back", "columns ↑ back",
    ]  # fmt: skip
    for axes in figure.axes[:6]:
        frame = axes.patches[0]
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == maps.frame()
        assert axes.images[0].get_extent() == [0, 44, 36, 0]
    drawn = figure.axes[3].images[1].get_array()
    assert np.unravel_index(drawn[..., 3].argmax(), drawn.shape[:2]) == np.unravel_index(
        int(maps.in_pixels(maps.merged())[0].argmax()), (36, 44)
    )
    maps.save(tmp_path / "new" / "maps.png", measure="share")
    recording.selectivity(1).save(tmp_path / "memory.png")
    recording.matrix(-1).save(tmp_path / "matrix.png", query=(3.0, 5.0))
    for name in ("new/maps.png", "memory.png", "matrix.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(2**20)) > 100


def test_a_vit_that_sees_another_part_is_asked_about_the_same_place():
    torch.manual_seed(0)
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    ours = vmamba.create_model("vmamba_femto_s2", img_size=32)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    recording = explain.record_scans(ours, picture)
    at = recording.seen.locate(60, 20)
    assert recording.seen.given(*at) == pytest.approx((60, 20))
    other = explain.vit_attention(vit, picture)
    figure = recording.matrix(-1).figure(other, query=at)
    x, y = other.seen.locate(60, 20)
    frame = figure.axes[-1].patches[0]
    assert (frame.get_x(), frame.get_y()) == (x // 16 * 16, y // 16 * 16)
    assert len(figure.axes) == 2 * (1 + 4 + 1)
