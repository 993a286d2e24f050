"""The product with GELU: its Triton kernel in the interpreter, as an operator, in an MLP, and on a GPU."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from compiling import kept_graphs, results_of
from nn.changes import TO_ANY_MODULE, global_hook, patched_class
from scans import assert_captured, assert_matches, launches_of
from torch import nn
from torch.nn.utils import parametrize, prune

from vmamba.nn import GELU, Linear, Mlp
from vmamba.ops import layers
from vmamba.ops.backends import choose_backend, proving, triton, use_backend

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(triton.unavailable(CPU) is not None, reason=str(triton.unavailable(CPU)))
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or triton.unavailable(torch.device("cuda")) is not None, reason="needs a GPU"
)
if triton.unavailable(CPU) is None or torch.cuda.is_available():
    from vmamba.ops.backends.triton import linear

    SHALLOW, DEEP, SMALL = linear.SHALLOW, linear.DEEP, linear.Tile(16, 16, 32, 1, 1)
else:
    SHALLOW = DEEP = SMALL = None

# The interpreter's products are wrong in bfloat16; in float32, which the kernel can do too, they are exact.
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def exact(x, weight, bias):
    return F.gelu(F.linear(x.double(), weight.double(), bias.double()))


def arguments(shape, width, dtype=HALF, device="cpu"):
    """x, weight and bias, whose product is about 1."""
    x, weight, bias = (torch.randn(size, device=device) for size in (shape, (width, shape[-1]), (width,)))
    return x.to(dtype), (weight / shape[-1] ** 0.5).to(dtype), bias.to(dtype)


def rounding(dtype):
    return 2e-6 if dtype == FLOAT else torch.finfo(dtype).eps


def assert_right(x, weight, bias, tile=None):
    y = linear.linear_gelu(x, weight, bias, tile)
    assert y.is_contiguous()
    assert y.dtype == x.dtype
    assert_matches([y], [exact(x, weight, bias)], rounding(x.dtype))


# --- in the interpreter ----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("tile", [SHALLOW, DEEP, SMALL], ids=["shallow", "deep", "small"])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((1, 64), 128),
        ((17, 96), 130),  # columns of a second block; a depth of one and a half steps
        ((129, 16), 33),  # rows of another block
        ((2, 3, 5, 24), 20),  # a depth that no step divides
        ((5, 7), 3),
        ((3, 1), 1),
        ((70,), 40),
    ],
)
def test_against_float64(shape, width, tile):
    for dtype in (HALF, FLOAT):
        assert_right(*arguments(shape, width, dtype), tile)


@interpreted
def test_many_blocks_each_way():
    assert_right(*arguments((3, 11, 40), 50), SMALL)


@interpreted
def test_the_tile_goes_by_the_depth(monkeypatch):
    tiles, plan = [], linear._plan
    monkeypatch.setattr(linear, "_plan", lambda shape, width, tile: (tiles.append(tile), plan(shape, width, tile))[1])
    for depth in (linear._SHALLOW, linear._SHALLOW + 1):
        assert_right(*arguments((2, depth), 4))
    assert tiles == [SHALLOW, DEEP]


@interpreted
def test_strides_and_nothing(monkeypatch):
    x, weight, bias = arguments((4, 6, 20), 9)
    y = linear.linear_gelu(x, weight, bias)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    planar = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.cat([x, x * 0], -1)[..., :20]
    strided = torch.stack([bias, bias * 0], 1)[:, 0]
    for given in (turned, planar, wide):
        assert not given.is_contiguous()
        assert torch.equal(linear.linear_gelu(given, weight.t().contiguous().t(), strided), y)
    assert torch.equal(linear.linear_gelu(x[:1].expand_as(x), weight, bias), y[:1].expand_as(y))
    bare = linear.linear_gelu(x[..., :0], weight[:, :0], bias)
    assert_matches([bare], [F.gelu(bias.double()).expand(4, 6, 9)], rounding(HALF))
    monkeypatch.setattr(linear, "launch", None)  # a card refuses to launch nothing
    assert linear.linear_gelu(x[:0], weight, bias).shape == (0, 6, 9)
    assert linear.linear_gelu(x, weight[:0], bias[:0]).shape == (4, 6, 0)


@interpreted
def test_what_lies_outside_is_neither_read_nor_written():
    """Neither rows and columns nor channels that do not exist."""
    memory = torch.full((200, 40), torch.nan, dtype=HALF)
    x, weight, bias = arguments((5, 40), 7)
    around, beside = memory.clone(), memory.clone()
    around[100:105], beside[50:57] = x, weight
    y = linear.linear_gelu(around[100:105], beside[50:57], bias, DEEP)
    assert torch.equal(y, linear.linear_gelu(x, weight, bias, DEEP))
    assert not y.isnan().any()


def gelu(values):
    """The kernel's GELU of these, each of which is a product of its own."""
    return linear.linear_gelu(values[:, None], values.new_ones(1, 1), values.new_zeros(1))[:, 0]


