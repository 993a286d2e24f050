"""The convolution that compiled graphs have as an operator on a GPU: torch's own numbers and derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compiling import kept_graphs, operators_in
from scans import assert_matches
from torch import nn

from vmamba.nn import ConvSiLU, layers
from vmamba.nn.layers import GridConv2d
from vmamba.ops import layers as functions

DOUBLE = torch.float64
# Kernel, stride, padding, dilation and groups, of 4 channels.
GEOMETRIES = {
    "as in the models": ((3, 3), (2, 2), (1, 1), (1, 1), 1),
    "patches": ((2, 2), (2, 2), (0, 0), (1, 1), 1),
    "uneven": ((3, 2), (1, 3), (2, 0), (1, 1), 1),
    "dilated": ((2, 3), (1, 1), (1, 2), (2, 2), 1),
    "in groups": ((3, 3), (2, 1), (1, 1), (1, 1), 2),
    "depthwise": ((3, 3), (1, 1), (1, 1), (1, 1), 4),
    "points": ((1, 1), (1, 1), (0, 0), (1, 1), 1),
}
geometries = pytest.mark.parametrize(
    ("kernel", "options"), [(g[0], g[1:]) for g in GEOMETRIES.values()], ids=GEOMETRIES
)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ]
)
def device(request, monkeypatch):
    """Where compiled graphs have the operator: a GPU, and a CPU that is taken for one."""
    monkeypatch.setitem(functions._FUSING, "cpu", "triton")
    torch._dynamo.reset()
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield request.param


def plain(x, weight, *options):
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, *options).permute(0, 2, 3, 1)


def arguments(kernel, groups, device, dtype=DOUBLE):
    return (
        torch.randn(2, 4, 5, 4, device=device, dtype=dtype),
        torch.randn(4, 4 // groups, *kernel, device=device, dtype=dtype),
    )


# --- the operator ----------------------------------------------------------------------------------------------------


@geometries
def test_operator(device, kernel, options):
    operator = torch.ops.vmamba.grid_convolution
    x, weight = arguments(kernel, options[-1], device)
    y = operator(x, weight, *options)
    assert y.is_contiguous()
    torch.testing.assert_close(y, plain(x, weight, *options))
    # However the image lies in memory.
    planar = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert operator(planar, weight, *options).is_contiguous()
    torch.library.opcheck(operator.default, (planar, weight, *options))
    torch.library.opcheck(operator.default, (x.requires_grad_(), weight.requires_grad_(), *options))
    nothing = operator(x[:0], weight, *options)
    assert nothing.shape == (0, *y.shape[1:])


@geometries
def test_derivatives_of_every_kind(device, kernel, options):
    def operator(*given):
        return torch.ops.vmamba.grid_convolution(*given, *options)

    given = [value.requires_grad_() for value in arguments(kernel, options[-1], device)]
    assert torch.autograd.gradcheck(operator, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, given, fast_mode=True)
    results = []
    for function in (operator, lambda *given: plain(*given, *options)):
        first = torch.autograd.grad(function(*given).pow(3).sum(), given, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)])
    torch.testing.assert_close(results[0], results[1])


def test_frozen_arguments_and_transforms(device):
    options = GEOMETRIES["as in the models"][1:]
    x, weight = arguments((3, 3), 1, device)
    for names in ("x", "weight"):
        leaves = [x.detach().requires_grad_(names == "x"), weight.detach().requires_grad_(names == "weight")]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(torch.ops.vmamba.grid_convolution(*leaves, *options).square().sum(), wanted)
        expected = torch.autograd.grad(plain(*leaves, *options).square().sum(), wanted)
        torch.testing.assert_close(found, expected)
    batches = torch.stack([x, 2 * x])
    found = torch.func.vmap(lambda x: torch.ops.vmamba.grid_convolution(x, weight, *options))(batches)
    torch.testing.assert_close(found[1], plain(2 * x, weight, *options))


# --- the layer -------------------------------------------------------------------------------------------------------


def assert_compiled(layer, x, wanted, tolerance=1e-5):
    """A compiled layer gives what it does otherwise, gradients too, and is the operator if that is wanted."""
    keep, graphs = kept_graphs()
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=keep)(x)
    assert [name for graph in graphs for name in operators_in(graph)] == (["vmamba.grid_convolution"] if wanted else [])
    assert any("conv2d" in graph.code for graph in graphs) != wanted
    torch._dynamo.reset()
    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        leaves = [x.detach().requires_grad_(), *layer.parameters()]
        y = function(leaves[0])
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert [value.dtype for value in results[0]] == [value.dtype for value in results[1]]
    assert_matches(*results, tolerance)


def layer_on(device, kernel=(3, 3), options=((2, 2), (1, 1), (1, 1), 1), kind=GridConv2d, **others):
    stride, padding, dilation, groups = options
    return kind(4, 4, kernel, stride, padding, dilation, groups, device=device, **others)


@geometries
@pytest.mark.parametrize("has_bias", [True, False])
def test_compiled(device, kernel, options, has_bias):
    layer = layer_on(device, kernel, options, bias=has_bias)
    assert_compiled(layer, torch.randn(2, 7, 6, 4, device=device), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_compiled_under_autocast(device, dtype, given):
    layer, x = layer_on(device), torch.randn(2, 7, 6, 4, device=device).to(given)
    with torch.autocast(device, dtype):
        assert_compiled(layer, x, True, 4 * torch.finfo(torch.bfloat16).eps)
        assert_compiled(layer.double(), x.double(), False)  # autocast leaves these alone


def test_compiled_in_other_dtypes(device):
    layer, x = layer_on(device), torch.randn(2, 7, 6, 4, device=device)
    for dtype in (torch.float64, torch.bfloat16):
        assert_compiled(copy.deepcopy(layer).to(dtype), x.to(dtype), True, torch.finfo(dtype).eps * 8)
    for one, other in ((layer, x.bfloat16()), (copy.deepcopy(layer).bfloat16(), x)):
        with pytest.raises(RuntimeError, match=r"(?i)type"):  # as outside
            torch.compile(one, fullgraph=True, backend="eager")(other)


def test_one_graph_for_every_size(device):
    layer = layer_on(device)
    keep, graphs = kept_graphs()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
    for shape in ((2, 7, 6, 4), (3, 8, 5, 4), (5, 13, 12, 4)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(compiled(x), layer(x))
    assert list(map(operators_in, graphs)) == [["vmamba.grid_convolution"]]


def test_a_convolution_with_silu(device):
    """One that is not depthwise."""
    layer = layer_on(device, kind=ConvSiLU)
    assert_compiled(layer, torch.randn(2, 7, 6, 4, device=device), True)


def test_outside_of_compiled_graphs_it_is_torch_s(device, monkeypatch):
    monkeypatch.setattr(layers, "convolution", None)  # which cannot be called
    layer, x = layer_on(device), torch.randn(2, 7, 6, 4, device=device)
    torch.testing.assert_close(layer(x), plain(x, layer.weight, *GEOMETRIES["as in the models"][1:]) + layer.bias)
    exported = torch.export.export(layer, (x,)).graph_module.code
    assert "conv2d" in exported
    assert "vmamba" not in exported
    with pytest.warns(FutureWarning):
        assert "vmamba::" not in str(torch.jit.trace(layer, x).inlined_graph)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(layer, fullgraph=True, backend="eager")(x)


def test_the_cpu_has_torch_s():
    torch._dynamo.reset()
    assert_compiled(layer_on("cpu"), torch.randn(2, 7, 6, 4), False)


class Doubled(GridConv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Own(GridConv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Wrapped(torch.Tensor):
    """As libraries that quantise have them."""


def test_what_users_change(device, monkeypatch):
    x = torch.randn(2, 7, 6, 4, device=device)
    for options in ({"padding_mode": "reflect"}, {"padding_mode": "circular"}):
        assert_compiled(layer_on(device, **options), x, False)
    for padding in ("same", "valid"):
        assert_compiled(layer_on(device, options=((1, 1), padding, (1, 1), 1)), x, False)
    assert_compiled(layer_on(device, kind=Doubled), x, False)
    assert_compiled(layer_on(device, kind=Own), x, True)
    layer = layer_on(device)
    before = layer(x)
    assert_compiled(layer, x[0].expand(2, 7, 6, 4), True)
    layer._conv_forward = lambda x, weight, bias: F.conv2d(x, 3 * weight, bias, 2, 1)
    assert_compiled(layer, x, False)
    assert not torch.equal(layer(x), before)
    del layer._conv_forward
    handle = layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    assert_compiled(layer, x, True)
    torch.testing.assert_close(layer(x), 2 * before)
    handle.remove()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: F.conv2d(x, 3 * weight, bias, 2, 1))
        assert_compiled(layer, x, False)
    assert_compiled(layer, x, True)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    keep, graphs = kept_graphs()
    torch.compile(layer, backend=keep)(x)
    assert not any(map(operators_in, graphs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_compiled_by_inductor(dtype):
    """In the grid's own layout, at both ends of the network around it."""
    torch._dynamo.reset()
    norm = nn.LayerNorm(64).to("cuda", dtype)
    network = nn.Sequential(GridConv2d(32, 64, 3, 2, 1), norm, GridConv2d(64, 64, 3, 2, 1, groups=64)).to("cuda", dtype)
    # torch 2.11's inductor fails at the norm's gradients, sums over open sizes that it splits.
    compiled = torch.compile(network, fullgraph=True, dynamic=torch.__version__ >= "2.14")
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    with torch.backends.cudnn.flags(allow_tf32=False):
        for shape in ((2, 30, 31, 32), (3, 17, 16, 32)):
            leaves = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True), *network.parameters()]
            results = []
            for function in (compiled, network):
                y = function(leaves[0])
                results.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
            assert results[0][0].is_contiguous()
            torch.testing.assert_close(results[0], results[1], atol=tolerance, rtol=tolerance)
