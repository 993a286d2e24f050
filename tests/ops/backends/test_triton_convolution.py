"""The depthwise convolution's Triton kernels: in the interpreter, as an operator, and on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from scans import assert_matches
from torch import nn
from torch.nn.utils import parametrize

from vmamba.nn import ConvSiLU
from vmamba.ops import layers
from vmamba.ops.backends import choose_backend, proving, triton, use_backend

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(triton.unavailable(CPU) is not None, reason=str(triton.unavailable(CPU)))
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or triton.unavailable(torch.device("cuda")) is not None, reason="needs a GPU"
)
if triton.unavailable(CPU) is None or torch.cuda.is_available():
    from vmamba.ops.backends.triton import convolution
    from vmamba.ops.backends.triton.convolution import Tile, use_tiles


def exact(x, weight, bias):
    z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return F.silu(z.permute(0, 2, 3, 1))


def arguments(shape, has_bias=True, dtype=torch.float32, device="cpu"):
    """x, weight, bias and the gradient of the result."""
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], 1, 3, 3, device=device) / 3
    return x, weight, torch.randn(shape[-1], device=device) if has_bias else None, grad


def assert_right(x, weight, bias, grad, value_tolerance=1e-6, gradient_tolerance=1e-5, function=None):
    """The kernels, or what `function` makes of x, weight and bias, against torch in float64."""
    leaves = [v.detach().double().requires_grad_() for v in (x, weight, bias) if v is not None]
    expected = exact(*leaves, *[None] * (3 - len(leaves)))
    expected_grads = torch.autograd.grad(expected, leaves, grad.double())
    if function is None:
        y, grads = convolution.depthwise_silu(x, weight, bias), convolution.depthwise_silu_backward(
            grad, x, weight, bias
        )[: len(leaves)]  # fmt: skip
    else:
        given = [v.detach().requires_grad_() for v in (x, weight, bias) if v is not None]
        y = function(*given, *[None] * (3 - len(given)))
        grads = torch.autograd.grad(y, given, grad)
    assert y.dtype == grads[0].dtype == x.dtype
    assert grads[1].dtype == weight.dtype
    assert y.is_contiguous()
    assert_matches([y.detach()], [expected.detach()], value_tolerance)
    assert_matches(list(grads), list(expected_grads), gradient_tolerance)


# --- in the interpreter ----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 1, 9, 5),  # a single row, more columns than a strip
        (1, 9, 1, 33),  # a single column, more rows than a band
        (1, 2, 3, 32),
        (2, 3, 2, 40),  # channels that do not fill a block
        (1, 8, 17, 35),
    ],
)
def test_odd_sizes(shape, has_bias):
    assert_right(*arguments(shape, has_bias))


@interpreted
@pytest.mark.parametrize("tile", [(7, 8, 32, 2), (2, 8, 32, 2), (1, 4, 16, 1), (3, 1, 8, 1), (16, 16, 64, 4)])
def test_tiles(tile):
    with use_tiles(Tile(*tile)):
        assert_right(*arguments((1, 8, 9, 20)))


@interpreted
def test_tiles_that_are_taken():
    """Large bands where they fill a card, small ones for a single image, none much larger than the image."""

    def rows(*shape):
        return convolution._cut(torch.empty(shape, device="meta"), is_gradient=False)[1].rows

    for shape in ((128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768), (8, 384, 384, 96)):
        assert rows(*shape) == 7
    assert rows(1, 56, 56, 96) == 2
    assert rows(1, 7, 7, 768) == 1
    assert rows(512, 3, 56, 96) == 2


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_low", [True, False])
def test_half_precision(dtype, is_low):
    """Also where parameters are of the same dtype; the arithmetic is float32 all the same."""
    x, weight, bias, grad = arguments((1, 4, 9, 32), dtype=dtype)
    if is_low:
        weight, bias = weight.to(dtype), bias.to(dtype)
    eps = torch.finfo(dtype).eps
    assert_right(x, weight, bias, grad, eps, 4 * eps)


@interpreted
def test_values_of_every_magnitude():
    x = torch.tensor([0.0, -1e-30, 1e-30, -20.0, 20.0, -87.0, -90.0, 90.0, -1e4, 1e4, -3e38, 3e38]).expand(1, 1, 1, 12)
    weight = torch.zeros(12, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    with torch.no_grad():
        torch.testing.assert_close(convolution.depthwise_silu(x, weight, None), F.silu(x))
    leaf = x.clone().requires_grad_()
    F.silu(leaf).sum().backward()
    grad_x, _, _ = convolution.depthwise_silu_backward(torch.ones_like(x), x, weight, None)
    torch.testing.assert_close(grad_x, leaf.grad)


@interpreted
def test_not_a_number_stays_in_its_neighbourhood():
    x, weight, bias, _ = arguments((1, 5, 6, 3))
    x[0, 2, 3, 1] = torch.nan
    expected = torch.zeros(1, 5, 6, 3, dtype=torch.bool)
    expected[0, 1:4, 2:5, 1] = True
    assert torch.equal(convolution.depthwise_silu(x, weight, bias).isnan(), expected)


@interpreted
def test_repeats_bit_by_bit_and_shares_add_up(monkeypatch):
    x, weight, bias, grad = arguments((3, 3, 9, 20))
    many = convolution.depthwise_silu_backward(grad, x, weight, bias)
    for value, again in zip(many, convolution.depthwise_silu_backward(grad, x, weight, bias), strict=True):
        assert torch.equal(value, again)
    monkeypatch.setattr(convolution, "_multiprocessors", lambda x: 1)  # several tiles each, fewer for the last
    assert_matches(list(convolution.depthwise_silu_backward(grad, x, weight, bias)), list(many), 1e-6)
    assert_right(x, weight, bias, grad)


@interpreted
def test_strides_and_empty_images():
    x, weight, bias, grad = arguments((2, 3, 4, 10))
    wide, turned = torch.cat([x, x], -1), weight.flip(0)
    y = convolution.depthwise_silu(x, weight, bias)
    assert torch.equal(convolution.depthwise_silu(wide.chunk(2, -1)[1], turned.flip(0), bias), y)
    planar = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    strided = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(convolution.depthwise_silu(planar, weight, strided), y)
    expected = convolution.depthwise_silu_backward(grad, x, weight, bias)
    found = convolution.depthwise_silu_backward(grad[:1, :1, :1, :1].expand_as(grad), planar, weight, strided)
    assert found[0].shape == expected[0].shape
    ones = convolution.depthwise_silu_backward(torch.ones_like(grad) * grad[0, 0, 0, 0], x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, ones, strict=True))
    for shape in ((0, 3, 4, 10), (2, 0, 4, 10), (2, 3, 0, 10)):
        nothing = torch.empty(shape)
        assert convolution.depthwise_silu(nothing, weight, bias).shape == shape
        grads = convolution.depthwise_silu_backward(nothing, nothing, weight, bias)
        assert [g.shape for g in grads] == [nothing.shape, weight.shape, bias.shape]
        assert not grads[1].any()
        assert not grads[2].any()


@interpreted
@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        (
            "_add",
            lambda total, row, weights: total + row[0] * weights[0] + row[1] * weights[1],
            "the result of the conv",
        ),
        ("_add_products", lambda sums, row, g: sums, "the gradient of the weight of the convolution is off by 1.0e"),
    ],
)
def test_kernels_that_are_wrong_are_not_proven(monkeypatch, name, value, fault):
    assert proving._compare_convolution(CPU, torch.bfloat16, 4 * torch.finfo(torch.bfloat16).eps) == ""
    monkeypatch.setattr(convolution, name, value)
    assert proving._compare_convolution(CPU, torch.float32, 0.0).startswith(fault)
    monkeypatch.setattr(proving, "_problems", lambda *given: iter(()))
    assert proving.compare(CPU, torch.float32, "cross", 2, 3).startswith(fault)
    assert proving.compare(CPU, torch.float32, "cross", 1, 3) == ""
    assert proving.compare(CPU, torch.float32, "bidirectional", 2, 3) == ""


# --- as an operator --------------------------------------------------------------------------------------------------


@pytest.fixture
def _interpreted_layers(monkeypatch):
    """The layer takes the Triton kernels on the CPU."""
    monkeypatch.setattr(layers, "_convolutions", lambda x: convolution)
    monkeypatch.setattr("vmamba.nn.layers.fuses_depthwise_silu", layers.applies)


@interpreted
@pytest.mark.usefixtures("_interpreted_layers")
@pytest.mark.parametrize("has_bias", [True, False])
def test_operator(has_bias):
    x, weight, bias, grad = arguments((2, 3, 4, 5), has_bias)
    assert_right(x, weight, bias, grad, function=layers.depthwise_silu)
    leaves = [None if v is None else v.requires_grad_() for v in (x, weight, bias)]
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu.default, leaves)
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu_backward.default, (grad, *leaves))


@interpreted
@pytest.mark.usefixtures("_interpreted_layers")
def test_second_derivatives():
    given = [v for v in arguments((1, 3, 4, 5))[:3] if v is not None]
    results = []
    for function in (layers.depthwise_silu, exact):
        leaves = [v.clone().requires_grad_() for v in given]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_matches(list(results[0]), list(results[1]), 1e-5)


@interpreted
@pytest.mark.usefixtures("_interpreted_layers")
def test_one_node_for_all_sizes():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = ConvSiLU(8, 8, 3, padding=1, groups=8)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
    for shape in ((1, 3, 4, 8), (3, 5, 7, 8), (2, 6, 3, 8)):
        x = torch.randn(shape, requires_grad=True)
        torch.testing.assert_close(compiled(x), exact(x, layer.weight, layer.bias))
    compiled(x).sum().backward()
    expected = torch.autograd.grad(exact(x, layer.weight, layer.bias).sum(), [x, *layer.parameters()])
    assert_matches([x.grad, layer.weight.grad, layer.bias.grad], list(expected), 1e-5)
    for graph in graphs:
        calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
        assert [call for call in calls if "vmamba" in str(call)] == [torch.ops.vmamba.depthwise_silu]
        assert not any("conv" in str(call) for call in calls)
    assert len(graphs) <= 2  # a batch of one is a case of its own
    exported = torch.export.export(layer, (x.detach(),)).graph_module.code
    assert "vmamba" not in exported
    assert "conv2d" in exported


# --- on a GPU --------------------------------------------------------------------------------------------------------

SHAPES = [(4, 56, 56, 96), (3, 28, 28, 192), (2, 14, 14, 384), (5, 7, 7, 768), (1, 57, 65, 50), (1, 384, 384, 96)]


@pytest.fixture
def _triton():
    with use_backend("triton"):
        yield


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_against_float64(shape, dtype):
    x, weight, bias, grad = arguments(shape, shape[0] % 2 == 0, dtype, "cuda")
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    for kept in (weight, weight.to(dtype)):
        assert_right(x, kept, bias, grad, 2 * eps, 10 * eps)


@needs_gpu
@pytest.mark.parametrize("tile", [(7, 8, 32, 2), (7, 8, 32, 1), (2, 8, 32, 2), (1, 8, 32, 2), (14, 16, 32, 4)])
def test_gpu_tiles(tile):
    with use_tiles(Tile(*tile)):
        assert_right(*arguments((2, 30, 29, 96), device="cuda"))


@needs_gpu
def test_gpu_large_batch_repeats_bit_by_bit():
    """Here a program of the parameters' gradients takes several tiles."""
    x, weight, bias, grad = arguments((64, 56, 56, 96), True, torch.bfloat16, "cuda")
    first = convolution.depthwise_silu_backward(grad, x, weight, bias)
    for value, again in zip(first, convolution.depthwise_silu_backward(grad, x, weight, bias), strict=True):
        assert torch.equal(value, again)
    assert_right(x, weight, bias, grad, 0.01, 0.02)


