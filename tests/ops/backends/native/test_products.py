"""The product with a layer's weight against torch in float64, with every instruction set that this machine has."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.backends.native import layers, library, products

pytestmark = pytest.mark.skipif(products.reason_unavailable() is not None, reason=str(products.reason_unavailable()))

FLOAT, LOW = torch.float32, torch.bfloat16
# Of x, weight and residual.
DTYPES = [(FLOAT, FLOAT, FLOAT), (LOW, LOW, LOW), (LOW, FLOAT, LOW), (LOW, LOW, FLOAT), (LOW, FLOAT, FLOAT)]
INF, NAN = float("inf"), float("nan")


def _arguments(rows, inputs, outputs, dtypes=DTYPES[0]):
    x, weight, residual = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    x, weight, residual = (value.to(dtype) for value, dtype in zip((x, weight, residual), dtypes, strict=True))
    return x, weight, torch.randn(outputs), residual


def _exact(x, weight, bias=None, activation="none", residual=None):
    weight, bias = weight.to(x.dtype).double(), None if bias is None else bias.double()
    y = F.linear(x.double(), weight, bias)
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else y + residual.double()


def _assert_near(actual, exact, inputs):
    """Sums of values of order 1, rounded at each step; in bfloat16 each entry may be rounded once more."""
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    assert not actual.requires_grad
    allowed = 5e-7 * inputs + 2e-6 + 2**-8 * exact.abs() * (actual.dtype == LOW)
    assert ((actual.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 52, 101, 255, 261])
def test_any_size(product_kernels, rows, dtypes):
    """On both sides of every width of vectors, panels and strips, and of the packing of pixels or weights."""
    for inputs, outputs in itertools.product((1, 2, 15, 16, 33, 98), (1, 5, 8, 47, 50, 97)):
        x, weight, bias, residual = _arguments(rows, inputs, outputs, dtypes)
        y = products.linear(x, weight, bias, "gelu", residual)
        assert y.dtype is dtypes[2]
        _assert_near(y, _exact(x, weight, bias, "gelu", residual), inputs)
        y = products.linear(x, weight)
        assert y.dtype is dtypes[0]
        _assert_near(y, _exact(x, weight), inputs)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("sizes", [(784, 96, 96), (260, 1536, 100), (196, 1536, 50), (49, 3072, 40)])
def test_sizes_of_models(product_kernels, sizes, dtypes):
    """What is packed in several blocks, of 512 KB, too."""
    x, weight, bias, residual = _arguments(*sizes, dtypes)
    for activation in ("none", "gelu"):
        y = products.linear(x, weight, bias, activation, residual)
        _assert_near(y, _exact(x, weight, bias, activation, residual), sizes[1])


def test_leading_dimensions_strides_and_bias_in_half_precision(product_kernels):
    x, residual = torch.randn(2, 20, 3, 5).permute(0, 2, 3, 1), torch.randn(30, 2, 3, 5).permute(1, 2, 3, 0)
    weight, bias = torch.randn(20, 30).t(), torch.randn(30).to(LOW)
    _assert_near(products.linear(x, weight, bias, residual=residual), _exact(x, weight, bias, residual=residual), 20)
    _assert_near(products.linear(x[0, 0, 0], weight, bias), _exact(x[0, 0, 0], weight, bias), 20)


@pytest.mark.parametrize("dtype", [FLOAT, LOW])
@pytest.mark.parametrize("rows", [20, 300])
def test_data_at_odd_addresses(product_kernels, rows, dtype):
    """A parameter may be a part of a larger tensor, at an address that is a multiple of its own size only."""
    flat = torch.randn(rows * 32 + 1).to(dtype)[1:].view(rows, 32), torch.randn(40 * 32 + 1).to(dtype)[1:].view(40, 32)
    _assert_near(products.linear(*flat), _exact(*flat), 32)


@pytest.mark.parametrize("dtypes", DTYPES[:3])
@pytest.mark.parametrize("rows", [7, 50, 300])
def test_weights_are_read_at_every_call(product_kernels, rows, dtypes):
    x, weight, bias, _ = _arguments(rows, 32, 20, dtypes)
    for _ in range(3):
        weight.neg_()
        bias.add_(1)
        _assert_near(products.linear(x, weight, bias), _exact(x, weight, bias), 32)


def test_weights_are_rounded_as_autocast_rounds_them(product_kernels):
    """Each product with a one is a weight; halves are rounded to even."""
    weight = torch.cat([torch.randn(1000, 16), 1 + torch.arange(64.0).view(4, 16) * 2**-9])
    for rows in (16, 256):
        x = torch.eye(16).repeat(rows // 16, 1).to(LOW)
        y = products.linear(x, weight, residual=torch.zeros(rows, len(weight)))
        assert torch.equal(y, weight.to(LOW).float().t().repeat(rows // 16, 1))


@pytest.mark.parametrize("dtypes", DTYPES[:3])
@pytest.mark.parametrize("rows", [5, 40, 300])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_values_that_are_not_finite_stay_in_their_row(product_kernels, value, rows, dtypes):
    for place in (3, 20, 32):
        x, weight, bias, _ = _arguments(rows, 33, 20, dtypes)
        whole = products.linear(x, weight, bias, "gelu")
        x[2, place] = value
        y, exact = products.linear(x, weight, bias, "gelu"), _exact(x, weight, bias, "gelu")
        others = torch.arange(rows) != 2
        assert torch.equal(y[others], whole[others])
        torch.testing.assert_close(y[2].double(), exact[2], equal_nan=True, atol=1e-2, rtol=1e-2)


def test_gelu_is_that_of_the_layers(product_kernels):
    for rows in (20, 300):
        x, weight, bias, _ = _arguments(rows, 16, 40)
        assert torch.equal(products.linear(x, weight, bias, "gelu"), layers.gelu(products.linear(x, weight, bias)))


@pytest.mark.parametrize("dtypes", DTYPES[:3])
@pytest.mark.parametrize("sizes", [(49, 768, 300), (200, 1000, 200), (255, 96, 96), (900, 500, 333), (3, 2000, 1000)])
def test_the_number_of_threads_changes_no_bit(product_kernels, threads, sizes, dtypes):
    arguments, results = _arguments(*sizes, dtypes), []
    for count in (1, 2, 3, 16, 2):
        threads(count)
        results.append(products.linear(*arguments[:3], "gelu", arguments[3]))
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_without_values(product_kernels):
    assert products.linear(torch.ones(0, 5), torch.ones(3, 5)).shape == (0, 3)
    assert products.linear(torch.ones(2, 5), torch.ones(0, 5)).shape == (2, 0)
    assert torch.equal(products.linear(torch.ones(2, 0), torch.ones(3, 0), torch.ones(3)), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(4, 6)}, ValueError, r"x has shape \(4, 6\)"),
        ({"x": torch.ones(())}, ValueError, "x has shape"),
        ({"x": torch.ones(4, 5, dtype=torch.float64)}, TypeError, "x has dtype torch.float64"),
        ({"x": torch.ones(4, 5, device="meta")}, ValueError, "x is on meta"),
        ({"weight": torch.ones(15)}, ValueError, r"weight has shape \(15,\)"),
        ({"weight": torch.ones(3, 5).to(LOW)}, TypeError, "weight has dtype torch.bfloat16"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\)"),
        ({"residual": torch.ones(4, 5)}, ValueError, r"residual has shape \(4, 5\)"),
        ({"residual": torch.ones(4, 3).to(LOW)}, TypeError, "residual has dtype torch.bfloat16"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
    ],
)
def test_arguments_that_do_not_fit(changes, error, message):
    arguments = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "bias": torch.ones(3)}
    with pytest.raises(error, match=message):
        products.linear(**{**arguments, **changes})


def test_where_it_wins(product_kernels):
    is_fast = product_kernels != "baseline"
    assert products.wins(196, 384, 1536, FLOAT) == is_fast
    assert not products.wins(196, 384, 1536, torch.float64)
    assert not products.wins(0, 384, 1536, FLOAT)
    low = is_fast and (product_kernels == "amx_bf16" or not torch.cpu._is_amx_tile_supported())
    assert products.wins(196, 384, 1536, LOW) == low
    assert not products.wins(12544, 27, 48, LOW)


def test_without_the_library_the_error_says_why(monkeypatch):
    monkeypatch.setattr(library, "_LIBRARY", None)
    monkeypatch.setattr(library, "_WHY_NOT", "it was not built")
    assert not products.wins(196, 384, 1536, FLOAT)
    missing = library.compute_function("vmamba_linear", products._Product)
    monkeypatch.setattr(products, "_call_linear", missing)
    with pytest.raises(RuntimeError, match="it was not built"):
        products.linear(torch.ones(2, 3), torch.ones(4, 3))
