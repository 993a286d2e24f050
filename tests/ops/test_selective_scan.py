"""The S6 recurrence, every backend against the loop that defines it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import FAST_BACKENDS, assert_matches, gradients, scan_arguments

from vmamba.ops import available_backends, selective_scan
from vmamba.ops.backends.eager import linear_recurrence

backends = pytest.mark.parametrize(
    "backend", [name for name in available_backends() if available_backends()[name] is None]
)
fast_backends = pytest.mark.parametrize("backend", [b for b in FAST_BACKENDS if available_backends()[b] is None])


@backends
@pytest.mark.parametrize("states", [1, 16])
def test_golden(golden_ops, backend, states):
    names = ["u", "delta", "A", "B", "C", "D", "delta_bias"]
    arguments = {n: golden_ops[f"n{states}_{n}"].clone().requires_grad_() for n in names}
    y = selective_scan(**arguments, delta_softplus=True, backend=backend)
    torch.testing.assert_close(y, golden_ops[f"n{states}_out"], atol=1e-5, rtol=0)
    grads = torch.autograd.grad(y, list(arguments.values()), golden_ops[f"n{states}_grad_out"])
    assert_matches(list(grads), [golden_ops[f"n{states}_grad_{n}"] for n in names], 1e-3)


@fast_backends
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 3), per_group=st.integers(1, 3), length=st.integers(1, 70),
    states=st.integers(1, 3), present=st.tuples(st.booleans(), st.booleans(), st.booleans()), softplus=st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_optional_argument(backend, batch, groups, per_group, length, states, present, softplus):
    arguments = scan_arguments(batch, groups * per_group, length, states, groups, torch.float64)
    arguments["delta"] = arguments["delta"] if softplus else arguments["delta"].abs() * 0.1
    for name, keep in zip(("D", "z", "delta_bias"), present, strict=True):
        if not keep or (name == "delta_bias" and not softplus):
            del arguments[name]
    names = list(arguments)

    def run(which):
        def function(*values):
            return selective_scan(
                **dict(zip(names, values, strict=True)), delta_softplus=softplus, return_last_state=True, backend=which
            )

        return gradients(function, list(arguments.values()))

    (ys, grads), (expected_ys, expected_grads) = run(backend), run("reference")
    assert_matches(ys, expected_ys, 1e-9)
    assert_matches(grads, expected_grads, 1e-8)


@fast_backends
@pytest.mark.parametrize("form", ["constant", "shared", "grouped"])
def test_forms_of_b_and_c(backend, form):
    a = scan_arguments(2, 6, 20, 3, 2, torch.float64)
    forms = {"constant": torch.randn(6, 3).double(), "shared": a["B"][:, 0], "grouped": a["B"]}
    y = selective_scan(a["u"], a["delta"].abs(), a["A"], forms[form], a["C"], backend=backend)
    # By hand: every form written out per channel.
    full = {
        "constant": forms["constant"][None, :, :, None].expand(2, 6, 3, 20),
        "shared": forms["shared"][:, None].expand(2, 6, 3, 20),
        "grouped": a["B"].repeat_interleave(3, 1),
    }[form]
    expected = selective_scan(
        a["u"], a["delta"].abs(), a["A"], full, a["C"].repeat_interleave(3, 1), backend="reference"
    )
    torch.testing.assert_close(y, expected)


@backends
def test_one_step_by_hand(backend):
    u, delta, A, B, C = (
        torch.tensor(v, dtype=torch.float64) for v in ([[[3.0, 5.0]]], [[[0.5, 2.0]]], [[-1.0]], [[2.0]], [[7.0]])
    )
    y, last = selective_scan(u, delta, A, B, C, return_last_state=True, backend=backend)
    h1 = 0.5 * 2 * 3
    h2 = math.exp(-2.0) * h1 + 2.0 * 2 * 5
    torch.testing.assert_close(y, torch.tensor([[[7 * h1, 7 * h2]]], dtype=torch.float64))
    torch.testing.assert_close(last, torch.tensor([[[h2]]], dtype=torch.float64))


@fast_backends
def test_gradcheck_to_second_order(backend):
    arguments = scan_arguments(1, 4, 5, 2, 2, torch.float64)
    names = list(arguments)
    leaves = [v.requires_grad_() for v in arguments.values()]

    def function(*values):
        return selective_scan(
            **dict(zip(names, values, strict=True)), delta_softplus=True, return_last_state=True, backend=backend
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@fast_backends
@pytest.mark.parametrize("length", [4_097, 65_536])
def test_long_sequences(backend, length):
    length //= 8 if backend == "triton" and length > 10_000 else 1  # on the CPU it is interpreted
    a = scan_arguments(1, 2, length, 1, 1)
    y = selective_scan(a["u"], a["delta"], a["A"] * 1e-3, a["B"], a["C"], delta_softplus=True, backend=backend)
    # The same in float64, solved by another method: the unrolled sum over the last steps, whose weights have not died.
    step = torch.nn.functional.softplus(a["delta"].double())
    log_a = step * a["A"].double() * 1e-3
    decay = torch.exp(log_a.flip(-1).cumsum(-1).flip(-1) - log_a)
    h = (decay * step * a["u"].double() * a["B"][:, 0].double()).sum(-1)
    torch.testing.assert_close(y[..., -1].double(), h * a["C"][:, 0, :, -1].double(), rtol=1e-3, atol=1e-4)


@fast_backends
@pytest.mark.parametrize("delta", [-1e4, -50.0, 50.0, 1e4, 1e30])
def test_extreme_steps_stay_finite_and_right(backend, delta):
    a = scan_arguments(1, 3, 100, 2, 1)
    a["delta"] = torch.where(torch.rand(1, 3, 100) < 0.3, delta, a["delta"])
    a["u"] = a["u"] * (1e-20 if delta > 1e10 else 1.0)
    names = ["u", "delta", "A", "B", "C", "D"]

    def run(which):
        return gradients(
            lambda *v: selective_scan(**dict(zip(names, v, strict=True)), delta_softplus=True, backend=which),
            [a[n] for n in names],
        )

    (ys, grads), (expected_ys, expected_grads) = run(backend), run("reference")
    assert all(torch.isfinite(t).all() for t in ys)
    assert_matches(ys, expected_ys, 1e-5)
    for actual, expected in zip(grads[2:], expected_grads[2:], strict=True):
        assert torch.isfinite(actual).all() == torch.isfinite(expected).all()


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float32_state(backend, dtype):
    a = scan_arguments(2, 4, 500, 2, 1)
    a["delta"] -= 4  # small steps: a half-precision state would stop moving
    low = {n: v.to(dtype) for n, v in a.items()}
    y, last = selective_scan(**low, delta_softplus=True, return_last_state=True, backend=backend)
    exact = selective_scan(**{n: v.double() for n, v in low.items()}, delta_softplus=True, backend="reference")
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert_matches([y], [exact], 4 * torch.finfo(dtype).eps)


@fast_backends
def test_non_contiguous_and_empty_inputs(backend):
    a = scan_arguments(2, 4, 30, 2, 2)
    twisted = {n: (v.transpose(0, -1).contiguous().transpose(0, -1)) for n, v in a.items()}
    torch.testing.assert_close(
        selective_scan(**twisted, delta_softplus=True, backend=backend),
        selective_scan(**a, delta_softplus=True, backend=backend),
    )
    for empty in (scan_arguments(0, 4, 30, 2, 2), scan_arguments(2, 4, 0, 2, 2)):
        y, last = selective_scan(**empty, delta_softplus=True, return_last_state=True, backend=backend)
        assert y.shape == empty["u"].shape
        assert torch.equal(last, torch.zeros(empty["u"].shape[0], 4, 2))


@fast_backends
@pytest.mark.parametrize(("constant", "dtype"), [("B", torch.float16), ("C", torch.bfloat16)])
def test_half_precision_gradients_are_added_up_in_float32(backend, dtype, constant):
    """Of B or C that is the same at every step, and of a step that channels share."""
    values = {name: value.to(dtype) for name, value in scan_arguments(2, 6, 40, 2, 2).items()}
    values["delta"] = values["delta"][:, :2]
    values["delta_bias"] = values["delta_bias"][:2]
    values[constant] = torch.randn(6, 2).to(dtype)
    names = list(values)

    def run(which, given):
        return gradients(
            lambda *v: selective_scan(**dict(zip(names, v, strict=True)), delta_softplus=True, backend=which), given
        )[1]

    actual = run(backend, list(values.values()))
    exact = run("reference", [value.double() for value in values.values()])
    # The gradients are of a sum weighted with numbers of `dtype`.
    assert_matches(actual, exact, 8 * torch.finfo(dtype).eps)


@fast_backends
def test_a_step_shared_by_neighbouring_channels(backend):
    """As VMamba's kernel takes it: delta (batch, S, L) and delta_bias (S,) for D channels."""
    a = scan_arguments(2, 6, 20, 3, 2, torch.float64)
    few = a | {"delta": a["delta"][:, :3], "delta_bias": a["delta_bias"][:3]}
    written_out = a | {
        name: few[name].repeat_interleave(2, -2 if name == "delta" else 0) for name in ("delta", "delta_bias")
    }
    torch.testing.assert_close(
        selective_scan(**few, delta_softplus=True, backend=backend),
        selective_scan(**written_out, delta_softplus=True, backend="reference"),
    )


