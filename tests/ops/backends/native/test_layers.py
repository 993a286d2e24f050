"""The fused layers of the CPU against torch in float64, with every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.backends.native import layers, library

pytestmark = pytest.mark.skipif(layers.reason_unavailable() is not None, reason=str(layers.reason_unavailable()))

CHANNELS = [1, 7, 16, 17, 96, 100]
DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def _assert_near(actual, exact, tolerance):
    """Largest difference against the largest entry, or 1; in bfloat16 each entry may be rounded once more."""
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    assert not actual.requires_grad
    allowed = tolerance * exact.abs().max().clamp(min=1) + 2**-8 * exact.abs() * (actual.dtype == torch.bfloat16)
    assert ((actual.double() - exact).abs() <= allowed).all()


def _convolution(x, weight, bias):
    """(B, H, W, C) to the same, without SiLU."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)


def _convolution_arguments(shape, dtype=torch.float32, has_bias=True):
    channels = shape[-1]
    x, weight = torch.randn(shape).to(dtype), torch.randn(channels, 1, 3, 3)
    return x, weight, torch.randn(channels) if has_bias else None


def _exact_gradients(grad, *arguments):
    """Of SiLU of the convolution, in float64, for those arguments that are given."""
    leaves = [None if value is None else value.double().requires_grad_() for value in arguments]
    given = [value for value in leaves if value is not None]
    return torch.autograd.grad(F.silu(_convolution(*leaves)), given, grad.double())


# --- LayerNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [*CHANNELS, 384, 1000])
def test_layer_norm(kernels, channels, dtype):
    x = (torch.randn(2, 5, 3, channels) * 3 + 1).to(dtype)
    weight, bias = torch.randn(channels), torch.randn(channels)
    for parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
        exact = F.layer_norm(x.double(), (channels,), *(p if p is None else p.double() for p in parameters), 1e-5)
        _assert_near(layers.layer_norm(x, *parameters, 1e-5), exact, 3e-6 if channels > 1 else 1e-30)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_layer_norm_far_from_zero_is_no_worse_than_torch(kernels, offset):
    x = torch.randn(50, 200) + offset
    exact = F.layer_norm(x.double(), (200,), None, None, 1e-5)
    ours = (layers.layer_norm(x, None, None, 1e-5) - exact).abs().max()
    torchs = (F.layer_norm(x, (200,), None, None, 1e-5) - exact).abs().max()
    assert ours <= max(1.2 * torchs, 1e-5)


def test_layer_norm_of_constants_is_the_bias(kernels):
    weight, bias = torch.randn(40), torch.randn(40)
    assert torch.equal(layers.layer_norm(torch.full((3, 40), 7.0), weight, bias, 1e-5), bias.expand(3, 40))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [3, 18])
def test_layer_norm_of_non_finite_values_is_nan_in_their_row_only(kernels, place, value):
    x = torch.randn(3, 20)
    x[1, place] = value
    y = layers.layer_norm(x, None, None, 1e-5)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


# --- depthwise convolution and SiLU ----------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (2, 1, 6), (1, 7, 1), (2, 5, 4), (1, 2, 3), (1, 17, 3), (1, 35, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("grid", SHAPES)
def test_depthwise_silu(kernels, grid, channels, dtype):
    for has_bias in (True, False):
        x, weight, bias = _convolution_arguments((*grid, channels), dtype, has_bias)
        exact = F.silu(_convolution(x.double(), weight.double(), bias if bias is None else bias.double()))
        _assert_near(layers.depthwise_silu(x, weight, bias), exact, 3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("grid", SHAPES)
def test_depthwise_silu_backward(kernels, grid, channels, dtype):
    for has_bias in (True, False):
        arguments = _convolution_arguments((*grid, channels), dtype, has_bias)
        grad = torch.randn_like(arguments[0])
        grads, exact = layers.depthwise_silu_backward(grad, *arguments), _exact_gradients(grad, *arguments)
        assert [value.dtype for value in grads] == [dtype, torch.float32, torch.float32]
        assert grads[2].shape == (channels,)
        for value, reference in zip(grads, exact, strict=False):
            _assert_near(value, reference, 1e-6)


def test_gradient_of_the_bias_without_a_bias():
    x, weight, _ = _convolution_arguments((2, 6, 5, 20))
    grad, zeros = torch.randn_like(x), torch.zeros(20)
    for value, same in zip(
        layers.depthwise_silu_backward(grad, x, weight, None),
        layers.depthwise_silu_backward(grad, x, weight, zeros),
        strict=True,
    ):
        assert torch.equal(value, same)


def test_gradients_are_no_views_of_larger_memory():
    x, weight, bias = _convolution_arguments((2, 40, 5, 20))
    for value in layers.depthwise_silu_backward(torch.randn_like(x), x, weight, bias):
        assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, -1e30])
