"""The scans in ONNX's standard operators, of any batch, height and width.

A route of L = H·W steps is cut into H pieces of W steps. All pieces of all routes are scanned at once, each from state
0, by an ONNX `Scan` of W steps; a second, short `Scan` over the H pieces gives the state that enters each; and what
that state adds is its product with the decay since the piece began. Only products of factors are formed, never
quotients or logarithms, so nothing overflows. Inside the loops are the recurrences alone: all else is done for all
steps at once, where runtimes have several threads for it and can fuse it. Routes are tables of positions: one `Gather`
reads the pixels in the order of every route, another one puts the results back.

The functions here are ONNX functions, written in Python's syntax (onnxscript); the exporter writes their nodes in the
place of `torch.ops.vmamba.ss2d_scan` and `torch.ops.vmamba.recurrence`. Shapes: T = W steps, K routes, B images, M = H
pieces, D channels, N states, R + 2N values of a route's projection.
"""

# What onnxscript compiles are no Python functions, whatever a type checker takes them for.
# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import BOOL, FLOAT, INT64, graph, ir, script, values
from onnxscript import opset18 as op

from vmamba.ops.routes import get_routes

_FUNCTIONS = values.Opset("vmamba", 1)
Floats, Ints, Bools = FLOAT[...], INT64[...], BOOL[...]
# Inside a loop ranks are said, since OpenVINO infers none there.
Rank2, Rank3, Rank4 = FLOAT[None, None], FLOAT[None, None, None], FLOAT[None, None, None, None]
Rank5 = FLOAT[None, None, None, None, None]


