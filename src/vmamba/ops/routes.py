"""Scan routes: the orders in which the four sequences walk an H×W grid (paper, section 4.2, "2D-Selective-Scan").

`cross_scan` lays a grid out as four sequences; `cross_merge`, its adjoint, puts four sequences back on the grid and
adds them. A pattern is data: four `Route`s along the axes, which every backend turns into index arithmetic of its own,
or else a function from (H, W) to four orders over the grid, whose results are kept and used to gather and to put back.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vmamba.ops import checks, patterns
from vmamba.ops.registration import define, is_tracing_for_export


class Route(NamedTuple):
    """One order along the axes: by rows or by columns, forwards or backwards."""

    columns: bool
    backwards: bool

    @property
    def bits(self) -> int:
        """As the kernels know it: 1 by columns, 2 backwards."""
        return self.columns + 2 * self.backwards


OrderFunction = Callable[[int, int], Any]
"""From height and width to four orders, (4, H·W): see `register_pattern`."""

Pattern = str | OrderFunction

_ROWS, _COLUMNS = Route(columns=False, backwards=False), Route(columns=True, backwards=False)
_ROWS_BACK, _COLUMNS_BACK = Route(columns=False, backwards=True), Route(columns=True, backwards=True)

PATTERNS: dict[str, tuple[Route, Route, Route, Route] | OrderFunction] = {
    "cross": (_ROWS, _COLUMNS, _ROWS_BACK, _COLUMNS_BACK),
    "unidirectional": (_ROWS, _ROWS, _ROWS, _ROWS),
    "bidirectional": (_ROWS, _ROWS, _ROWS_BACK, _ROWS_BACK),
    "diagonal": patterns.diagonal,
    "hilbert": patterns.hilbert,
    "spiral": patterns.spiral,
}
SEQUENCE = "sequence"  # a grid that is one route already, as operators are given it

_BUILT_IN = frozenset(PATTERNS)
_UNNAMED: WeakValueDictionary[str, OrderFunction] = WeakValueDictionary()
# A compiler makes functools.partial objects anew and drops them as soon as it has their name.
_RECENT: deque[OrderFunction] = deque(maxlen=64)
ROUTES = 4  # of a scan that is not of one sequence
_KEPT = 64  # tables of orders: sixteen sizes of image, of four grids each


def register_pattern(name: str, function: OrderFunction) -> None:
    """Give a scan pattern of your own a name, so that files and recipes can ask for it.

    Args:
        name: any that no pattern of this package has; a name of your own is given anew.
        function: from height and width to four orders over the grid, (4, H·W), as a tensor, an array or nested lists of
            integers. Entry (k, t) is the position, counted row by row, that route k visits at step t; every route
            visits every position once. It is called once for each size and must always return the same. A graph traced
            with open sizes needs a function that computes with torch alone; any other works for fixed sizes.

    Raises:
        ValueError: the name is empty or that of a pattern of this package.
        TypeError: `function` is not callable.
    """
    if not isinstance(name, str) or not name or name in _BUILT_IN or name == SEQUENCE:
        raise ValueError(f"the name is {name!r}; expected a new one, not {', '.join(map(repr, sorted(_BUILT_IN)))}")
    if not callable(function):
        raise TypeError(
            f"the pattern {name!r} is a {type(function).__name__}; expected a function from (H, W) to orders"
        )
    PATTERNS[name] = function


def check_pattern(pattern: Pattern) -> None:
    """Require a known name or a function.

    Raises:
        ValueError: the pattern has no entry in `PATTERNS` and is no function, or one without a hash.
    """
    if not (callable(pattern) or (isinstance(pattern, str) and (pattern in PATTERNS or pattern in _UNNAMED))):
        raise ValueError(
            f"pattern is {pattern!r}; expected one of {', '.join(map(repr, PATTERNS))}, a function from (H, W) to four"
            " orders, or a name after vmamba.register_pattern(name, function)"
        )
    if not isinstance(pattern, Hashable):  # as an instance of a dataclass is
        raise ValueError(
            f"pattern is {pattern!r}, which has no hash, so its orders could not be kept; give a function, or make its"
            " class a @dataclass(frozen=True)"
        )


@torch.compiler.assume_constant_result
def name_of(pattern: Pattern) -> str:
    """A pattern as a string, which operators and graphs can hold; for a function, it means that while it lives."""
    check_pattern(pattern)
    if isinstance(pattern, str):
        return pattern
    name = f"{getattr(pattern, '__qualname__', type(pattern).__name__)} at {id(pattern):#x}"
    if name not in _UNNAMED:
        _UNNAMED[name] = pattern
        _RECENT.append(pattern)
    return name


@torch.compiler.assume_constant_result
def is_along_axes(pattern: Pattern) -> bool:
    """Whether a pattern is made of `Route`s, and not a function.

    Raises:
        ValueError: the pattern has no entry in `PATTERNS` and is no function.
    """
    if pattern == SEQUENCE:
        return True
    check_pattern(pattern)
    return isinstance(pattern, str) and isinstance(PATTERNS.get(pattern), tuple)


def get_routes(pattern: Pattern) -> tuple[Route, ...]:
    """The routes of a pattern along the axes, for kernels that know no others.

    Raises:
        ValueError: the pattern is a function, or unknown.
    """
    if pattern == SEQUENCE:
        return (_ROWS,)
    if not is_along_axes(pattern):
        raise ValueError(f"pattern is {pattern!r}; expected one along the axes")
    return cast(tuple[Route, ...], PATTERNS[cast(str, pattern)])


def count_routes(pattern: Pattern) -> int:
    """How many routes a pattern has."""
    return len(get_routes(pattern)) if is_along_axes(pattern) else ROUTES


# --- orders ----------------------------------------------------------------------------------------------------------


class Orders(NamedTuple):
    """Four permutations of a grid's positions, int64, (4, H·W) each.

    Attributes:
        visited: (k, t) is the position that route k visits at step t.
        steps: (k, p) is the step at which route k visits position p, the inverse.
    """

    visited: Tensor
    steps: Tensor


def scan_orders(pattern: Pattern, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The order in which each route of a pattern visits a grid, of any pattern.

    Args:
        pattern: a name in `PATTERNS` or a function, as for `register_pattern`.
        height, width: of the grid.
        device: where the result is to be, the CPU if None.

    Returns:
        (4, H·W), int64: entry (k, t) is the position, counted row by row, that route k visits at step t.

    Raises:
        ValueError: the pattern is unknown, or its function does not return four permutations of H·W positions.
    """
    if is_along_axes(pattern):
        grid = torch.arange(height * width, device=device or "cpu").view(height, width)
        return torch.stack([_flattened(grid, route) for route in get_routes(pattern)])
    return _kept(_function(pattern), height, width, torch.device(device or "cpu")).visited.clone()


