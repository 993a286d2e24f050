"""Pure torch, for any device: no loop over the sequence, nothing that overflows, traceable by torch.export.

Everything rests on `linear_recurrence`, h_t = a_t·h_{t-1} + b_t, which is solved by chunks. A loop over the
positions within a chunk, for all chunks at once, reduces each chunk to a pair, Π a and the h at its end; the same
recurrence over these pairs, shorter by the chunk's length, gives the state that enters each chunk; a second loop
replays the chunks from there. Only products of factors are formed, never quotients, logarithms or running sums of Δ·A,
so a long sequence or a large Δ underflows to the 0 it stands for. In a graph whose length is open, loops of the graph
take the place of Python's.

Layout: time second, (batch, L, G, P) for G groups of P channels that share B and C; channels are contiguous. One state
of the N is held at a time, so memory does not grow with N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops.arguments import ScanArguments, SS2DArguments, as_gradients, in_state_dtype
from vmamba.ops.exporting import keeps_scans, recurrence
from vmamba.ops.registration import is_exporting
from vmamba.ops.routes import Route, get_routes, orders_for

_CHUNK = 16
# Doublings of an open length cannot stop when the sequence is covered: 2²⁰ positions are a 4096×4096 image at stride 4.
# Beyond them they give NaN.
_TRACED_DOUBLINGS = 20


# Left alone by torch.export's strict tracer, to which open sizes look like numbers, until sizes are known to be open.
@torch.compiler.allow_in_graph
def linear_recurrence(a: Tensor, b: Tensor, backwards: bool = False, piece: int | None = None) -> Tensor:
    """Solve h_t = a_t·h_{t-1} + b_t with h before the first step 0.

    Args:
        a, b: (batch, L, ...), one floating-point dtype, equal shapes.
        backwards: run from the last position to the first, h_t = a_t·h_{t+1} + b_t.
        piece: a length, best of about √L, of which L is a multiple: a graph's loops then take fewer steps.

    Returns:
        h, shaped as `b`.
    """
    shape = b.shape
    a, b = a.flatten(2), b.flatten(2)
    if keeps_scans():
        return recurrence(a, b, backwards).view(shape)
    if not isinstance(shape[1], (torch.SymInt, Tensor)):
        return _by_chunks(a, b, backwards).view(shape)
    # An open length. Loops are for torch.export alone: torch.jit.trace, with its tensor for the length, cannot record
    # them, and transforms of torch.func do not see through them.
    a, b = (x.flip(1) if backwards else x for x in (a, b))
    h = _by_loops(a, b, piece) if is_exporting() else _by_doubling(a, b)
    return (h.flip(1) if backwards else h).view(shape)


def _by_chunks(a: Tensor, b: Tensor, backwards: bool) -> Tensor:
    batch, length, features = b.shape
    if length <= _CHUNK:
        return torch.stack(_steps(a.unbind(1), b.unbind(1), None, backwards), dim=1) if length else b

    chunks = -(-length // _CHUNK)
    size = -(-length // chunks)  # the size that wastes least: 49 positions are 4 chunks of 13
    padding = (0, 0, 0, chunks * size - length)
    a_steps = F.pad(a, padding).view(batch, chunks, size, features).unbind(2)
    b_steps = F.pad(b, padding).view(batch, chunks, size, features).unbind(2)

    order = range(size - 1, -1, -1) if backwards else range(size)
    product, state = a_steps[order[0]], b_steps[order[0]]
    for t in order[1:]:
        product, state = product * a_steps[t], torch.addcmul(b_steps[t], a_steps[t], state)
    leaving = _by_chunks(product, state, backwards)
    entering = F.pad(leaving[:, 1:], (0, 0, 0, 1)) if backwards else F.pad(leaving[:, :-1], (0, 0, 1, 0))

    states = torch.stack(_steps(a_steps, b_steps, entering, backwards), dim=2)
    return states.view(batch, chunks * size, features)[:, :length]


def _by_loops(a: Tensor, b: Tensor, piece: int | None) -> Tensor:
    """The same, forwards, as one loop in the graph, or as two that are short.

    All pieces are scanned at once, from state 0, beside the products of their factors; a loop over the pieces carries
    the state that enters each, and what that adds is its product with those of the factors.
    """
    loop = torch.ops.higher_order.scan  # of a step's results, those that it hands out must be memory of their own

    def step(state: Tensor, a_t: Tensor, b_t: Tensor) -> list[Tensor]:
        state = torch.addcmul(b_t, a_t, state)
        return [state, state.clone()]

    def step_in_all(state: Tensor, product: Tensor, a_t: Tensor, b_t: Tensor) -> list[Tensor]:
        state, product = torch.addcmul(b_t, a_t, state), product * a_t
        return [state, product, state.clone(), product.clone()]

    def carry(entering: Tensor, product: Tensor, end: Tensor) -> list[Tensor]:
        return [torch.addcmul(end, product, entering), entering.clone()]

    if piece is None:
        a, b = (x.transpose(0, 1).contiguous() for x in (a, b))  # for the same strides in all steps
        _, states = loop(step, [torch.zeros_like(b[0])], [a, b], ())
        return states.transpose(0, 1)
    # (piece, pieces, batch, features)
    a, b = (x.unflatten(1, (-1, piece)).transpose(0, 2).contiguous() for x in (a, b))
    nothing = torch.zeros_like(b[0])
    ends, products, within, reaches = loop(step_in_all, [nothing, torch.ones_like(nothing)], [a, b], ())
    _, entering = loop(carry, [torch.zeros_like(ends[0])], [products, ends], ())
    return torch.addcmul(within, reaches, entering).transpose(0, 2).flatten(1, 2)


def _by_doubling(a: Tensor, b: Tensor) -> Tensor:
    """The same, forwards, in log₂ L passes, each joining stretches of twice the length."""
    length = b.shape[1]
    positions = torch.arange(length, device=b.device)
    for doubling in range(_TRACED_DOUBLINGS):
        # By index, since a slice by an amount that may exceed the length would pin it.
        before = positions - 2**doubling
        # Of a stretch that reaches the start nothing comes before; its factors may have grown beyond all numbers.
        a = torch.where((before >= 0)[:, None], a, 0)
        before = before.clamp(min=0)
        b = torch.addcmul(b, a, b[:, before])
        a = a * a[:, before]
    # No check, which would pin the length.
    return torch.where((positions < 2**_TRACED_DOUBLINGS)[:, None], b, torch.nan)


def _steps(a: tuple[Tensor, ...], b: tuple[Tensor, ...], state: Tensor | None, backwards: bool) -> list[Tensor]:
    """The recurrence step by step from a given state; returns the states in the order of the positions."""
    states = []
    for a_t, b_t in zip(reversed(a), reversed(b), strict=True) if backwards else zip(a, b, strict=True):
        state = b_t if state is None else torch.addcmul(b_t, a_t, state)
        states.append(state)
    return states[::-1] if backwards else states


class _ScanGradients(NamedTuple):
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """S6 without the skip: u, delta (batch, L, G, P); A (G, P, N); B, C (batch, L, G, N), all in the state's dtype.

    Returns y (batch, L, G, P) and the state at every route's end, (batch, G, P, N).
    """
    weighted = delta * u
    y = torch.zeros_like(u)
    last = []
    for n in range(A.shape[-1]):
        h = linear_recurrence(torch.exp(delta * A[..., n]), weighted * B[..., n, None], backwards)
        y = torch.addcmul(y, C[..., n, None], h)
        last.append(h[:, 0 if backwards else -1] if h.shape[1] else torch.zeros_like(h.sum(1)))
    return y, _stack(last, A.expand(u.shape[0], *A.shape))


def _scan_backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    backwards: bool,
) -> _ScanGradients:
    """Gradients of `_scan`, from its inputs alone: the states are computed again, one n at a time.

    With g the gradient that reaches h from y and the last state, the adjoint is the same recurrence run the other way,
    G_t = g_t + a_{t+1}·G_{t+1}; and a_t·h_{t-1} is h_t - b_t.
    """
    weighted = delta * u
    grad_weighted, grad_delta = torch.zeros_like(u), torch.zeros_like(u)
    grad_A, grad_B, grad_C = [], [], []
    for n in range(A.shape[-1]):
        a, b = torch.exp(delta * A[..., n]), weighted * B[..., n, None]
        h = linear_recurrence(a, b, backwards)
        g = grad_y * C[..., n, None]
        if grad_last is not None:
            end, rest = grad_last[:, None, ..., n], torch.zeros_like(g[:, 1:])
            g = g + torch.cat([end, rest] if backwards else [rest, end], dim=1)
        edge = torch.zeros_like(a[:, :1])
        following = torch.cat([edge, a[:, :-1]] if backwards else [a[:, 1:], edge], dim=1)
        G = linear_recurrence(following, g, not backwards)
        grad_C.append((grad_y * h).sum(-1))
        grad_B.append((G * weighted).sum(-1))
        grad_weighted = torch.addcmul(grad_weighted, G, B[..., n, None])
        grad_log_a = G * (h - b)
        grad_delta = torch.addcmul(grad_delta, grad_log_a, A[..., n])
        grad_A.append((grad_log_a * delta).sum((0, 1)))
    return _ScanGradients(
        u=grad_weighted * delta,
        delta=torch.addcmul(grad_delta, grad_weighted, u),
        A=_stack(grad_A, A),
        B=_stack(grad_B, B),
        C=_stack(grad_C, C),
    )


def _stack(by_state: list[Tensor], like: Tensor) -> Tensor:
    """What there is for each state, along a last dimension, in the shape of `like`; N may be 0."""
    return torch.stack(by_state, dim=-1) if by_state else torch.zeros_like(like)


# --- one sequence ----------------------------------------------------------------------------------------------------


class _TimeFirst(NamedTuple):
    """Arguments of `selective_scan` in this file's layout and the state's dtype."""

    u: Tensor
    raw: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def _time_first(arguments: ScanArguments) -> _TimeFirst:
    u, delta, A, B, C, _, _, delta_bias, delta_softplus = arguments
    groups = B.shape[1]
    u, raw = (x.transpose(1, 2).contiguous().unflatten(2, (groups, -1)) for x in (u, delta))
    B, C = (x.permute(0, 3, 1, 2) for x in (B, C))
    if delta_bias is not None:
        raw = raw + delta_bias.unflatten(0, (groups, -1))
    return _TimeFirst(u, raw, F.softplus(raw) if delta_softplus else raw, A.unflatten(0, (groups, -1)), B, C)


def _ungated(s: _TimeFirst, arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """y before the gate (batch, D, L), and the last state (batch, G, P, N)."""
    y, last = _scan(s.u, s.delta, s.A, s.B, s.C, backwards=False)
    y = y.flatten(2).transpose(1, 2)
    return y if arguments.D is None else torch.addcmul(y, arguments.D[:, None], arguments.u), last


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Selective scan; results as in `reference.selective_scan`."""
    a = in_state_dtype(arguments)
    y, last = _ungated(_time_first(a), a)
    if a.z is not None:
        y = y * F.silu(a.z)
    return y.to(arguments.u.dtype).contiguous(), last.flatten(1, 2)


