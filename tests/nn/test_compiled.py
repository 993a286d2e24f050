"""What torch.compile makes of a model in inference on the CPU: the operators that compute it at once, and no others.

They compute what the model does, also where their kernels know no way, and follow every change of the model.
"""

from __future__ import annotations

import pytest
import torch
from compiling import kept_graphs, operators_in
from nn.changes import Scale, forward_hook, forward_pre_hook, patched_instance, plainly, subclass
from timm.layers import DropPath
from torch import nn
from torch.nn.utils import prune

from vmamba.models.vmamba import VMamba
from vmamba.nn import ConvStem, VSSBlock
from vmamba.ops import fused
from vmamba.ops.backends.native.products import multiplies_fast
from vmamba.ops.ss2d import watch_scans

pytestmark = pytest.mark.skipif(not multiplies_fast(torch.float32), reason="the kernels are no faster than torch")

BLOCKS = {
    "MLP": {},
    "vanilla": {"mlp_ratio": 0, "gated": True, "ssm_ratio": 2, "d_state": 3, "conv_bias": True},
    "rows": {"pattern": "bidirectional", "mlp_ratio": 2},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def filled(module):
    """No zeros and ones: every parameter matters."""
    for name, value in module.named_parameters():
        if value.ndim == 1 and "dt" not in name:
            nn.init.uniform_(value, 0.5, 1.5)
    return module.eval()


def block(kind="MLP"):
    torch.manual_seed(0)
    return filled(VSSBlock(8, **BLOCKS[kind]))


def stem():
    torch.manual_seed(0)
    return filled(ConvStem(3, 8))


def network(**options):
    torch.manual_seed(0)
    return filled(VMamba(depths=(1, 2), dims=(8, 12), num_classes=5, stem_stride=2, img_size=32, **options))


# torch before 2.14 looks for hooks once, unless it is told otherwise.
is_older = torch.__version__ < "2.14"
watching_hooks = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False) if is_older else lambda test: test

GRID, IMAGE = torch.randn(2, 7, 5, 8), torch.randn(2, 3, 18, 14)
MADE = [(block, "vss_block", GRID), (stem, "conv_stem", IMAGE)]


def arguments_of(module, x):
    """The operator in the module's graph, and what it is called with."""
    seen = []

    def backend(graph, inputs):
        class Watch(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                if str(target).startswith("vmamba."):
                    seen.append((target.default, args))
                return super().call_function(target, args, kwargs)

        return Watch(graph).run

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(x)
    ((operator, args),) = seen
    return operator, args


# --- what is in the graph --------------------------------------------------------------------------------------------


def test_a_network_is_its_blocks():
    model = network()
    backend, graphs = kept_graphs()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(IMAGE), model(IMAGE))
    expected = ["conv_stem", "vss_block", "grid_convolution", "vss_block", "vss_block"]
    assert [operators_in(graph) for graph in graphs] == [[f"vmamba.{name}" for name in expected]]


def test_training_records_every_layer():
    model = network().train()
    backend, graphs = kept_graphs()
    torch.compile(model, backend=backend, fullgraph=True)(IMAGE)
    assert {name for graph in graphs for name in operators_in(graph)} == {
        "vmamba.linear", "vmamba.depthwise_silu", "vmamba.ss2d_scan"
    }  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast", "autocast of float16"], ids=str)
def test_as_the_model(kind, dtype):
    module, x = block(kind), GRID
    if dtype is torch.bfloat16:
        module, x = module.to(dtype), x.to(dtype)
    if dtype == "autocast of float16":
        x = x.half()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in str(dtype)):
        found, expected = compiled(x), module(x)
    assert found.dtype == expected.dtype
    # Of float16 there is no kernel: layers computed one by one may round anew.
    tolerance = 0.02 if dtype == "autocast of float16" else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dynamic", [True, None])
def test_of_any_size(dynamic):
    model = network()
    backend, graphs = kept_graphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for shape in ((2, 3, 18, 14), (3, 3, 33, 40), (5, 3, 21, 64)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) <= 2


def test_by_inductor():
    model = network()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(IMAGE), model(IMAGE))