def launches_of(function):
    """Names of the kernels that a function launches."""
    one = torch.ones(1, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one.add_(1)
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no launches here")
    return names[1:]


@needs_gpu
@pytest.mark.usefixtures("_triton")
@torch.no_grad()
def test_gpu_layer_is_one_launch():
    layer, x = ConvSiLU(96, 96, 3, padding=1, groups=96).cuda(), torch.randn(2, 20, 20, 96, device="cuda")
    layer(x)
    assert launches_of(lambda: layer(x)) == ["convolution_kernel"]
    with use_backend("eager"):
        assert "convolution_kernel" not in launches_of(lambda: layer(x))


def uses_kernels(layer, x):
    """Whether a layer's call reaches the Triton kernels."""
    calls, before = [], convolution.depthwise_silu
    convolution.depthwise_silu = lambda *given: (calls.append(1), before(*given))[1]
    try:
        layer(x)
    finally:
        convolution.depthwise_silu = before
    return bool(calls)


class Doubled(ConvSiLU):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@needs_gpu
@pytest.mark.usefixtures("_triton")
@torch.no_grad()
@torch.backends.cudnn.flags(enabled=False)  # no tf32
def test_gpu_what_users_change(monkeypatch):
    x, layer = torch.randn(2, 9, 10, 64, device="cuda"), ConvSiLU(64, 64, 3, padding=1, groups=64).cuda()

    def close(a, b):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    plain = exact(x, layer.weight, layer.bias)
    assert uses_kernels(layer, x)
    close(layer(x), plain)
    close(layer(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), plain)
    with use_backend("eager"):
        assert not uses_kernels(layer, x)
        close(layer(x), plain)
    handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
    close(layer(x), plain + 1)
    handle.remove()
    halved = copy.deepcopy(layer)
    parametrize.register_parametrization(halved, "weight", Halved())
    close(halved(x), exact(x, layer.weight / 2, layer.bias))
    doubled = Doubled(64, 64, 3, padding=1, groups=64, bias=False).cuda()
    close(doubled(x), exact(x, 2 * doubled.weight, None))
    assert not uses_kernels(doubled, x)
    own = copy.deepcopy(layer)
    own._conv_forward = lambda x, weight, bias: F.conv2d(x, 3 * weight, bias, padding=1, groups=64)
    close(own(x), exact(x, 3 * layer.weight, layer.bias))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x)
        close(layer(x), F.silu(x))
    close(torch.func.vmap(layer)(x[None])[0], plain)
    close(torch.func.functional_call(layer, {"weight": layer.weight * 2}, (x,)), exact(x, 2 * layer.weight, layer.bias))
    assert not uses_kernels(layer.double(), x.double())
    with pytest.raises(RuntimeError):
        layer(x)  # weights of another dtype
    with pytest.raises(RuntimeError):
        layer.cpu().float()(x)
    dense = ConvSiLU(64, 64, 3, padding=1).cuda()
    assert not uses_kernels(dense, x)
    assert layer.cuda()(x[:0]).shape == (0, 9, 10, 64)


