"""Packed weights on the CPU: the same results, and never those of weights that have since changed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmamba
from vmamba.nn import VSSBlock, cpu
from vmamba.nn.conv import GridConv2d
from vmamba.ops import use_backend

pytestmark = pytest.mark.skipif(not cpu._packable_dtypes(), reason="this build of torch has no oneDNN")
has_bfloat16 = pytest.mark.skipif(torch.bfloat16 not in cpu._packable_dtypes(), reason="no bfloat16 instructions")


def _is_packed(layer, x):
    cpu._copies.pop(layer, None)
    cpu.caller(layer, x)(layer, x)
    return layer in cpu._copies


LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (2, 3, 5, 40)),
    "linear without bias": (lambda: nn.Linear(40, 24, bias=False), (7, 40)),
    "convolution": (lambda: GridConv2d(8, 12, 3, stride=2, padding=1), (2, 9, 6, 8)),
    "depthwise": (lambda: GridConv2d(20, 20, 3, padding=1, groups=20, bias=False), (1, 7, 5, 20)),
    "patches": (lambda: GridConv2d(3, 10, 4, stride=4), (1, 9, 8, 3)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make().eval(), torch.randn(shape)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "gelu", "swish"])
def test_equals_the_layer(layer_and_input, activation):
    layer, x = layer_and_input
    expected = {"none": lambda y: y, "gelu": F.gelu, "swish": F.silu}[activation](layer(x))
    for _ in range(2):  # packs, then finds the copy
        torch.testing.assert_close(cpu.caller(layer, x)(layer, x, activation), expected, atol=1e-5, rtol=1e-5)
    assert layer in cpu._copies or activation == "swish"  # a depthwise convolution before it has a kernel of its own
    strided = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    torch.testing.assert_close(cpu.caller(layer, x)(layer, strided, activation), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@has_bfloat16
def test_autocast_and_bfloat16_layers(layer_and_input):
    layer, x = layer_and_input
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cpu.caller(layer, x)(layer, x)
        expected = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
    low = copy.deepcopy(layer).bfloat16()
    y = cpu.caller(low, x.bfloat16())(low, x.bfloat16())
    torch.testing.assert_close(y, low(x.bfloat16()), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_images_of_changing_size():
    layer = GridConv2d(8, 12, 3, stride=2, padding=1).eval()
    for height, width in ((8, 8), (30, 17), (8, 8), (1, 1)):
        x = torch.randn(1, height, width, 8)
        torch.testing.assert_close(cpu.caller(layer, x)(layer, x), layer(x), atol=1e-5, rtol=1e-5)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "a new tensor as data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    "load_state_dict": lambda layer: layer.load_state_dict({n: v * 2 for n, v in layer.state_dict().items()}),
    "the bias": lambda layer: layer.bias.mul_(3),
    "the bias through data": lambda layer: layer.bias.data.mul_(3),
    "an optimizer": lambda layer: _optimizer_step(layer),
    "there and back": lambda layer: layer.double().float(),
}


def _optimizer_step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_sees_every_change_of_the_weights(name, change):
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    cpu.caller(layer, x)(layer, x)
    change(layer)
    torch.testing.assert_close(cpu.caller(layer, x)(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def test_leaves_everything_unusual_to_the_layer():
    layer, x = nn.Linear(6, 4).eval(), torch.randn(3, 6)
    assert not _is_packed(layer, x)  # gradients
    with torch.no_grad():
        assert _is_packed(layer, x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not _is_packed(layer, x)
        assert not _is_packed(layer.train(), x)
        layer.eval()
        assert not _is_packed(layer, torch.empty(0, 6))
        assert not _is_packed(copy.deepcopy(layer).double(), x.double())
        with FlopCounterMode(display=False) as counter:
            assert not _is_packed(layer, x)
        assert counter.get_total_flops() == 2 * 3 * 6 * 4
        assert not _is_packed(torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(layer)), x)
        hook = layer.register_forward_hook(lambda module, inputs, output: output + 1)
        assert not _is_packed(layer, x)
        torch.testing.assert_close(cpu.caller(layer, x)(layer, x), F.linear(x, layer.weight, layer.bias) + 1)
        hook.remove()
        torch.func.vmap(lambda row: cpu.caller(layer, row)(layer, row))(x)
        y = torch.func.functional_call(_Through(layer), {"layer.weight": torch.zeros(4, 6)}, (x,))
        torch.testing.assert_close(y, layer.bias.expand(3, 4))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(cpu.caller(layer, dual)(layer, dual)).tangent
    torch.testing.assert_close(tangent, layer.weight.detach().sum(1).expand(3, 4))


class _Through(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return cpu.caller(self, x)(self.layer, x)


@torch.no_grad()
def test_a_wrong_width_gets_the_layer_s_own_error():
    layer = nn.Linear(6, 4).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.caller(layer, torch.randn(3, 5))(layer, torch.randn(3, 5))


@torch.no_grad()
def test_copies_go_with_their_layers():
    layer, x = nn.Linear(6, 4).eval(), torch.randn(3, 6)
    cpu.caller(layer, x)(layer, x)
    copies = weakref.ref(cpu._copies[layer][torch.float32])
    assert copies() is not None
    del layer
    gc.collect()
    assert copies() is None


@torch.no_grad()
def test_a_model_gives_what_it_gives_without():
    model, x = vmamba.create_model("vmamba_femto").eval(), torch.randn(2, 3, 45, 70)
    fast = model(x)
    with torch.backends.mkldnn.flags(enabled=False):
        slow = model(x)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    with torch.enable_grad():
        torch.testing.assert_close(fast, model(x).detach(), atol=1e-5, rtol=1e-4)


BLOCKS = {
    "MLP": {},
    "wide": {"ssm_ratio": 2.0},
    "gate, no MLP": {"mlp_ratio": 0.0, "gated": True, "ssm_ratio": 2.0, "d_state": 2, "conv_bias": True},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("stretch", [64, 2**21])
def test_blocks_infer_what_they_compute(options, backend, stretch, monkeypatch):
    """In stretches and in place, from inputs of any strides, which are left as they were."""
    monkeypatch.setattr(cpu, "_STRETCH", stretch)
    torch.manual_seed(0)
    block = VSSBlock(8, **options).eval()
    contiguous = torch.randn(2, 5, 7, 8)
    for x in (contiguous, contiguous.permute(0, 2, 1, 3), contiguous[:, ::2], contiguous[:0]):
        before = x.clone()
        with use_backend(backend):
            expected = block(x).detach()
            with torch.no_grad():
                y = block(x)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(x, before)


@torch.no_grad()
@has_bfloat16
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_blocks_infer_under_autocast(options):
    torch.manual_seed(0)
    block, x = VSSBlock(8, **options).eval(), torch.randn(2, 5, 7, 8)
    exact = block(x)
    for image in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(image)
        assert y.dtype == image.dtype
        torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_hooks_see_what_they_saw():
    """A hook's tensor is not overwritten later, and every module is called once."""
    torch.manual_seed(0)
    model, x = vmamba.create_model("vmamba_femto").eval(), torch.randn(1, 3, 40, 40)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.setdefault(name, []).append(output))
    expected = model(x)
    kept = {name: [output.clone() for output in outputs] for name, outputs in seen.items()}
    assert all(len(outputs) == 1 for outputs in seen.values())
    assert "stages.0.blocks.0.ss2d.out_proj" in seen
    model(x)
    assert all(torch.equal(seen[name][0], kept[name][0]) for name in kept)
    for module in model.modules():
        module._forward_hooks.clear()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