# --- changes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [forward_hook, forward_pre_hook, patched_instance, subclass])
@pytest.mark.parametrize(
    ("make", "x", "name"),
    [(block, GRID, name) for name in ("norm1", "ss2d", "ss2d.conv", "ss2d.dropout", "mlp", "mlp.act")]
    + [(stem, IMAGE, name) for name in ("conv1", "act", "norm2")],
)
@watching_hooks
def test_a_change_after_compiling_is_followed(change, make, x, name):
    module = make()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        torch.testing.assert_close(before, module(x))
        change(module.get_submodule(name))
        found = compiled(x)
        with plainly():
            torch.testing.assert_close(found, module(x), atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-5


def _other_routes(module):
    module.ss2d.pattern = "bidirectional"


def _another_activation(module):
    module.mlp.act = nn.ReLU()


def _tanh(module):
    module.mlp.act.approximate = "tanh"


def _another_layer(module):
    module.ss2d.out_proj = nn.Sequential(module.ss2d.out_proj, Scale())


def _written_weights(module):
    module.norm2.weight.data = module.norm2.weight * 2
    module.ss2d.A_log.data.mul_(0.5)


def _eps(module):
    module.norm1.eps = 0.5


def _pruned(module):
    prune.l1_unstructured(module.mlp.fc1, "weight", 0.5)


def _dilated(module):
    module.ss2d.conv.dilation, module.ss2d.conv.padding = (2, 2), (2, 2)


def _own_step(module):
    kind = type(module.ss2d)
    module.ss2d.scan = lambda u: 2 * kind.scan(module.ss2d, u)


CHANGES = [
    _other_routes, _another_activation, _tanh, _another_layer, _written_weights, _eps, _pruned, _dilated, _own_step
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_setting_changed_after_compiling_is_followed(change):
    module = block()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        before = compiled(GRID)
        change(module)
        found = compiled(GRID)
        with plainly():
            torch.testing.assert_close(found, module(GRID), atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-5


def test_a_block_compiled_in_its_place():
    module = block()
    backend, graphs = kept_graphs()
    with torch.no_grad():
        expected = module(GRID)
        module.compile(backend=backend)
        torch.testing.assert_close(module(GRID), expected)
    assert [operators_in(graph) for graph in graphs] == [["vmamba.vss_block"]]


def test_a_branch_that_is_dropped_is_no_operator():
    module = block()
    module.drop_path1 = DropPath(0.999999).eval()
    backend, graphs = kept_graphs()
    compiled = torch.compile(module, backend=backend)
    with torch.no_grad():
        compiled(GRID)
        module.drop_path1.train()
        found = compiled(GRID)
    assert [operators_in(graph)[:1] for graph in graphs] == [["vmamba.vss_block"], ["vmamba.linear"]]
    assert torch.isfinite(found).all()


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "name", "x"), MADE, ids=["block", "stem"])
def test_layer_by_layer_where_the_kernel_knows_no_way(make, name, x, monkeypatch):
    operator, arguments = arguments_of(make(), x)
    assert operator is getattr(torch.ops.vmamba, name).default
    expected = operator(*arguments)
    monkeypatch.setattr(fused, f"compute_{name.split('_')[1]}", lambda *_: None)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        found = operator(given, *arguments[1:])
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_graph_tells_nobody_of_its_scans(monkeypatch):
    operator, arguments = arguments_of(block(), GRID)
    monkeypatch.setattr(fused, "compute_block", lambda *_: None)
    seen = []
    with watch_scans(lambda *scan: seen.append(scan)):
        operator(*arguments)
        assert not seen
        block()(GRID)
    assert len(seen) == 1


def test_layer_by_layer_in_half_precision(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        operator, arguments = arguments_of(block(), GRID)
    expected = operator(*arguments)
    monkeypatch.setattr(fused, "compute_block", lambda *_: None)
    found = operator(*arguments)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize(("make", "name", "x"), MADE, ids=["block", "stem"])
def test_operators_are_torch_s(make, name, x):
    """Derivatives of every kind, though graphs of inference need none, and torch's own checks."""
    module = make()
    operator, arguments = arguments_of(module, x)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(operator, arguments, test_utils=checks)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(operator(leaf, *arguments[1:]).square().sum(), leaf)
    with plainly():
        (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    batches = torch.stack((x, 2 * x))
    torch.testing.assert_close(
        torch.func.vmap(lambda one: operator(one, *arguments[1:]))(batches),
        torch.stack([operator(one, *arguments[1:]) for one in batches]), atol=1e-5, rtol=1e-5,
    )  # fmt: skip