@needs_gpu
@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_autocast(dtype):
    layer, x = ConvSiLU(64, 64, 3, padding=1, groups=64).cuda(), torch.randn(2, 9, 10, 64, device="cuda")
    x.requires_grad_()
    with torch.autocast("cuda", dtype):
        assert uses_kernels(layer, x)
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    given = [v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias)]
    exact(*given).square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    assert_matches([x.grad, layer.weight.grad, layer.bias.grad], [v.grad for v in given], tolerance)


@needs_gpu
@pytest.mark.usefixtures("_triton")
def test_gpu_derivatives_of_every_kind():
    x, weight, bias, _ = arguments((1, 5, 6, 32), device="cuda")
    layer = ConvSiLU(32, 32, 3, padding=1, groups=32).cuda()
    layer.load_state_dict({"weight": weight, "bias": bias})
    with torch.backends.cudnn.flags(enabled=False):  # no tf32
        results = []
        for function in (layer, lambda x: exact(x, layer.weight, layer.bias)):
            leaves = [x.clone().requires_grad_(), *layer.parameters()]
            first = torch.autograd.grad(function(leaves[0]).square().sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        assert_matches(list(results[0]), list(results[1]), 1e-4)
        tangent = torch.ones_like(x)
        with torch.no_grad():
            found = torch.func.jvp(layer, (x,), (tangent,))
            expected = torch.func.jvp(lambda x: exact(x, weight, bias), (x,), (tangent,))
        assert_matches(list(found), list(expected), 1e-5)


@needs_gpu
@pytest.mark.usefixtures("_triton")
def test_gpu_compiled():
    torch._dynamo.reset()
    layer = ConvSiLU(96, 96, 3, padding=1, groups=96).cuda()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for shape in ((2, 20, 31, 96), (3, 17, 16, 96), (1, 40, 40, 96)):
        leaves = [torch.randn(shape, device="cuda", requires_grad=True), *layer.parameters()]
        found, expected = compiled(leaves[0]), layer(leaves[0])
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)]
        assert_matches(list(grads[0]), list(grads[1]), 1e-5)
    with torch.no_grad():
        compiled(leaves[0])
        assert launches_of(lambda: compiled(leaves[0])) == ["convolution_kernel"]
        exported = torch.export.export(layer, (leaves[0].detach(),)).graph_module.code
    assert "vmamba" not in exported


