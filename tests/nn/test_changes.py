"""However a model is changed, what it computes is the changed model's: the fast path is held against the plain one."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from nn.changes import TO_ANY_CLASS, TO_ANY_MODULE, Functions, Scale, plainly, results, trained
from timm.layers import DropPath
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils import parametrize

from vmamba.models.vmamba import VMamba
from vmamba.nn import GELU, SS2D, Conv2d, ConvSiLU, ConvStem, GridConv2d, LayerNorm, Linear, Mlp, VSSBlock, cpu
from vmamba.ops.backends import native
from vmamba.ops.backends.native import block
from vmamba.ops.operators import runs_eagerly

pytestmark = pytest.mark.skipif(native.unavailable(torch.device("cpu")) is not None, reason="there is no fast path")

SMALL = {"depths": (1, 1), "dims": (8, 12), "stem_stride": 2, "num_classes": 5, "img_size": 32}
VARIANTS = {
    "MLP": SMALL | {"drop_path_rate": 0.3, "proj_drop_rate": 0.2},
    "vanilla": SMALL | {
        "mlp_ratio": 0, "gated": True, "ssm_ratio": 2, "d_state": 2, "conv_bias": True, "stem": "patch",
        "downsample": "merge",
    },
}  # fmt: skip


def make(variant, dtype=torch.float32):
    torch.manual_seed(0)
    model = VMamba(**VARIANTS[variant], dtype=dtype).eval()
    for name, value in model.named_parameters():  # no zeros and ones: every parameter matters
        if value.ndim == 1 and "dt" not in name:
            nn.init.uniform_(value, 0.5, 1.5)
    with torch.no_grad():
        model(IMAGE.to(dtype))  # what blocks remember of a call is there before any change
    return model


IMAGE = torch.randn(1, 3, 18, 14, generator=torch.Generator().manual_seed(3))
NAMES = [(variant, name) for variant in VARIANTS for name, _ in make(variant).named_modules()]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    monkeypatch.setattr(cpu, "_STRETCH", 500)
    monkeypatch.setattr(block, "_STRETCH", 500)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=VARIANTS)
def unchanged(request):
    return request.param, results(make(request.param), IMAGE)


def check(model, unchanged=None, image=IMAGE, atol=2e-5):
    """The fast path equals the plain one; and, given the results before the change, the change shows in one of them."""
    fast = results(model, image)
    with plainly():
        y, *grads = trained(model, image)
    for one, other in zip(fast, [y, y, *grads], strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one / scale, other / scale, atol=atol, rtol=1e-4, equal_nan=True)
    if unchanged is not None:
        assert any(a.shape != b.shape or (a - b).abs().max() > 1e-5 for a, b in zip(fast, unchanged, strict=False))


def fits(model):
    """Whether the model still runs; if not, it is the plain path's error that is raised."""
    with plainly():
        try:
            trained(model, IMAGE)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            expected = type(error)
        else:
            return True
    with pytest.raises(expected), torch.no_grad():
        model(IMAGE)
    return False


def test_as_built(unchanged):
    variant, before = unchanged
    check(make(variant))
    with pytest.raises(AssertionError):
        check(make(variant), before)  # the check itself can fail


@pytest.mark.parametrize("change", TO_ANY_MODULE, ids=lambda change: change.__name__)
def test_one_module_hooked_patched_or_subclassed(change, unchanged):
    variant, before = unchanged
    for name, _ in list(make(variant).named_modules()):
        model = make(variant)
        change(model.get_submodule(name))
        check(model, None if "backward" in change.__name__ else before)


KINDS = [
    Linear, LayerNorm, GELU, GridConv2d, ConvSiLU, Mlp, SS2D, VSSBlock, ConvStem, nn.Conv2d, nn.Dropout,
]  # fmt: skip


