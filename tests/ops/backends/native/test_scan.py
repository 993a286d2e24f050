"""The C++ kernel: every instruction set that this machine has, and what only pointers and threads can get wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import assert_matches, gradients, scan_arguments, ss2d_arguments

from vmamba.ops import PATTERNS, selective_scan, ss2d_scan
from vmamba.ops.arguments import SS2DArguments
from vmamba.ops.backends import native
from vmamba.ops.backends.native import library

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native.unavailable(CPU) is not None, reason=str(native.unavailable(CPU)))


def _ss2d(*arguments, pattern="cross", backend="native"):
    return ss2d_scan(*arguments, pattern=pattern, backend=backend)


def _assert_as_exact(arguments, pattern="cross"):
    """Values and gradients in float32 against eager in float64."""
    ys, grads = gradients(lambda *v: _ss2d(*v, pattern=pattern), arguments)
    exact_ys, exact_grads = gradients(
        lambda *v: _ss2d(*v, pattern=pattern, backend="eager"), [v.double() for v in arguments]
    )
    assert_matches(ys, exact_ys, 1e-5)
    assert_matches(grads, exact_grads, 5e-5)


# --- values ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12), channels=st.integers(1, 50),
    states=st.sampled_from([1, 2, 5, 16, 19]), rank=st.integers(1, 20), pattern=st.sampled_from(sorted(PATTERNS)),
)  # fmt: skip
def test_ss2d_in_any_shape(batch, height, width, channels, states, rank, pattern):
    _assert_as_exact(ss2d_arguments(batch, height, width, channels, states, rank), pattern)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), per_group=st.integers(1, 20), length=st.integers(1, 150),
    states=st.sampled_from([1, 2, 5, 16]), softplus=st.booleans(), optional=st.booleans(),
)  # fmt: skip
def test_selective_scan_in_any_shape(batch, groups, per_group, length, states, softplus, optional):
    values = scan_arguments(batch, groups * per_group, length, states, groups)
    if not softplus:
        values["delta"], values["delta_bias"] = values["delta"].abs(), values["delta_bias"].abs()
    names = [name for name in values if optional or name not in ("D", "z", "delta_bias")]

    def run(backend, *given):
        return selective_scan(
            **dict(zip(names, given, strict=True)), delta_softplus=softplus, return_last_state=True, backend=backend
        )

    arguments = [values[name] for name in names]
    ys, grads = gradients(lambda *v: run("native", *v), arguments)
    exact_ys, exact_grads = gradients(lambda *v: run("eager", *v), [v.double() for v in arguments])
    assert_matches(ys, exact_ys, 1e-5)
    assert_matches(grads, exact_grads, 5e-5)


@pytest.mark.parametrize(
    "shape",
    [(1, 14, 14, 96, 1, 6), (2, 7, 7, 40, 16, 24), (1, 1, 70, 16, 16, 3), (1, 70, 1, 17, 3, 5), (70, 2, 3, 32, 1, 2)],
)
def test_every_instruction_set(kernels, shape):
    _assert_as_exact(ss2d_arguments(*shape))


@pytest.mark.parametrize(("size", "states"), [(256, 1), (48, 16)])
def test_long_sequences_are_replayed_span_by_span(kernels, size, states):
    """The backward pass keeps about 4,000 positions at a time with one state, 450 with sixteen."""
    arguments = ss2d_arguments(1, size, size, 16, states, 2)
    _assert_as_exact(arguments)


@pytest.mark.parametrize("bias", [-200.0, -95.0, -30.0, 19.0, 21.0, 60.0, 1e4])
def test_extreme_steps(kernels, bias):
    """Δ from 0 to ten thousand: the exponentials underflow to 0 and nothing overflows."""
    arguments = ss2d_arguments(1, 5, 9, 20, 2, 1)
    arguments[3] = torch.full_like(arguments[3], bias)
    _assert_as_exact(arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("argument", range(6))
def test_non_finite_inputs_spread_as_in_the_definition(kernels, argument, value):
    arguments = ss2d_arguments(1, 4, 5, 18, 2, 2)
    arguments[argument].flatten()[7] = value
    actual, expected = (_ss2d(*arguments, backend=backend) for backend in ("native", "reference"))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected))
    finite = torch.isfinite(expected)
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_float32_rounded_once(kernels):
    u, *parameters = ss2d_arguments(2, 9, 10, 40, 1, 3)
    u = u.bfloat16()
    assert torch.equal(_ss2d(u, *parameters), _ss2d(u.float(), *parameters).bfloat16())
    _, (low, *_) = gradients(_ss2d, [u, *parameters])
    _, (exact, *_) = gradients(_ss2d, [u.float(), *parameters])
    assert low.dtype == torch.bfloat16
    assert_matches([low], [exact], 0.01)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_non_contiguous_and_broadcast_inputs():
    u, *parameters = ss2d_arguments(2, 6, 7, 20, 2, 3)
    strange = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in parameters]
    channels_first = u.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(_ss2d(channels_first, *strange), _ss2d(u, *parameters))
    broadcast = u[:1, :1, :1].expand(2, 6, 7, 20)
    assert torch.equal(_ss2d(broadcast, *parameters), _ss2d(broadcast.contiguous(), *parameters))


@pytest.mark.parametrize("shape", [(0, 4, 4, 16), (2, 0, 4, 16), (2, 4, 0, 16)])
def test_empty_inputs(shape):
    arguments = ss2d_arguments(*shape, 1, 2)
    ys, grads = gradients(_ss2d, arguments)
    assert ys[0].shape == shape
    assert all(torch.equal(grad, torch.zeros_like(value)) for grad, value in zip(grads, arguments, strict=True))


@pytest.mark.parametrize("position", range(6))
def test_the_registered_operator_checks_shapes_itself(position):
    """Whoever calls torch.ops.vmamba directly, past the public function, must not reach memory that is not theirs."""
    u, _, *parameters = ss2d_arguments(1, 4, 4, 16, 2, 2)
    arguments = [u, torch.randn(1, 4, 4, 4, 6), *parameters]
    arguments[position] = arguments[position][..., :-1]
    with pytest.raises(ValueError, match="has shape"):
        torch.ops.vmamba.ss2d_scan(*arguments, "cross", "native")
    with pytest.raises(ValueError, match="has shape"):
        torch.ops.vmamba.ss2d_scan_backward(u, *arguments, "cross", "native")


# --- threads and processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 20, 21, 50, 1, 6), (3, 9, 8, 96, 2, 6)])
def test_the_number_of_threads_changes_no_bit(kernels, threads, dtype, shape):
    u, _, *parameters = ss2d_arguments(*shape)
    u, rank, states = u.to(dtype), shape[-1], shape[-2]
    arguments = SS2DArguments(u, torch.randn(*shape[:3], 4, rank + 2 * states), *parameters, "cross")
    results = []
    for count in (1, 2, 3, 16, 2):
        threads(count)
        results.append([native.ss2d_scan(arguments), *native.ss2d_scan_backward(u, arguments)])
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            assert torch.equal(value, first)


def test_works_where_torch_has_no_openmp():
    """Then threads are started for each call."""
    arguments = ss2d_arguments(1, 16, 16, 64, 1, 2)
    expected = gradients(_ss2d, arguments)
    library._LIBRARY.vmamba_use_openmp(None)
    try:
        actual = gradients(_ss2d, arguments)
    finally:
        library._LIBRARY.vmamba_use_openmp(library._openmp_parallel())
    for value, first in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(value, first)


def _run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_forked_process_works_alone():
    """A DataLoader's workers are forked from a process whose OpenMP threads they do not have."""
    code = """
import os, torch
from vmamba.ops import ss2d_scan
torch.set_num_threads(2)
shapes = (1, 20, 20, 64), (4, 4, 64), (4, 64, 2), (4, 64), (4, 64, 1), (4, 64)
arguments = [torch.randn(shape) for shape in shapes]
arguments[4] = -arguments[4].abs()
y = ss2d_scan(*arguments, backend="native")
pid = os.fork()
if pid == 0:
    projected = torch.zeros(1, 20, 20, 4, 4)
    from vmamba.ops.arguments import SS2DArguments
    from vmamba.ops.backends import native
    z = native.ss2d_scan(SS2DArguments(arguments[0], projected, *arguments[2:], "cross"))
    os._exit(0 if torch.isfinite(z).all() else 1)
print(os.waitpid(pid, 0)[1], torch.equal(y, ss2d_scan(*arguments, backend="native")))
"""
    assert _run_python(code).split() == ["0", "True"]


