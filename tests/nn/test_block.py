"""Blocks by stretches of pixels and in place: what they compute, and what they leave alone."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import vmamba
from vmamba.nn import SS2D, GridConv2d, VSSBlock, cpu
from vmamba.nn import block as block_module
from vmamba.nn import ss2d as ss2d_module
from vmamba.nn.mlp import Mlp
from vmamba.ops import use_backend
from vmamba.ops.backends.native import block as native
from vmamba.ops.ss2d import watch_scans

BLOCKS = {
    "MLP": {},
    "wide": {"ssm_ratio": 2.0},
    "gate, no MLP": {"mlp_ratio": 0.0, "gated": True, "ssm_ratio": 2.0, "d_state": 2, "conv_bias": True},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("stretch", [64, 2**21])
def test_blocks_infer_what_they_compute(options, backend, stretch, monkeypatch):
    """In stretches and in place, from inputs of any strides, which are left as they were."""
    monkeypatch.setattr(native, "_STRETCH", stretch)
    torch.manual_seed(0)
    block = VSSBlock(8, **options).eval()
    contiguous = torch.randn(2, 5, 7, 8)
    for x in (contiguous, contiguous.permute(0, 2, 1, 3), contiguous[:, ::2], contiguous[:0]):
        before = x.clone()
        with use_backend(backend):
            expected = block(x).detach()
            with torch.no_grad():
                y = block(x)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_blocks_infer_under_autocast(options):
    torch.manual_seed(0)
    block, x = VSSBlock(8, **options).eval(), torch.randn(2, 5, 7, 8)
    exact = block(x)
    for image in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(image)
        assert y.dtype == image.dtype
        torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_hooks_see_what_they_saw():
    """A hook's tensor is not overwritten later, and every module is called once."""
    torch.manual_seed(0)
    model, x = vmamba.create_model("vmamba_femto").eval(), torch.randn(1, 3, 40, 40)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.setdefault(name, []).append(output))
    expected = model(x)
    kept = {name: [output.clone() for output in outputs] for name, outputs in seen.items()}
    assert all(len(outputs) == 1 for outputs in seen.values())
    assert {"stem.act", "stages.0.blocks.0.ss2d.out_proj", "stages.0.blocks.0.mlp.act"} <= seen.keys()
    model(x)
    assert all(torch.equal(seen[name][0], kept[name][0]) for name in kept)
    for module in model.modules():
        module._forward_hooks.clear()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_large_images_are_worked_on_in_stretches(monkeypatch):
    """No tensor of an MLP is much larger than a stretch, except those of the whole image and its width."""
    sizes = []
    monkeypatch.setattr(cpu, "_STRETCH", 64 * 32)
    mlp, x = Mlp(8, 32).eval(), torch.randn(1, 40, 50, 8)
    original = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **kw: sizes.append(size) or original(self, *size, **kw)
    )
    parts = cpu.stretches(x.flatten(0, -2), 32)
    assert len(parts) == 32
    assert max(len(part) for part in parts) * 32 <= 64 * 32
    mlp(x)
    assert sizes