def orders_for(pattern: str, grid: Tensor, height: int, width: int) -> Orders:
    """The orders of a pattern as the situation needs them: kept, recorded or traced. Along the axes, only traced.

    Args:
        pattern: `name_of` it.
        grid: any tensor on the right device, of which height and width are sizes.
        height, width: of the grid, which may be open.
    """
    if is_tracing_for_export():
        return Orders(*_traced(grid, pattern, height, width))
    # A compiler, or whatever else watches operators, must see where these come from.
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        visited, steps = torch.ops.vmamba.scan_orders(pattern, height, width, grid.device)
        return Orders(visited, steps)
    return _kept(_function(pattern), height, width, grid.device)


def _function(pattern: Pattern) -> OrderFunction:
    found = pattern if callable(pattern) else PATTERNS.get(pattern) or _UNNAMED.get(pattern)
    if not callable(found):
        raise ValueError(f"the function {pattern} is gone: keep a reference to it, or register it by a name")
    return found


@functools.lru_cache(maxsize=_KEPT)
def _kept(function: OrderFunction, height: int, width: int, device: torch.device) -> Orders:
    # In a thread of its own, where the caller's transforms, modes and default device do not reach.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_computed, function, height, width, device).result()


def _computed(function: OrderFunction, height: int, width: int, device: torch.device) -> Orders:
    if not height * width:
        empty = torch.empty(ROUTES, 0, dtype=torch.int64, device=device)
        return Orders(empty, empty)
    visited = _permutations(function(height, width), function, height, width)
    return Orders(visited.to(device), _inverse(visited).to(device))


