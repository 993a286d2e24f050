"""Graphs of whole models for any batch, height and width: torch.export, strict and not, and torch.jit.trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vmamba.models.variants import VARIANTS
from vmamba.models.vmamba import VMamba


def _reduced(variant):
    """One of two stages of a block each, which has all kinds of parts that the variant has."""
    return replace(
        variant, depths=(1, 1), dims=(8, 16), local_stages=min(variant.local_stages, 1),
        d_state=min(variant.d_state, 2), img_size=(64, 64), drop_path_rate=0.0, release=None,
    )  # fmt: skip


# Every variant's architecture once: a name for each.
ARCHITECTURES = {_reduced(variant): name for name, variant in VARIANTS.items()}
architectures = pytest.mark.parametrize("variant", ARCHITECTURES, ids=ARCHITECTURES.values())
# One of a kind, for what takes long. The first two are also traced strictly, which torch does not do by default.
KINDS = ("vmamba_nano", "vanilla_vmamba_base", "vmamba_pico_local")
strictly = pytest.mark.parametrize(
    ("variant", "strict"),
    [
        *(pytest.param(variant, False, id=name) for variant, name in ARCHITECTURES.items()),
        *(pytest.param(_reduced(VARIANTS[name]), True, id=f"{name}, strictly") for name in KINDS[:2]),
    ],
)


def _model(variant):
    torch.manual_seed(0)
    return VMamba(**variant.arguments(), num_classes=5).eval()


def _assert_as_the_model(graph, model, sizes):
    with torch.no_grad():
        for batch, height, width in sizes:
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-6)


def _assert_plain_torch(program):
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "scan" in targets  # torch's loop
    assert all(target.startswith(("aten.", "<built-in function")) for target in targets - {"scan"}), targets


@pytest.mark.parametrize("variant", [_reduced(VARIANTS[name]) for name in KINDS], ids=KINDS)
def test_named_sizes(variant):
    """Of two images or more and of coarsest grids of two pixels a side or more: torch takes one for a special case."""
    model = _model(variant)
    smallest = model.total_stride + variant.stem_stride
    dims = {0: ("batch", 2), 2: ("height", smallest), 3: ("width", smallest)}
    dynamic = {axis: torch.export.Dim(name, min=low, max=4096) for axis, (name, low) in dims.items()}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes={"x": dynamic})
    _assert_plain_torch(program)
    _assert_as_the_model(program.module(), model, [(2, smallest, smallest), (3, 64, 96), (2, 101, 77)])


@pytest.mark.parametrize("variant", [_reduced(VARIANTS[name]) for name in KINDS[:2]], ids=KINDS[:2])
def test_a_program_can_be_decomposed_and_differentiated(variant):
    model = _model(variant).requires_grad_(False)
    dynamic = {"x": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=dynamic)
    _assert_as_the_model(program.run_decompositions().module(), model, [(3, 101, 77)])
    image = torch.randn(2, 3, 80, 112)
    gradients = []
    for network in (model, program.module()):
        x = image.clone().requires_grad_()
        network(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


@strictly
def test_every_size_from_the_total_stride_on(variant, strict):
    """With the shapes' specification that knows no special sizes, from an image of the smallest size itself."""
    spec = pytest.importorskip("torch.fx.experimental.dynamic_spec")
    model = _model(variant)
    smallest = model.total_stride
    lows = {"batch": 1, "height": smallest, "width": smallest}
    batch, height, width = (spec.ShapeVar(name, min=low, max=4096) for name, low in lows.items())
    shapes = spec.ParamsSpec({"x": spec.TensorSpec([batch, 3, height, width])})
    example = torch.randn(1, 3, smallest, smallest)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=strict)
    _assert_plain_torch(program)
    _assert_as_the_model(program.module(), model, [(1, smallest, smallest), (3, smallest, 64), (2, 101, 77)])


@architectures
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_a_trace_takes_other_sizes(variant):
    model = _model(variant)
    smallest = model.total_stride
    with torch.no_grad():
        trace = torch.jit.trace(model, torch.randn(2, 3, 64, 96))
    _assert_as_the_model(trace, model, [(1, smallest, smallest), (3, 64, 96), (2, 101, 77)])