@pytest.mark.parametrize("change", TO_ANY_CLASS.values(), ids=TO_ANY_CLASS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_patched_or_every_module_hooked(change, kind, unchanged):
    variant, before = unchanged
    model = make(variant)
    with change(kind):
        check(model, before if any(type(module) is kind for module in model.modules()) else None)


def test_functions_of_torch_replaced_by_a_mode(unchanged):
    variant, before = unchanged
    model = make(variant)
    with Functions():
        check(model, before)
    with torch.device("cpu"):  # a mode, too, but one that only makes tensors
        assert runs_eagerly(IMAGE)


def test_a_function_in_the_place_of_a_part(unchanged):
    variant, before = unchanged
    tried = 0
    for name, part in list(make(variant).named_modules()):
        parent, _, child = name.rpartition(".")
        model = make(variant)
        holder = model.get_submodule(parent)
        if not name or isinstance(holder, nn.ModuleList | nn.Sequential) or isinstance(part, nn.ModuleList):
            continue
        original = getattr(holder, child)
        delattr(holder, child)
        setattr(holder, child, lambda *given, original=original: 0.5 * original(*given))
        if fits(model):
            check(model, [y for y in before if y.shape] if tried else None)
            tried += 1
    assert tried > 10


def test_a_part_whose_class_inherits_from_that_of_the_part():
    torch.manual_seed(0)
    stem = ConvStem(3, 16).eval()
    stem.conv2 = ConvSiLU(8, 16, 3, stride=2, padding=1)
    check(stem)


def replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


REPLACEMENTS = {
    "wrapped": lambda module: nn.Sequential(module, Scale()),
    "nothing": lambda module: nn.Identity(),
    "dropout in training": lambda module: nn.Sequential(module, nn.Dropout(0.5).train()),
    "drop path in training": lambda module: nn.Sequential(module, DropPath(0.5).train()),
    "a known layer out of place": lambda module: LayerNorm(_width(module)),
    "normalised": lambda module: nn.Sequential(module, nn.LayerNorm(_width(module))),
}


def _width(module):
    widths = [m.out_features if isinstance(m, nn.Linear) else m.weight.shape[0] for m in module.modules()
              if isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv2d)]  # fmt: skip
    return widths[-1] if widths else 8


