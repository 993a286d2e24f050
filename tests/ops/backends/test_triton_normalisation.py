"""LayerNorm's Triton kernels: in the interpreter, as an operator, as a layer, and on a GPU."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from compiling import results_of
from scans import assert_captured, assert_matches, launches_of
from torch import nn
from torch.nn.utils import parametrize

from vmamba.nn import LayerNorm
from vmamba.ops import layers
from vmamba.ops.backends import choose_backend, proving, triton, use_backend

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(triton.unavailable(CPU) is not None, reason=str(triton.unavailable(CPU)))
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or triton.unavailable(torch.device("cuda")) is not None, reason="needs a GPU"
)
if triton.unavailable(CPU) is None or torch.cuda.is_available():
    from vmamba.ops.backends.triton import normalisation

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(layers, "_WORTHWHILE", 0)


def exact(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def arguments(shape, dtype=FLOAT, wanted=FLOAT, device="cpu"):
    """x with a mean of its own in each row, weight, bias and the gradient of the result."""
    x = torch.randn(shape, device=device) * 2 + torch.randn(*shape[:-1], 1, device=device)
    weight, bias = torch.randn(2, shape[-1], device=device)
    return x.to(dtype), weight, bias, torch.randn(shape, device=device).to(wanted)


def rounding(dtype):
    return 2e-6 if dtype == FLOAT else torch.finfo(dtype).eps


def assert_right(x, weight, bias, grad, eps=1e-5, function=None):
    """The kernels, or what `function` makes of x, weight and bias, against torch in float64."""
    leaves = [v.detach().double().requires_grad_() for v in (x, weight, bias)]
    expected = exact(*leaves, eps)
    expected_grads = torch.autograd.grad(expected, leaves, grad.double())
    if function is None:
        y = normalisation.layer_norm(x, weight, bias, eps, grad.dtype)
        grads = normalisation.layer_norm_backward(grad, x, weight, bias, eps)
    else:
        given = [v.detach().requires_grad_() for v in (x, weight, bias)]
        y = function(*given)
        grads = torch.autograd.grad(y, given, grad)
    assert y.is_contiguous()
    assert y.dtype == grad.dtype
    assert_matches([y.detach()], [expected.detach()], rounding(y.dtype))
    for value, given, reference in zip(grads, (x, weight, bias), expected_grads, strict=True):
        assert value.dtype == given.dtype
        assert_matches([value], [reference], 5 * rounding(value.dtype))


# --- in the interpreter ----------------------------------------------------------------------------------------------

# 5: a part that is not full; 130 and 300: the last of several; 96, 192 and 288: parts of 32 and 64; 1500: all warps
SHAPES = [
    (1, 2),
    (3, 5),
    (17, 33),
    (2, 3, 4, 32),
    (5, 130),
    (33, 96),
    (9, 192),
    (9, 288),
    (3, 300),
    (2, 1500),
    (1, 4095),
]


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "wanted"), [(FLOAT, FLOAT), (BFLOAT, FLOAT), (HALF, HALF)])
def test_against_float64(shape, dtype, wanted):
    assert_right(*arguments(shape, dtype, wanted))


@interpreted
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_parameters_of_half_precision(dtype):
    x, weight, bias, grad = arguments((20, 40), dtype, dtype)
    assert_right(x, weight.to(dtype), bias.to(dtype), grad)
    assert_right(x, weight.to(dtype), bias, grad.float())


@interpreted
def test_a_large_mean_leaves_the_variance_alone():
    x, weight, bias, _ = arguments((6, 48))
    x = (x * 64).round() / 64 + 4096  # such numbers are exact; the mean of squares would lose all digits
    y = normalisation.layer_norm(x, weight, bias, 1e-5, FLOAT)
    assert_matches([y], [exact(x.double(), weight.double(), bias.double())], 2e-4)  # half a unit of the mean


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps_and_rows_that_do_not_exist(eps):
    x, weight, bias, grad = arguments((5, 24))  # of 64 that a program has
    assert_right(x, weight, bias, grad, eps)


@interpreted
def test_constant_rows_and_not_a_number():
    x, weight, bias, grad = arguments((4, 10))
    x[1], x[2, 3] = 7.0, torch.nan
    y = normalisation.layer_norm(x, weight, bias, 1e-5, FLOAT)
    assert torch.equal(y[1], bias)
    assert torch.equal(y.isnan().any(1), torch.tensor([False, False, True, False]))
    assert y[2].isnan().all()
    grad_x, grad_weight, grad_bias = normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5)
    assert torch.equal(grad_x.isnan().all(1), torch.tensor([False, False, True, False]))
    assert not grad_x[[0, 1, 3]].isnan().any()
    assert grad_weight.isnan().all()
    assert_matches([grad_bias], [grad.sum(0)], 1e-6)


@interpreted
def test_repeats_bit_by_bit_and_shares_add_up(monkeypatch):
    x, weight, bias, grad = arguments((300, 96))
    many = normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5)
    for value, again in zip(many, normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5), strict=True):
        assert torch.equal(value, again)
    monkeypatch.setattr(normalisation, "multiprocessors", lambda x: 1)  # several blocks each, fewer for the last
    few = normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5)
    assert torch.equal(few[0], many[0])
    assert not torch.equal(few[1], many[1])
    assert_matches(list(few), list(many), 1e-6)
    assert_right(x, weight, bias, grad)


@interpreted
def test_strides_and_nothing():
    x, weight, bias, grad = arguments((4, 6, 20))
    y = normalisation.layer_norm(x, weight, bias, 1e-5, FLOAT)
    strided = torch.stack([weight, weight], 1)[:, 0]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(normalisation.layer_norm(turned, strided, bias, 1e-5, FLOAT), y)
    found = normalisation.layer_norm_backward(grad[:1, :1].expand_as(grad), turned, strided, bias, 1e-5)
    expected = normalisation.layer_norm_backward(grad[:1, :1].repeat(4, 6, 1), x, weight, bias, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    nothing = x[:0]
    assert normalisation.layer_norm(nothing, weight, bias, 1e-5, BFLOAT).shape == (0, 6, 20)
    grads = normalisation.layer_norm_backward(nothing, nothing, weight, bias, 1e-5)
    assert [g.shape for g in grads] == [nothing.shape, weight.shape, bias.shape]
    assert not grads[1].any()


@interpreted
@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("_mean", lambda values, CHANNELS, PARTS: values[0] * 0.0, "the result of LayerNorm"),
        (
            "_add",
            lambda of_weight, of_bias, normal, grad, w, PARTS: (
                of_weight, of_bias, tuple(g * v for g, v in zip(grad, w, strict=True))
            ),
            "the gradient of the weight of LayerNorm is off by 1.0e",
        ),
    ],
)  # fmt: skip
def test_kernels_that_are_wrong_are_not_proven(monkeypatch, name, value, fault):
    assert proving._compare_normalisation(CPU, BFLOAT, 4 * torch.finfo(BFLOAT).eps) == ""
    monkeypatch.setattr(normalisation, name, value)
    assert proving._compare_normalisation(CPU, FLOAT, 0.0).startswith(fault)
    monkeypatch.setattr(proving, "_problems", lambda *given: iter(()))
    assert proving.compare(CPU, FLOAT, "cross", 2, 3).startswith(fault)
    assert proving.compare(CPU, FLOAT, "cross", 1, 3) == ""
    assert proving.compare(CPU, FLOAT, "bidirectional", 2, 3) == ""


# --- what the compiler makes of them ---------------------------------------------------------------------------------

COMPILE = """
import json, re, sys
import triton
from compiling import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vmamba.ops.backends.triton import normalisation