@needs_gpu
def test_gpu_sizes_are_not_specialised():
    """A new image size is no reason to compile again."""
    weight = torch.randn(32, 1, 3, 3, device="cuda")

    def count():
        caches = convolution.convolution_kernel.device_caches.values()
        return sum(len(cache[0]) for cache in caches)

    with use_tiles(Tile(7, 8, 32, 2)):
        convolution.depthwise_silu(torch.randn(1, 40, 40, 32, device="cuda"), weight, None)
        before = count()
        for shape in ((2, 41, 32, 32), (1, 1, 1, 32), (16, 48, 64, 32)):
            convolution.depthwise_silu(torch.randn(shape, device="cuda"), weight, None)
        assert count() == before


@needs_gpu
@pytest.mark.usefixtures("_triton")
def test_gpu_graph_capture():
    layer, x = ConvSiLU(64, 64, 3, padding=1, groups=64).cuda(), torch.randn(2, 9, 10, 64, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


@needs_gpu
def test_gpu_more_than_two_to_the_31_elements():
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < 30e9:
        pytest.skip(f"needs 30 GB of free GPU memory, found {free / 1e9:.0f}")
    weight = torch.randn(96, 1, 3, 3, device="cuda")
    for shape in ((9, 1600, 1600, 96), (1, 4800, 4800, 96)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        assert x.numel() > 2**31
        y = convolution.depthwise_silu(x, weight, None)
        torch.testing.assert_close(y[-1:, -50:], convolution.depthwise_silu(x[-1:, -51:], weight, None)[:, 1:])
        del x, y


@needs_gpu
def test_gpu_is_proven():
    assert choose_backend("triton", torch.device("cuda")).name == "triton"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounding = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        assert proving._compare_convolution(torch.device("cuda"), dtype, rounding) == ""