@interpreted
def test_accuracy_of_the_gelu():
    x = torch.linspace(-12, 12, 4801)
    y = gelu(x).double()
    expected = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    off = (y - expected).abs()
    assert off.max() < 5e-7
    # Against the result. A unit in the last place of bfloat16 is 4e-3 or more, and of float16 5e-4.
    for least, most, limit in ((-12, -8, 0.04), (-8, -5, 0.02), (-5, -4, 2e-3), (-4, -2, 5e-4), (-2, 12, 5e-6)):
        part = (x >= least) & (x <= most) & (x != 0)
        assert (off / expected.abs())[part].max() < limit, (least, most)
    assert gelu(torch.zeros(1)).item() == 0
    assert (y[x < 0] < 0).all()


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_extreme_values(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([60000.0, largest, -60000.0, -largest, -30.0, -20.0, 0.0, -0.0, 6e-8, -6e-8], dtype=dtype)
    y = gelu(x)
    assert torch.equal(y[:2], x[:2])
    assert not y[2:8].any()
    assert_matches([y[8:]], [x[8:] / 2], rounding(dtype))
    # No sum is rounded before the GELU. In float16 these are infinite.
    x, weight, bias = torch.full((2, 64), 60000.0).to(dtype), torch.ones(2, 64).to(dtype), torch.zeros(2).to(dtype)
    x[1], weight[1] = -x[1], -1
    expected = 64 * 60000.0 if dtype == FLOAT else torch.inf
    assert linear.linear_gelu(x, weight, bias).tolist() == [[expected, 0.0], [0.0, expected]]


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
def test_not_a_number_stays_in_its_row():
    x, weight, bias = arguments((6, 20), 5)
    x[2, 3], bias[1] = torch.nan, torch.nan
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[2], expected[:, 1] = True, True
    assert torch.equal(linear.linear_gelu(x, weight, bias).isnan(), expected)


@interpreted
def test_a_kernel_that_is_wrong_is_not_proven(monkeypatch):
    monkeypatch.setattr(proving, "_problems", lambda *given: iter(()))
    for other in ("_compare_convolution", "_compare_normalisation"):
        monkeypatch.setattr(proving, other, lambda *given: "")
    assert proving.compare(CPU, HALF, "cross", 2, 3) == ""
    before = linear.linear_gelu
    monkeypatch.setattr(linear, "linear_gelu", lambda *given: before(*given) * 1.1)
    assert proving.compare(CPU, HALF, "cross", 2, 3).startswith("the result of the product with GELU is off by 1.0e-01")
    assert proving.compare(CPU, HALF, "cross", 1, 3) == ""
    assert proving.compare(CPU, HALF, "bidirectional", 2, 3) == ""
    assert proving.compare(CPU, FLOAT, "cross", 2, 3) == ""  # where it is not used


# --- what the compiler makes of it -----------------------------------------------------------------------------------

COMPILE = """
import json, re, sys
import triton
from compiling import usage_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vmamba.ops.backends.triton import linear

backend, architecture, cases = json.loads(sys.argv[1])
kernel = linear.linear_gelu_kernel
for kind, depth, width in cases:
    constants = dict(linear._plan((1000, depth), width, linear.tile_for(depth, backend == "hip"))[1])
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    del constants["rows"]
    signature = {n: "constexpr" if n in constants else "i32" if n == "rows" else kind for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    target = GPUTarget(backend, architecture, 32 if backend == "cuda" else 64)
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    found = {"shared": compiled.metadata.shared}
    if backend == "cuda":
        found |= usage_of(compiled)
        found["products"] = sorted(set(re.findall(r"wgmma\\.mma_async|mma\\.sync", compiled.asm["ptx"])))
        found["stores"] = sorted(set(re.findall(r"st\\.global\\.[\\w.]+", compiled.asm["ptx"])))
    else:
        text = compiled.asm["amdgcn"]
        found["stack"] = int(re.search(r"private_segment_fixed_size:? +(\\d+)", text).group(1))
        found["products"] = sorted(set(re.findall(r"v_mfma", text)))
    print(json.dumps(found))
"""

MODEL = [("*bf16", 96, 384), ("*fp16", 192, 768), ("*bf16", 768, 3072)]
ODD = [("*bf16", 50, 70), ("*fp16", 150, 33), ("*bf16", 1, 1)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; its packages bring ptxas")
@pytest.mark.parametrize(
    ("target", "cases", "products", "memory"),
    [
        (("cuda", 90), MODEL + ODD, "wgmma.mma_async", 227 * 1024),
        (("cuda", 89), MODEL[:2], "mma.sync", 99 * 1024),
        (("hip", "gfx942"), [*MODEL[:2], ("*bf16", 128, 512)], "v_mfma", 64 * 1024),
    ],
)
def test_nothing_spills_and_products_are_the_card_s(target, cases, products, memory):
    results = results_of(COMPILE, *target, cases)
    for (_, depth, width), found in zip(cases, results, strict=True):
        assert found["stack"] == 0, found
        assert found["products"] == [products], found
        assert found["shared"] <= memory, found
        if target[0] == "cuda":
            assert found["registers"] <= 255, found
            if (depth % 16, width % 16) == (0, 0):
                assert found["stores"] == ["st.global.v4.b32"], found  # eight neighbours at once


# --- as an operator and in an MLP, in the interpreter and on a GPU ---------------------------------------------------


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Where the MLP takes the Triton kernel, on the CPU interpreted."""
    monkeypatch.setitem(layers._FUSING, "cpu", "triton")
    torch._dynamo.reset()
    with use_backend("triton"):
        yield request.param


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with each call of the kernel."""
    calls, before = [], linear.linear_gelu
    monkeypatch.setattr(linear, "linear_gelu", lambda *given: (calls.append(1), before(*given))[1])
    return calls


def mlp_on(device, dtype=FLOAT, drop=0.0):
    mlp = Mlp(8, 24, drop).to(device, dtype)
    for value in mlp.parameters():
        nn.init.normal_(value, std=0.5)
    return mlp.eval()


def image_on(device, dtype=FLOAT):
    return torch.randn(2, 3, 5, 8, device=device).to(dtype)


def plainly(mlp, x):
    torch.manual_seed(1)
    with use_backend("eager"):
        return mlp(x)


def assert_plain(mlp, x, launches, count, tolerance=4e-3):
    """The MLP calls the kernel so many times, and its result is the plain one."""
    before = len(launches)
    torch.manual_seed(1)
    y = mlp(x)
    assert len(launches) - before == count
    expected = plainly(mlp, x)
    assert len(launches) - before == count
    assert y.dtype == expected.dtype
    assert_matches([y.detach()], [expected.detach()], tolerance)


@torch.no_grad()
@pytest.mark.parametrize("given", [FLOAT, HALF])
@pytest.mark.parametrize("kept", [FLOAT, HALF])
def test_inference_in_half_precision(device, launches, given, kept):
    mlp, x = mlp_on(device, kept), image_on(device, given)
    with torch.autocast(device, HALF):
        assert_plain(mlp, x, launches, 1)
        assert_plain(mlp, x.transpose(0, 1), launches, 1)
        assert_plain(mlp, x[0, 0, 0], launches, 1)
        assert_plain(mlp.train(), x, launches, 1)
    if given == kept:
        assert_plain(mlp, x, launches, int(given == HALF), 1e-6 if given == FLOAT else 4e-3)
    with torch.inference_mode(), torch.autocast(device, HALF):
        assert_plain(mlp, x, launches, 1)


def test_not_where_anything_is_recorded(device, launches):
    mlp, x = mlp_on(device), image_on(device)
    with torch.autocast(device, HALF):
        assert_plain(mlp, x, launches, 0)
        mlp.requires_grad_(False)
        assert_plain(mlp, x, launches, 1)
        assert_plain(mlp, x.clone().requires_grad_(), launches, 0)
        mlp.fc2.requires_grad_(True)
        assert_plain(mlp, x, launches, 1)
        mlp(x).float().sum().backward()
        grad, mlp.fc2.weight.grad = mlp.fc2.weight.grad, None
        plainly(mlp, x).float().sum().backward()
    assert_matches([grad], [mlp.fc2.weight.grad], 4e-3)


@torch.no_grad()
def test_not_in_other_dtypes(device, launches):
    mlp, x = mlp_on(device), image_on(device)
    assert_plain(mlp, x, launches, 0, 1e-6)
    assert_plain(copy.deepcopy(mlp).double(), x.double(), launches, 0, 1e-12)
    with torch.autocast(device, HALF):
        assert_plain(copy.deepcopy(mlp).double(), x.double(), launches, 0, 1e-12)
    for one, other in ((mlp, x.half()), (copy.deepcopy(mlp).half(), x)):
        with pytest.raises(RuntimeError, match="dtype"):
            one(other)
    assert not launches


@torch.no_grad()
@pytest.mark.parametrize("change", TO_ANY_MODULE, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("name", "count"), [("fc1", 0), ("act", 0), ("drop1", 1), ("norm", 1), ("fc2", 1), ("", 1)])
def test_one_module_hooked_patched_or_subclassed(device, launches, change, name, count):
    mlp, x = mlp_on(device, HALF), image_on(device, HALF)
    before = mlp(x)
    change(mlp.get_submodule(name))
    assert_plain(mlp, x, launches, count)
    assert "backward" in change.__name__ or not torch.equal(mlp(x), before)


@torch.no_grad()
@pytest.mark.parametrize("change", [patched_class, global_hook], ids=lambda change: change.__name__)
@pytest.mark.parametrize(("kind", "count"), [(Linear, 0), (GELU, 0), (nn.Linear, 0), (nn.GELU, 0), (nn.Dropout, 1)])
def test_a_class_patched_or_every_module_hooked(device, launches, change, kind, count):
    mlp, x = mlp_on(device, HALF), image_on(device, HALF)
    with change(kind):
        assert_plain(mlp, x, launches, count if change is patched_class else 0)
    assert_plain(mlp, x, launches, 1)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Wrapped(torch.Tensor):
    """As libraries that quantise have them."""


REPLACEMENTS = {
    "torch's linear": ("fc1", lambda layer: nn.Linear(8, 24)),
    "another width": ("fc1", lambda layer: nn.Sequential(nn.Linear(8, 24), nn.Identity())),
    "no bias": ("fc1", lambda layer: Linear(8, 24, bias=False)),
    "torch's gelu": ("act", lambda layer: nn.GELU()),
    "tanh": ("act", lambda layer: GELU("tanh")),
    "torch's tanh": ("act", lambda layer: nn.GELU("tanh")),
    "another activation": ("act", lambda layer: nn.SiLU()),
    "parametrised": ("fc1", lambda layer: parametrize.register_parametrization(layer, "weight", Halved())),
    "pruned": ("fc1", lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "value"), REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replaced_layers(device, launches, name, value):
    mlp, x = mlp_on(device), image_on(device)
    setattr(mlp, name, value(getattr(mlp, name)).to(device))
    with torch.autocast(device, HALF):
        assert_plain(mlp, x, launches, 0)


@torch.no_grad()
def test_parameters_of_other_kinds(device, launches):
    mlp, x = mlp_on(device, HALF), image_on(device, HALF)
    expected = mlp(x)
    mlp.fc1.weight = nn.Parameter(mlp.fc1.weight.t().contiguous().t())
    assert_plain(mlp, x, launches, 1)
    mlp.fc1.weight.mul_(2)
    assert_plain(mlp, x, launches, 1)
    assert not torch.equal(mlp(x), expected)
    mlp.fc1.weight = nn.Parameter(mlp.fc1.weight.as_subclass(Wrapped))
    assert_plain(mlp, x, launches, 0)


@torch.no_grad()
def test_dropout_and_what_is_around_are_kept(device, launches):
    mlp, x = mlp_on(device, HALF, drop=0.5), image_on(device, HALF)
    mlp.norm = nn.LayerNorm(24).to(device, HALF)
    assert_plain(mlp, x, launches, 1)
    assert_plain(mlp.train(), x, launches, 1)
    assert (mlp(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.2)


@torch.no_grad()
def test_unusual_calls(device, launches):
    mlp, x = mlp_on(device, HALF), image_on(device, HALF)
    expected = plainly(mlp, x)
    torch.testing.assert_close(torch.func.vmap(mlp)(x), expected, atol=1e-2, rtol=1e-2)
    tangent = torch.func.jvp(mlp, (x,), (torch.zeros_like(x),))[1]
    assert not tangent.any()
    assert mlp(x[:0]).shape == (0, 3, 5, 8)
    with pytest.raises(RuntimeError):
        mlp(x[..., :7])
    assert mlp.to("meta")(x.to("meta")).shape == x.shape
    assert not launches
    mlp = mlp_on(device, HALF)
    weight = mlp.fc1.weight * 2
    y = torch.func.functional_call(mlp, {"fc1.weight": weight}, (x,))
    mlp.fc1.weight.copy_(weight)
    torch.testing.assert_close(y, plainly(mlp, x), atol=1e-2, rtol=1e-2)
    assert len(launches) == 1


# --- as an operator --------------------------------------------------------------------------------------------------


def test_operator(device):
    x, weight, bias = arguments((2, 3, 5), 6, device=device)
    y = torch.ops.vmamba.linear_gelu(x, weight, bias)
    assert_matches([y], [exact(x, weight, bias)], rounding(HALF))
    for requires_grad in (False, True):
        leaves = [value.detach().requires_grad_(requires_grad) for value in (x, weight, bias)]
        torch.library.opcheck(torch.ops.vmamba.linear_gelu.default, leaves)
    found = torch.autograd.grad(torch.ops.vmamba.linear_gelu(*leaves).float().sum(), leaves)
    doubles = [value.detach().double().requires_grad_() for value in leaves]
    expected = torch.autograd.grad(exact(*doubles).sum(), doubles)
    assert [value.dtype for value in found] == 3 * [HALF]
    assert_matches(list(found), list(expected), 8 * rounding(HALF))


def test_derivatives_of_every_kind(device, monkeypatch):
    """By torch's own functions in float64, for which the kernel is not made."""
    monkeypatch.setattr(linear, "linear_gelu", lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)))
    operator = torch.ops.vmamba.linear_gelu
    given = [torch.randn(size, device=device, dtype=torch.float64) for size in ((2, 3, 4), (5, 4), (5,))]
    leaves = [value.requires_grad_() for value in given]
    assert torch.autograd.gradcheck(operator, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operator, leaves)
    frozen = [given[0], given[1].detach(), given[2]]
    assert torch.autograd.gradcheck(operator, frozen)
    x, weight, bias = (value.detach() for value in given)
    batched = torch.func.vmap(operator, (0, None, None))(x, weight, bias)
    torch.testing.assert_close(batched, exact(x, weight, bias))


def has_operator(graph):
    return any("linear_gelu" in str(node.target) for node in graph.graph.nodes)


@torch.no_grad()
def test_one_graph_for_every_batch(device, launches):
    mlp = mlp_on(device, HALF)
    keep, graphs = kept_graphs()
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend=keep)
    for batch in (2, 5, 3):
        x = torch.randn(batch, 3, 4, 8, device=device).half()
        assert torch.equal(compiled(x), mlp(x))
    assert len(graphs) == 1
    assert has_operator(graphs[0])
    assert not any("gelu" in str(node.target).replace("linear_gelu", "") for node in graphs[0].graph.nodes)
    assert len(launches) == 6
    exported = torch.export.export(mlp, (x,)).graph_module.code
    assert "vmamba" not in exported
    assert "gelu" in exported


@pytest.mark.parametrize("kept", [FLOAT, HALF])
def test_compiled_under_autocast_and_in_training(device, launches, kept):
    mlp, x = mlp_on(device, kept), image_on(device, kept)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, HALF):
        with torch.no_grad():
            y = compiled(x)
            assert len(launches) == 1
            assert_matches([y], [plainly(mlp, x)], 4e-3)
        y = compiled(x)  # recorded
        y.float().square().sum().backward()
        assert len(launches) == 1
        grads = [value.grad for value in mlp.parameters()]
        mlp.zero_grad()
        plainly(mlp, x).float().square().sum().backward()
    assert_matches(grads, [value.grad for value in mlp.parameters()], 1e-2)