backend, architecture, cases = json.loads(sys.argv[1])
for image, result, channels in cases:
    for kernel in (normalisation.norm_kernel, normalisation.norm_backward_kernel):
        options = normalisation._cut((1000, channels))[2]
        chosen = {"num_warps": options["num_warps"]}
        if kernel is normalisation.norm_backward_kernel and backend == "cuda":
            chosen["maxnreg"] = normalisation._residents(options)[1]
        del options["num_warps"]
        types = {"x": image, "grad_x": image, "y": result, "grad": result, "eps": "fp32"}
        types |= dict.fromkeys(("weight", "bias", "parts"), "*fp32")
        signature = {n: "constexpr" if n in options else types.get(n, "i32") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
        compiled = triton.compile(ASTSource(kernel, signature, options, aligned), target=target, options=chosen)
        found = {"kernel": kernel.__name__, "channels": channels, "shared": compiled.metadata.shared,
                 "parts": options["PARTS"]}
        if backend == "cuda":
            found |= usage_of(compiled)
            found["loads"] = re.findall(r"ld\\.global\\.[\\w.]+", compiled.asm["ptx"])
        print(json.dumps(found))
"""

CASES = [("*bf16", "*fp32", 96), ("*bf16", "*fp32", 384), ("*bf16", "*fp32", 768)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; its packages bring ptxas")
@pytest.mark.parametrize(
    ("target", "cases"),
    [
        (("cuda", 90), CASES),
        (("cuda", 90), [("*fp32", "*fp32", 192), ("*fp32", "*fp32", 768), ("*fp16", "*fp16", 5)]),
        (("cuda", 80), [("*bf16", "*bf16", 96)]),
        (("hip", "gfx942"), [("*bf16", "*fp32", 96)]),
    ],
)
def test_nothing_spills_and_neighbouring_channels_are_loaded_at_once(target, cases):
    results = results_of(COMPILE, *target, cases)
    assert len(results) == 2 * len(cases)
    for found, (image, result, channels) in zip(results, [case for case in cases for _ in range(2)], strict=True):
        is_forward, parts = found["kernel"] == "norm_kernel", found["parts"]
        if is_forward and channels % 32 == 0:
            assert found["shared"] == 0, found  # nothing goes through memory from thread to thread
        if target[0] != "cuda":
            continue
        assert found["stack"] == 0, found
        if channels % 4 == 0:
            wide = {"*bf16": "ld.global.v2.b32", "*fp32": "ld.global.v4.b32"}
            images = [image] if is_forward else [image, image, result, result]
            expected = sorted(wide[kind] for kind in (*images, *["*fp32"] * (2 if is_forward else 1))) * parts
            assert sorted(found["loads"]) == sorted(expected), found
    assert [f for f in results if f["kernel"] == "norm_kernel" and f.get("registers", 0) > 64] == []


# --- as a layer, in the interpreter and on a GPU ---------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Where the layer takes the Triton kernels, on the CPU interpreted."""
    monkeypatch.setitem(layers._FUSING, "cpu", "triton")
    with use_backend("triton"):
        yield request.param


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with each call of the kernels' forward pass."""
    calls, before = [], normalisation.layer_norm
    monkeypatch.setattr(normalisation, "layer_norm", lambda *given: (calls.append(1), before(*given))[1])
    return calls


def layer_on(device, channels=8, kind=LayerNorm, **options):
    layer = kind(channels, device=device, **options)
    for value in layer.parameters():
        nn.init.normal_(value)
    return layer


def test_small_ones_are_left_to_torch(device, launches, monkeypatch):
    layer = layer_on(device)
    monkeypatch.setattr(layers, "_WORTHWHILE", 48)
    for rows, count in ((5, 0), (6, 1)):
        x = torch.randn(rows, 8, device=device)
        assert_matches([layer(x)], [F.layer_norm(x, (8,), layer.weight, layer.bias)], 1e-5)
        assert len(launches) == count


@pytest.mark.parametrize(("dtype", "wanted"), [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (BFLOAT, FLOAT)])
def test_operator(device, dtype, wanted):
    x, weight, bias, grad = arguments((2, 3, 4, 5), dtype, wanted, device)
    weight, bias = (weight, bias) if wanted == FLOAT else (weight.to(wanted), bias.to(wanted))

    def function(*given):
        return torch.ops.vmamba.layer_norm(*given, 1e-5, wanted == FLOAT)

    assert_right(x, weight, bias, grad, function=function)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    torch.library.opcheck(torch.ops.vmamba.layer_norm.default, (*leaves, 1e-5, wanted == FLOAT))
    torch.library.opcheck(torch.ops.vmamba.layer_norm_backward.default, (grad, *leaves, 1e-5))


def test_derivatives_of_every_kind(device, launches):
    layer, x = layer_on(device, 5), torch.randn(1, 3, 4, 5, device=device)
    weight, bias = layer.weight, layer.bias
    results = []
    for function in (layer, lambda x: exact(x, weight, bias)):
        leaves = [x.clone().requires_grad_(), weight, bias]
        first = torch.autograd.grad(function(leaves[0]).pow(3).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert len(launches) == 1
    assert_matches(list(results[0]), list(results[1]), 1e-4)
    with torch.no_grad():
        found = torch.func.jvp(layer, (x,), (torch.arange(5.0, device=device).expand_as(x),))
        expected = torch.func.jvp(
            lambda x: exact(x, weight, bias), (x,), (torch.arange(5.0, device=device).expand_as(x),)
        )
        assert_matches(list(found), list(expected), 1e-5)
        torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], expected[0])
        twice = torch.func.functional_call(layer, {"weight": 2 * weight}, (x,))
        torch.testing.assert_close(twice, exact(x, 2 * weight, bias))
    frozen = x.clone().requires_grad_()
    layer.requires_grad_(False)(frozen).pow(3).sum().backward()
    assert_matches([frozen.grad], [torch.func.grad(lambda x: exact(x, weight, bias).pow(3).sum())(x)], 1e-5)


