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
    """By patches, whatever is faster."""
    monkeypatch.setattr(convolutions, "_tiles_win", lambda *_: False)
    monkeypatch.setattr(convolutions, "_patches_win", lambda *_: True)


@pytest.fixture
def by_tiles(monkeypatch, any_size):
    monkeypatch.setattr(convolutions, "_tiles_win", lambda *_: True)


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


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 5), (1, 4, 4), (3, 7, 6), (1, 33, 40), (2, 60, 52)])
@pytest.mark.parametrize(("channels", "outputs"), [(5, 7), (16, 3), (24, 100), (150, 48), (300, 33)])
def test_tiles(size, channels, outputs, threads, by_tiles):
    torch.manual_seed(0)
    x, weight = torch.randn(*size, channels), torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    for bias in (None, torch.randn(outputs)):
        threads(1)
        y = convolution(x, weight, bias, 1)
        torch.testing.assert_close(y.double(), exact(x, weight, bias, 1), atol=2e-5, rtol=0)
        assert y.is_contiguous()
        threads(3)
        assert torch.equal(convolution(x, weight, bias, 1), y)


def test_tiles_read_any_strides(by_tiles):
    x = torch.randn(2, 6, 9, 8).permute(0, 2, 3, 1)
    weight = torch.randn(5, 9, 3, 3).to(memory_format=torch.channels_last)[:, 1:7] / 7
    torch.testing.assert_close(convolution(x, weight, None, 1).double(), exact(x, weight, None, 1), atol=2e-5, rtol=0)


def test_tiles_keep_to_their_image(by_tiles):
    """Beyond an image's edge is 0, not the next image; a NaN spoils no more than its own tile and the neighbours."""
    x, weight = torch.randn(3, 8, 8, 16), torch.randn(16, 16, 3, 3)
    alone = torch.cat([convolution(image[None], weight, None, 1) for image in x])
    assert torch.equal(convolution(x, weight, None, 1), alone)
    x[1, 0, 0] = float("nan")
    is_spoilt = convolution(x, weight, None, 1).isnan().any(-1)
    assert not is_spoilt[[0, 2]].any()
    assert not is_spoilt[1, 4:].any()


def test_few_roundings_add_up(by_tiles):
    """Sums of thousands of products are about as exact as torch's, whatever the transforms add."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 32, 32, 512).relu(), torch.randn(64, 512, 3, 3) * (2 / 9 / 512) ** 0.5
    truth = exact(x, weight, None, 1)
    plain = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    error, usual = ((y.double() - truth).square().mean().sqrt() for y in (convolution(x, weight, None, 1), plain))
    assert error < 3 * usual + 1e-7


@pytest.mark.parametrize(
    ("size", "channels", "stride", "dtype", "expected"),
    [
        ((1, 64, 64), 128, 1, FLOAT, "by_tiles"), ((1, 64, 64), 64, 1, FLOAT, None), ((1, 8, 8), 128, 1, FLOAT, None),
        ((1, 64, 64), 128, 2, FLOAT, "patches"), ((1, 64, 64), 128, 2, LOW, "patches"),
        ((1, 64, 64), 128, 1, LOW, None),
    ],
)  # fmt: skip
def test_the_way_depends_on_the_shape(size, channels, stride, dtype, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(convolutions, "is_fast", lambda: True)
    monkeypatch.setattr(convolutions, "wins", lambda *_: True)
    calls = []
    monkeypatch.setattr(convolutions, "_call_convolution", calls.append)
    y = convolution(torch.randn(*size, channels).to(dtype), torch.randn(96, channels, 3, 3).to(dtype), None, stride)
    ways = ["by_tiles" if call.by_tiles else "patches" for call in calls]
    assert ways == ([expected] if expected else [])
    assert (y is None) == (expected is None)