@backends
def test_without_states_the_skip_is_left(backend):
    a = scan_arguments(2, 4, 9, 0, 2)
    leaves = {name: value.requires_grad_() for name, value in a.items()}
    y, last = selective_scan(**leaves, return_last_state=True, backend=backend)
    torch.testing.assert_close(y, a["D"][:, None] * a["u"] * torch.nn.functional.silu(a["z"]))
    assert last.shape == (2, 4, 0)
    grads = torch.autograd.grad(y.sum(), list(leaves.values()), materialize_grads=True)
    assert not grads[list(a).index("delta")].any()
    torch.testing.assert_close(grads[list(a).index("D")], (a["u"] * torch.nn.functional.silu(a["z"])).sum((0, 2)))


class _Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C, D):
        return selective_scan(u, delta, A, B, C, D, backend="eager")


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_takes_any_length_and_growing_factors(strict):
    """Without softplus a negative step makes factors above 1, whose products before the start must not matter."""
    names = ("u", "delta", "A", "B", "C", "D")

    def arguments(length):
        values = scan_arguments(2, 4, length, 2, 2)
        values["A"] = values["A"] * min(1.0, 20 / length)
        return tuple(values[name] for name in names)

    length = torch.export.Dim("length", min=1)
    dynamic = {name: {2: length} if name in ("u", "delta") else {3: length} if name in "BC" else None for name in names}
    program = torch.export.export(_Scan(), arguments(40), dynamic_shapes=dynamic, strict=strict)
    for count in (1, 17, 100, 500):
        values = arguments(count)
        assert (values[1] < 0).any()
        expected = selective_scan(*values, backend="reference")
        assert expected.isfinite().all()
        assert_matches([program.module()(*values)], [expected], 1e-4)