@pytest.mark.parametrize("replacement", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_one_part_replaced(replacement, unchanged):
    variant, _ = unchanged
    tried = 0
    for name, _ in list(make(variant).named_modules()):
        if not name:
            continue
        model = make(variant)
        replace(model, name, replacement(model.get_submodule(name)))
        if fits(model):
            check(model)
            tried += 1
    assert tried > 10


def test_drop_rates_of_single_modules():
    for name, module in make("MLP").named_modules():
        if isinstance(module, nn.Dropout | DropPath):
            model = make("MLP")
            part = model.get_submodule(name).train()
            part.p = part.drop_prob = 0.5
            check(model)


def test_the_whole_model_in_training(unchanged):
    variant, _ = unchanged
    check(make(variant).train())


GEOMETRY = {
    "padding mode": {"padding_mode": "reflect", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
    "stride": {"stride": (3, 2)},
    "stride as a number": {"stride": 2},
    "dilation": {"dilation": (2, 2), "padding": (2, 2)},
    "padding": {"padding": (2, 0)},
    "named padding": {"padding": "valid"},
}


@pytest.mark.parametrize("geometry", GEOMETRY.values(), ids=GEOMETRY)
def test_convolutions_of_other_geometry(geometry, unchanged):
    variant, _ = unchanged
    for name, module in make(variant).named_modules():
        if isinstance(module, nn.Conv2d):
            model = make(variant)
            vars(model.get_submodule(name)).update(geometry)
            if fits(model):
                check(model)


ATTRIBUTES = {
    "no bias": ("bias", lambda module: None),
    "no scale": ("weight", lambda module: None if isinstance(module, nn.LayerNorm) else module.weight),
    "one bias": ("bias", lambda module: _one_bias(module, ())),
    "one bias in a list": ("bias", lambda module: _one_bias(module, (1,))),
    "biases of a row": ("bias", lambda module: _one_bias(module, (1, len(module.weight)))),
    "eps": ("eps", lambda module: 0.5),
    "tanh": ("approximate", lambda module: "tanh"),
    "float64": ("weight", lambda module: nn.Parameter(module.weight.double())),
    "not contiguous": ("weight", lambda module: nn.Parameter(_strided(module.weight))),
    "expanded": ("weight", lambda module: nn.Parameter(module.weight.flatten()[:1].expand(module.weight.shape))),
}


def _one_bias(module, shape):
    """A bias that torch broadcasts, where it does."""
    is_broadcast = isinstance(module, nn.Linear)
    return nn.Parameter(torch.full(shape, 0.7)) if is_broadcast else module.bias


def _strided(weight):
    return torch.stack([weight, weight * 0], dim=-1).detach()[..., 0]


@pytest.mark.parametrize(("attribute", "value"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_attributes_of_single_layers(attribute, value, unchanged):
    variant, _ = unchanged
    for name, module in make(variant).named_modules():
        if getattr(module, attribute, None) is None:
            continue
        model = make(variant)
        setattr(model.get_submodule(name), attribute, value(model.get_submodule(name)))
        if fits(model):
            check(model, atol=1e-4)


def test_norms_of_other_widths(unchanged):
    variant, _ = unchanged
    for name, module in make(variant).named_modules():
        if isinstance(module, LayerNorm):
            model = make(variant)
            replace(model, name, LayerNorm(2, elementwise_affine=False))
            assert not fits(model), name


@pytest.mark.parametrize("layer", [nn.GELU("tanh"), nn.ReLU(), nn.SiLU()], ids=str)
def test_another_activation(layer):
    before = results(make("MLP"), IMAGE)
    for name in ("stem.act", "stages.1.blocks.0.mlp.act"):
        model = make("MLP")
        replace(model, name, layer)
        check(model, before)


def test_parametrised_parameters(unchanged):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    variant, before = unchanged
    for name, _ in make(variant).named_parameters():
        model = make(variant)
        owner, _, attribute = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(owner), attribute, Doubled())
        check(model, before)


# --- weights written behind torch's back ----------------------------------------------------------------------------


def _flat_vector(value):
    flat = value.detach().flatten().clone()
    value.data = flat.view(value.shape)
    yield
    flat[flat.numel() // 2] += 3.0


def _write(write):
    def change(value):
        yield
        write(value)

    return change


def _is_square(value):
    return value.ndim == 2 and value.shape[0] == value.shape[1]


def _shifted(value):
    """Of twice the memory, first one half and then the other."""
    both = torch.cat([value.data.flatten(), 2 * value.data.flatten()])
    value.data = both[value.numel() :].view(value.shape)


WRITES = {
    "a column of data": _write(lambda value: value.data[..., -1].fill_(0.7)),
    "one element of data": _write(lambda value: value.data.view(-1)[value.numel() // 3].add_(2.0)),
    "numpy": _write(lambda value: np.put(value.detach().numpy(), value.numel() // 2, 4.0)),
    "a flat vector": _flat_vector,
    "a new tensor as data": _write(lambda value: setattr(value, "data", value.data * 1.5)),
    "in place": _write(lambda value: value.detach().mul_(1.5)),
    "a square turned": _write(lambda value: _is_square(value) and setattr(value, "data", value.data.t())),
    "the same memory from its middle": _write(_shifted),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen_by_the_next_pass(write, unchanged):
    variant, _ = unchanged
    for name, _ in make(variant).named_parameters():
        model = make(variant)
        steps = write(dict(model.named_parameters())[name])
        next(steps)
        with torch.no_grad():
            model(IMAGE)
            next(steps, None)
            seen = model(IMAGE)
            with plainly():
                expected = model(IMAGE)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(seen / scale, expected / scale, atol=2e-5, rtol=1e-4)


def test_parameters_whose_memory_is_freed(unchanged):
    variant, _ = unchanged
    layers_of_torch = ("head.fc", "stem.conv", "A_log")  # and what computes A, which do not always notice
    names = [name for name, _ in make(variant).named_parameters() if not any(part in name for part in layers_of_torch)]
    for name in names:
        model = make(variant)
        parameter = model.get_parameter(name)
        shared = torch.cat([parameter.data.new_zeros(10), parameter.data.flatten()])
        parameter.data = shared[10:].view(parameter.shape)
        with torch.no_grad():
            model(IMAGE)
        shared.untyped_storage().resize_(0)
        for is_recorded in (False, True):
            with torch.set_grad_enabled(is_recorded), pytest.raises(RuntimeError, match="has no memory"):
                model(IMAGE)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_values_that_do_not_lie_in_memory_as_they_are():
    inputs = (
        torch._neg_view(torch.randn(3, 8)), torch._efficientzerotensor((3, 8)),
        torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)]),
    )  # fmt: skip
    for layer, plain in ((Linear(8, 4), nn.Linear), (LayerNorm(8), nn.LayerNorm), (GELU(), nn.GELU)):
        for x in inputs:
            with torch.no_grad():
                y, expected = layer(x), plain.forward(layer, x)
            for one, other in zip(y.unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_finite_differences():
    """A step that the gradient predicts, taken in place in one weight at a time."""
    model = make("MLP")
    image = IMAGE[:1]
    with torch.no_grad():
        for name, value in model.named_parameters():
            place = (0,) * value.ndim
            with torch.enable_grad():
                slope = torch.autograd.grad(model(image).sum(), value)[0][place]
            start = value.data[place].clone()
            ends = []
            for step in (1e-2, -1e-2):
                value.data[place] = start + step
                ends.append(model(image).double().sum())
            value.data[place] = start
            assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(slope), rel=0.03, abs=2e-3), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, unchanged):
    variant, _ = unchanged
    model = make(variant, dtype)
    check(model, image=IMAGE.to(dtype), atol=1e-9 if dtype == torch.float64 else 0.1)


def test_nothing_is_left_behind_by_a_change_of_dtype():
    before = _held()
    model = VMamba(depths=(1, 1), dims=(64, 128), num_classes=5).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    held = _held() - before
    model.bfloat16()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32).bfloat16())
    assert held < 1.05 * sum(4 * value.numel() for value in model.parameters())
    assert _held() - before <= 0.55 * held


def _held():
    """Bytes of all large tensors that are alive, but for what torch.func may have left of other tests."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter)]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in tensors
        if not is_functorch_wrapped_tensor(value) and value.layout is torch.strided and value.numel() > 1000
    }
    return sum(storages.values())


@pytest.mark.parametrize("channels", [32, 33])
@pytest.mark.parametrize(("kind", "size", "stride"), [(GridConv2d, 3, 2), (GridConv2d, 7, 2), (Conv2d, 3, 3)])
def test_results_of_one_column_in_bfloat16(kind, size, stride, channels):
    layer = kind(channels, 16, size, stride=stride, padding=size // 2)
    for width in (1, 2):
        x = torch.randn(2, channels, 24, width)
        given = x.permute(0, 2, 3, 1) if kind is GridConv2d else x
        with torch.autocast("cpu", torch.bfloat16):
            recorded = layer(given)
            grads = torch.autograd.grad(recorded.float().square().sum(), layer.parameters())
            with torch.no_grad():
                unrecorded = layer(given)
        y = nn.Conv2d.forward(layer, x)
        expected = torch.autograd.grad(y.square().sum(), layer.parameters())
        y = y.permute(0, 2, 3, 1) if kind is GridConv2d else y
        for one, other in zip((recorded, unrecorded, *grads), (y, y, *expected), strict=True):
            assert (one - other).abs().max() < 0.05 * other.abs().max()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, unchanged):
    variant, _ = unchanged
    model = make(variant)
    with torch.autocast("cpu", dtype=low):
        check(model, atol=0.05)


@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", ["strided", "by tiles", "GELU"])
def test_results_lie_as_they_do_in_training(kind, of_weight):
    layers = {"strided": Conv2d(16, 16, 3, 2, 1), "by tiles": Conv2d(128, 96, 3, 1, 1), "GELU": GELU()}
    layer = layers[kind].to(memory_format=of_weight)
    x = torch.randn(2, getattr(layer, "in_channels", 16), 48, 48)
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (x, last, x[..., ::2, ::2], last[..., ::2, ::2], x.mT, last.mT, x[:1, :, :1, :1]):
        with torch.no_grad():
            y = layer(given)
        recorded = layer(given.detach().requires_grad_())
        assert y.stride() == recorded.stride()
        torch.testing.assert_close(y, recorded, atol=2e-5, rtol=1e-4)


# --- other people's tools --------------------------------------------------------------------------------------------


def test_parameters_loaded_on_demand(unchanged):
    accelerate = pytest.importorskip("accelerate")
    variant, before = unchanged
    model = accelerate.cpu_offload(make(variant), execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGE), before[0], atol=2e-5, rtol=1e-4)
    assert next(model.parameters()).is_meta


def test_adapters(unchanged):
    peft = pytest.importorskip("peft")
    variant, before = unchanged
    model = make(variant)
    config = peft.LoraConfig(
        r=2, target_modules=["in_proj", "out_proj", "fc1", "fc2"], init_lora_weights=False,
        target_parameters=[f"stages.{stage}.blocks.0.ss2d.x_proj_weight" for stage in (0, 1)],
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    check(adapted, before)
    with torch.no_grad():
        expected = adapted(IMAGE)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IMAGE), expected, atol=1e-4, rtol=1e-3)
    check(merged, before)


def test_copied_and_pickled_models(unchanged):
    import pickle

    variant, before = unchanged
    for twin in (copy.deepcopy(make(variant)), pickle.loads(pickle.dumps(make(variant)))):
        torch.testing.assert_close(results(twin, IMAGE), before, atol=1e-6, rtol=1e-5)
        assert all(map(cpu.as_built, (m for m in twin.modules() if isinstance(m, VSSBlock))))
