"""The parts that look at neighbours and at the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vmamba
from vmamba.nn import SS2D, LayerNorm, VSSBlock
from vmamba.nn.local import LocalBlock, LocalMlp, ResidualDownsample
from vmamba.nn.norms import BatchNorm
from vmamba.nn.stem import ConvStem, SmallStem

LOCAL = {"mlp": "local", "norm": "batch", "mlp_ratio": 1.0}


def test_batch_norm_is_torchs_on_grids():
    ours, theirs, x = BatchNorm(6), nn.BatchNorm2d(6), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(ours.bn.running_var, theirs.running_var)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ours))
    assert isinstance(synchronised[0].bn, nn.SyncBatchNorm)


def test_local_mlp_is_two_convolutions_and_begins_as_nothing():
    mlp, x = LocalMlp(4, 8).eval(), torch.randn(2, 6, 5, 4)
    assert not mlp(x).any()
    nn.init.ones_(mlp.norm2.bn.weight)
    scale = (1 + mlp.norm1.bn.eps) ** -0.5
    hidden = nn.functional.conv2d(x.permute(0, 3, 1, 2), mlp.conv1.weight, padding=1) * scale
    expected = nn.functional.conv2d(hidden.relu(), mlp.conv2.weight, padding=1) * scale
    torch.testing.assert_close(mlp(x), expected.permute(0, 2, 3, 1))


def test_batch_norms_inside_ss2d():
    """After the depthwise convolution and at the end, where the branch begins as nothing."""
    mixer, x = SS2D(8, norm="batch", conv_bias=True).eval(), torch.randn(2, 6, 5, 8)
    assert not mixer(x).any()
    nn.init.uniform_(mixer.proj_norm.bn.weight)
    scale = (1 + mixer.conv.norm.bn.eps) ** -0.5
    u = mixer.in_proj(x).permute(0, 3, 1, 2)
    u = nn.functional.silu(nn.functional.conv2d(u, *mixer.conv.conv.parameters(), padding=1, groups=8) * scale)
    y = mixer.out_proj(mixer.norm(mixer.scan(u.permute(0, 2, 3, 1))))
    torch.testing.assert_close(mixer(x), y * scale * mixer.proj_norm.bn.weight)
    mixer.train()(x)
    assert mixer.conv.norm.bn.num_batches_tracked == mixer.proj_norm.bn.num_batches_tracked == 1


def test_a_local_block_computes_the_same_with_and_without_autograd():
    block, x = VSSBlock(16, **LOCAL), torch.randn(2, 6, 7, 16)
    for norm in (block.ss2d.proj_norm, block.mlp.norm2):
        nn.init.ones_(norm.bn.weight)
    block(x)  # moves the statistics
    block.eval()
    y = x + block.ss2d(block.norm1(x))
    expected = (y + block.mlp(y)).relu()
    torch.testing.assert_close(block(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected)


def test_first_stages_may_do_without_scans():
    model = vmamba.VMamba(
        depths=(1, 2, 2), dims=(8, 8, 16), num_classes=2, local_stages=2, drop_path_rate=0.4, img_size=32,
        pattern=["cross", "bidirectional"], **LOCAL,
    )  # fmt: skip
    kinds = [[type(block) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[LocalBlock], 2 * [LocalBlock], 2 * [VSSBlock]]
    assert [m.pattern for m in model.modules() if isinstance(m, SS2D)] == ["cross", "bidirectional"]
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.4, 0.4])  # a block that scans has two
    block, x = model.stages[1].blocks[0].eval(), torch.randn(2, 3, 5, 8)
    nn.init.ones_(block.mlp.norm2.bn.weight)
    torch.testing.assert_close(block(x), (x + block.mlp(x)).relu())
    with pytest.raises(ValueError, match="one, or 2, one a block"):
        model.set_pattern(5 * ["cross"])


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_wide_stem_halves_as_the_other_does(stride):
    wide, x = ConvStem(3, 8, stride, norm="batch", wide=True), torch.randn(2, 3, 17, 24)
    assert wide(x).shape == ConvStem(3, 8, stride)(x).shape
    assert wide.conv1.weight.shape == (8, 3, 7, 7)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_small_stem_is_a_convolution_a_norm_and_a_relu(stride):
    stem, x = SmallStem(3, 8, stride, norm="batch").eval(), torch.randn(2, 3, 17, 24)
    y = nn.functional.conv2d(x, stem.conv1.weight, None, stride, 1) * (1 + stem.norm1.bn.eps) ** -0.5
    torch.testing.assert_close(stem(x), y.relu().permute(0, 2, 3, 1))
    assert isinstance(SmallStem(3, 8).norm1, LayerNorm)
    with pytest.raises(ValueError, match="stem stride is 4; the small stem has 1 or 2"):
        SmallStem(3, 8, 4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2)])
def test_residual_downsampling_is_a_shortcut_and_a_local_mlp(stride, size):
    down, x = ResidualDownsample(4, 6, stride).eval(), torch.randn(2, *size, 4)
    scale = (1 + down.norm.bn.eps) ** -0.5
    means = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), stride, ceil_mode=True, count_include_pad=False)
    shortcut = scale * nn.functional.conv2d(means, down.proj.weight).permute(0, 2, 3, 1)
    torch.testing.assert_close(down(x), shortcut.relu())  # the branch begins as nothing
    nn.init.ones_(down.mlp.norm2.bn.weight)
    branch = down.mlp(x)
    assert branch.shape == (2, *(-(-side // stride) for side in size), 6)
    torch.testing.assert_close(down(x), (shortcut + branch).relu())
    with pytest.raises(ValueError, match="residual downsampling has 'batch' alone"):
        ResidualDownsample(4, 6, norm="layer")


def test_residual_downsampling_keeps_the_grid_where_the_output_stride_asks_for_it():
    options = {"depths": (1, 1, 1), "dims": (8, 8, 16), "num_classes": 2, "img_size": 32, "downsample": "residual"}
    coarse, fine = (vmamba.VMamba(output_stride=stride, **options, **LOCAL).eval() for stride in (None, 8))
    fine.load_state_dict(coarse.state_dict())
    images = torch.randn(1, 3, 40, 48)
    assert coarse.forward_features(images).shape == (1, 3, 3, 16)
    assert fine.forward_features(images).shape == (1, 5, 6, 16)


def test_a_local_model_learns():
    torch.manual_seed(0)
    model = vmamba.VMamba(depths=(1, 1), dims=(8, 16), num_classes=2, stem="wide", img_size=16, **LOCAL)
    assert sum(isinstance(module, BatchNorm) for module in model.modules()) == 2 + 1 + 2 * 5
    optimizer, labels = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.arange(8) % 2
    images = torch.randn(8, 3, 16, 16) + labels[:, None, None, None]
    losses = []
    for _ in range(12):
        losses.append(nn.functional.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    again = vmamba.VMamba(depths=(1, 1), dims=(8, 16), num_classes=2, stem="wide", img_size=16, **LOCAL)
    again.load_state_dict(model.state_dict())
    assert again.stages[1].blocks[0].mlp.norm2.bn.weight.any()
    torch.testing.assert_close(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlp": "dense"}, "mlp is 'dense'; expected 'pixel' or 'local'"),
        ({"norm": "group"}, "norm is 'group'; expected 'layer' or 'batch'"),
        ({"local_stages": 1}, "local_stages is 1 of 1 stages, mlp_ratio 4.0; expected fewer than there are stages"),
        ({"local_stages": -1}, "local_stages is -1"),
        ({"depths": (1, 1), "dims": (8, 8), "local_stages": 1, "mlp_ratio": 0}, "an MLP for their blocks"),
        ({"norm": "batch", "stem": "patch"}, "patch stem and patch merging have 'layer' alone"),
        ({"norm": "batch", "downsample": "merge"}, "patch stem and patch merging have 'layer' alone"),
    ],
)
def test_unknown_parts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        vmamba.VMamba(**{"depths": (1,), "dims": (8,)} | arguments)


def test_ss2d_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="norm is 'group'; expected 'layer' or 'batch'"):
        SS2D(8, norm="group")


def test_drawing_anew_closes_the_branches_too():
    torch.manual_seed(0)
    model = vmamba.VMamba(depths=(1,), dims=(32,), num_classes=2, **LOCAL)
    block = model.stages[0].blocks[0]
    for norm in (block.ss2d.proj_norm, block.mlp.norm2):
        nn.init.ones_(norm.bn.weight)
    model.init_weights()
    for norm in (block.ss2d.proj_norm, block.mlp.norm2):
        assert not norm.bn.weight.any()
    for norm in (block.ss2d.conv.norm, block.mlp.norm1):
        assert norm.bn.weight.all()
    # As He et al. draw them, of 3×3 weights into 32 channels.
    assert block.mlp.conv1.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    assert not model.stem.conv2.bias.any()


def test_weights_are_drawn_anew_after_norms_were_replaced():
    model = vmamba.VMamba(depths=(1,), dims=(32,), num_classes=2, **LOCAL)
    block = model.stages[0].blocks[0]
    block.ss2d.proj_norm = block.mlp.norm2 = LayerNorm(32)
    model.init_weights()
    assert block.mlp.norm2.weight.all()