def test_linear_recurrence_backwards_mirrors_forwards():
    a, b = torch.rand(2, 77, 3, dtype=torch.float64), torch.randn(2, 77, 3, dtype=torch.float64)
    torch.testing.assert_close(linear_recurrence(a, b, backwards=True), linear_recurrence(a.flip(1), b.flip(1)).flip(1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", torch.zeros(2, 4), r"u has shape \(2, 4\); expected 3 dimensions \(batch, D, L\)"),
        ("delta", torch.zeros(2, 4, 8), r"delta has shape \(2, 4, 8\); expected \(batch, D, L\) = \(2, 4, 9\)"),
        ("A", torch.zeros(5, 2), r"A has shape \(5, 2\); expected \(D, N\) = \(4, 2\)"),
        ("B", torch.zeros(2, 3, 2, 9), r"B has 3 groups; expected a divisor of the 4 channels"),
        ("C", torch.zeros(2, 2, 3, 9), r"C has shape \(2, 2, 3, 9\); expected .*\(2, any, 2, 9\)"),
        ("D", torch.zeros(1), r"D has shape \(1,\); expected \(D,\) = \(4\)"),
        ("z", torch.zeros(2, 4, 9, 1), r"z has shape \(2, 4, 9, 1\)"),
        ("delta_bias", torch.zeros(3), r"delta_bias has shape \(3,\)"),
        ("delta", torch.zeros(2, 4, 9, device="meta"), r"delta is on meta but u is on cpu; move them to one device"),
        ("B", torch.zeros(2, 2, 2, 9, dtype=torch.complex64), r"B has dtype torch.complex64; expected a real"),
        ("u", torch.zeros(2, 4, 9, dtype=torch.int64), r"u has dtype torch.int64; expected a real"),
    ],
)  # fmt: skip
def test_clear_errors(name, value, message):
    arguments = scan_arguments(2, 4, 9, 2, 2) | {name: value}
    with pytest.raises((ValueError, TypeError), match=message):
        selective_scan(**arguments)
