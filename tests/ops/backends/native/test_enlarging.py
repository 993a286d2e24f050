"""The convolution of an enlarged map in C++ against torch in float64, with every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.backends.native import enlarging

pytestmark = pytest.mark.skipif(enlarging.reason_unavailable() is not None, reason=str(enlarging.reason_unavailable()))

# Of the result and of the map: twice, about twice, equal, one pixel, larger in one direction alone.
SIZES = [((16, 20), (8, 10)), ((25, 35), (13, 18)), ((9, 8), (9, 8)), ((7, 9), (1, 1)), ((12, 5), (3, 5))]


@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize(("size", "coarse"), SIZES)
def test_it_is_the_convolution_of_the_enlarged_map(kernels, threads, size, coarse, channels):
    generator = torch.Generator().manual_seed(channels)
    image = torch.randn(2, 5, *coarse, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 5, 3, 3, generator=generator, dtype=torch.float64)
    before = torch.randn(2, *size, channels + 3, generator=generator)
    expected = before.double()
    enlarged = F.interpolate(image, size, mode="bilinear", align_corners=False)
    expected[..., 2:-1] += F.conv2d(enlarged, weight, padding=1).permute(0, 2, 3, 1)

    z = torch.einsum("bchw,ocij->bhwijo", image, weight).float().contiguous()
    results = []
    for count in (1, 3):
        threads(count)
        results.append(before.clone())
        enlarging.add_enlarged(results[-1], z, first=2)
    assert (results[0] - expected).abs().max() < 2e-6 * expected.abs().max()
    assert torch.equal(*results)


def test_arguments_that_do_not_fit_are_refused():
    y, z = torch.zeros(1, 4, 4, 8), torch.zeros(1, 2, 2, 3, 3, 8)
    with pytest.raises(ValueError, match="z has channels 1 to 9 of y, which has 8"):
        enlarging.add_enlarged(y, z, first=1)
    with pytest.raises(ValueError, match=r"z has shape \(1, 2, 2, 3, 8\)"):
        enlarging.add_enlarged(y, z[:, :, :, 0])
    with pytest.raises(ValueError, match="expected contiguous"):
        enlarging.add_enlarged(y.transpose(1, 2), z)
    with pytest.raises(TypeError, match=r"z has dtype torch\.float64"):
        enlarging.add_enlarged(y, z.double())
