"""A block in one call, against its definition in float64 and, in bfloat16, against itself in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vmamba.ops.arguments import SS2DArguments
from vmamba.ops.backends import native, reference
from vmamba.ops.backends.native import block as blocks
from vmamba.ops.backends.native.block import Affine, Scan, vss_block

pytestmark = pytest.mark.skipif(blocks.reason_unavailable() is not None, reason=str(blocks.reason_unavailable()))

FLOAT, LOW = torch.float32, torch.bfloat16
KINDS = {
    "MLP": {"inner": 20, "hidden": 40},
    "no MLP": {"inner": 32, "hidden": 0, "states": 2},
    "gate": {"inner": 20, "hidden": 36, "gated": True, "states": 3},
}


@pytest.fixture(autouse=True)
def any_size(monkeypatch, kernels):
    """Also with the kernels that oneDNN beats, and beside each instruction set."""
    monkeypatch.setattr(blocks, "wins", lambda *_: True)


def make(inner, hidden, channels=10, gated=False, states=1, rank=2, biased=True):
    torch.manual_seed(0)

    def affine(*shape, eps=0.0):
        weight = torch.randn(shape) / (shape[-1] if len(shape) == 2 else 3) ** 0.5
        return Affine(weight, torch.randn(shape[0]) if biased else None, eps)

    scan = Scan(
        torch.randn(4, rank + 2 * states, inner) / inner**0.5, torch.randn(4, inner, rank), torch.randn(4, inner) - 2,
        -torch.rand(4, inner, states) - 0.1, torch.randn(4, inner), "cross",
    )  # fmt: skip
    return {
        "norm1": affine(channels, eps=1e-5), "in_proj": affine((2 if gated else 1) * inner, channels),
        "conv": affine(inner, 1, 3, 3), "scan": scan, "norm": affine(inner, eps=1e-5),
        "out_proj": affine(channels, inner), "gated": gated,
        "mlp": (affine(channels, eps=1e-5), affine(hidden, channels), affine(channels, hidden)) if hidden else (),
    }  # fmt: skip


def exact(x, norm1, in_proj, conv, scan, norm, out_proj, gated, mlp):
    """The block's definition, layer by layer, in float64."""
    x = x.double()

    def double(layer):
        return [None if value is None else value.double() for value in layer[:2]]

    def normal(value, layer):
        return F.layer_norm(value, value.shape[-1:], *double(layer), layer.eps)

    u = F.linear(normal(x, norm1), *double(in_proj))
    u, gate = u.chunk(2, -1) if gated else (u, None)
    weight, bias = double(conv)
    u = F.silu(F.conv2d(u.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1))
    projected = F.linear(u, scan[0].double().flatten(0, 1)).unflatten(-1, scan[0].shape[:2])
    y = reference.ss2d_scan(SS2DArguments(u, projected, *(value.double() for value in scan[1:-1]), scan.pattern))
    y = normal(y, norm)
    x = x + F.linear(y if gate is None else y * F.silu(gate), *double(out_proj))
    if not mlp:
        return x
    norm2, fc1, fc2 = mlp
    return x + F.linear(F.gelu(F.linear(normal(x, norm2), *double(fc1))), *double(fc2))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("stretch", [64, 2**21])
def test_float32(kind, biased, stretch, monkeypatch):
    monkeypatch.setattr(blocks, "_STRETCH", stretch)
    parameters = make(**kind, biased=biased)
    for shape in ((2, 5, 7, 10), (1, 1, 1, 10), (1, 20, 17, 10)):
        x = torch.randn(shape)
        before = x.clone()
        y = vss_block(x, **parameters)
        assert torch.equal(x, before)
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), exact(x, **parameters), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("image", "weights"), [(LOW, LOW), (LOW, FLOAT), (FLOAT, FLOAT)])
def test_bfloat16(kind, image, weights):
    """A bfloat16 image, or a float32 one under autocast; weights as they are or rounded beforehand."""
    parameters = make(**kind)

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(weights)
        if isinstance(value, Affine | Scan):
            return value._make(map(cast, value))
        return tuple(map(cast, value)) if isinstance(value, tuple) else value

    x = torch.randn(2, 9, 6, 10).to(image)
    y = vss_block(x, **{name: cast(value) for name, value in parameters.items()}, dtype=LOW)
    assert y.dtype == image
    torch.testing.assert_close(y.double(), exact(x, **parameters), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_parameters_in_bfloat16_are_those_numbers(kind):
    """Any of them, beside others in float32: the kernel widens them for itself, and computes with the same numbers."""
    given = make(**kind)

    def variants(value):
        """Of a parameter or a tuple of them: all ways to have one tensor in bfloat16, and the same in float32."""
        if isinstance(value, torch.Tensor):
            yield value.to(LOW), value.to(LOW).float()
        elif isinstance(value, tuple):
            build = getattr(value, "_make", tuple)
            for i, part in enumerate(value):
                for low, wide in variants(part):
                    yield tuple(build([*value[:i], other, *value[i + 1 :]]) for other in (low, wide))

    x, tried = torch.randn(2, 3, 5, 10), 0
    for name, value in given.items():
        for low, wide in variants(value):
            if name == "scan" and low.A.dtype is LOW:
                continue  # A is always float32
            results = [vss_block(x, **{**given, name: other}, dtype=LOW) for other in (low, wide)]
            assert torch.equal(*results), name
            tried += 1
    assert tried == (20 if kind["hidden"] else 14)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_number_of_threads_gives_the_same(kind, threads):
    parameters, x, results = make(**kind), torch.randn(3, 40, 33, 10), []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(vss_block(x, **parameters))
    # With more threads than tasks the routes of the scan are added up later, but in the same order.
    assert all(torch.equal(result, results[0]) for result in results)


def test_calls_at_once_do_not_share_memory():
    from concurrent.futures import ThreadPoolExecutor

    parameters = make(**KINDS["MLP"])
    images = [torch.randn(1, side, side, 10) for side in range(8, 24)]
    expected = [vss_block(x, **parameters) for x in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(lambda x: vss_block(x, **parameters), images), expected))


def test_what_does_not_fit_is_left_to_others():
    parameters, x = make(**KINDS["MLP"]), torch.randn(1, 5, 7, 10)
    assert vss_block(x, **parameters) is not None
    for name in ("norm1", "in_proj", "conv", "norm", "out_proj"):
        layer = parameters[name]
        for other in (layer._replace(weight=layer.weight[:-1]), layer._replace(weight=layer.weight.double())):
            assert vss_block(x, **{**parameters, name: other}) is None, name
    assert vss_block(x.double(), **parameters) is None
    assert vss_block(x[..., :9], **parameters) is None
    assert vss_block(x[:0], **parameters) is None
    assert vss_block(x.bfloat16(), **parameters) is None


def test_slow_kernels_are_not_used(monkeypatch):
    monkeypatch.undo()
    is_slow = native.kernels() == "baseline"
    assert (vss_block(torch.randn(1, 5, 7, 10), **make(**KINDS["MLP"])) is None) == is_slow
