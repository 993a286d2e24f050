"""Counts against the published tables."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmamba
from vmamba.models.complexity import COUNTED, profile
from vmamba.models.registry import ENTRIES
from vmamba.models.variants import VARIANTS

RELEASED = {name: variant.release for name, variant in VARIANTS.items() if variant.release}


@pytest.mark.parametrize("name", RELEASED)
def test_published_parameters_and_flops(name):
    found = profile(vmamba.create_model(name, device="meta"))
    assert found.img_size == (224, 224)
    assert found.params == RELEASED[name].params
    assert found.flops / 1e9 == pytest.approx(RELEASED[name].flops, rel=0.02)
    assert sum(part.params for part in found.parts) == found.params
    assert sum(part.flops for part in found.parts) == found.flops


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES.values() if not (entry.params and entry.flops)])
def test_what_was_counted_before(name):
    found = profile(vmamba.create_model(name, device="meta"))
    assert (found.params, found.flops / 1e9) == (COUNTED[name][0], pytest.approx(COUNTED[name][1], rel=5e-4))


def test_a_small_model_by_hand():
    model = vmamba.VMamba(depths=(1,), dims=(16,), num_classes=5, d_state=2, ssm_ratio=2.0, stem="patch", stem_stride=2)
    found = profile(model, (8, 6))
    pixels, channels, inner, rank = 12, 16, 32, 1
    stem = pixels * channels * 3 * 2 * 2
    block = pixels * (channels * inner * 2 + inner * 9 + inner * 4 * (rank + 4) + channels * channels * 4 * 2)
    block += 4 * pixels * inner * (9 * 2 + 1 + rank)  # the scans
    assert [part.flops for part in found.parts] == [stem, block, 0, channels * 5]
    assert [part.output_shape for part in found.parts] == [(4, 3, 16), (4, 3, 16), (4, 3, 16), (5,)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torchs_own_counter_counts_the_scans(device):
    """Which Lightning's summaries and many others ask: forward as `profile` does, and twice as much backward."""
    model = vmamba.create_model("vmamba_femto", device=device)
    image = torch.randn(2, 3, 28, 28, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    forward = counter.get_total_flops()
    assert forward == 2 * 2 * profile(model, 28).flops
    with FlopCounterMode(display=False) as counter:
        model(image.requires_grad_()).sum().backward()
    counts = counter.get_flop_counts()["Global"]  # torch counts the backward of grouped convolutions too high
    assert counts[torch.ops.vmamba.ss2d_scan_backward] == 2 * counts[torch.ops.vmamba.ss2d_scan] > 0


def test_what_a_scan_costs():
    u, A, B = torch.randn(2, 6, 10), -torch.rand(6, 3), torch.randn(2, 3, 10)
    with FlopCounterMode(display=False) as counter:
        vmamba.selective_scan(u, u, A, B, B, backend="eager")
    assert counter.get_total_flops() == 2 * 2 * 6 * 10 * (9 * 3 + 1)


def test_flops_are_linear_in_pixels_and_the_model_is_left_alone():
    model = vmamba.create_model("vmamba_nano", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, large = profile(model, 256), profile(model, (512, 1024))
    assert large.flops / small.flops == pytest.approx(8, rel=1e-3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "params", "flops"),
    [
        ("resnet18", 11_689_512, 1.814e9),
        ("swin_tiny_patch4_window7_224", 28_288_354, 4.49e9),
        ("vit_tiny_patch16_224", 5_717_416, 1.254e9),
    ],
)
def test_others_of_timms_models(name, params, flops):
    found = profile(timm.create_model(name))
    assert (found.img_size, found.params) == ((224, 224), params)
    assert found.flops == pytest.approx(flops, rel=1e-3)
    assert sum(part.flops for part in found.parts) == found.flops
    assert found.parts[-1].output_shape == (1000,)