@script(_FUNCTIONS)
def orders(u: Floats, is_column: Bools, is_backward: Bools, route: Ints) -> tuple[Ints, Ints, Ints]:
    """Tables for grids like `u`, (B, H, W, D): which pixel each step of each route visits, and where each pixel went.

    Returns positions among the pixels (T, K, B, M); among the pixels' projections (T, K, B, M), and the inverse of
    that, (B, H, W, K). A route of rows is a grid as it lies; a route of columns is the transposed one, read in rows of
    the same length. Backwards, the whole batch is reversed, images and all: its positions count from the end, -1 is
    the last.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    size = op.Shape(u, start=0, end=3)
    count = op.ReduceProd(size, keepdims=0)
    rows = op.Reshape(op.Range(zero, count, one), size)
    columns = op.Reshape(op.Transpose(rows, perm=[0, 2, 1]), size)
    forward = op.Where(is_column, columns, rows)
    visited = op.Where(is_backward, op.Sub(op.Constant(value_int=-1), forward), forward)
    steps = op.Transpose(visited, perm=[3, 0, 1, 2])
    routes = op.Size(route)
    projections = op.Add(op.Mul(steps, routes), route)
    every = op.Range(zero, op.Mul(count, routes), one)
    flat = op.Reshape(projections, op.Constant(value_ints=[-1]))
    inverse = op.ScatterElements(every, flat, every)
    places = op.Reshape(inverse, op.Concat(size, op.Constant(value_ints=[-1]), axis=0))
    return steps, projections, places


@script(_FUNCTIONS)
def zeros(u: Floats, inner: Ints) -> tuple[Floats, Floats, Floats]:
    """States before the first step: (K, B, M, *inner) of zeros and of ones, and (K, B, *inner) of zeros."""
    routes = op.Slice(inner, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
    rest = op.Slice(inner, op.Constant(value_ints=[1]), op.Constant(value_ints=[9]))
    pieces = op.Concat(routes, op.Shape(u, start=0, end=2), rest, axis=0)
    nothing = op.Expand(op.Constant(value_float=0.0), pieces)
    everything = op.Expand(op.Constant(value_float=1.0), pieces)
    return nothing, everything, op.Gather(nothing, op.Constant(value_int=0), axis=2)


@script(_FUNCTIONS)
def in_order(
    u: Floats, projected: Floats, steps: Ints, projections: Ints, dt_weight: Floats, split: Ints, row: Ints,
    given: Ints,
) -> tuple[Floats, Floats, Floats, Floats]:  # fmt: skip
    """The scans' inputs in the order of the routes: pixels and Δ (T, K, B, M, D), B and C (T, K, B, M, N).

    A column of ones behind the projections makes Δ's bias a row of its weight, so that none has to be added to every
    channel of every step; the rows of B and C are zeros.

    Args:
        u: (B, H, W, D).
        projected: (B, H, W, K, R + 2N).
        steps, projections: of `orders`.
        dt_weight: (K, 1, R + 2N + 1, D), the bias last.
        split: R, N, N, 1.
        row, given: the shapes (-1, D) and (-1, R + 2N).
    """
    one = op.Constant(value_float=1.0)
    most = op.Constant(value_float=80.0)
    pixels = op.Gather(op.Reshape(u, row), steps)
    table = op.Pad(op.Reshape(projected, given), op.Constant(value_ints=[0, 0, 0, 1]), one)
    ordered = op.Gather(table, projections)
    _low, B, C, _one = op.Split(ordered, split, axis=-1)
    raw = op.MatMul(ordered, dt_weight)
    delta = op.Max(raw, op.Log(op.Add(op.Exp(op.Clip(raw, None, most)), one)))
    return pixels, delta, B, C


@script(_FUNCTIONS)
def scan_one_state(
    pixels: Floats, delta: Floats, B: Floats, C: Floats, empty: Floats, full: Floats, start: Floats, A: Floats
) -> Floats:
    """C·h along the routes with N = 1, (T, K, B, M, D).

    Args:
        pixels, delta, B, C: of `in_order`.
        empty, full, start: of `zeros`, (K, B, M, D) twice and (K, B, D).
        A: (K, 1, 1, D).
    """
    a = op.Exp(op.Mul(delta, A))
    b = op.Mul(op.Mul(delta, pixels), B)

    @graph()
    def step(state: Rank4, decay: Rank4, a_t: Rank4, b_t: Rank4, C_t: Rank4):
        next_state = op.Add(op.Mul(a_t, state), b_t)
        next_decay = op.Mul(a_t, decay)
        y = op.Mul(next_state, C_t)
        reach = op.Mul(next_decay, C_t)
        return next_state, next_decay, y, reach

    ends, decays, within, reaches = op.Scan(empty, full, a, b, C, body=step, num_scan_inputs=3)

    @graph()
    def carry(entering: Rank3, decay: Rank3, end: Rank3):
        leaving = op.Add(op.Mul(entering, decay), end)
        entered = op.Identity(entering)
        return leaving, entered

    _last, entering = op.Scan(
        start, decays, ends, body=carry, num_scan_inputs=2, scan_input_axes=[2, 2], scan_output_axes=[2]
    )
    return op.Add(within, op.Mul(reaches, entering))


@script(_FUNCTIONS)
def scan_many_states(
    pixels: Floats, delta: Floats, B: Floats, C: Floats, empty: Floats, start: Floats, A: Floats
) -> Floats:
    """C·h along the routes with any N, (T, K, B, M, D): the states, which are many, are computed twice and never kept.

    Args:
        pixels, delta, B, C: of `in_order`.
        empty, start: (K, B, M, N, D) and (K, B, N, D) of zeros.
        A: (K, 1, 1, N, D).
    """
    state_axis = op.Constant(value_ints=[3])
    channel_axis = op.Constant(value_ints=[4])
    inputs = op.Mul(delta, pixels)

    @graph()
    def arrive(state: Rank5, delta_t: Rank4, x: Rank4, B_t: Rank4):
        a = op.Exp(op.Mul(op.Unsqueeze(delta_t, state_axis), A))
        b = op.Mul(op.Unsqueeze(x, state_axis), op.Unsqueeze(B_t, channel_axis))
        return op.Add(op.Mul(a, state), b)

    ends = op.Scan(empty, delta, inputs, B, body=arrive, num_scan_inputs=3)
    times = op.ReduceSum(delta, op.Constant(value_ints=[0]), keepdims=0)
    decays = op.Exp(op.Mul(op.Unsqueeze(times, state_axis), A))

    @graph()
    def carry(
        entering: Rank4,
        decay: Rank4,
        end: Rank4,
    ):
        leaving = op.Add(op.Mul(entering, decay), end)
        entered = op.Identity(entering)
        return leaving, entered

    _last, entering = op.Scan(
        start, decays, ends, body=carry, num_scan_inputs=2, scan_input_axes=[2, 2], scan_output_axes=[2]
    )

    @graph()
    def pass_through(state: Rank5, delta_t: Rank4, x: Rank4, B_t: Rank4, C_t: Rank4):
        a = op.Exp(op.Mul(op.Unsqueeze(delta_t, state_axis), A))
        b = op.Mul(op.Unsqueeze(x, state_axis), op.Unsqueeze(B_t, channel_axis))
        next_state = op.Add(op.Mul(a, state), b)
        y = op.Squeeze(op.MatMul(op.Unsqueeze(C_t, state_axis), next_state), state_axis)
        return next_state, y

    _final, ys = op.Scan(entering, delta, inputs, B, C, body=pass_through, num_scan_inputs=4)
    return ys


@script(_FUNCTIONS)
def merge(y: Floats, u: Floats, places: Ints, D: Floats, row: Ints) -> Floats:
    """The sum over the routes, back in the grid, and the skip: (T, K, B, M, D) to (B, H, W, D).

    Args:
        y: C·h along the routes.
        u: (B, H, W, D).
        places: of `orders`.
        D: (D,), the sum of the routes' skips.
        row: the shape (-1, D).
    """
    merged = op.ReduceSum(op.Gather(op.Reshape(y, row), places), op.Constant(value_ints=[3]), keepdims=0)
    return op.Add(merged, op.Mul(u, D))


@script(_FUNCTIONS)
def solve_recurrence(a: Floats, b: Floats) -> Floats:
    """h_t = a_t·h_{t-1} + b_t from 0 along the second axis of (B, L, F), in about √L pieces of about √L steps."""
    front = op.Constant(value_ints=[0])
    minus = op.Constant(value_ints=[-1])
    axis = op.Constant(value_ints=[1])
    batch = op.Shape(b, start=0, end=1)
    length = op.Shape(b, start=1, end=2)
    features = op.Shape(b, start=2, end=3)
    root = op.Cast(op.Ceil(op.Sqrt(op.Cast(length, to=1))), to=7)
    steps = op.Max(root, op.Constant(value_ints=[1]))
    pieces = op.Div(op.Sub(op.Add(length, steps), op.Constant(value_ints=[1])), steps)
    missing = op.Sub(op.Mul(steps, pieces), length)
    padding = op.Concat(front, front, front, front, missing, front, axis=0)
    size = op.Concat(batch, pieces, steps, features, axis=0)
    factors = op.Transpose(op.Reshape(op.Pad(a, padding), size), perm=[2, 0, 1, 3])
    summands = op.Transpose(op.Reshape(op.Pad(b, padding), size), perm=[2, 0, 1, 3])
    piece = op.Concat(batch, pieces, features, axis=0)
    empty = op.Expand(op.CastLike(op.Constant(value_float=0.0), b), piece)
    full = op.Expand(op.CastLike(op.Constant(value_float=1.0), b), piece)
    start = op.Expand(op.CastLike(op.Constant(value_float=0.0), b), op.Concat(batch, features, axis=0))

    @graph()
    def step(
        state: Rank3,
        decay: Rank3,
        factor: Rank3,
        summand: Rank3,
    ):
        next_state = op.Add(op.Mul(factor, state), summand)
        next_decay = op.Mul(factor, decay)
        y = op.Identity(next_state)
        reach = op.Identity(next_decay)
        return next_state, next_decay, y, reach

    ends, decays, within, reaches = op.Scan(empty, full, factors, summands, body=step, num_scan_inputs=2)

    @graph()
    def carry(entering: Rank2, decay: Rank2, end: Rank2):
        leaving = op.Add(op.Mul(entering, decay), end)
        entered = op.Identity(entering)
        return leaving, entered

    _last, entering = op.Scan(
        start, decays, ends, body=carry, num_scan_inputs=2, scan_input_axes=[1, 1], scan_output_axes=[1]
    )
    states = op.Transpose(op.Add(within, op.Mul(reaches, entering)), perm=[1, 2, 0, 3])
    whole = op.Reshape(states, op.Concat(batch, minus, features, axis=0))
    return op.Slice(whole, front, length, axis)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter writes for our operators, for one file: `torch.onnx.export(custom_translation_table=…)`."""
    made: dict[Any, Any] = {}  # tables and zeros, which all scans of grids of one size share

    def once(function, *key):
        if key not in made:
            made[key] = function()
        return made[key]

    def ss2d_scan(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern: str, backend: str):
        dtype, size = u.dtype, tuple(map(str, u.shape[:3]))
        routes, (K, channels, states), rank = get_routes(pattern), A.shape, dt_proj_weight.shape[2]
        u, projected, dt_proj_weight, dt_proj_bias, A, D = (
            _as_float32(value) for value in (u, projected, dt_proj_weight, dt_proj_bias, A, D)
        )
        is_column = torch.tensor([route.columns for route in routes]).view(-1, 1, 1, 1)
        is_backward = torch.tensor([route.backwards for route in routes]).view(-1, 1, 1, 1)
        route = torch.arange(K).view(-1, 1, 1)
        tables = once(lambda: orders(u, *map(_constant, (is_column, is_backward, route))), size, pattern)

        def before(*inner: int):
            return once(lambda: zeros(u, _constant(torch.tensor(inner))), size, inner)

        nothing = _constant(torch.zeros(K, 2 * states, channels))
        weight = (op.Transpose(dt_proj_weight, perm=[0, 2, 1]), nothing, op.Unsqueeze(dt_proj_bias, [1]))
        dt_weight = op.Unsqueeze(op.Concat(*weight, axis=1), [1])
        A = op.Unsqueeze(op.Transpose(A, perm=[0, 2, 1]), [1] if states == 1 else [1, 2])
        split, row, given = [rank, states, states, 1], [-1, channels], [-1, rank + 2 * states]
        split, row, given = (_constant(torch.tensor(values)) for values in (split, row, given))
        steps, projections, places = tables
        ordered = in_order(u, projected, steps, projections, dt_weight, split, row, given)
        if states == 1:
            y = scan_one_state(*ordered, *before(K, channels), A)
        else:
            empty, _, start = before(K, states, channels)
            y = scan_many_states(*ordered, empty, start, A)
        y = merge(y, u, places, op.ReduceSum(D, [0], keepdims=0), row)
        return y if dtype == ir.DataType.FLOAT else op.Cast(y, to=dtype.value)

    def recurrence(a, b, backwards: bool):
        if not backwards:
            return solve_recurrence(a, b)
        last, first, step = [2**63 - 1], [-(2**63)], [-1]
        a, b = (op.Slice(value, last, first, [1], step) for value in (a, b))
        return op.Slice(solve_recurrence(a, b), last, first, [1], step)

    return {torch.ops.vmamba.ss2d_scan.default: ss2d_scan, torch.ops.vmamba.recurrence.default: recurrence}


def _as_float32(value):
    return value if value.dtype == ir.DataType.FLOAT else op.Cast(value, to=ir.DataType.FLOAT.value)


def _constant(value: torch.Tensor):
    return op.Constant(value=ir.tensor(value.numpy()))