def test_graphs_have_torch_s_own(device, launches):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer, x = layer_on(device), torch.randn(3, 5, 8, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(x), exact(x, layer.weight, layer.bias))
    codes = [graph.code for graph in graphs]
    codes.append(torch.export.export(layer, (x,)).graph_module.code)
    codes.append(torch.fx.symbolic_trace(nn.Sequential(layer)).code)
    assert len(codes) == 3
    assert not any("vmamba.layer_norm" in code for code in codes)
    assert all("layer_norm" in code for code in codes[:2])
    assert not launches


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("given", [FLOAT, BFLOAT, HALF])
def test_autocast(device, dtype, given, launches):
    layer = layer_on(device)
    x, _, _, grad = arguments((3, 5, 8), given, FLOAT, device)

    def function(x, weight, bias):
        with torch.autocast(device, dtype):
            return layers.layer_norm(x, weight, bias, layer.eps)

    assert_right(x, layer.weight, layer.bias, grad, function=function)
    with torch.autocast(device, dtype):
        assert layer(x).dtype == FLOAT
        assert layer.to(dtype)(x).dtype == FLOAT
    assert len(launches) == 3


class Doubled(LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@torch.no_grad()
def test_what_users_change(device, launches, monkeypatch):
    close = torch.testing.assert_close
    layer, x = layer_on(device, eps=1e-3), torch.randn(2, 4, 5, 8, device=device)

    def plain(x=x, scale=1):
        return exact(x, scale * layer.weight, layer.bias, 1e-3)

    close(layer(x), plain())
    close(layer(x.transpose(0, 1)), plain().transpose(0, 1))
    handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
    close(layer(x), plain() + 1)
    handle.remove()
    halved = copy.deepcopy(layer)
    parametrize.register_parametrization(halved, "weight", Halved())
    close(halved(x), plain(scale=0.5))
    layer.weight.mul_(3)
    close(layer(x), plain())
    doubled = Doubled(8, eps=1e-3, device=device)
    doubled.load_state_dict(layer.state_dict())
    close(doubled(x), 2 * plain())
    assert len(launches) == 6
    # From here on torch's own.
    with use_backend("eager"):
        close(layer(x), plain())
    own = copy.deepcopy(layer)
    own.forward = lambda x: 3 * x
    close(own(x), 3 * x)
    with monkeypatch.context() as patch:
        patch.setattr(nn.LayerNorm, "forward", lambda self, x: 4 * x)
        close(layer(x), 4 * x)
    close(layer(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), plain())
    for options in ({"bias": False}, {"elementwise_affine": False}):
        other = layer_on(device, **options)
        close(other(x), nn.LayerNorm.forward(other, x))
    whole = layer_on(device, (5, 8))
    close(whole(x), F.layer_norm(x, (5, 8), whole.weight, whole.bias))
    assert layer(x[:0]).shape == (0, 4, 5, 8)
    double = copy.deepcopy(layer).double()
    close(double(x.double()), exact(x.double(), double.weight, double.bias, 1e-3))
    with pytest.raises(RuntimeError):
        layer(x[..., :7])
    assert not layers.fuses_layer_norm(x.bfloat16(), layer.weight, layer.bias)  # what torch makes of it
    if device == "cuda":
        with pytest.raises(RuntimeError):
            layer.cpu()(x)
    assert len(launches) == 6


@interpreted
def test_the_cpu_has_its_own(launches):
    layer, x = layer_on("cpu"), torch.randn(3, 8)
    with use_backend("triton"), torch.no_grad():
        torch.testing.assert_close(layer(x), exact(x, layer.weight, layer.bias))
    assert not launches


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_SHAPES = [
    (128 * 56 * 56, 96), (128 * 28 * 28, 192), (128 * 14 * 14, 384), (128 * 7 * 7, 768),
    (1, 1), (1001, 50), (37, 1536), (5, 4096),
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "wanted"), [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (BFLOAT, FLOAT), (HALF, FLOAT)]
)
def test_gpu_against_float64(shape, dtype, wanted):
    x, weight, bias, grad = arguments(shape, dtype, wanted, "cuda")
    if shape[-1] == 1:
        assert torch.equal(normalisation.layer_norm(x, weight, bias, 1e-5, wanted), bias.expand(shape).to(wanted))
        return
    for parameters in {FLOAT, wanted}:
        assert_right(x, weight.to(parameters), bias.to(parameters), grad)


