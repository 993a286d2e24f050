"""The depthwise convolution's Triton kernels: in the interpreter, as an operator, and on a GPU."""

from __future__ import annotations

import copy
import importlib.util
import re

import pytest
import torch
import torch.nn.functional as F
from compiling import results_of
from scans import assert_captured, assert_matches, launches_of
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
        return convolution._cut(shape, convolution.TILES)[1].rows

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
    monkeypatch.setattr(convolution, "multiprocessors", lambda x: 1)  # several tiles each, fewer for the last
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


# --- what the compiler makes of them ---------------------------------------------------------------------------------

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vmamba.ops.backends.triton import convolution

backend, architecture, image, tile, channels = json.loads(sys.argv[1])
found = []
for kernel in (convolution.convolution_kernel, convolution.gradient_kernel):
    sizes = dict(zip(("ROWS", "COLUMNS", "BLOCK"), tile))
    constants = {"bias": None, "CHANNELS": channels, "FLIP": False, "SILU": True, **sizes}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"weight": "*fp32", "parts": "*fp32"} | dict.fromkeys(("x", "y", "grad", "grad_z"), image)
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": tile[3], "num_stages": 1})
    found.append([compiled.asm.get("ptx", ""), compiled.metadata.shared])
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; its packages bring ptxas")
@pytest.mark.parametrize(
    ("target", "image", "channels", "loads"),
    [
        (("cuda", 90), "*bf16", 96, "ld.global.v2.b32"),
        (("cuda", 80), "*fp32", 192, "ld.global.v4.b32"),
        (("hip", "gfx942"), "*bf16", 96, None),
    ],
)
def test_neighbouring_channels_are_loaded_at_once(target, image, channels, loads):
    *_, found = results_of(COMPILE, *target, image, [7, 8, 32, 2], channels)
    (forward, shared), (gradient, _) = found
    assert shared == 0  # nothing goes from thread to thread
    if loads is not None:
        for code, rows in ((forward, 3 * 9), (gradient, 3 * 9 + 7)):
            found = re.findall(r"ld\.global\.[\w.]+", code)
            assert found.count(loads) == rows, sorted(set(found))
            assert not any(load.endswith("b16") for load in found)


# --- as a layer, in the interpreter and on a GPU ---------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Where the layer takes the Triton kernels, on the CPU interpreted; torch multiplies in float32, not tf32."""
    monkeypatch.setitem(layers._FUSING, "cpu", "triton")
    with use_backend("triton"), torch.backends.cudnn.flags(enabled=False):
        yield request.param


def layer_on(device, channels=8, kind=ConvSiLU, **options):
    return kind(channels, channels, 3, padding=1, groups=channels, device=device, **options)


@pytest.mark.parametrize("has_bias", [True, False])
def test_operator(device, has_bias):
    x, weight, bias, grad = arguments((2, 3, 4, 5), has_bias, device=device)
    assert_right(x, weight, bias, grad, function=layers.depthwise_silu)
    leaves = [None if v is None else v.requires_grad_() for v in (x, weight, bias)]
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu.default, leaves)
    torch.library.opcheck(torch.ops.vmamba.depthwise_silu_backward.default, (grad, *leaves))


def test_derivatives_of_every_kind(device):
    layer, x = layer_on(device, 5), torch.randn(1, 3, 4, 5, device=device)
    weight, bias = layer.weight, layer.bias
    results = []
    for function in (layer, lambda x: exact(x, weight, bias)):
        leaves = [x.clone().requires_grad_(), weight, bias]
        first = torch.autograd.grad(function(leaves[0]).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_matches(list(results[0]), list(results[1]), 1e-5)
    with torch.no_grad():
        found = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        expected = torch.func.jvp(lambda x: exact(x, weight, bias), (x,), (torch.ones_like(x),))
        assert_matches(list(found), list(expected), 1e-5)
        torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], expected[0])
        twice = torch.func.functional_call(layer, {"weight": 2 * weight}, (x,))
        torch.testing.assert_close(twice, exact(x, 2 * weight, bias))
    frozen = x.clone().requires_grad_()
    layer.requires_grad_(False)(frozen).sum().backward()
    torch.testing.assert_close(frozen.grad, torch.func.grad(lambda x: exact(x, weight, bias).sum())(x))


