from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from models.dense import (
    SEGMENTATION,
    assert_close,
    assert_map,
    case_of,
    draw,
    fixed_backbone,
    golden_weights,
    unpacked,
    write_openmmlab,
)
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

import vmamba
from vmamba.models.feature_maps import conv_block
from vmamba.models.segmentation import FusionBlock, UPerNet, resized

Restored = Callable[[str], UPerNet]


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    """Models by name, each with the golden weights read from a file in the released format."""
    models: dict[str, UPerNet] = {}

    def get(name: str) -> UPerNet:
        if name not in models:
            path = write_openmmlab(tmp_path_factory.mktemp("released") / "weights.pth", golden_weights(name))
            models[name] = vmamba.create_model(name, checkpoint=path).eval()
            path.unlink()
        return models[name]

    return get


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
def test_numbers_are_those_of_mmsegmentation(path: Path, restored: Restored) -> None:
    name, images, size, expected = case_of(path)
    model = restored(name)
    with torch.inference_mode():
        maps = model.backbone(images)
        for i, x in enumerate(maps, start=1):
            assert_map(expected, f"stage{i}", x)
        decoded, auxiliary = model.decode_head(maps), model.auxiliary_head(maps[2])
        logits = model(images)
    if "decode_logits" in expected:
        assert_close(decoded, expected["decode_logits"])
    else:
        assert_map(expected, "decode", decoded)
        assert_close(decoded[:, ::7, ::3, ::3], expected["decode_sub"])
    assert_map(expected, "aux", auxiliary)

    assert logits.shape == (1, 150, *size)
    (final,) = resized(logits, expected["ori_shape"].tolist()) if "ori_shape" in expected else logits
    assert list(final.shape) == expected["final_shape"].tolist()
    assert_close(final.mean(dim=(1, 2)), expected["final_mean"])
    assert_close(final[:, -3:, -3:], expected["final_corner"])
    classes, wanted = final.argmax(0), expected["argmax"].long()
    sure = unpacked(expected["argmax_sure"], wanted.shape)
    assert sure.float().mean() > 0.9
    assert torch.equal(classes[sure], wanted[sure])


def small_head() -> UPerNet:
    """A narrow head with known numbers, on known maps."""
    model = UPerNet(fixed_backbone(), 7, channels=32, auxiliary_channels=16, out_norm=False).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.ndim:
            around_one = "running_var" in name or name.endswith("bn.weight")
            tensor.copy_(draw(name, tensor.shape, std=0.05, mean=float(around_one)))
    return model


def test_losses_are_those_of_mmsegmentation() -> None:
    model, images = small_head(), torch.zeros(2, 3, 160, 224)
    labels = torch.from_numpy(np.random.RandomState(5).randint(0, 9, (2, 160, 224)))
    losses = model(images, labels.where(labels < 7, -1).short())
    # mmsegmentation 1.2.2's UPerHead and FCNHead, the latter with weight 0.4, on the same maps, weights and labels.
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"decode": 1.5880144, "auxiliary": 0.6187396}, abs=2e-6
    )
    nothing = model(images, torch.full_like(labels, -1))
    assert [loss.item() for loss in nothing.values()] == [0.0, 0.0]


