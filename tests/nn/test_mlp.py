"""The MLP that keeps little: the same function as timm's, and the memory it is there to save."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from vmamba.models.vmamba import VMamba
from vmamba.nn import SS2D, Linear, cpu
from vmamba.nn.mlp import Mlp


@pytest.fixture
def short_stretches(monkeypatch):
    monkeypatch.setattr(cpu, "_STRETCH", 100)


def _pair(dim, hidden, dtype=torch.float32):
    torch.manual_seed(0)
    ours, theirs = Mlp(dim, hidden), timm.layers.Mlp(dim, hidden)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def _gradients(mlp, x, wanted=None):
    x = x.clone().requires_grad_()
    y = mlp(x)
    inputs = [x, *mlp.parameters()] if wanted is None else wanted
    return y, torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 6), (0, 6)])
def test_values_and_gradients_are_those_of_timm(short_stretches, shape):
    ours, theirs = _pair(6, 24, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    (y, grads), (expected_y, expected_grads) = _gradients(ours, x), _gradients(theirs, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(grads, expected_grads)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), expected_y)


def test_float32_takes_the_fast_products(short_stretches):
    ours, theirs = _pair(16, 64)
    x = torch.randn(3, 9, 16)
    (y, grads), (expected_y, expected_grads) = _gradients(ours, x), _gradients(theirs, x)
    torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=1e-4)


def test_a_second_layer_of_another_width(short_stretches):
    ours, theirs = _pair(16, 32)
    for width in (1, 40):
        layer = nn.Linear(32, width)
        for mlp in (ours, theirs):
            mlp.fc2 = Linear(32, width)
            mlp.fc2.load_state_dict(layer.state_dict())
        x = torch.randn(2, 30, 16)
        (y, grads), (expected_y, expected_grads) = _gradients(ours, x), _gradients(theirs, x)
        torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected_y, atol=1e-5, rtol=1e-5)


def test_one_pixel_alone():
    ours, theirs = _pair(16, 32)
    x = torch.randn(16)
    for layer, torch_s in ((ours, theirs), (ours.fc1, nn.Linear(16, 32))):
        torch_s.load_state_dict(layer.state_dict())
        (y, grads), (expected_y, expected_grads) = _gradients(layer, x), _gradients(torch_s, x)
        torch.testing.assert_close(y, expected_y, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected_y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Mlp", "Linear", "SS2D", "model"])
def test_several_gradients_at_once(kind):
    """As `torch.autograd.grad(is_grads_batched=True)` computes them, for Jacobians and Hessians."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 8)
    modules = {"Mlp": lambda: Mlp(8, 24), "Linear": lambda: Linear(8, 5), "SS2D": lambda: SS2D(8)}
    if kind == "model":
        options = {"depths": (1, 1), "dims": (8, 12), "stem_stride": 2, "num_classes": 3, "img_size": 12}
        module, x = VMamba(**options).eval(), torch.randn(1, 3, 12, 12)
    else:
        module = modules[kind]()
    one, several = (torch.autograd.functional.jacobian(module, x, vectorize=v) for v in (False, True))
    torch.testing.assert_close(several, one, atol=1e-6, rtol=1e-4)
    weight = next(module.parameters())
    y = module(x).flatten()
    (several,) = torch.autograd.grad(y, weight, torch.eye(len(y)), is_grads_batched=True, retain_graph=True)
    one = torch.stack([torch.autograd.grad(value, weight, retain_graph=True)[0] for value in y])
    torch.testing.assert_close(several, one, atol=1e-6, rtol=1e-4)


def test_gradients_to_second_order(short_stretches):
    ours, _ = _pair(3, 7, torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*ours.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


def test_the_last_bias_may_change_before_its_gradient_is_computed():
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    expected = torch.autograd.grad(mlp(x).square().sum(), [*mlp.parameters()])
    loss = mlp(x).square().sum()
    with torch.no_grad():
        mlp.fc2.bias.add_(1.0)
    torch.testing.assert_close(torch.autograd.grad(loss, [*mlp.parameters()]), expected)


def test_frozen_parameters():
    ours, theirs = _pair(6, 24)
    for mlp in (ours, theirs):
        mlp.fc1.requires_grad_(False)
    x = torch.randn(4, 6)
    wanted = [[mlp.fc2.weight, mlp.fc2.bias] for mlp in (ours, theirs)]
    torch.testing.assert_close(_gradients(ours, x, wanted[0])[1], _gradients(theirs, x, wanted[1])[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(short_stretches, dtype):
    ours, theirs = _pair(16, 64)
    x = torch.randn(3, 9, 16)
    with torch.autocast("cpu", dtype=dtype):
        (y, grads), (expected_y, expected_grads) = _gradients(ours, x), _gradients(theirs, x)
        with torch.no_grad():
            inferred = ours.eval()(x)
    assert y.dtype == inferred.dtype == dtype
    torch.testing.assert_close(y, expected_y, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(inferred, expected_y, atol=2e-2, rtol=2e-2)
    for value, expected in zip(grads, expected_grads, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_dropout_hooks_and_replaced_layers_are_obeyed():
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    dropping = Mlp(6, 24, drop=0.5)
    assert (dropping(x) == 0).float().mean() == pytest.approx(0.5, abs=0.1)

    hooked, _ = _pair(6, 24)
    hooked.act.register_forward_hook(lambda layer, inputs, output: output * 0)
    torch.testing.assert_close(hooked(x), hooked.fc2.bias.expand(50, 6))

    replaced, _ = _pair(6, 24)
    replaced.fc2 = nn.Sequential(replaced.fc2, nn.Tanh())
    assert replaced(x).abs().max() < 1


def test_training_keeps_the_hidden_layer_once():
    ours, theirs = _pair(8, 32)
    x = torch.randn(1000, 8)

    def kept(mlp):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value: sizes.setdefault(value.data_ptr(), value.numel()) and value, lambda value: value
        ):
            mlp(x)
        return sum(sizes.values())

    hidden = 1000 * 32
    assert kept(ours) < kept(theirs) - 0.9 * hidden
    assert kept(ours) < 1.5 * hidden