@needs_gpu
def test_gpu_repeats_bit_by_bit():
    x, weight, bias, grad = arguments((128 * 28 * 28, 192), BFLOAT, FLOAT, "cuda")
    first = normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5)
    for value, again in zip(first, normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5), strict=True):
        assert torch.equal(value, again)


@needs_gpu
@pytest.mark.parametrize("given", [FLOAT, BFLOAT])
def test_gpu_is_as_torch_s_own_under_autocast(given):
    layer, x = layer_on("cuda", 96), torch.randn(2, 56, 56, 96, device="cuda").to(given)
    results = []
    for name in ("triton", "eager"):
        leaf = x.clone().requires_grad_()
        with use_backend(name), torch.autocast("cuda", BFLOAT):
            y = layer(leaf)
        grads = torch.autograd.grad(y.pow(3).sum(), [leaf, *layer.parameters()])
        results.append([y.detach(), *grads])
    assert [v.dtype for v in results[0]] == [v.dtype for v in results[1]]
    assert_matches(results[0], results[1], 2e-5 if given == FLOAT else rounding(given) * 2)


@needs_gpu
@torch.no_grad()
def test_gpu_layer_is_one_launch():
    layer, x = layer_on("cuda", 96), torch.randn(2, 20, 20, 96, device="cuda", dtype=BFLOAT)
    with torch.autocast("cuda", BFLOAT):
        with use_backend("triton"):
            layer(x)
            assert launches_of(lambda: layer(x)) == ["norm_kernel"]
        with use_backend("eager"):
            assert "norm_kernel" not in launches_of(lambda: layer(x))