def test_a_small_model_learns_two_pictures() -> None:
    torch.manual_seed(0)
    model = UPerNet(vmamba.create_model("vmamba_femto", features_only=True), 3, 32, auxiliary_channels=16)
    images, labels = torch.randn(2, 3, 48, 64), torch.zeros(2, 48, 64, dtype=torch.int64)
    labels[:, 10:30, 10:40] = 1
    labels[:, 30:, 30:] = 2
    labels[:, :5] = -1
    images += 2 * (labels == 1)[:, None] - 2 * (labels == 2)[:, None].float()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    totals = []
    for _ in range(30):
        total = sum(model(images, labels).values())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        totals.append(total.item())
    assert totals[0] == pytest.approx(1.4 * np.log(3) * (43 / 48), rel=0.15)  # of classes equally likely
    assert totals[-1] < 0.4 * totals[0]
    with torch.inference_mode():
        right = (model.eval()(images).argmax(1) == labels)[labels >= 0].float().mean()
    assert right > 0.8


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("vmamba_femto", {}),
        ("vmamba_pico_s2", {}),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("convnext_atto", {}),
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
        ("efficientnet_b0", {}),
    ],
)
def test_any_backbone_carries_it(backbone: str, options: dict[str, object]) -> None:
    model = UPerNet(timm.create_model(backbone, features_only=True, **options), 5, 16, auxiliary_channels=8).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)
        for x, chans, stride in zip(
            model.backbone(torch.randn(1, 3, 64, 96)), model.backbone.channels, model.backbone.strides, strict=True
        ):
            assert x.shape == (1, chans, 64 // stride, 96 // stride)
            assert_close(x.mean(1), torch.zeros(1, 64 // stride, 96 // stride))  # the norm is over channels


def test_nothing_is_copied_between_a_channels_last_backbone_and_the_heads() -> None:
    model = UPerNet(vmamba.create_model("vmamba_femto_s2", features_only=True), 5, 16).eval()
    with torch.inference_mode():
        assert all(x.permute(0, 2, 3, 1).is_contiguous() for x in model.backbone(torch.randn(2, 3, 32, 32)))


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"VMamba is no feature extractor; .*features_only=True"):
        UPerNet(vmamba.create_model("vmamba_femto_s2"), 5)
    with pytest.raises(ValueError, match=r"strides \[8\]; expected two or more"):
        UPerNet(vmamba.create_model("vmamba_femto_s2", features_only=True, out_indices=(2,)), 5)
    model = small_head()
    with pytest.raises(ValueError, match=r"targets are \(2, 160, 224\); expected \(2, 128, 128\)"):
        model(torch.zeros(2, 3, 128, 128), torch.zeros(2, 160, 224, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"given \(3, 128, 128\) of torch.float32; expected normalised images"):
        model(torch.zeros(3, 128, 128))
    with pytest.raises(ValueError, match=r"of torch.uint8"):
        model(torch.zeros(2, 3, 128, 128, dtype=torch.uint8))


def test_both_heads_drop_as_many_channels_as_they_are_told() -> None:
    for options, rate in (({}, 0.1), ({"drop_rate": 0.3}, 0.3)):
        model = UPerNet(fixed_backbone(), 7, 16, 8, **options)
        assert [head.dropout.p for head in (model.decode_head, model.auxiliary_head)] == [rate, rate]


def test_without_an_auxiliary_head_and_with_synchronised_norms() -> None:
    model = UPerNet(fixed_backbone(), 7, 16, auxiliary_channels=0)
    assert model(torch.zeros(2, 3, 160, 224), torch.zeros(2, 160, 224, dtype=torch.int64)).keys() == {"decode"}
    names = model.state_dict().keys()
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict().keys() == names


@pytest.mark.parametrize("sizes", [((16, 20), (8, 10), (4, 5)), ((25, 36), (13, 18), (7, 9)), ((9, 9), (9, 9), (5, 3))])
def test_enlarging_after_the_convolution_changes_nothing(sizes: tuple[tuple[int, int], ...]) -> None:
    block = FusionBlock(3 * 8, 16).eval()
    maps = [draw(f"map{i}", (2, 8, *size)) for i, size in enumerate(sizes)]
    with torch.inference_mode():
        fast = block(maps)
        plain = block.relu(block.bn(block.conv(torch.cat([resized(x, sizes[0]) for x in maps], 1))))
        assert_close(fast, plain, atol=2e-5)
        assert fast.std() > 0.1
        # A hooked or replaced convolution is asked.
        handle = block.conv.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not block(maps).any()
        handle.remove()
        assert torch.equal(block(maps), fast)
    with torch.no_grad():
        assert torch.equal(block(maps), fast)
    # What training computes is the definition.
    assert_close(block(maps), plain, atol=0.0)


def name_of(module: nn.Module) -> str:
    return type(module).__name__


@pytest.mark.parametrize(
    "conv",
    [
        nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.Conv2d(24, 16, 1, bias=False)),
        nn.Conv2d(24, 16, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(24, 16, 3, padding=1),
    ],
    ids=["separable", "dilated", "with a bias"],
)
def test_another_convolution_of_enlarged_maps(conv: nn.Module) -> None:
    block, maps = FusionBlock(24, 16).eval(), [draw(f"map{i}", (2, 8, side, side)) for i, side in enumerate((9, 5, 3))]
    block.conv = conv
    with torch.no_grad():
        plain = block.relu(block.bn(conv(torch.cat([resized(x, (9, 9)) for x in maps], 1))))
        assert_close(block(maps), plain, atol=2e-5)
        block.bn = nn.GroupNorm(4, 16)
        assert block(maps).shape == (2, 16, 9, 9)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_norm_in_place_changes_nothing(kernel: int) -> None:
    block, x = conv_block(8, 16, kernel, norm=True, relu=True).eval(), draw("x", (2, 8, 5, 7))
    for name, tensor in block.bn.named_buffers():
        if tensor.ndim:
            tensor.copy_(draw(name, tensor.shape, std=0.2, mean=float(name == "running_var")))

    def plain() -> Tensor:
        return F.relu(block.bn(block.conv(x)))

    with torch.inference_mode():
        fast = block(x)
        assert_close(fast, plain(), atol=2e-6)
        assert fast.std() > 0.1
        # What somebody looks at is not overwritten, and what they put in counts.
        seen: list[Tensor] = []
        handle = block.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
        block(x)
        handle.remove()
        assert torch.equal(seen[0], block.conv(x))
        handle = block.bn.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not block(x).any()
        handle.remove()
        block.bn.train()
        assert_close(block(x), plain(), atol=0.0)
        block.bn.eval()
        block.append(nn.Flatten())
        assert block(x).shape == (2, 560)
        block.bn = nn.Identity()
        assert_close(block(x), F.relu(block.conv(x)).flatten(1), atol=0.0)


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(4, 16), nn.InstanceNorm2d(16), nn.SyncBatchNorm(16)], ids=lambda module: type(module).__name__
)
def test_another_norm_after_a_convolution(norm: nn.Module) -> None:
    block, x = conv_block(8, 16, 3, norm=True, relu=True).eval(), draw("x", (2, 8, 5, 7))
    block.bn = norm.eval()
    with torch.no_grad():
        assert_close(block(x), F.relu(norm(block.conv(x))), atol=0.0)


@pytest.mark.parametrize("conv", [nn.Identity(), nn.Dropout(), DropPath(0.1)], ids=name_of)
def test_nothing_is_overwritten_that_no_convolution_gave(conv: nn.Module) -> None:
    block, x = conv_block(8, 8, 3, norm=True, relu=True).eval(), draw("x", (2, 8, 5, 7))
    block.conv = conv.eval()
    block.bn.running_mean.fill_(1.0)
    given = x.clone()
    with torch.no_grad():
        assert_close(block(x), F.relu(block.bn(given)), atol=0.0)
    assert torch.equal(x, given)