@torch.no_grad()
def test_compiled_in_other_dtypes(device, launches):
    for dtype in (FLOAT, torch.float64):
        mlp, x = mlp_on(device, dtype), image_on(device, dtype)
        keep, graphs = kept_graphs()
        y = torch.compile(mlp, fullgraph=True, backend=keep)(x)
        assert_matches([y], [plainly(mlp, x)], 1e-6)
        assert not any(map(has_operator, graphs))
    assert not launches


CHANGES = [change for change in TO_ANY_MODULE if change.__name__ != "compiled_call"]  # which torch.compile ignores


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["fc1", "act"])
def test_compiled_and_changed(device, launches, change, name):
    """A compiled MLP has what was done to its first layers, before it was compiled and after."""
    mlp, x = mlp_on(device, HALF), image_on(device, HALF)
    changed = copy.deepcopy(mlp)
    change(changed.get_submodule(name))
    keep, graphs = kept_graphs()
    y = torch.compile(changed, backend=keep)(x)
    assert_matches([y], [plainly(changed, x)], 4e-3)
    assert not any(map(has_operator, graphs))
    compiled = torch.compile(mlp, backend="aot_eager")
    compiled(x)
    assert len(launches) == 1
    change(mlp.get_submodule(name))
    assert_matches([compiled(x)], [plainly(mlp, x)], 4e-3)
    assert len(launches) == 1


