"""RoIAlign as torch sees it: recorded, compiled, exported; torchvision's where the fast path does not apply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvisions

from vmamba.ops.backends.native import roi_align as native
from vmamba.ops.roi_align import laid_out, roi_align

ROIS = torch.tensor([[0.0, 1, 2, 30, 40], [1, 5, 5, 20, 12], [0, 0, 0, 8, 8]])
needs_library = pytest.mark.skipif(native.reason_unavailable() is not None, reason=str(native.reason_unavailable()))


def _plain(x: Tensor) -> Tensor:
    return torchvisions(x, ROIS.to(x.dtype), 7, 0.25, sampling_ratio=0, aligned=True)


def _ours(x: Tensor) -> Tensor:
    return roi_align(x, ROIS.to(x.dtype), 7, 0.25)


def _map(channels: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, channels, 12, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchvisions(channels, dtype):
    x = _map(channels, dtype)
    y, expected = _ours(x), _plain(x)
    grad = torch.randn_like(y)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(value, x, grad)[0] for value in (y, expected)))
    with torch.inference_mode():
        assert torch.equal(_ours(x.detach()), expected)


@needs_library
def test_gradients_can_be_differentiated():
    x, grad = _map(), torch.randn(3, 20, 7, 7, requires_grad=True)
    (grad_x,) = torch.autograd.grad(_ours(x), x, grad, create_graph=True)
    (of_grad,) = torch.autograd.grad(grad_x.square().sum(), grad)
    assert torch.allclose(of_grad, _plain(2 * grad_x.detach()), atol=1e-6)


@needs_library
def test_opcheck():
    image = _map().detach().permute(0, 2, 3, 1).requires_grad_()
    torch.library.opcheck(torch.ops.vmamba.roi_align.default, (image, ROIS, 7, 0.25))
    grad = torch.randn(3, 20, 7, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.vmamba.roi_align_backward.default, (grad, ROIS, list(image.shape), 0.25))


@needs_library
@pytest.mark.filterwarnings("ignore")
def test_vmap_and_compiler():
    x = _map().detach()
    stacked = torch.stack([x, -x])
    assert torch.equal(torch.func.vmap(_ours)(stacked), torch.stack([_plain(x), _plain(-x)]))
    torch.compiler.reset()
    leaf = _map()
    y = torch.compile(_ours, backend="aot_eager", fullgraph=True)(leaf)
    grad = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(value, leaf, grad)[0] for value in (y, _plain(leaf))))


def test_exported_graphs_need_torchvision_alone():
    class Pool(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _ours(x)

    program = torch.export.export(Pool(), (_map().detach(),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "torchvision.roi_align.default" in operators
    assert not any("vmamba" in name for name in operators)


@needs_library
def test_maps_of_the_network_are_read_as_they_lie():
    x = _map().detach()
    assert laid_out(x).data_ptr() == x.data_ptr()
    narrow = _map(3).detach()
    assert laid_out(narrow).is_contiguous()
