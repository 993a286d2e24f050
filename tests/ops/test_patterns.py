"""Patterns that are functions: what is computed along them, on every backend, and what is refused."""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scans import FAST_BACKENDS, assert_matches, few_states, gradients, ss2d_arguments

from vmamba.ops import (
    PATTERNS,
    available_backends,
    cross_merge,
    cross_scan,
    register_pattern,
    scan_orders,
    ss2d_scan,
    use_backend,
)
from vmamba.ops.routes import _kept

backends = pytest.mark.parametrize("backend", [b for b in (*FAST_BACKENDS, "reference") if not available_backends()[b]])


def spelled(height, width):
    """The built-in "cross", as a function spells it."""
    grid = torch.arange(height * width).view(height, width)
    return torch.stack([grid.flatten(), grid.T.flatten(), grid.flatten().flip(0), grid.T.flatten().flip(0)])


def shuffled(height, width):
    """Four orders of no regularity."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.stack([torch.randperm(height * width, generator=generator) for _ in range(4)])


@pytest.fixture
def named():
    """Registers patterns for one test."""
    before = dict(PATTERNS)
    yield register_pattern
    for name in PATTERNS.keys() - before.keys():
        del PATTERNS[name]


# (B, H, W, D, N, R)
@backends
@pytest.mark.parametrize("shape", [(2, 5, 7, 6, 1, 2), (1, 3, 4, 5, 16, 3), (1, 1, 9, 3, 2, 1), (2, 7, 1, 17, 1, 1)])
def test_a_function_that_spells_cross_is_cross(backend, shape):
    arguments = ss2d_arguments(*few_states(backend, shape))
    ys, grads = gradients(lambda *v: ss2d_scan(*v, spelled, backend=backend), arguments)
    expected_ys, expected_grads = gradients(lambda *v: ss2d_scan(*v, "cross", backend=backend), arguments)
    assert_matches(ys, expected_ys, 1e-5)
    assert_matches(grads, expected_grads, 1e-4)
    x = arguments[0].permute(0, 3, 1, 2)
    assert torch.equal(cross_scan(x, spelled), cross_scan(x))
    ys = cross_scan(x) * torch.arange(4.0).view(4, 1, 1)
    torch.testing.assert_close(cross_merge(ys, shape[1:3], spelled), cross_merge(ys, shape[1:3]))


@backends
def test_any_order_against_the_definition(backend):
    for shape, pattern in (((2, 3, 5, 6, 1, 2), shuffled), ((1, 3, 4, 3, 2, 3), "hilbert")):
        exact = ss2d_arguments(*shape, torch.float64)
        expected = gradients(lambda *v, p=pattern: ss2d_scan(*v, p, backend="reference"), exact)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            given = [value.to(dtype) for value in exact]
            actual = gradients(lambda *v, p=pattern: ss2d_scan(*v, p, backend=backend), given)
            for values, wanted in zip(actual, expected, strict=True):
                assert_matches(values, wanted, tolerance)


def test_patches_moved_about_with_their_orders_give_the_same_result_moved():
    u, *parameters = ss2d_arguments(1, 3, 4, 5, 2, 2, torch.float64)
    moved, orders = torch.randperm(12), scan_orders("spiral", 3, 4)
    there = u.flatten(1, 2)[:, moved].unflatten(1, (3, 4))  # place p has what was at moved[p]
    y = ss2d_scan(there, *parameters, lambda height, width: moved.argsort()[orders])
    expected = ss2d_scan(u, *parameters, "spiral").flatten(1, 2)[:, moved].unflatten(1, (3, 4))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("backend", "pattern"), [("native", shuffled), ("eager", "diagonal"), ("reference", "spiral")])
def test_gradcheck(backend, pattern):
    values = [v.requires_grad_() for v in ss2d_arguments(1, 2, 2, 2, 1, 1, torch.float64)]
    scan = functools.partial(ss2d_scan, pattern=pattern, backend=backend)
    assert torch.autograd.gradcheck(scan, values)
    assert torch.autograd.gradgradcheck(scan, values)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_the_routes_up_before_it_rounds(backend, dtype):
    exact = ss2d_arguments(1, 5, 6, 8, 1, 2)
    u = exact[0].to(dtype)
    expected = ss2d_scan(u.float(), *exact[1:], "spiral", backend=backend)
    actual = ss2d_scan(u, *exact[1:], "spiral", backend=backend)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ss2d_scan(u.float(), *exact[1:], "spiral", backend=backend), expected)


def test_whatever_returns_four_orders_is_a_pattern():
    expected = spelled(2, 3)

    class Callable:
        def __call__(self, height, width):
            return expected.tolist()

        def method(self, height, width):
            return list(expected)

    instance = Callable()
    for pattern in (
        instance, instance.method, functools.partial(lambda k, *_: k, expected), lambda *_: expected.int().numpy(),
        lambda *_: expected.numpy().astype(np.uint8), lambda *_: tuple(expected.numpy()),
    ):  # fmt: skip
        assert torch.equal(scan_orders(pattern, 2, 3), expected)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[0, 1, 2, 3]] * 3, r"\(3, 4\) numbers, int64; expected \(4, 4\) integers"),
        ([[0.0, 1.0, 2.0, 3.0]] * 4, r"\(4, 4\) numbers, float64; expected \(4, 4\) integers"),
        ([[True, False, True, True]] * 4, r"\(4, 4\) numbers, bool"),
        ([[0, 1, 2, 4], *[[0, 1, 2, 3]] * 3], "position 4 in route 0; expected 0 to 3"),
        ([*[[0, 1, 2, 3]] * 3, [0, -1, 2, 3]], "position -1 in route 3; expected 0 to 3"),
        ([[0, 1, 2, 3], [3, 1, 1, 0], *[[0, 1, 2, 3]] * 2], "a route 1 that visits position 1 2 times and misses 2"),
        ([[0, 1], [2]], "no table of numbers"),
        (None, r"\(\) numbers|no table of numbers"),
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(returned, message):
    def wrong(height, width):
        return returned

    with pytest.raises(ValueError, match=rf"the pattern .*wrong returned for a grid of 2×2 .*({message})"):
        ss2d_scan(*ss2d_arguments(1, 2, 2, 3, 1, 1), wrong)


def test_a_pattern_without_a_hash_is_refused():
    class Reversed:
        step: int = 1

        def __call__(self, height, width):
            return [list(range(height * width))[:: -self.step]] * 4

    @dataclass
    class Mutable(Reversed):
        step: int = 1

    arguments = ss2d_arguments(1, 2, 2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"Mutable\(step=1\), which has no hash.*make its class a @dataclass\(frozen"):
        ss2d_scan(*arguments, Mutable())

    @dataclass(frozen=True)
    class Frozen(Reversed):
        pass

    assert ss2d_scan(*arguments, Frozen()).shape == arguments[0].shape


def test_an_error_inside_a_pattern_comes_through():
    def broken(height, width):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        scan_orders(broken, 2, 2)


def test_names(named):
    calls = []

    def mine(height, width):
        calls.append((height, width))
        return spelled(height, width)

    named("mine", mine)
    arguments = ss2d_arguments(1, 2, 3, 3, 1, 1)
    expected = ss2d_scan(*arguments, "cross")
    for _ in range(3):
        torch.testing.assert_close(ss2d_scan(*arguments, "mine"), expected)
    assert calls == [(2, 3)]  # kept
    named("mine", shuffled)
    assert torch.equal(scan_orders("mine", 2, 3), shuffled(2, 3))  # and not stale
    assert (ss2d_scan(*arguments, "mine") - expected).abs().max() > 1e-3
    for name in ("cross", "diagonal", "", "sequence", None):
        with pytest.raises(ValueError, match="expected a new one"):
            register_pattern(name, spelled)
    with pytest.raises(TypeError, match="the pattern 'it' is a list"):
        register_pattern("it", [[0]])
    with pytest.raises(ValueError, match=r"pattern is 'unheard'; expected one of 'cross', .*register_pattern\(name, f"):
        ss2d_scan(*arguments, "unheard")
    with pytest.raises(ValueError, match=r"pattern is \['cross'\]"):
        ss2d_scan(*arguments, ["cross"])


def test_what_is_kept_cannot_be_changed_and_does_not_pile_up():
    orders = scan_orders("spiral", 3, 3)
    expected = orders.clone()
    orders.zero_()
    assert torch.equal(scan_orders("spiral", 3, 3), expected)

    def once(height, width):
        return spelled(height, width)

    scan_orders(once, 2, 2)
    gone = weakref.ref(once)
    del once
    for size in range(1, 80):
        scan_orders("diagonal", 1, size)
    gc.collect()
    assert gone() is None
    assert _kept.cache_info().currsize <= 64


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.device("meta"), torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_orders_made_where_they_are_first_needed_serve_everywhere(context):
    def fresh(height, width):
        return spelled(height, width)

    arguments = ss2d_arguments(1, 2, 3, 3, 1, 1)
    with context():
        ss2d_scan(*arguments, fresh)
    ys, grads = gradients(lambda *v: ss2d_scan(*v, fresh), arguments)
    expected = gradients(lambda *v: ss2d_scan(*v, "cross"), arguments)
    assert_matches(ys, expected[0], 1e-5)
    assert_matches(grads, expected[1], 1e-4)


def test_orders_made_inside_a_transform_serve_outside():
    def fresh(height, width):
        return spelled(height, width)

    arguments = ss2d_arguments(1, 2, 3, 3, 1, 1)
    inside = torch.func.grad(lambda u: torch.func.vmap(lambda v: ss2d_scan(v, *arguments[1:], fresh))(u[None]).sum())
    expected = torch.func.grad(lambda u: ss2d_scan(u, *arguments[1:]).sum())(arguments[0])
    torch.testing.assert_close(inside(arguments[0]), expected)
    torch.testing.assert_close(ss2d_scan(*arguments, fresh), ss2d_scan(*arguments))


def test_a_model_on_the_meta_device_has_shapes():
    arguments = [value.to("meta") for value in ss2d_arguments(2, 3, 4, 5, 1, 1)]
    with use_backend("eager"):
        assert ss2d_scan(*arguments, "hilbert").shape == (2, 3, 4, 5)
        assert cross_scan(arguments[0], "hilbert").shape == (2, 4, 3, 20)
