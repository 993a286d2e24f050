"""The Triton kernel of a stem's first half: in the interpreter, as an operator, as part of a stem, and on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from compiling import kept_graphs, results_of
from scans import assert_matches, launches_of
from torch import nn
from torch.nn.utils import parametrize

from vmamba.nn import ConvStem
from vmamba.nn.layers import LayerNorm
from vmamba.ops import layers
from vmamba.ops.backends import proving, triton, use_backend

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(triton.unavailable(CPU) is not None, reason=str(triton.unavailable(CPU)))
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or triton.unavailable(torch.device("cuda")) is not None, reason="needs a GPU"
)
if triton.unavailable(CPU) is None or torch.cuda.is_available():
    from vmamba.ops.backends.triton import stem as kernel

BFLOAT, HALF = torch.bfloat16, torch.float16  # whose products the interpreter gets wrong, and right


def exact(x, weight, bias, scale, offset, stride, eps):
    """In float64; the image rounded as the kernel rounds it."""
    image, filters, *others = (v.double() for v in (x.to(weight.dtype), weight, bias, scale, offset))
    y = F.conv2d(image, filters, others[0], stride, 1).permute(0, 2, 3, 1)
    return F.gelu(F.layer_norm(y, scale.shape, *others[1:], eps))


def arguments(shape, dim, dtype=HALF, device="cpu"):
    """An image, filters, and bias, scale and offset in float32."""
    filters = torch.randn(dim, shape[1], 3, 3, device=device) / 3
    return torch.randn(shape, device=device), filters.to(dtype), *torch.randn(3, dim, device=device)


def assert_right(*given, stride=2, eps=1e-5):
    y = kernel.stem(*given, stride, eps)
    expected = exact(*given, stride, eps)
    assert y.shape == expected.shape
    assert y.is_contiguous()
    assert y.dtype == given[1].dtype
    assert_matches([y], [expected], 2 * torch.finfo(y.dtype).eps)


# --- in the interpreter ----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("shape", "dim", "stride"),
    [
        ((2, 3, 17, 22), 48, 2),  # two programs, of which the second is not full
        ((1, 3, 8, 8), 64, 1),
        ((3, 1, 7, 5), 20, 2),  # neither channels nor depth fill their lanes
        ((1, 7, 4, 6), 16, 1),
        ((2, 4, 1, 1), 3, 2),  # nothing but edges
    ],
)
def test_shapes(shape, dim, stride):
    assert_right(*arguments(shape, dim), stride=stride)


@interpreted
def test_any_layout_and_dtype_of_the_image():
    x, *others = arguments((2, 3, 9, 10), 24)
    wide = torch.randn(2, 3, 9, 25)
    for image in (x.to(memory_format=torch.channels_last), wide[..., ::3][..., :9], x.half(), x.transpose(2, 3)):
        assert_right(image, *others)
    assert kernel.stem(x[:0], *others, 2, 1e-5).shape == (0, 5, 5, 24)


# --- as an operator --------------------------------------------------------------------------------------------------


@interpreted
def test_operator_is_registered_properly():
    given = arguments((1, 2, 5, 6), 4)
    leaves = [v.detach().requires_grad_() for v in given]
    torch.library.opcheck(torch.ops.vmamba.stem.default, (*leaves, 2, 1e-5))
    y = torch.ops.vmamba.stem(*leaves, 2, 1e-5)
    again = [v.detach().double().requires_grad_() for v in given]
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    expected = torch.autograd.grad(exact(*again, 2, 1e-5).square().sum(), again)
    assert_matches(list(grads), list(expected), 0.01)


# --- as part of a stem -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with each call of what stands for the kernel, which is taken on the CPU."""
    found = []
    monkeypatch.setitem(layers._FUSING, "cpu", "triton")
    monkeypatch.setattr(layers, "choose_backend", lambda *given: type("Backend", (), {"name": "triton"}))
    monkeypatch.setattr(layers, "_compute_stem", lambda *given: (found.append(1), layers._plain_stem(*given))[1])
    monkeypatch.setattr(ConvStem, "_infer", lambda self, x: None)  # the CPU's own
    return found


def _patched(stem, monkeypatch):
    monkeypatch.setattr(LayerNorm, "forward", lambda self, x: nn.LayerNorm.forward(self, x) + 1)