@needs_gpu
def test_gpu_sizes_are_not_specialised():
    """A new number of rows is no reason to compile again."""
    kernels = normalisation.norm_kernel, normalisation.norm_backward_kernel

    def count():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def both(rows):
        x, weight, bias, grad = arguments((rows, 32), device="cuda")
        normalisation.layer_norm(x, weight, bias, 1e-5, FLOAT)
        normalisation.layer_norm_backward(grad, x, weight, bias, 1e-5)

    both(50)
    before = count()
    for rows in (1, 16, 1600, 100_001):
        both(rows)
    assert count() == before


@needs_gpu
@use_backend("triton")
def test_gpu_graph_capture():
    layer, x = layer_on("cuda", 64), torch.randn(2, 9, 10, 64, device="cuda")
    assert_captured(layer, x)


@needs_gpu
def test_gpu_more_than_two_to_the_31_elements():
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < 30e9:
        pytest.skip(f"needs 30 GB of free GPU memory, found {free / 1e9:.0f}")
    x = torch.randn(2**31 // 96 + 1000, 96, device="cuda", dtype=BFLOAT)
    _, weight, bias, _ = arguments((1, 96), device="cuda")
    y = normalisation.layer_norm(x, weight, bias, 1e-5, BFLOAT)
    assert torch.equal(y[-500:], normalisation.layer_norm(x[-500:], weight, bias, 1e-5, BFLOAT))
    grad_x, _, _ = normalisation.layer_norm_backward(y, x, weight, bias, 1e-5)
    last, _, _ = normalisation.layer_norm_backward(y[-500:], x[-500:], weight, bias, 1e-5)
    assert torch.equal(grad_x[-500:], last)


@needs_gpu
def test_gpu_is_proven():
    assert choose_backend("triton", torch.device("cuda")).name == "triton"
    for dtype in (FLOAT, BFLOAT, HALF):
        tolerance = 4 * torch.finfo(dtype).eps if dtype != FLOAT else 0.0
        assert proving._compare_normalisation(torch.device("cuda"), dtype, tolerance) == ""
