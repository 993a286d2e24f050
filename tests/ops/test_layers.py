"""Layers as functions: the numbers of torch's own, and all their derivatives, however they are called."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from vmamba.nn import ConvSiLU, Linear, cpu
from vmamba.nn.layers import Conv2d, GridConv2d
from vmamba.ops import layers
from vmamba.ops.backends.native import convolution as convolutions
from vmamba.ops.backends.native import layers as native
from vmamba.ops.backends.native import library

needs_library = pytest.mark.skipif(native.reason_unavailable() is not None, reason="the library is missing")


def conv_silu(x, weight, bias):
    return F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 40), (7, 40), (40,), (0, 40)])
def test_linear(shape, has_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(24, 40), torch.randn(24) if has_bias else None
    torch.testing.assert_close(layers.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    for strided in (torch.stack([x, x], -1)[..., 0], x.transpose(0, -2) if x.ndim > 1 else x):
        for w in (weight, weight.t().contiguous().t()):
            y, expected = layers.linear(strided, w, bias), F.linear(strided, w, bias)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_a_bias_may_change_before_its_gradient_is_computed():
    x, weight, bias = torch.randn(4, 40), torch.randn(24, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (weight, bias))
    loss = layers.linear(x, weight, bias).square().sum()
    with torch.no_grad():
        bias.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, (weight, bias)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_to_second_order(has_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 4, 5), torch.randn(6, 5), torch.randn(6) if has_bias else None
    kernel, offset = torch.randn(5, 1, 3, 3), torch.randn(5) if has_bias else None
    for ours, theirs, given in (
        (layers.linear, F.linear, (x, weight, bias)),
        (layers.depthwise_silu, conv_silu, (x, kernel, offset)),
    ):
        results = []
        for function in (ours, theirs):
            inputs = [v.clone().requires_grad_() for v in given if v is not None]
            y = function(*inputs, *[None] * (3 - len(inputs)))
            loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            squares = sum(g.square().sum() for g in first)
            second = torch.autograd.grad(squares, inputs, materialize_grads=True)
            results.append([y, *first, *second])
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_frozen_arguments_get_no_gradient():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(6, 5)
    layers.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 5))
    assert weight.grad is None


@needs_library
@pytest.mark.parametrize("has_bias", [True, False])
def test_operators_keep_torch_s_rules(has_bias):
    torch.manual_seed(0)
    for requires_grad in (True, False):
        x, weight, kernel = (
            torch.randn(shape, requires_grad=requires_grad) for shape in ((2, 3, 4, 5), (6, 5), (5, 1, 3, 3))
        )
        bias, offset = (torch.randn(n, requires_grad=requires_grad) if has_bias else None for n in (6, 5))
        torch.library.opcheck(torch.ops.vmamba.linear.default, (x, weight, bias))
        torch.library.opcheck(torch.ops.vmamba.depthwise_silu.default, (x, kernel, offset))
    args = (torch.randn(2, 3, 4, 5), x, kernel, offset)
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu_backward.default, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, weight, bias = torch.randn(9, 40), torch.randn(24, 40), torch.randn(24)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = layers.linear(x, weight, bias), F.linear(x, weight, bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, atol=0.1, rtol=2e-2)


@torch.no_grad()
def test_unusual_calls_are_torch_s():
    layer, x = Linear(6, 4), torch.randn(3, 6)
    expected = F.linear(x, layer.weight, layer.bias)
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(layer(x), expected)
    assert counter.get_total_flops() == 2 * 3 * 6 * 4
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    y = torch.func.functional_call(layer, {"weight": torch.zeros(4, 6)}, (x,))
    torch.testing.assert_close(y, layer.bias.expand(3, 4))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, layer.weight.sum(1).expand(3, 4))
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(3, 5))
    assert layers.applies(x)
    for unusual in (x.double(), x.to_sparse(), torch.empty(0, 6), x.to("meta")):
        assert not layers.applies(unusual)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (1, 1), (30, 17)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (3, 1, 1, 1), (3, 2, 2, 2), (2, 2, 0, 1)]
)
def test_convolutions_by_products_and_others(size, kernel, stride, padding, dilation):
    x = torch.randn(2, *size, 6)
    layer = GridConv2d(6, 10, kernel, stride=stride, padding=padding, dilation=dilation)
    if min(size) + 2 * padding <= dilation * (kernel - 1):
        return
    assert cpu.is_patchwise(layer) == ((kernel, padding, dilation) == (3, 1, 1))
    expected = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, stride, padding, dilation).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_convolution_that_is_not_depthwise_has_its_silu():
    x, layer = torch.randn(1, 6, 5, 8), ConvSiLU(8, 8, 3, padding=1)
    expected = F.silu(F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1).permute(0, 2, 3, 1))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [(GridConv2d, {"stride": 2}), (ConvSiLU, {"groups": 16})])
def test_a_method_of_a_subclass_or_of_one_layer_is_called(kind, options):
    class Own(kind):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    layer, x = kind(16, 16, 3, padding=1, bias=False, **options), torch.randn(1, 8, 9, 16)
    twice = copy.deepcopy(layer)
    twice.weight.mul_(2)
    own = Own(16, 16, 3, padding=1, bias=False, **options)
    own.load_state_dict(layer.state_dict())
    torch.testing.assert_close(own(x), twice(x), atol=1e-5, rtol=1e-5)
    layer._conv_forward = lambda x, weight, bias: twice._conv_forward(x, twice.weight, bias)
    torch.testing.assert_close(layer(x), twice(x), atol=1e-5, rtol=1e-5)


# --- what users do to a head's convolution, at a size that is computed by tiles --------------------------------------


class Doubled(Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.fixture
def by_tiles(monkeypatch):
    """The calls by tiles that are made."""
    calls, plain = [], convolutions._call_convolution
    monkeypatch.setattr(convolutions, "_call_convolution", lambda call: (calls.append(call.by_tiles), plain(call)))
    if library.kernels() in (None, "baseline"):
        pytest.skip("this processor or this build has no kernels by tiles")
    return calls


def grid(layout=torch.channels_last):
    torch.manual_seed(0)
    return torch.randn(2, 96, 21, 30).contiguous(memory_format=layout), Conv2d(96, 100, 3, padding=1).eval()


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_heads_convolution(layout, by_tiles):
    x, layer = grid(layout)
    y = layer(x)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-5, rtol=1e-5)
    assert y.is_contiguous(memory_format=layout)  # as torch's
    assert by_tiles == [1] * (layout is torch.channels_last)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-5, rtol=1e-5)
    single = x[0]
    torch.testing.assert_close(layer(single), F.conv2d(single, layer.weight, layer.bias, padding=1))


def test_a_heads_convolution_that_was_changed(by_tiles, monkeypatch):
    x, layer = grid()
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1).detach()
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        doubled = Doubled(96, 100, 3, padding=1)
        doubled.load_state_dict(layer.state_dict())
        close(doubled(x), 2 * plain)
        handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
        close(layer(x), plain + 1)
        handle.remove()
        halved = copy.deepcopy(layer)
        parametrize.register_parametrization(halved, "weight", Halved())
        close(halved(x), F.conv2d(x, layer.weight / 2, layer.bias, padding=1))
        pruned = prune.l1_unstructured(copy.deepcopy(layer), "weight", 0.5)
        close(pruned(x), F.conv2d(x, pruned.weight_orig * pruned.weight_mask, layer.bias, padding=1))
        mine = copy.deepcopy(layer)
        mine._conv_forward = lambda x, weight, bias: x[:, :2]
        assert torch.equal(mine(x), x[:, :2])
        assert len(by_tiles) == 3
        with monkeypatch.context() as patch:
            patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x[:, :1])
            assert torch.equal(layer(x), x[:, :1])
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
        close(torch.func.vmap(layer)(x[None])[0], plain)
        close(torch.compile(layer, backend="eager")(x), plain)
        close(layer.double()(x.double()).float(), plain)
    layer.float()(x).sum().backward()
    close(layer.bias.grad, torch.full((100,), float(x[:, 0].numel())))
    assert 1 not in by_tiles[3:]


def test_kernels_of_a_gpu_are_given_parameters_that_fit(monkeypatch):
    """They read as much as the weight says there is."""
    monkeypatch.setitem(layers._FUSING, "cpu", "triton")
    monkeypatch.setattr(layers, "choose_backend", lambda *given: type("Backend", (), {"name": "triton"}))
    grid, image = torch.randn(1, 4, 5, 8).bfloat16(), torch.randn(1, 3, 8, 8).bfloat16()

    def random(*shape):
        return torch.randn(shape).bfloat16()

    with torch.no_grad():
        for asks, x, *parameters in (
            (layers.fuses_depthwise_silu, grid, random(8, 1, 3, 3), random(8)),
            (layers.fuses_linear_gelu, grid, random(12, 8), random(12)),
            (layers.fuses_stem, image, random(16, 3, 3, 3), random(16), random(16), random(16)),
        ):
            assert asks(x, *parameters)
            for i, value in enumerate(parameters):
                for less in (value[:-1], torch.cat([value, value])):
                    assert not asks(x, *parameters[:i], less, *parameters[i + 1 :])