def test_one_node_for_all_sizes(device):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = layer_on(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
    for shape in ((1, 3, 4, 8), (3, 5, 7, 8), (2, 6, 3, 8)):
        x = torch.randn(shape, requires_grad=True, device=device)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_autocast(device, dtype, is_compiled, monkeypatch):
    torch._dynamo.reset()
    layer, x = layer_on(device), torch.randn(1, 3, 9, 8, device=device, requires_grad=True)
    monkeypatch.setattr(layers.native, "depthwise_silu", None)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
    with torch.autocast(device, dtype):
        y = run(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    given = [v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias)]
    exact(*given).square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    assert_matches([x.grad, layer.weight.grad, layer.bias.grad], [v.grad for v in given], tolerance)


class Doubled(ConvSiLU):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with each call of the kernels' forward pass."""
    calls, before = [], convolution.depthwise_silu
    monkeypatch.setattr(convolution, "depthwise_silu", lambda *given: (calls.append(1), before(*given))[1])
    return calls


@torch.no_grad()
def test_what_users_change(device, launches, monkeypatch):
    close = torch.testing.assert_close
    layer, x = layer_on(device), torch.randn(2, 4, 5, 8, device=device)
    plain = exact(x, layer.weight, layer.bias)
    close(layer(x), plain)
    close(layer(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), plain)
    handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
    close(layer(x), plain + 1)
    handle.remove()
    halved = copy.deepcopy(layer)
    parametrize.register_parametrization(halved, "weight", Halved())
    close(halved(x), exact(x, layer.weight / 2, layer.bias))
    layer.weight.mul_(3)
    close(layer(x), exact(x, layer.weight, layer.bias))
    assert len(launches) == 5
    # From here on torch's own.
    with use_backend("eager"):
        close(layer(x), exact(x, layer.weight, layer.bias))
    doubled = layer_on(device, kind=Doubled, bias=False)
    close(doubled(x), exact(x, 2 * doubled.weight, None))
    own = copy.deepcopy(layer)
    own._conv_forward = lambda x, weight, bias: F.conv2d(x, 3 * weight, bias, padding=1, groups=8)
    close(own(x), exact(x, 3 * layer.weight, layer.bias))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x)
        close(layer(x), F.silu(x))
    for options in ({"dilation": 2, "padding": 2}, {"padding_mode": "circular", "padding": 1}, {"stride": 2}):
        other = ConvSiLU(8, 8, 3, groups=8, device=device, **options)
        close(other(x), F.silu(nn.Conv2d.forward(other, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
    assert layer(x[:0]).shape == (0, 4, 5, 8)
    with pytest.raises(RuntimeError, match="same"):
        layer(x.bfloat16())
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 4, 5, 7, device=device))
    close(copy.deepcopy(layer).double()(x.double()), exact(x.double(), layer.weight.double(), layer.bias.double()))
    if device == "cuda":
        with pytest.raises(RuntimeError):
            layer(x.cpu())
        with pytest.raises(RuntimeError):
            layer.cpu()(x)
    assert len(launches) == 5


# --- on a GPU --------------------------------------------------------------------------------------------------------

SHAPES = [(4, 56, 56, 96), (3, 28, 28, 192), (2, 14, 14, 384), (5, 7, 7, 768), (1, 57, 65, 50), (1, 384, 384, 96)]


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


@needs_gpu
@torch.no_grad()
def test_gpu_layer_is_one_launch():
    layer, x = ConvSiLU(96, 96, 3, padding=1, groups=96).cuda(), torch.randn(2, 20, 20, 96, device="cuda")
    with use_backend("triton"):
        layer(x)
        assert launches_of(lambda: layer(x)) == ["convolution_kernel"]
    with use_backend("eager"):
        assert "convolution_kernel" not in launches_of(lambda: layer(x))


@needs_gpu
@use_backend("triton")
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
@use_backend("triton")
def test_gpu_graph_capture():
    layer, x = ConvSiLU(64, 64, 3, padding=1, groups=64).cuda(), torch.randn(2, 9, 10, 64, device="cuda")
    assert_captured(layer, x)


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