@interpreted
def test_the_cpu_has_its_own(launches):
    mlp, x = mlp_on("cpu", HALF), image_on("cpu", HALF)
    with use_backend("triton"), torch.no_grad():
        assert_plain(mlp, x, launches, 0)


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_SHAPES = [
    ((8, 56, 56, 96), 384), ((8, 28, 28, 192), 768), ((8, 14, 14, 384), 1536), ((8, 7, 7, 768), 3072),
    ((1, 1), 1), ((1001, 50), 70), ((37, 150), 33), ((3, 128), 4096),
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize(("shape", "width"), GPU_SHAPES)
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_gpu_against_float64(shape, width, dtype):
    given = arguments(shape, width, dtype, "cuda")
    for tile in (None, SHALLOW, DEEP):
        assert_right(*given, tile)


@needs_gpu
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_gpu_values_of_every_magnitude(dtype):
    x = torch.linspace(-12, 12, 4801, device="cuda").to(dtype)
    x = torch.cat([x, torch.tensor([60000.0, -60000.0, 0.0, 1e-5, -1e-5], device="cuda", dtype=dtype)])
    y, expected = gelu(x), x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    assert not y.isnan().any()
    near = x > -5  # half a unit in the last place, and what the approximation is off by
    torch.testing.assert_close(y[near].double(), expected[near], rtol=torch.finfo(dtype).eps + 2e-3, atol=1e-7)
    torch.testing.assert_close(y[~near].double(), expected[~near], rtol=0.05, atol=1e-7)


@needs_gpu
def test_gpu_what_is_not_aligned():
    x, weight, bias = arguments((50, 96), 130, BFLOAT, "cuda")
    y = linear.linear_gelu(x, weight, bias)
    for offset in (1, 3):
        moved = []
        for value in (x, weight, bias):
            memory = value.new_zeros(value.numel() + offset)
            moved.append(memory[offset:].view(value.shape).copy_(value))
        assert_matches([linear.linear_gelu(*moved)], [y], rounding(BFLOAT))


@needs_gpu
@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
@pytest.mark.parametrize("given", [FLOAT, BFLOAT, HALF])
@torch.no_grad()
def test_gpu_is_as_torch_s_own_under_autocast(dtype, given, launches):
    mlp = Mlp(96, 384).cuda().eval()
    x = torch.randn(2, 20, 20, 96, device="cuda").to(given)
    with torch.autocast("cuda", dtype), use_backend("triton"):
        assert_plain(mlp, x, launches, 1, 4 * torch.finfo(dtype).eps)
        # Weights are cast in launches of their own; of what remains the first layer and its GELU are one.
        names = launches_of(lambda: mlp(x.to(dtype)))
    assert names.count("linear_gelu_kernel") == 1
    assert not any("gelu" in name.lower() for name in names if name != "linear_gelu_kernel")


@needs_gpu
@torch.no_grad()
def test_gpu_two_layers_are_one_launch():
    mlp = Mlp(96, 384).cuda().bfloat16().eval()
    x = torch.randn(2, 20, 20, 96, device="cuda", dtype=BFLOAT)
    with use_backend("triton"):
        mlp(x)
        names = launches_of(lambda: mlp(x))
        assert names[0] == "linear_gelu_kernel"
        first = launches_of(lambda: layers.linear_gelu(x, mlp.fc1.weight, mlp.fc1.bias))
        assert first == ["linear_gelu_kernel"]
    with use_backend("eager"):
        assert "linear_gelu_kernel" not in launches_of(lambda: mlp(x))


@needs_gpu
@torch.no_grad()
@use_backend("triton")
def test_gpu_compiled():
    torch._dynamo.reset()
    mlp = Mlp(96, 384).cuda().bfloat16().eval()
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True)
    for batch in (2, 5, 3):
        x = torch.randn(batch, 20, 20, 96, device="cuda", dtype=BFLOAT)
        assert_matches([compiled(x)], [mlp(x)], rounding(BFLOAT))
    assert launches_of(lambda: compiled(x)).count("linear_gelu_kernel") == 1


