"""The stem in one call, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.backends.native import stem as stems
from vmamba.ops.backends.native.block import Affine
from vmamba.ops.backends.native.stem import conv_stem

pytestmark = pytest.mark.skipif(stems.reason_unavailable() is not None, reason=str(stems.reason_unavailable()))


@pytest.fixture(autouse=True)
def any_size(monkeypatch, kernels):
    monkeypatch.setattr(stems, "wins", lambda *_: True)


def make(channels=3, middle=6, outputs=20, biased=True):
    torch.manual_seed(0)

    def affine(*shape, eps=0.0):
        return Affine(torch.randn(shape), torch.randn(shape[0]) if biased else None, eps)

    convolutions = affine(middle, channels, 3, 3), affine(outputs, middle, 3, 3)
    return convolutions[0], affine(middle, eps=1e-5), convolutions[1], affine(outputs, eps=1e-3)


def exact(x, conv1, norm1, conv2, norm2, strides):
    def double(layer):
        return [None if value is None else value.double() for value in layer[:2]]

    def convolve(image, layer, stride):
        return F.conv2d(image, *double(layer), stride=stride, padding=1)

    def normal(image, layer):
        y = F.layer_norm(image.permute(0, 2, 3, 1), image.shape[1:2], *double(layer), layer.eps)
        return y.permute(0, 3, 1, 2)

    y = F.gelu(normal(convolve(x.double(), conv1, strides[0]), norm1))
    return normal(convolve(y, conv2, strides[1]), norm2).permute(0, 2, 3, 1)


@pytest.mark.parametrize("strides", [(2, 2), (2, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (7, 6), (33, 40), (64, 63)])
def test_sizes(strides, size, threads):
    layers = make()
    x = torch.randn(2, 3, *size)
    y = conv_stem(x, *layers, strides)
    expected = exact(x, *layers, strides)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=2e-5)
    threads(3)
    assert torch.equal(conv_stem(x, *layers, strides), y)


def test_any_strides_and_no_parameters():
    conv1, norm1, conv2, norm2 = make(channels=2, biased=False)
    norm1, norm2 = norm1._replace(weight=None), norm2._replace(weight=None)
    x = torch.randn(1, 20, 30, 2).permute(0, 3, 1, 2)
    y = conv_stem(x, conv1, norm1, conv2, norm2, (2, 2))
    torch.testing.assert_close(y.double(), exact(x, conv1, norm1, conv2, norm2, (2, 2)), atol=2e-5, rtol=2e-5)


def test_what_does_not_fit_is_left_to_others():
    layers, x = make(), torch.randn(1, 3, 8, 8)
    assert conv_stem(x, *layers, (2, 2)) is not None
    assert conv_stem(x[:, :2], *layers, (2, 2)) is None
    assert conv_stem(x[:0], *layers, (2, 2)) is None
    assert conv_stem(x[0], *layers, (2, 2)) is None
    assert conv_stem(x.double(), *layers, (2, 2)) is None
    for i, layer in enumerate(layers):
        for other in (layer._replace(weight=layer.weight[:-1]), layer._replace(bias=layer.bias.double())):
            assert conv_stem(x, *layers[:i], other, *layers[i + 1 :], (2, 2)) is None
