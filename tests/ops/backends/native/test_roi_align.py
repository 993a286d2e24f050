"""RoIAlign in C++ against torchvision's, bit for bit, with every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align as torchvisions

from vmamba.ops.backends.native import roi_align as native

pytestmark = pytest.mark.skipif(native.reason_unavailable() is not None, reason=str(native.reason_unavailable()))

HEIGHT, WIDTH = 23, 31
SCALES = [0.25, 0.3]


def _regions(count: int, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Of every size and place on two images; some lie partly or wholly outside, one has no area."""
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) / scale
    halves = (torch.randn(count, 2, generator=generator) + 2.5).exp()
    rois = torch.cat([torch.arange(count)[:, None] % 2, centres - halves, centres + halves], 1)
    rois[0, 1:] = torch.tensor([0, 0, WIDTH / scale, HEIGHT / scale])
    rois[1, 1:] = torch.tensor([-900, -900, -800, -850])
    rois[2, 3:] = rois[2, 1:3]
    return rois


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("side", [1, 7])
@pytest.mark.parametrize("channels", [1, 7, 16, 40])
def test_both_passes_are_torchvisions(kernels, threads, channels, side, scale):
    generator = torch.Generator().manual_seed(channels + side)
    rois = _regions(30, scale, generator)
    x = torch.randn(2, channels, HEIGHT, WIDTH, generator=generator, requires_grad=True)
    expected = torchvisions(x, rois, side, scale, sampling_ratio=0, aligned=True)
    grad = torch.randn(expected.shape, generator=generator)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    assert expected[0].abs().max() > 0
    assert not expected[1].any()

    image = x.detach().permute(0, 2, 3, 1)
    for count in (1, 2, 5):
        threads(count)
        y = native.roi_align(image, rois, side, scale)
        assert torch.equal(y, expected)
        assert y.is_contiguous()
        grad_x = native.roi_align_backward(grad, rois, image.shape, scale)
        assert torch.equal(grad_x.permute(0, 3, 1, 2), expected_grad)
        assert grad_x.is_contiguous()


def test_memory_of_any_order_is_read(kernels):
    x, rois = torch.randn(2, 9, 8, 24)[:, ::2].transpose(1, 2), _regions(6, 0.5, torch.Generator().manual_seed(0))
    y = native.roi_align(x, rois, 3, 0.5)
    assert torch.equal(y, native.roi_align(x.contiguous(), rois.t().contiguous().t(), 3, 0.5))
    grad = torch.randn(6, 3, 3, 24).permute(0, 3, 1, 2)
    whole = native.roi_align_backward(grad.contiguous(), rois, x.shape, 0.5)
    assert torch.equal(native.roi_align_backward(grad, rois, x.shape, 0.5), whole)


def test_nothing_in_is_nothing_out():
    x = torch.randn(1, 4, 4, 16)
    assert native.roi_align(x, torch.zeros(0, 5), 7, 1.0).shape == (0, 16, 7, 7)
    assert not native.roi_align_backward(torch.zeros(0, 16, 7, 7), torch.zeros(0, 5), x.shape, 1.0).any()


def test_regions_that_are_none_have_no_features():
    rois = torch.tensor([[0.0, 1.0, 1.0, float("nan"), 3.0], [0.0, 3.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0, 4.0]])
    y = native.roi_align(torch.ones(1, 4, 4, 16), rois, 2, 1.0)
    assert not y[:2].any()
    assert (y[2] == 1).all()


def test_arguments_that_do_not_fit_are_refused():
    x, rois = torch.randn(2, 4, 4, 16), torch.zeros(3, 5)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        native.roi_align(x.double(), rois, 7, 1.0)
    with pytest.raises(ValueError, match=r"expected \(n, 5\)"):
        native.roi_align(x, rois[:, :4], 7, 1.0)
    for image in (2.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            native.roi_align(x, rois.index_fill(1, torch.tensor([0]), image), 7, 1.0)
    with pytest.raises(ValueError, match="grad has shape"):
        native.roi_align_backward(torch.zeros(3, 8, 7, 7), rois, x.shape, 1.0)