def test_silu_of_extreme_values_is_torchs(kernels, value):
    """The convolution passes its input on, so that the result is SiLU of it."""
    weight = torch.zeros(20, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    x = torch.randn(1, 1, 1, 20)
    x[..., 3], x[..., 18] = value, value
    torch.testing.assert_close(layers.depthwise_silu(x, weight, None), F.silu(x), equal_nan=True)
    grad_x, _, _ = layers.depthwise_silu_backward(torch.ones_like(x), x, weight, None)
    exact = torch.ops.aten.silu_backward(torch.ones(20).double(), x.flatten().double())
    torch.testing.assert_close(grad_x.flatten().double(), exact, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_a_non_finite_pixel_reaches_its_neighbours_only(kernels):
    x, weight, bias = _convolution_arguments((1, 6, 6, 20))
    x[0, 2, 3, 4] = NAN
    expected = torch.zeros(1, 6, 6, 20, dtype=torch.bool)
    expected[0, 1:4, 2:5, 4] = True
    assert torch.equal(layers.depthwise_silu(x, weight, bias).isnan(), expected)


# --- GELU ------------------------------------------------------------------------------------------------------------


def _values():
    return torch.cat((torch.linspace(-20, 20, 100_003), torch.randn(1000), torch.tensor([0.0, -0.0, 1e-30, -1e-40])))


def test_gelu_within_its_bound(kernels):
    h = _values()
    error = (layers.gelu(h) - F.gelu(h.double())).abs()
    assert (error <= 2e-7 * h.abs().clamp(min=1)).all()


def test_gelu_keeps_its_relative_accuracy_far_below_zero(kernels):
    h = torch.linspace(-5, -0.01, 10_001)
    exact = F.gelu(h.double())
    assert ((layers.gelu(h) - exact).abs() <= 2e-5 * exact.abs()).all()


def test_gelu_backward_within_its_bound(kernels):
    h = _values()
    y, grad = layers.gelu_backward(torch.ones_like(h), h)
    exact = torch.ops.aten.gelu_backward(torch.ones_like(h).double(), h.double())
    assert torch.equal(y, layers.gelu(h))
    assert ((grad - exact).abs() <= 2e-7 * h.abs().clamp(min=1)).all()


@pytest.mark.parametrize("count", [1, 3, 4, 8, 15, 16, 17, 33, 1000, 70_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_any_size(kernels, count, dtype):
    h, grad = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    exact = torch.ops.aten.gelu_backward(grad.double(), h.double())
    y, grad_h = layers.gelu_backward(grad, h)
    _assert_near(layers.gelu(h), F.gelu(h.double()), 1e-6)
    _assert_near(y, F.gelu(h.double()), 1e-6)
    _assert_near(grad_h, exact, 1e-6)


def test_gelu_of_non_finite_values_is_that_of_the_definition(kernels):
    h = torch.tensor([INF, -INF, NAN, 1e38, -1e38, 30.0, -30.0]).repeat(5)
    ones = torch.ones_like(h)
    y, grad = layers.gelu_backward(ones, h)
    torch.testing.assert_close(y.double(), F.gelu(h.double()), equal_nan=True)
    torch.testing.assert_close(grad.double(), torch.ops.aten.gelu_backward(ones.double(), h.double()), equal_nan=True)
    assert torch.equal(layers.gelu(h).nan_to_num(), y.nan_to_num())


# --- all of them -----------------------------------------------------------------------------------------------------


def _call_all(x, grad, weight, bias, scale):
    return [
        layers.layer_norm(x, scale, bias, 1e-5),
        layers.depthwise_silu(x, weight, bias),
        *layers.depthwise_silu_backward(grad, x, weight, bias),
        layers.gelu(x),
        *layers.gelu_backward(grad, x),
    ]


def _arguments(shape, dtype=torch.float32):
    x, weight, bias = _convolution_arguments(shape, dtype)
    return x, torch.randn_like(x), weight, bias, torch.randn(shape[-1])


def _assert_same(results, others):
    for value, other in zip(results, others, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 20, 21, 50), (3, 37, 8, 96), (2, 5, 7, 700)])
def test_the_number_of_threads_changes_no_bit(kernels, threads, dtype, shape):
    arguments, results = _arguments(shape, dtype), []
    for count in (1, 2, 3, 16, 2):
        threads(count)
        results.append(_call_all(*arguments))
    for result in results[1:]:
        _assert_same(result, results[0])


def test_works_where_torch_has_no_openmp(threads):
    """Then threads are started for each call."""
    threads(3)
    arguments = _arguments((2, 20, 20, 40))
    expected = _call_all(*arguments)
    library._LIBRARY.vmamba_use_openmp(None)
    try:
        actual = _call_all(*arguments)
    finally:
        library._LIBRARY.vmamba_use_openmp(library._openmp_parallel())
    _assert_same(actual, expected)


def test_bfloat16_is_float32_rounded_once(kernels):
    x, grad, weight, bias, scale = _arguments((2, 9, 10, 40), torch.bfloat16)
    low, high = (
        _call_all(image, slope, weight, bias, scale) for image, slope in ((x, grad), (x.float(), grad.float()))
    )
    for value, exact in zip(low, high, strict=True):
        assert torch.equal(value, exact.to(value.dtype))


def test_parameters_in_bfloat16_are_converted():
    x, grad, *parameters = _arguments((2, 4, 5, 20))
    parameters = [value.bfloat16() for value in parameters]
    low, high = (_call_all(x, grad, *values) for values in (parameters, [value.float() for value in parameters]))
    for value, exact in zip(low, high, strict=True):
        assert torch.equal(value, exact.to(value.dtype))
    assert [value.dtype for value in low[3:5]] == [torch.bfloat16] * 2


def test_non_contiguous_inputs():
    x, grad, weight, bias, scale = _arguments((2, 6, 5, 20))
    strange = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in (x, grad, weight)]
    strange += [torch.stack((value, value), dim=1)[:, 0] for value in (bias, scale)]
    assert not any(value.is_contiguous() for value in strange)
    _assert_same(_call_all(*strange), _call_all(x, grad, weight, bias, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_in_the_memory_of_an_argument(kernels, dtype):
    x, grad, *_ = _arguments((2, 3, 5, 21), dtype)
    expected, given = layers.gelu_backward(grad, x)[1], grad.clone()
    result = layers.gelu_backward(given, x, overwrite=True)[1]
    assert result.data_ptr() == given.data_ptr()
    assert torch.equal(result, expected)
    given = grad.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layers.gelu_backward(given, x, overwrite=True)[1], expected)
    assert torch.equal(given, grad)


@pytest.mark.parametrize("shape", [(0, 4, 4, 16), (2, 0, 4, 16), (2, 4, 0, 16), (2, 4, 4, 0)])
def test_empty_inputs(shape):
    x, grad, weight, bias, scale = _arguments(shape)
    norm, u, grad_x, grad_weight, grad_bias, y, again, grad_h = _call_all(x, grad, weight, bias, scale)
    assert all(value.shape == shape for value in (norm, u, grad_x, y, again, grad_h))
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    assert torch.equal(grad_bias, torch.zeros_like(bias))


def test_whatever_the_default_dtype_is():
    arguments = _arguments((2, 20, 5, 20))
    expected = _call_all(*arguments)
    torch.set_default_dtype(torch.float64)
    try:
        actual = _call_all(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    _assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_other_dtypes_are_refused(dtype):
    x, grad, weight, bias, scale = _arguments((1, 3, 3, 4))
    other = "has dtype .* support float32 and bfloat16"
    calls = [
        lambda: layers.layer_norm(x.to(dtype), scale, bias, 1e-5),
        lambda: layers.layer_norm(x, scale.to(dtype), bias, 1e-5),
        lambda: layers.depthwise_silu(x.to(dtype), weight, bias),
        lambda: layers.depthwise_silu(x, weight.to(dtype), bias),
        lambda: layers.depthwise_silu_backward(grad.to(dtype), x, weight, bias),
        lambda: layers.depthwise_silu_backward(grad, x, weight, bias.to(dtype)),
        lambda: layers.gelu(x.to(dtype)),
        lambda: layers.gelu_backward(grad.to(dtype), x),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=other):
            call()


def test_a_gradient_in_another_dtype_is_refused():
    x, grad, weight, bias, _ = _arguments((1, 3, 3, 4))
    with pytest.raises(TypeError, match=r"grad_u has dtype .*; expected that of x"):
        layers.depthwise_silu_backward(grad.bfloat16(), x, weight, bias)
    with pytest.raises(TypeError, match=r"grad has dtype .*; expected that of h"):
        layers.gelu_backward(grad.bfloat16(), x)


def test_wrong_shapes_are_refused():
    x, grad, weight, bias, scale = _arguments((1, 3, 3, 4))
    calls = [
        lambda: layers.layer_norm(x, scale[:-1], bias, 1e-5),
        lambda: layers.layer_norm(x, scale, bias[:, None], 1e-5),
        lambda: layers.depthwise_silu(x[0], weight, bias),
        lambda: layers.depthwise_silu(x, weight[:-1], bias),
        lambda: layers.depthwise_silu(x, weight[..., :-1], bias),
        lambda: layers.depthwise_silu(x, weight, bias[:-1]),
        lambda: layers.depthwise_silu_backward(grad[:, :-1], x, weight, bias),
        lambda: layers.gelu_backward(grad[:, :-1], x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="has shape"):
            call()
    with pytest.raises(ValueError, match="x has no dimensions"):
        layers.layer_norm(torch.tensor(1.0), None, None, 1e-5)


def test_other_devices_and_other_types_are_refused():
    x, _, weight, _, _ = _arguments((1, 3, 3, 4))
    with pytest.raises(ValueError, match="h is on meta; the fused layers run on the CPU only"):
        layers.gelu(x.to("meta"))
    with pytest.raises(ValueError, match="weight is on meta"):
        layers.depthwise_silu(x, weight.to("meta"), None)
    with pytest.raises(TypeError, match="h is a list"):
        layers.gelu([1.0])


def test_without_the_library_every_call_says_why(tmp_path):
    code = """
import torch
from vmamba.ops.backends.native import layers
print(layers.reason_unavailable())
try:
    layers.gelu(torch.zeros(3))
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"VMAMBA_NATIVE_LIBRARY": str(tmp_path / "missing.so")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    reason, error = result.stdout.splitlines()
    assert reason == error
    assert "could not be loaded" in reason
