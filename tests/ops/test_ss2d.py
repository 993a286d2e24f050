"""SS2D's operator on a grid, every backend against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import FAST_BACKENDS, assert_matches, few_states, gradients, ss2d_arguments

from vmamba.ops import PATTERNS, available_backends, cross_merge, cross_scan, selective_scan, ss2d_scan

fast_backends = pytest.mark.parametrize("backend", [b for b in FAST_BACKENDS if available_backends()[b] is None])


def test_reference_is_scan_then_selective_scan_then_merge():
    """The definition written out with the public operators, projections made after the scan, as the paper draws it."""
    u, x_proj, dt_proj, bias, A, D = ss2d_arguments(2, 4, 5, 3, 2, 2, torch.float64)
    for pattern in PATTERNS:
        sequences = cross_scan(u.permute(0, 3, 1, 2), pattern)
        dt_low, B, C = torch.einsum("bkdl,kcd->bkcl", sequences, x_proj).split([2, 2, 2], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt_low, dt_proj)
        y = selective_scan(
            sequences.flatten(1, 2), delta.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten(), None, bias.flatten(),
            delta_softplus=True, backend="reference",
        )  # fmt: skip
        expected = cross_merge(y.unflatten(1, (4, 3)), (4, 5), pattern).permute(0, 2, 3, 1)
        actual = ss2d_scan(u, x_proj, dt_proj, bias, A, D, pattern, backend="reference")
        torch.testing.assert_close(actual, expected)


@fast_backends
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 5),
    states=st.integers(1, 3), rank=st.integers(1, 3), pattern=st.sampled_from(sorted(PATTERNS)),
)  # fmt: skip
def test_any_shape(backend, batch, height, width, channels, states, rank, pattern):
    arguments = ss2d_arguments(batch, height, width, channels, states, rank, torch.float64)
    ys, grads = gradients(lambda *v: ss2d_scan(*v, pattern, backend=backend), arguments)
    expected_ys, expected_grads = gradients(lambda *v: ss2d_scan(*v, pattern, backend="reference"), arguments)
    assert_matches(ys, expected_ys, 1e-9)
    assert_matches(grads, expected_grads, 1e-8)


@fast_backends
@pytest.mark.parametrize(
    "shape", [(2, 14, 14, 96, 1, 6), (1, 7, 9, 40, 16, 3), (1, 1, 33, 17, 1, 2), (1, 33, 1, 16, 4, 1)]
)
def test_float32_against_float64_reference(backend, shape):
    arguments = ss2d_arguments(*few_states(backend, shape))
    ys, grads = gradients(lambda *v: ss2d_scan(*v, backend=backend), arguments)
    expected_ys, expected_grads = gradients(
        lambda *v: ss2d_scan(*v, backend="reference"), [v.double() for v in arguments]
    )
    assert_matches(ys, expected_ys, 1e-5)
    assert_matches(grads, expected_grads, 1e-4)


@fast_backends
def test_gradcheck_to_second_order(backend):
    arguments = [v.requires_grad_() for v in ss2d_arguments(1, 2, 3, 2, 2, 1, torch.float64)]
    assert torch.autograd.gradcheck(lambda *v: ss2d_scan(*v, backend=backend), arguments)
    assert torch.autograd.gradgradcheck(lambda *v: ss2d_scan(*v, backend=backend), arguments)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype):
    arguments = [v.to(dtype) for v in ss2d_arguments(2, 12, 12, 32, 1, 2)]
    y = ss2d_scan(*arguments, backend=backend)
    exact = ss2d_scan(*(v.double() for v in arguments), backend="reference")
    assert y.dtype == dtype
    assert_matches([y], [exact], 4 * torch.finfo(dtype).eps)


@fast_backends
def test_autocast_computes_in_float32(backend):
    u, *parameters = ss2d_arguments(1, 8, 8, 16, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ss2d_scan(u, *parameters, backend=backend)
        y_low = ss2d_scan(u.bfloat16(), *parameters, backend=backend)
    assert torch.equal(y, ss2d_scan(u, *parameters, backend=backend))
    assert y_low.dtype == torch.bfloat16
    assert_matches([y_low], [ss2d_scan(u.bfloat16().float(), *parameters, backend=backend)], 0.01)


@fast_backends
def test_large_inputs_in_half_precision_train_without_nan(backend):
    """The complaint about mixed precision: exp, softplus and their sums overflow when they are taken in float16."""
    arguments = ss2d_arguments(1, 10, 10, 8, 1, 1)
    arguments[0] = (arguments[0] * 1e3).half()
    arguments[1] = arguments[1] * 1e-4
    arguments[2] = arguments[2] * 1e3  # Δ around a hundred
    ys, grads = gradients(lambda *v: ss2d_scan(*v, backend=backend), arguments)
    assert all(torch.isfinite(t).all() for t in (*ys, *grads))


@fast_backends
def test_operator_is_registered_properly(backend):
    u, x_proj, *parameters = ss2d_arguments(1, 3, 4, 4, 2, 1, torch.float64)
    projected = torch.nn.functional.linear(u, x_proj.flatten(0, 1)).unflatten(-1, (4, -1))
    leaves = [v.requires_grad_() for v in (u, projected, *parameters)]
    torch.library.opcheck(torch.ops.vmamba.ss2d_scan, (*leaves, "cross", backend))


@fast_backends
def test_compiles_into_one_graph(backend):
    arguments = ss2d_arguments(2, 5, 6, 8, 1, 2)
    compiled = torch.compile(lambda *v: ss2d_scan(*v, backend=backend), fullgraph=True, backend="aot_eager")
    ys, grads = gradients(compiled, arguments)
    expected_ys, expected_grads = gradients(lambda *v: ss2d_scan(*v, backend=backend), arguments)
    assert_matches(ys, expected_ys, 1e-6)
    assert_matches(grads, expected_grads, 1e-6)


class _Operator(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.values = torch.nn.ParameterList(parameters)

    def forward(self, u):
        return ss2d_scan(u, *self.values)


@pytest.mark.parametrize("sizes", [[(5, 6)], [(5, 6), (9, 17), (40, 3)]])
def test_exports_to_plain_torch(sizes):
    """An exported graph holds no operator of ours, so it runs where this package is not installed."""
    u, *parameters = ss2d_arguments(1, *sizes[0], 4, 2, 1)
    module = _Operator(parameters)
    dynamic = {"u": {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}} if len(sizes) > 1 else None
    program = torch.export.export(module, (u,), dynamic_shapes=dynamic)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert ("scan" in targets) == (len(sizes) > 1)  # torch's loop, for open sizes
    assert all(target.startswith(("aten.", "<built-in function")) for target in targets - {"scan"}), targets
    for height, width in sizes:
        image = torch.randn(1, height, width, 4)
        torch.testing.assert_close(program.module()(image), module(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 4), r"u has shape \(2, 3, 4\); expected 4 dimensions \(B, H, W, D\)"),
        (1, torch.zeros(4, 5, 3), r"x_proj_weight has shape \(4, 5, 3\); expected \(K, R \+ 2N, D\) = \(4, 5, 4\)"),
        (2, torch.zeros(3, 4, 1), r"dt_proj_weight has shape \(3, 4, 1\); expected \(K, D, R\) = \(4, 4, 1\)"),
        (3, torch.zeros(16), r"dt_proj_bias has shape \(16,\); expected \(K, D\) = \(4, 4\)"),
        (4, torch.zeros(16, 2), r"A has shape \(16, 2\); expected 3 dimensions \(K, D, N\)"),
        (5, torch.zeros(4, 4, device="meta"), r"D is on meta but u is on cpu"),
    ],
)  # fmt: skip
def test_clear_errors(position, value, message):
    arguments = ss2d_arguments(1, 3, 3, 4, 2, 1)
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        ss2d_scan(*arguments)