def _permutations(given: Any, function: OrderFunction, height: int, width: int) -> Tensor:
    """What a function returned, checked.

    Raises:
        ValueError: saying what is wrong with it.
    """
    name, size = getattr(function, "__qualname__", repr(function)), height * width
    said = f"the pattern {name} returned for a grid of {height}×{width}"
    if isinstance(given, (list, tuple)) and all(isinstance(order, Tensor) for order in given):
        given = [order.detach().cpu().numpy() for order in given]
    try:
        orders = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said} what is no table of numbers, {error}; expected (4, {size}) integers") from error
    if (
        orders.shape != (ROUTES, size)
        or orders.is_floating_point()
        or orders.is_complex()
        or orders.dtype == torch.bool
    ):
        kind = str(orders.dtype).removeprefix("torch.")
        raise ValueError(f"{said} {tuple(orders.shape)} numbers, {kind}; expected (4, {size}) integers, (4, H·W)")
    orders = orders.to(torch.int64).contiguous()
    for k, order in enumerate(orders):
        if outside := order[(order < 0) | (order >= size)].tolist():
            raise ValueError(f"{said} position {outside[0]} in route {k}; expected 0 to {size - 1}")
        visits = torch.bincount(order, minlength=size)
        if (visits != 1).any():
            twice, missing = ((visits > 1).nonzero().flatten().tolist(), (visits == 0).nonzero().flatten().tolist())
            raise ValueError(
                f"{said} a route {k} that visits position {twice[0]} {int(visits[twice[0]])} times and misses"
                f" {missing[0]}, {len(missing)} missing in all; expected every position once"
            )
    return orders