@torch.no_grad()
@pytest.mark.skipif(native.reason_unavailable() is not None, reason="needs the CPU kernel")
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_as_built_is_one_call(options, dtype, monkeypatch):
    calls = []
    call = native._call_block
    monkeypatch.setattr(native, "_call_block", lambda block: calls.append(block) or call(block))
    monkeypatch.setattr(native, "wins", lambda *sizes: True)
    block, x = VSSBlock(8, **options).eval(), torch.randn(1, 5, 7, 8)
    exact = block(x)
    calls.clear()
    block, x = block.to(dtype), x.to(dtype)
    y = block(x)
    assert len(calls) == 1
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.05)
    with use_backend("eager"):
        block(x)
    with watch_scans(lambda arguments, y: None):
        block(x)
    block.ss2d.pattern = spiral
    block(x)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.skipif(native.reason_unavailable() is not None, reason="needs the CPU kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_told_again_what_is_still_true(dtype, monkeypatch):
    """Not more often than something changes, and never what another image, dtype or parameter needs."""
    described = []
    monkeypatch.setattr(block_module, "describe", lambda *given: described.append(given) or native.describe(*given))
    monkeypatch.setattr(native, "wins", lambda *sizes: True)
    torch.manual_seed(0)
    block = VSSBlock(8, **BLOCKS["MLP"]).to(dtype).eval()
    x = torch.randn(1, 5, 7, 8)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05

    def check(image, times):
        """It is described so many times for two calls, and both are right."""
        described.clear()
        for scale in (1, 2):
            scaled = (scale * image).to(dtype)
            y = block(scaled)
            with torch.enable_grad():
                torch.testing.assert_close(y, block(scaled).detach(), atol=tolerance, rtol=tolerance)
        assert len(described) == times

    fc1 = block.mlp.fc1
    check(x, 1)
    check(torch.randn(1, 5, 7, 8).permute(0, 2, 1, 3), 1)  # another shape
    check(x, 1)  # one situation is remembered
    check(x, 0)
    fc1.weight.mul_(1.5)
    check(x, 0)
    block.ss2d.A_log.data.add_(0.5)
    check(x, 0)
    fc1.weight = nn.Parameter(fc1.weight.clone())
    check(x, 1)
    fc1.bias = None
    check(x, 1)
    block.norm1.eps = 0.5
    check(x, 1)
    block.ss2d.pattern = "unidirectional"
    check(x, 1)
    scale, offset = block.norm2.weight, block.norm2.bias
    scale.mul_(2)
    check(x, 0)
    del block.norm2.weight, block.norm2.bias
    block.norm2.bias, block.norm2.weight = scale, offset  # the same two, the other way round
    check(x, 2)  # whoever has taken a layer apart is asked each time
    block.load_state_dict({name: value.clone() for name, value in block.state_dict().items()}, assign=True)
    check(x, 2)
    block.norm2 = type(block.norm2)(8).to(dtype)
    check(x, 1)
    block.conv_of_mine = nn.Identity()  # which no block has
    check(x, 0)
    del block.conv_of_mine
    check(x, 0)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    fc1.weight.data, fc2.weight.data = fc1.weight.data[:16], fc2.weight.data.flatten()[:128].view(8, 16)
    check(x, 1)  # half as wide, in the same places
    transposed = block.ss2d.in_proj.weight.data.t()
    block.ss2d.in_proj.weight.data = transposed
    check(x, 2)  # such a weight is copied for the kernel, and a copy does not last


@torch.no_grad()
@pytest.mark.skipif(native.reason_unavailable() is not None, reason="needs the CPU kernel")
def test_nothing_is_remembered_from_one_dtype_to_another(monkeypatch):
    monkeypatch.setattr(native, "wins", lambda *sizes: True)
    torch.manual_seed(0)
    block, x = VSSBlock(8).eval(), torch.randn(1, 5, 7, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        block(x)  # as torch's own layers say: its parameters are in float32


def test_a_remembered_block_is_not_kept_alive():
    block = VSSBlock(8).eval()
    with torch.no_grad():
        block(torch.randn(1, 5, 7, 8))
    one, other = weakref.ref(block), weakref.ref(block.mlp.fc1.weight)
    del block
    gc.collect()
    assert one() is None
    assert other() is None


def test_many_threads_call_one_block():
    torch.manual_seed(0)
    block = VSSBlock(8).eval()
    images = [torch.randn(1, 24, 24, 8) for _ in range(16)]

    def call(x):
        with torch.no_grad():
            return block(x)

    expected = [call(x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(call, images), expected))


def spiral(height, width):
    """Four orders that are not along the axes: each the same, pixels from the last to the first."""
    return torch.arange(height * width).flip(0).expand(4, -1)


@torch.no_grad()
def test_what_is_put_in_place_of_a_scan_is_called(monkeypatch):
    """The function of the scans, or a method between projection and projection, of the class or of one module."""
    torch.manual_seed(0)
    block, x = VSSBlock(8).eval(), torch.randn(1, 5, 7, 8)
    without_scans = x + block.ss2d.out_proj(block.ss2d.norm(block.ss2d.conv(block.ss2d.in_proj(block.norm1(x)))))
    without_scans = without_scans + block.mlp(block.norm2(without_scans))
    assert not torch.allclose(block(x), without_scans, atol=1e-3)
    places = (
        (ss2d_module, "ss2d_scan", lambda u, *_: u), (SS2D, "scan", lambda self, u: u),
        (block.ss2d, "scan", lambda u: u), (SS2D, "mix", lambda self, x: (self.conv(x), None)),
    )  # fmt: skip
    for owner, name, function in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            torch.testing.assert_close(block(x), without_scans, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_method_that_a_class_did_not_have_is_called(monkeypatch):
    """Between the class of a layer and the one that has the method so far."""
    torch.manual_seed(0)
    model, x = vmamba.create_model("vmamba_femto").eval(), torch.randn(1, 3, 40, 40)
    before = model.stem(x)
    monkeypatch.setattr(GridConv2d, "_conv_forward", nn.Conv2d._conv_forward, raising=False)
    assert cpu.as_built(model.stem) is False
    monkeypatch.undo()
    assert cpu.as_built(model.stem)
    assert torch.equal(model.stem(x), before)


def test_compiled_models_give_the_same():
    torch.manual_seed(0)
    model = vmamba.VMamba(depths=(1, 1), dims=(16, 24), stem_stride=2, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
        names = _operators(model, x)
    assert "vmamba.vss_block" in names

    grads = []
    for network in (model, compiled):
        loss = (network(x) * torch.linspace(-1, 1, 5)).sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-3)


def _operators(model, x):
    """Names of what a graph of the model calls."""
    names = set()

    def backend(graph, inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    return names


def test_a_scan_without_states_is_refused():
    with pytest.raises(ValueError, match="d_state is 0; expected at least 1"):
        VSSBlock(8, d_state=0)