class Shifted(LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _replace(name, layer):
    return lambda stem, monkeypatch: setattr(stem, name, layer)


CHANGES = {
    "hook": lambda stem, monkeypatch: stem.norm1.register_forward_hook(lambda *given: given[2] + 1),
    "pre-hook": lambda stem, monkeypatch: stem.conv1.register_forward_pre_hook(lambda layer, given: (2 * given[0],)),
    "hook of the activation": lambda stem, monkeypatch: stem.act.register_forward_hook(lambda *given: given[2] + 1),
    "forward of one": lambda stem, monkeypatch: setattr(stem.act, "forward", torch.relu),
    "patched class": _patched,
    "other norm": _replace("norm1", Shifted(8)),
    "no norm": _replace("norm1", nn.Identity()),
    "no weight in the norm": _replace("norm1", LayerNorm(8, elementwise_affine=False)),
    "other activation": _replace("act", nn.ReLU()),
    "tanh": _replace("act", nn.GELU(approximate="tanh")),
    "parametrised": lambda stem, monkeypatch: parametrize.register_parametrization(stem.conv1, "weight", Doubled()),
    "reflected edges": _replace("conv1", nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")),
    "5×5": _replace("conv1", nn.Conv2d(3, 8, 5, 2, 2)),
    "no bias": _replace("conv1", nn.Conv2d(3, 8, 3, 2, 1, bias=False)),
}


def _results(stem, x):
    """Of a stem in bfloat16 autocast, and of the same with the kernel switched off."""
    found = []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", BFLOAT), torch.no_grad():
        patch.setitem(layers._FUSING, "cpu", "triton")
        found.append(stem(x))
        patch.setattr("vmamba.nn.stem.fuses_stem", lambda *given: False)
        found.append(stem(x))
    return found


def test_stem_takes_it(calls):
    stem, x = ConvStem(3, 16).eval(), torch.randn(2, 3, 20, 24)
    fused, plain = _results(stem, x)
    assert len(calls) == 1
    assert_matches([fused], [plain], 0.02)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_stems_are_left_alone(calls, monkeypatch, change):
    stem, x = ConvStem(3, 16).eval(), torch.randn(2, 3, 20, 24)
    CHANGES[change](stem, monkeypatch)
    fused, plain = _results(stem, x)
    assert calls == []
    assert torch.equal(fused, plain)


def test_where_it_is_not_taken(calls):
    stem, x = ConvStem(3, 16).eval(), torch.randn(2, 3, 20, 24)
    with torch.no_grad():
        stem(x)  # float32
        with torch.autocast("cpu", BFLOAT):
            stem(x.double().float()[:0])  # nothing
            with torch.enable_grad():
                stem(x)
    wide = ConvStem(8, 16).eval(), ConvStem(3, 288).eval()
    for other, channels in zip(wide, (8, 3), strict=True):
        _results(other, torch.randn(1, channels, 8, 8))
    assert calls == []


@interpreted
def test_compiled(calls):
    """The operator is a node of the graph, until something is hooked to a layer."""
    torch._dynamo.reset()
    stem, x = ConvStem(3, 16).eval(), torch.randn(2, 3, 20, 24)
    keep, graphs = kept_graphs()
    compiled = torch.compile(stem, fullgraph=True, backend=keep)
    with torch.no_grad(), torch.autocast("cpu", HALF):
        assert_matches([compiled(x)], [stem(x).double()], 0.01)
        stem.norm1.register_forward_hook(lambda *given: given[2] + 1)
        assert_matches([compiled(x)], [stem(x).double()], 0.01)
    assert ["vmamba.stem" in graph.code for graph in graphs] == [True, False]


def test_exported_stems_are_torch_s_own(calls):
    with torch.no_grad(), torch.autocast("cpu", BFLOAT):
        exported = torch.export.export(ConvStem(3, 16).eval(), (torch.randn(1, 3, 16, 16),))
    assert "vmamba" not in exported.graph_module.code


# --- what the compiler makes of it -----------------------------------------------------------------------------------

COMPILE = """
import json, sys
import triton
from compiling import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vmamba.ops.backends.triton import stem

backend, architecture, cases = json.loads(sys.argv[1])
for image, low, channels, dim in cases:
    numbers = dict(stem._plan((2, channels, 64, 64), (channels * 4096, 4096, 64, 1), dim, 2, 1e-5)[1])
    options = {"num_warps": numbers.pop("num_warps")}
    constants = {name: value for name, value in numbers.items() if name.isupper()}
    types = {"x": image, "weight": low, "y": low, "eps": "fp32"} | dict.fromkeys(("bias", "scale", "offset"), "*fp32")
    names = stem.stem_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
    source = ASTSource(stem.stem_kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=target, options=options)
    found = {}
    if backend == "cuda":
        found = usage_of(compiled)
    print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; its packages bring ptxas")
@pytest.mark.parametrize(
    ("target", "cases"),
    [
        (("cuda", 90), [("*fp32", "*bf16", 3, 48), ("*bf16", "*bf16", 3, 64), ("*fp16", "*fp16", 7, 128)]),
        (("cuda", 80), [("*fp32", "*bf16", 3, 48)]),
        (("hip", "gfx942"), [("*fp32", "*bf16", 3, 48)]),
    ],
)
def test_nothing_spills(target, cases):
    results = results_of(COMPILE, *target, cases)
    assert len(results) == len(cases)
    assert all(found.get("stack", 0) == 0 for found in results), results


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize(
    ("shape", "dim", "stride"), [((3, 3, 224, 224), 48, 2), ((2, 1, 57, 91), 64, 1), ((1, 7, 20, 9), 128, 2)]
)
def test_gpu_against_float64(shape, dim, stride, dtype):
    x, *others = arguments(shape, dim, dtype, "cuda")
    for image in (x, x.to(memory_format=torch.channels_last), x.to(dtype)):
        assert_right(image, *others, stride=stride)


@needs_gpu
@torch.no_grad()
def test_gpu_stem():
    stem, x = ConvStem(3, 96).eval().cuda(), torch.randn(2, 3, 64, 48, device="cuda")
    with torch.autocast("cuda", BFLOAT):
        with use_backend("eager"):
            expected = stem(x)
        with use_backend("triton"):
            assert_matches([stem(x)], [expected.double()], 0.02)
            assert "stem_kernel" in launches_of(lambda: stem(x))
            torch._dynamo.reset()
            compiled = torch.compile(stem, fullgraph=True, dynamic=True)
            for size in (64, 41):
                image = x[..., :size, :].contiguous()
                assert_matches([compiled(image)], [stem(image).double()], 0.02)
            assert "stem_kernel" in launches_of(lambda: compiled(image))


@needs_gpu
def test_gpu_is_proven():
    for dtype in (torch.float32, BFLOAT, HALF):
        rounding = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        assert proving._compare_products(torch.device("cuda"), dtype, rounding) == ""