# Left alone by torch.export's strict tracer, to which open sizes look like numbers.
@torch.compiler.allow_in_graph
def _traced(grid: Tensor, pattern: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The orders in a graph that must stand without this package: numbers, or where sizes are open how to find them."""
    if is_along_axes(pattern):
        visited = scan_orders(pattern, height, width, grid.device)
        return visited, _inverse(visited)
    function = _function(pattern)
    if not isinstance(height * width, (torch.SymInt, Tensor)):
        visited, steps = (
            torch.tensor(v.tolist(), device=grid.device) for v in _kept(function, height, width, torch.device("cpu"))
        )
        return visited, steps
    fault: Exception | None = None
    try:
        visited = function(height, width)
    except Exception as error:  # whatever a function of one's own does with sizes that are no numbers
        visited, fault = None, error
    if not isinstance(visited, Tensor) or not isinstance(visited.shape[-1], (torch.SymInt, Tensor)):
        raise ValueError(
            f"the pattern {getattr(function, '__qualname__', function)} cannot be traced for open sizes, because it"
            " needs numbers for height and width: write it with torch's functions alone, or export for a fixed size"
        ) from fault
    visited = visited.to(grid.device)
    return visited, _inverse(visited)


def _inverse(visited: Tensor) -> Tensor:
    """Of permutations (K, L)."""
    steps = torch.arange(visited.shape[1], device=visited.device).expand(visited.shape)
    return torch.scatter(visited, 1, visited, steps)


# Of numbers alone, so that no transform takes its result for something to differentiate.
@torch.library.custom_op("vmamba::scan_orders", mutates_args=())
def _copied(pattern: str, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orders with which a compiled graph may do what it likes."""
    visited, steps = _kept(_function(pattern), height, width, device)
    return visited.clone(), steps.clone()


@_copied.register_fake
def _(pattern: str, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    visited, steps = (torch.empty((ROUTES, height * width), dtype=torch.int64, device=device) for _ in range(2))
    return visited, steps


define(
    "permute(Tensor x, Tensor order, Tensor inverse, int dim) -> Tensor",
    lambda x, order, inverse, dim: x.index_select(dim, order),
    plain=lambda x, order, inverse, dim: x.index_select(dim, order),
    # By the inverse, where torch's own gradient would clear memory and add row by row.
    gradient=lambda ctx, grad: (permute(grad, *reversed(ctx.saved_tensors[1:]), *ctx.options), None, None),
    fake=lambda x, order, inverse, dim: x.new_empty(x.shape),
)


def permute(x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """Entry order[i] of `x` along a dimension at place i, for a permutation (L,) and its inverse."""
    if is_tracing_for_export() or not (torch.is_grad_enabled() and x.requires_grad):
        return x.index_select(dim, order)
    return torch.ops.vmamba.permute(x, order, inverse, dim)


# --- scan and merge --------------------------------------------------------------------------------------------------


def cross_scan(x: Tensor, pattern: Pattern = "cross") -> Tensor:
    """Lay a grid out as four sequences.

    Args:
        x: (B, C, H, W), any dtype.
        pattern: a name in `PATTERNS`, such as "cross" (rows, columns and both backwards), or a function from (H, W) to
            four orders (`register_pattern`).

    Returns:
        (B, 4, C, H·W), the dtype of `x`.

    Raises:
        ValueError: `x` is not four-dimensional, the pattern is unknown, or its function returns no permutations.
    """
    checks.ndim("x", x, 4, "(B, C, H, W)")
    if is_along_axes(pattern):
        return torch.stack([_flattened(x, route) for route in get_routes(pattern)], dim=1)
    visited, steps = orders_for(name_of(pattern), x, x.shape[2], x.shape[3])
    x = x.flatten(2)
    return torch.stack([permute(x, visited[k], steps[k], 2) for k in range(ROUTES)], dim=1)


def cross_merge(ys: Tensor, size: tuple[int, int], pattern: Pattern = "cross") -> Tensor:
    """Put four sequences back on their grid and add them: the adjoint of `cross_scan`.

    Args:
        ys: (B, 4, C, L) with L = H·W, any dtype.
        size: (H, W) of the grid.
        pattern: the pattern that `cross_scan` was called with.

    Returns:
        (B, C, H, W), the dtype of `ys`.

    Raises:
        ValueError: `ys` does not hold four sequences of length H·W, the pattern is unknown, or its function returns no
            permutations.
    """
    height, width = size
    checks.ndim("ys", ys, 4, "(B, 4, C, H·W)")
    checks.shape("ys", ys, (None, 4, None, height * width), f"(B, 4, C, H·W) for a grid of {height}×{width}")
    sequences = ys.unbind(1)
    if is_along_axes(pattern):
        routes = get_routes(pattern)
        grids = [_on_grid(sequence, route, height, width) for sequence, route in zip(sequences, routes, strict=True)]
    else:
        visited, steps = orders_for(name_of(pattern), ys, height, width)
        placed = [permute(sequence, steps[k], visited[k], 2) for k, sequence in enumerate(sequences)]
        grids = [sequence.unflatten(-1, (height, width)) for sequence in placed]
    return functools.reduce(torch.add, grids)


def _flattened(grid: Tensor, route: Route) -> Tensor:
    """(..., H, W) as a route's sequence, (..., H·W)."""
    sequence = (grid.transpose(-2, -1) if route.columns else grid).flatten(-2)
    return sequence.flip(-1) if route.backwards else sequence


def _on_grid(sequence: Tensor, route: Route, height: int, width: int) -> Tensor:
    """The inverse of `_flattened`."""
    sequence = sequence.flip(-1) if route.backwards else sequence
    if route.columns:
        return sequence.unflatten(-1, (width, height)).transpose(-2, -1)
    return sequence.unflatten(-1, (height, width))