selective_scan_for_export = selective_scan


def gate_backward(grad: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y · SiLU(z) for y and z."""
    gate = torch.sigmoid(z)
    silu = z * gate
    return grad * silu, grad * y * (gate + silu * (1 - gate))


def selective_scan_backward(grad_y: Tensor, grad_last: Tensor, arguments: ScanArguments) -> tuple[Tensor, ...]:
    """Gradients of `selective_scan` for its eight tensors, in order; empty for those that are None."""
    a = in_state_dtype(arguments)
    s, groups = _time_first(a), a.B.shape[1]
    grad, grad_last, grad_z = grad_y.to(a.u.dtype), grad_last.to(a.u.dtype), None
    if a.z is not None:
        grad, grad_z = gate_backward(grad, _ungated(s, a)[0], a.z)
    grad_time_first = grad.transpose(1, 2).contiguous().unflatten(2, (groups, -1))
    g = _scan_backward(
        grad_time_first, grad_last.unflatten(1, (groups, -1)), s.u, s.delta, s.A, s.B, s.C, backwards=False
    )
    grad_raw = g.delta * torch.sigmoid(s.raw) if a.delta_softplus else g.delta
    grad_u = g.u.flatten(2).transpose(1, 2)
    if a.D is not None:
        grad_u = torch.addcmul(grad_u, a.D[:, None], grad)
    grads = (
        grad_u, grad_raw.flatten(2).transpose(1, 2), g.A, g.B.permute(0, 2, 3, 1), g.C.permute(0, 2, 3, 1),
        (grad * a.u).sum((0, 2)), grad_z, grad_raw.sum((0, 1)),
    )  # fmt: skip
    return as_gradients(grads, arguments)


# --- four routes over a grid -----------------------------------------------------------------------------------------


class _RouteInputs(NamedTuple):
    """What route k scans, in the order of its axis (rows or columns) and without a copy for the way back."""

    u: Tensor
    dt_low: Tensor
    raw: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def _sequence(grid: Tensor, columns: bool) -> Tensor:
    """(batch, H, W, ...) as (batch, L, ...), by rows or by columns."""
    return (grid.transpose(1, 2) if columns else grid).flatten(1, 2)


def _grid(sequence: Tensor, columns: bool, height: int, width: int) -> Tensor:
    """The inverse of `_sequence`."""
    return sequence.unflatten(1, (width, height)).transpose(1, 2) if columns else sequence.unflatten(1, (height, width))


def _route_inputs(k: int, route: Route, arguments: SS2DArguments) -> _RouteInputs:
    u, projected, weight, bias, A, _, _ = arguments
    R, N = weight.shape[-1], A.shape[-1]
    dt_low, B, C = _sequence(projected[:, :, :, k], route.columns).split([R, N, N], dim=-1)
    raw = F.linear(dt_low, weight[k], bias[k]).unsqueeze(2)
    x = _sequence(u, route.columns).unsqueeze(2)
    return _RouteInputs(x, dt_low, raw, F.softplus(raw), A[k : k + 1], B.unsqueeze(2), C.unsqueeze(2))


def ss2d_scan(arguments: SS2DArguments) -> Tensor:
    """SS2D's operator on a grid; result as in `reference.ss2d_scan`.

    Opposite routes read the same sequence, one of them backwards, so at most one transposed copy is made of the grid.
    """
    a = in_state_dtype(arguments)
    height, width = a.u.shape[1:3]
    y = a.u * a.D.sum(0)
    for k, route in enumerate(get_routes(a.pattern)):
        r = _route_inputs(k, route, a)
        y_k, _ = _scan(r.u, r.delta, r.A, r.B, r.C, route.backwards)
        y = y + _grid(y_k.squeeze(2), route.columns, height, width)
    return y.to(arguments.u.dtype).contiguous()


def ss2d_scan_for_export(arguments: SS2DArguments) -> Tensor:
    """`ss2d_scan` as a small graph: all routes and states in one recurrence, at their price in memory.

    The routes are tables of positions, by which pixels and projections are read and results put back.
    """
    u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern = in_state_dtype(arguments)
    (routes, _, N), height, width = A.shape, *u.shape[1:3]
    # (L, K); the latter two among those of all routes
    visited, steps = (table.t().contiguous() for table in orders_for(pattern, u, height, width))
    entries, places = (table * routes + torch.arange(routes, device=u.device) for table in (visited, steps))

    x = u.flatten(1, 2)[:, visited]  # (batch, L, K, D)
    dt_low, B, C = projected.flatten(1, 3)[:, entries].split([dt_proj_weight.shape[-1], N, N], dim=-1)
    delta = F.softplus(torch.einsum("blkr,kdr->blkd", dt_low, dt_proj_weight) + dt_proj_bias).unsqueeze(3)
    a = torch.exp(delta * A.transpose(1, 2))  # (batch, L, K, N, D)
    h = linear_recurrence(a, delta * x.unsqueeze(3) * B.unsqueeze(4), piece=width)
    y = (h * C.unsqueeze(4)).sum(3).flatten(1, 2)[:, places].sum(2)
    return torch.addcmul(y.unflatten(1, (height, width)), u, D.sum(0)).to(arguments.u.dtype)


def ss2d_scan_backward(grad_y: Tensor, arguments: SS2DArguments) -> tuple[Tensor, ...]:
    """Gradients of `ss2d_scan` for its six tensors, in order. Only the inputs are needed: the states are recomputed."""
    a = in_state_dtype(arguments)
    height, width = a.u.shape[1:3]
    grad = grad_y.to(a.u.dtype)
    grad_u = grad * a.D.sum(0)
    grad_D = (grad * a.u).sum((0, 1, 2)).expand_as(a.D)
    grad_projected, grad_weight, grad_bias, grad_A = [], [], [], []
    for k, route in enumerate(get_routes(a.pattern)):
        r = _route_inputs(k, route, a)
        grad_k = _sequence(grad, route.columns).unsqueeze(2)
        g = _scan_backward(grad_k, None, r.u, r.delta, r.A, r.B, r.C, route.backwards)
        grad_raw = (g.delta * torch.sigmoid(r.raw)).squeeze(2)
        grad_weight.append(torch.einsum("bld,blr->dr", grad_raw, r.dt_low))
        grad_bias.append(grad_raw.sum((0, 1)))
        grad_A.append(g.A[0])
        grad_parameters = torch.cat([grad_raw @ a.dt_proj_weight[k], g.B.squeeze(2), g.C.squeeze(2)], dim=-1)
        grad_projected.append(_grid(grad_parameters, route.columns, height, width))
        grad_u = grad_u + _grid(g.u.squeeze(2), route.columns, height, width)
    stacked = (torch.stack(grads) for grads in (grad_weight, grad_bias, grad_A))
    return as_gradients((grad_u, torch.stack(grad_projected, dim=3), *stacked, grad_D), arguments)
