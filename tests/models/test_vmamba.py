"""The backbone and classifier, held to what timm asks of a model."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import timm
import torch
from timm.models import create_feature_extractor, get_model_args, get_model_input_config
from timm.models._features import FeatureInfo
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import freeze, unfreeze
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models._utils import IntermediateLayerGetter

import vmamba
from vmamba.models.variants import VARIANTS
from vmamba.nn import ConvStem, LayerNorm
from vmamba.nn.norms import BatchNorm

# One model for each way of building: conv stem and MLP; gates, patch stem and patch merging; a stem of stride 2.
SMALL = {
    "vmamba_tiny_s1l8": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)},
    "vanilla_vmamba_tiny": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "d_state": 3},
    "vmamba_femto_s2": {"dims": (16, 24, 32)},
}
small = pytest.mark.parametrize("name", SMALL)


def create(name: str, **kwargs):
    return timm.create_model(name, **{**SMALL[name], **kwargs}).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_classifies_at_its_own_size(name):
    model = vmamba.create_model(name).eval()
    height, width = VARIANTS[name].img_size
    with torch.no_grad():
        logits = model(torch.randn(1, 3, height, width))
    assert logits.shape == (1, 1000)
    assert torch.isfinite(logits).all()
    assert model.variant == name


def test_variants_are_timm_models():
    for name in VARIANTS:
        assert timm.is_model(name)
    assert set(timm.list_models("*vmamba*")) == set(VARIANTS)
    assert set(timm.list_pretrained("*vmamba*")) == {f"{n}.in1k" for n, v in VARIANTS.items() if v.release}
    assert vmamba.list_models() == list(VARIANTS)


@small
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40), (127, 32)])
def test_any_image_size(name, size):
    model = create(name, num_classes=7)
    assert model(torch.randn(2, 3, *size)).shape == (2, 7)


@small
def test_any_number_of_channels_and_classes(name):
    for channels in (1, 2, 5):
        assert create(name, in_chans=channels, num_classes=3)(torch.randn(1, channels, 32, 32)).shape == (1, 3)


@small
def test_heads(name):
    model = create(name, num_classes=11, drop_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    grid = 64 // model.feature_info[-1]["reduction"]
    assert features.shape == (2, grid, grid, model.num_features)
    assert model.output_fmt == "NHWC"
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2)))

    assert model.get_classifier() is model.head.fc
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(x).shape == (2, 5)
    assert model.head.drop.p == 0.5
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4)


@small
def test_features_only(name):
    model = timm.create_model(name, features_only=True, **SMALL[name])
    x = torch.randn(1, 3, 65, 94)
    features = model(x)
    assert len(features) == len(model.feature_info)
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape[1] == channels
        for side, pixels in zip(feature.shape[2:], (65, 94), strict=True):
            assert side in (-(-pixels // reduction), pixels // reduction)
    assert not any(name.startswith("model.head.fc") for name, _ in model.named_parameters())

    some = timm.create_model(name, features_only=True, out_indices=(0, -2), **SMALL[name])
    assert [tuple(f.shape) for f in some(x)] == [tuple(features[0].shape), tuple(features[-2].shape)]


@small
def test_forward_intermediates(name):
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    final, all_stages = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(all_stages) == len(model.stages)

    _, normed = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(normed[-1], final.permute(0, 3, 1, 2))
    assert not torch.allclose(normed[-1], all_stages[-1])

    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    for actual, expected in zip(last_two, all_stages[-2:], strict=True):
        torch.testing.assert_close(actual, expected)

    (channels_last,) = model.forward_intermediates(x, indices=[1], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(channels_last.permute(0, 3, 1, 2), all_stages[1])

    stopped, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(first, all_stages[0])
    torch.testing.assert_close(stopped.permute(0, 3, 1, 2), first)
    with pytest.raises(ValueError, match="output_fmt is 'NLC'; expected 'NCHW' or 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@small
def test_pruning_keeps_the_intermediates(name):
    model = create(name)
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    assert model.num_features == model.feature_info[1]["num_chs"]
    for actual, before in zip(model.forward_intermediates(x, [0, 1], intermediates_only=True), expected, strict=True):
        torch.testing.assert_close(actual, before)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_pretrained_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert FeatureInfo(model.feature_info, tuple(range(len(model.stages)))).reduction()[0] == VARIANTS[name].stem_stride
    assert f"{cfg['classifier']}.weight" in model.state_dict()
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    assert cfg["input_size"] == (3, *VARIANTS[name].img_size)
    with torch.no_grad():
        features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape[1:3] == cfg["pool_size"]
    if release := VARIANTS[name].release:
        assert (
            cfg["url"] == f"https://github.com/MzeroMiko/VMamba/releases/download/%23{release.tag[1:]}/{release.file}"
        )


@small
def test_weight_decay_spares_the_state_space_parameters(name):
    model = create(name)
    spared = model.no_weight_decay()
    assert {n.rpartition(".")[2] for n in spared} == {"A_log", "D", "dt_proj_bias"}
    plain, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    assert plain["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter in decayed["params"]:
        short = names[id(parameter)]
        assert short.endswith(("weight",)), short
        assert "norm" not in short


@small
def test_layer_groups_follow_the_depth(name):
    model = create(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scales = sorted({g["lr_scale"] for g in groups})
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert len(scales) == 1 + blocks + 1  # stem, blocks, norm with head
    assert scales[-1] == 1.0
    coarse = model.group_matcher(coarse=True)
    assert coarse["blocks"] == r"^stages\.(\d+)"


@small
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    model = create(name, num_classes=4)
    x = torch.randn(2, 3, 32, 32)

    def grads():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = grads()
    model.set_grad_checkpointing()
    for a, b in zip(plain, grads(), strict=True):
        torch.testing.assert_close(a, b)


def test_stages_inside_of_something_else_recompute_too():
    model = create("vmamba_femto_s2")
    model.stages[1] = nn.Sequential(model.stages[1], nn.Identity())
    model.set_grad_checkpointing()
    assert [model.stages[0].grad_checkpointing, model.stages[1][0].grad_checkpointing] == [True, True]


def test_local_models_begin_anew_after_their_norms_were_replaced():
    model = timm.create_model("vmamba_femto_local")
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, BatchNorm):
                setattr(module, name, LayerNorm(child.bn.num_features))
    model.init_weights()
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@small
def test_every_parameter_learns(name):
    model = create(name).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_drop_path_grows_linearly_from_zero():
    model = timm.create_model("vmamba_tiny_s1l8", device="meta")
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 14))
    none = timm.create_model("vmamba_tiny_s1l8", device="meta", drop_path_rate=0.0)
    assert not any(type(m).__name__ == "DropPath" for m in none.modules())


def test_weights_start_as_the_paper_has_them():
    model = vmamba.create_model("vanilla_vmamba_tiny", num_classes=10)
    ss2d = model.stages[2].blocks[0].ss2d
    torch.testing.assert_close(ss2d.A_log[1, 5], torch.log(torch.arange(1.0, 17.0)))
    assert (ss2d.D == 1).all()
    step = torch.nn.functional.softplus(ss2d.dt_proj_bias)
    assert 0.0009 < step.min() < 0.0015
    assert 0.07 < step.max() < 0.101
    # Log-uniform: the median is the geometric mean of the ends.
    assert 0.008 < step.median() < 0.0125
    bound = 24**-0.5
    assert 0.99 * bound < ss2d.dt_proj_weight.abs().max() <= bound
    assert abs(ss2d.in_proj.weight.std() - 0.02) < 1e-3
    assert abs(model.head.fc.weight.std() - 0.02) < 2e-3
    assert (model.head.fc.bias == 0).all()


@pytest.mark.parametrize("init", ["v1", "v2"])
def test_other_initialisations(init):
    ss2d = vmamba.nn.SS2D(64, d_state=4, init=init)
    if init == "v1":
        assert abs(ss2d.A_log.std() - 1) < 0.1
        assert abs(ss2d.dt_proj_weight.std() - 0.1) < 0.01
        assert ss2d.dt_proj_bias.min() < 0
    else:
        assert (ss2d.A_log == 0).all()
        assert abs(ss2d.dt_proj_weight.mean() - 0.05) < 0.005
        assert ss2d.dt_proj_bias.min() >= 0
    assert ss2d(torch.randn(1, 4, 4, 64)).shape == (1, 4, 4, 64)


@small
def test_compiles_into_one_graph(name):
    model = create(name, num_classes=4)
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "open_axes", "shapes"),
    [
        ("vmamba_tiny_s1l8", (0, 2, 3), [(2, 3, 96, 64), (1, 3, 64, 160), (3, 3, 100, 75)]),
        ("vanilla_vmamba_tiny", (2, 3), [(2, 3, 96, 64), (2, 3, 36, 132)]),
    ],
)
def test_exports_with_open_sizes(name, open_axes, shapes):
    model = create(name, num_classes=4, depths=(1, 1), dims=(16, 32))
    dynamic = {"x": dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC)}
    program = torch.export.export(model, (torch.randn(shapes[0]),), dynamic_shapes=dynamic)
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@small
def test_feature_extraction_through_fx(name):
    model = create(name)
    extractor = create_feature_extractor(model, {"stages.1": "second"})
    x = torch.randn(1, 3, 64, 64)
    (expected,) = model.forward_intermediates(x, [1], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(extractor(x)["second"], expected)


@small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype):
    model = create(name, num_classes=4)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.02)


@small
def test_autocast_trains_without_nan(name):
    model = create(name, num_classes=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(20 * torch.randn(4, 3, 32, 32)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- Changed as other models of timm's are ---------------------------------------------------------------------------

# Beside ours, those that set the example: each test holds for them as well.
SMALL_OTHERS = {
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24, "strict_img_size": False,
    },
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
}  # fmt: skip
alike = pytest.mark.parametrize("name", [*SMALL, *SMALL_OTHERS])


def any_of(name, **kwargs):
    return timm.create_model(name, **{**(SMALL | SMALL_OTHERS)[name], **kwargs}).eval()


@alike
def test_head_taken_away_or_replaced(name):
    model, x = any_of(name), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    model.head = torch.nn.Identity()
    torch.testing.assert_close(model(x), features)
    model.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features[0].numel(), 3))
    assert model(x).shape == (2, 3)


@alike
def test_children_in_order_are_the_model(name):
    model, x = any_of(name), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.nn.Sequential(*model.children())(x), model(x))
    trunk = torch.nn.Sequential(*list(model.children())[:-1])
    torch.testing.assert_close(trunk(x), model.forward_features(x))
    (_, first), (stages, second) = list(model.named_children())[:2]
    torch.testing.assert_close(IntermediateLayerGetter(model, {stages: "features"})(x)["features"], second(first(x)))


@alike
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_every_kind_of_feature_extractor(name, feature_cls):
    indices = (0, -1)
    extractor = any_of(name, features_only=True, feature_cls=feature_cls, out_indices=indices)
    model, x = any_of(name), torch.randn(2, 3, 64, 64)
    if feature_cls == "fx":
        extractor.graph_module.load_state_dict(model.state_dict(), strict=False)
    else:
        weights = {
            re.sub("^(stem|stages|layers)_", r"\1.", re.sub("^(model|body)[.]", "", key)): value
            for key, value in extractor.state_dict().items()
        }
        assert not model.load_state_dict(weights, strict=False).unexpected_keys
    found = extractor(x)
    found = list(found.values()) if isinstance(found, dict) else found
    expected = model.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    assert extractor.feature_info.reduction() == [model.feature_info[i]["reduction"] for i in indices]
    for actual, wanted in zip(found, expected, strict=True):
        if str(getattr(extractor, "output_fmt", "NCHW")).endswith("NHWC"):
            actual = actual.permute(0, 3, 1, 2)
        torch.testing.assert_close(actual, wanted)


@alike
def test_pooled_width_follows_the_head(name):
    if name == "convnext_tiny":
        pytest.skip("its head does not pool twice")
    x = torch.randn(2, 3, 64, 64)
    model = any_of(name, global_pool="catavgmax", num_classes=0)
    assert model(x).shape == (2, model.head_hidden_size) == (2, 2 * model.num_features)
    model.reset_classifier(3, "max")
    assert model.head_hidden_size == model.num_features
    model.reset_classifier(0, "catavgmax")
    assert model.head_hidden_size == model.forward_head(model.forward_features(x), pre_logits=True).shape[1]
    assert model.head_hidden_size == 2 * model.num_features


@alike
def test_input_size_is_told_to_timm(name):
    model = any_of(name)
    if not hasattr(model, "set_input_size"):
        pytest.skip("has no input size")
    before = get_model_input_config(model)
    model.set_input_size()
    assert get_model_input_config(model) == before
    model.set_input_size((96, 128))
    assert get_model_input_config(model)["input_size"] == (3, 96, 128)
    assert get_model_args(model)["img_size"] == (96, 128)
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 1000)


@small
def test_another_first_convolution(name):
    model = create(name)
    stem = model.stem
    key = "conv1" if hasattr(stem, "conv1") else "conv"
    old = getattr(stem, key)
    setattr(stem, key, type(old)(5, old.out_channels, old.kernel_size, old.stride, old.padding))
    assert model.in_chans == 5
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 5, H, W\)"):
        model(torch.randn(1, 3, 64, 64))


class Pair(nn.Module):
    """The difference that a stem sees between two images, which lie one behind the other."""

    def __init__(self, stem):
        super().__init__()
        self.stem = stem

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return self.stem(first) - self.stem(second)


def repeat_channels(module):
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].expand(-1, 3, -1, -1),))


def _replace_stem(model, stem):
    model.stem = stem


def _stay_at_one_size(model):
    model.stem = ConvStem(3, 16, stride=1)
    for stage in model.stages[1:]:
        stage.downsample.conv.stride = (1, 1)


OWN_STEMS = {
    "blocks of pixels": (
        lambda model: _replace_stem(model, nn.Sequential(nn.PixelUnshuffle(2), ConvStem(12, 16, stride=1))), (3, 64, 64)
    ),
    "two images": (lambda model: _replace_stem(model, Pair(model.stem)), (6, 64, 64)),
    "grey, by a hook": (lambda model: repeat_channels(model.stem), (1, 64, 64)),
    "grey, by a hook of the convolution": (lambda model: repeat_channels(model.stem.conv1), (1, 64, 64)),
    "every grid as large as the image": (_stay_at_one_size, (3, 8, 8)),
    "enlarged": (
        lambda model: _replace_stem(model, nn.Sequential(nn.Upsample(scale_factor=4), model.stem)), (3, 16, 16)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "size"), OWN_STEMS.values(), ids=OWN_STEMS)
def test_what_takes_other_images_is_given_them(change, size):
    model = create("vmamba_tiny_s1l8", num_classes=7)
    change(model)
    assert model(torch.randn(1, *size)).shape == (1, 7)


def test_fewer_stages_take_smaller_images():
    extractor = create("vmamba_tiny_s1l8", features_only=True, out_indices=(0,))
    assert extractor(torch.randn(1, 3, 8, 8))[0].shape == (1, 16, 2, 2)
    with pytest.raises(ValueError, match="needs at least 4 a side"):
        extractor(torch.randn(1, 3, 3, 8))


@small
def test_weights_drawn_again_are_those_of_a_new_model(name):
    torch.manual_seed(0)
    new = create(name, num_classes=6)
    model = create(name, num_classes=6, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    for (key, actual), expected in zip(model.state_dict().items(), new.state_dict().values(), strict=True):
        if expected.unique().numel() == 1 or key.endswith("A_log"):
            assert torch.equal(actual, expected), key
        else:
            assert 0.3 < actual.abs().max() / expected.abs().max() < 3, key


@pytest.fixture
def mesh():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("init", ["v0", "v1", "v2"])
def test_weights_are_drawn_after_sharding(mesh, init):
    """As FSDP2 wants it: nothing has memory before each process has its share."""
    torch.manual_seed(0)
    new = timm.create_model("vmamba_femto", num_classes=6, init=init)
    model = timm.create_model("vmamba_femto", num_classes=6, init=init, device="meta")
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.init_weights()
    for (key, actual), expected in zip(model.state_dict().items(), new.state_dict().values(), strict=True):
        if expected.unique().numel() == 1 or (init == "v0" and key.endswith("A_log")):
            assert torch.equal(actual.full_tensor(), expected), key
        else:
            assert 0.3 < actual.full_tensor().abs().max() / expected.abs().max() < 3, key


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride_keeps_the_grid_and_the_weights(stride):
    model, plain = create("vmamba_tiny_s1l8", output_stride=stride), create("vmamba_tiny_s1l8")
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    reductions = [min(reduction, stride) for reduction in (4, 8, 16, 32)]
    assert [info["reduction"] for info in model.feature_info] == reductions
    features = model.forward_intermediates(x, intermediates_only=True)
    for feature, before, reduction in zip(
        features, plain.forward_intermediates(x, intermediates_only=True), reductions, strict=True
    ):
        assert feature.shape[2:] == (64 // reduction, 96 // reduction)
        if feature.shape == before.shape:
            torch.testing.assert_close(feature, before)
    assert model(x).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"output_stride is 16, but patch merging cannot keep a grid's size"):
        create("vanilla_vmamba_tiny", output_stride=16)
    with pytest.raises(ValueError, match=r"output_stride is 4; expected 8, 16 or 32"):
        create("vmamba_tiny_s1l8", output_stride=4)
    assert vmamba.VMamba(img_size=64, depths=[1] * 5, dims=[8] * 5).feature_info[-1]["reduction"] == 64


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet", "DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_decoders_of_segmentation_models_pytorch(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = getattr(smp, decoder)("tu-vmamba_nano", encoder_weights=None, classes=5)
    with torch.no_grad():
        assert network.eval()(torch.randn(1, 3, 128, 128)).shape == (1, 5, 128, 128)


@small
def test_torchscript(name):
    model = create(name, num_classes=4)
    with pytest.raises(RuntimeError, match=r"use torch\.export\.export, torch\.compile or torch\.jit\.trace"):
        torch.jit.script(torch.nn.Sequential(model))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.trace(model, x)(2 * x), model(2 * x), rtol=1e-4, atol=1e-5)


@alike
def test_copies_and_pickles(name):
    model, x = any_of(name), torch.randn(1, 3, 64, 64)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        assert again.state_dict().keys() == model.state_dict().keys()


@small
def test_made_where_and_as_what_is_asked(name):
    model = create(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model.reset_classifier(3)
    assert (model.head.fc.weight.device.type, model.head.fc.weight.dtype) == ("meta", torch.bfloat16)


@small
def test_parts_are_frozen_by_name(name):
    model = create(name)
    freeze(model, ["stem", "stages.0"])
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key in model.state_dict() if key.startswith(("stem.", "stages.0."))}
    unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_clear_errors():
    model = create("vmamba_tiny_s1l8")
    with pytest.raises(ValueError, match=r"was given \(1, 1, 64, 64\); expected images of shape \(B, 3, H, W\)"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"was given \(3, 64, 64\)"):
        model(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="31×64 pixels; this model needs at least 32 a side"):
        model(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match="img_size is 16×16; this model needs at least 32"):
        model.set_input_size(16)
    with pytest.raises(ValueError, match=r"no model 'vmamba_tiny'; expected one such as .*vmamba_tiny_s1l8.*: see `"):
        vmamba.create_model("vmamba_tiny")
    with pytest.raises(ValueError, match="no model '2'; expected one such as vmamba_tiny_s1l8, vmamba_small_s1l20, "):
        vmamba.create_model("2")
    with pytest.raises(ValueError, match="stem is 'mlp'; expected one of 'conv', 'wide', 'small', 'patch'"):
        vmamba.VMamba(stem="mlp")
    with pytest.raises(ValueError, match="differ in length"):
        vmamba.VMamba(depths=(1, 2))
    with pytest.raises(ValueError, match="pattern is 'zigzag'"):
        vmamba.VMamba(pattern="zigzag")
    with pytest.raises(ValueError, match="init is 'v3'"):
        vmamba.VMamba(init="v3")
    with pytest.raises(RuntimeError, match="vmamba_nano has no published weights"):
        vmamba.create_model("vmamba_nano", pretrained=True)
    with pytest.raises(ValueError, match="choose one source of weights"):
        vmamba.create_model("vmamba_nano", pretrained=True, checkpoint="x.pth")
