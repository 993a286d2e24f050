"""The dense convolution of a grid against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.backends.native import convolution as convolutions
from vmamba.ops.backends.native.convolution import convolution

pytestmark = pytest.mark.skipif(
    convolutions.reason_unavailable() is not None, reason=str(convolutions.reason_unavailable())
)

FLOAT, LOW = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def any_size(monkeypatch, kernels):
    monkeypatch.setattr(convolutions, "wins", lambda *_: True)


def exact(x, weight, bias, stride):
    image = x.double().permute(0, 3, 1, 2)
    bias = None if bias is None else bias.double()
    return F.conv2d(image, weight.to(x.dtype).double(), bias, stride, padding=1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 5), (1, 2, 2), (3, 7, 6), (1, 33, 40)])
@pytest.mark.parametrize(("channels", "outputs"), [(5, 7), (16, 3), (24, 100)])  # more pixels than outputs, and fewer
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (LOW, LOW), (LOW, FLOAT)])
def test_sizes(stride, size, channels, outputs, dtypes, threads):
    torch.manual_seed(0)
    x, weight = torch.randn(*size, channels).to(dtypes[0]), torch.randn(outputs, channels, 3, 3).to(dtypes[1])
    for bias in (None, torch.randn(outputs)):
        threads(1)
        y = convolution(x, weight, bias, stride)
        expected = exact(x, weight, bias, stride)
        assert y.dtype == x.dtype
        assert y.is_contiguous()
        allowed = 1e-4 + 2**-8 * expected.abs() * (x.dtype == LOW)
        assert ((y.double() - expected).abs() <= allowed).all()
        threads(3)
        assert torch.equal(convolution(x, weight, bias, stride), y)


def test_many_patches_are_taken_in_parts():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 90, 80, 64), torch.randn(8, 64, 3, 3)
    torch.testing.assert_close(
        convolution(x, weight, None, 1).double(), exact(x, weight, None, 1), atol=2e-4, rtol=1e-4
    )


def test_any_strides_in_memory():
    x, weight = torch.randn(2, 6, 9, 8).permute(0, 2, 3, 1), torch.randn(3, 3, 5, 6).permute(2, 3, 0, 1)
    torch.testing.assert_close(
        convolution(x, weight, None, 2).double(), exact(x, weight, None, 2), atol=1e-4, rtol=1e-4
    )


def test_what_does_not_fit_is_left_to_others():
    x, weight, bias = torch.randn(1, 8, 8, 4), torch.randn(6, 4, 3, 3), torch.randn(6)
    assert convolution(x, weight, bias, 1) is not None
    for call in (
        (x[0], weight, bias), (x[:0], weight, bias), (x[..., :3], weight, bias), (x, weight[..., :2], bias),
        (x, weight, bias[:5]), (x.double(), weight, bias), (x, weight.bfloat16(), bias), (x, weight, bias.double()),
    ):  # fmt: skip
        assert convolution(*call, 1) is None