@needs_gpu
def test_gpu_sizes_are_not_specialised():
    """A new number of rows is no reason to compile again."""

    def count():
        return sum(len(cache[0]) for cache in linear.linear_gelu_kernel.device_caches.values())

    linear.linear_gelu(*arguments((50, 32), 64, BFLOAT, "cuda"))
    before = count()
    for rows in (1, 16, 1600, 100_001):
        linear.linear_gelu(*arguments((rows, 32), 64, BFLOAT, "cuda"))
    assert count() == before


@needs_gpu
@use_backend("triton")
def test_gpu_graph_capture():
    mlp = Mlp(64, 256).cuda().half().eval()
    x = torch.randn(2, 9, 10, 64, device="cuda", dtype=HALF)
    assert_captured(mlp, x)


@needs_gpu
def test_gpu_more_than_two_to_the_31_elements():
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < 20e9:
        pytest.skip(f"needs 20 GB of free GPU memory, found {free / 1e9:.0f}")
    for depth, width in ((16, 384), (384, 16)):  # of the result, and of x
        x, weight, bias = arguments((2**31 // 384 + 1000, depth), width, BFLOAT, "cuda")
        y = linear.linear_gelu(x, weight, bias)
        assert torch.equal(y[-500:], linear.linear_gelu(x[-500:], weight, bias))
        del x, y


@needs_gpu
def test_gpu_is_proven(monkeypatch):
    assert choose_backend("triton", torch.device("cuda")).name == "triton"
    monkeypatch.setattr(proving, "_problems", lambda *given: iter(()))
    for dtype in (FLOAT, BFLOAT, HALF):
        assert proving.compare(torch.device("cuda"), dtype, "cross", 2, 3) == ""