def test_without_the_library_eager_takes_over_and_says_so_once(tmp_path):
    code = """
import warnings, torch
from vmamba.ops import available_backends, ss2d_scan
shapes = (1, 2, 2, 4), (4, 4, 4), (4, 4, 2), (4, 4), (4, 4, 1), (4, 4)
arguments = [torch.zeros(shape) for shape in shapes]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(available_backends()["native"])
    for _ in range(2):
        ss2d_scan(*arguments)
    torch.compile(ss2d_scan, fullgraph=True, backend="eager")(*arguments)
print(*(str(warning.message) for warning in caught if "plain torch" in str(warning.message)))
"""
    library = str(tmp_path / "missing.so")
    reason, warning = _run_python(code, VMAMBA_NATIVE_LIBRARY=library).strip().splitlines()
    assert reason.startswith(f"the CPU kernel {library} could not be loaded")
    assert warning == f"the operators run in plain torch, several times slower than they could: {reason}"


def test_memory_of_the_backward_pass_does_not_hold_every_state():
    """One array of all states would be 4·L·D·N floats, 268 MB; the gradients themselves need far less."""
    code = """
import resource, torch
from vmamba.ops.arguments import SS2DArguments
from vmamba.ops.backends import native
torch.set_num_threads(2)
L, D, N, R = 4096, 256, 16, 2
values = [torch.rand(1, 64, 64, D), torch.rand(1, 64, 64, 4, R + 2 * N), torch.rand(4, D, R), torch.rand(4, D)]
values += [-torch.rand(4, D, N), torch.rand(4, D)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
native.ss2d_scan_backward(values[0], SS2DArguments(*values, "cross"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(_run_python(code)) < 120


def test_default_dtype_and_device_do_not_matter():
    """Buffers that followed them would hand the kernel memory of another size, or of a GPU."""
    arguments = ss2d_arguments(2, 6, 5, 20, 2, 3)
    sequence = scan_arguments(2, 6, 40, 2, 3)
    expected = gradients(lambda *v: ss2d_scan(*v, backend="native"), arguments)
    expected_scan = gradients(lambda *v: selective_scan(*v, True, backend="native"), list(sequence.values()))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = ss2d_scan(*arguments, backend="native")
        assert torch.equal(y, expected[0][0])
        actual_scan = gradients(lambda *v: selective_scan(*v, True, backend="native"), list(sequence.values()))
        actual_grid = gradients(lambda *v: ss2d_scan(*v, backend="native"), arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_matches([*actual_grid[0], *actual_grid[1]], [*expected[0], *expected[1]], 1e-6)
    assert_matches([*actual_scan[0], *actual_scan[1]], [*expected_scan[0], *expected_scan[1]], 1e-6)
