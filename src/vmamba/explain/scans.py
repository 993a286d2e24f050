"""What the scans of a model were given and returned, recorded in one pass: what activation maps are computed from."""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.errors import RecipeError
from vmamba.explain.config import FORGOTTEN
from vmamba.explain.images import AnyPictures, Seen, evaluating, see
from vmamba.explain.scan_patterns import route_names
from vmamba.models.feature_maps import DenseModel
from vmamba.ops import scan_orders
from vmamba.ops.arguments import SS2DArguments, in_state_dtype
from vmamba.ops.ss2d import watch_scans


@dataclass(frozen=True, eq=False)
class Scan:
    """One call of `ss2d_scan` on B grids of H×W patches, L = H·W, in the dtype of its states.

    Attributes:
        block: name of the block that called it.
        u: (B, L, D), what is scanned; patches row by row.
        B, C: (B, K, L, N), what each patch writes to the states and reads from them, on each of the K = 4 routes.
        delta: (B, K, L, D), the step Δ that each patch chooses.
        A: (K, D, N), negative.
        D: (K, D), the skip.
        y: (B, L, D), what the scan returned.
        orders: (K, L), int64: entry (k, t) is the patch that route k visits at step t.
        grid: H and W.
        pattern: name of the routes.
    """

    block: str
    arguments: SS2DArguments
    y: Tensor
    orders: Tensor
    grid: tuple[int, int]

    @property
    def u(self) -> Tensor:  # noqa: D102
        return self.arguments.u.flatten(1, 2)

    @property
    def A(self) -> Tensor:  # noqa: D102
        return self.arguments.A

    @property
    def D(self) -> Tensor:  # noqa: D102
        return self.arguments.D

    @property
    def pattern(self) -> str:  # noqa: D102
        return self.arguments.pattern

    @cached_property
    def _parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt_low, B and C of each route, (B, K, L, ·)."""
        rank, states = self.arguments.dt_proj_weight.shape[-1], self.A.shape[-1]
        dt_low, B, C = self.arguments.projected.flatten(1, 2).transpose(1, 2).split([rank, states, states], -1)
        return dt_low, B, C

    @property
    def B(self) -> Tensor:  # noqa: D102
        return self._parameters[1]

    @property
    def C(self) -> Tensor:  # noqa: D102
        return self._parameters[2]

    @cached_property
    def delta(self) -> Tensor:  # noqa: D102
        step = torch.einsum("bklr,kdr->bkld", self._parameters[0], self.arguments.dt_proj_weight)
        return F.softplus(step + self.arguments.dt_proj_bias[:, None])

    @cached_property
    def steps(self) -> Tensor:
        """(K, L), int64: the step at which route k visits each patch, the inverse of `orders`."""
        return self.orders.argsort(1)

    @property
    def label(self) -> str:
        """The block in words."""
        stage, number = place_of(self.block)
        if stage is None or number is None:
            return self.block or "the block"
        return f"stage {stage + 1}, block {number + 1}"

    @property
    def route_names(self) -> tuple[str, ...]:
        """The routes in words."""
        return route_names(self.pattern)

    def on_grid(self, values: Tensor, dim: int) -> Tensor:
        """A dimension of L patches as H×W."""
        return values.unflatten(dim, self.grid)

    def weights(self, query: int, image: int) -> Tensor:
        """What plays the part of attention: how much of each patch's u arrives in the output of one patch, exactly.

        Along a route, with the query q and the patches j it visited before q (and q itself),
        w(q, j)[d] = Σ_n C_q[n] · exp(A[d, n] · Σ_{i=j+1..q} Δ_i[d]) · Δ_j[d] · B_j[n]. The sums of Δ are taken from
        the query backwards, in linear time and memory.

        Args:
            query: the patch, counted row by row.
            image: which of the batch.

        Returns:
            (K, L, D): y_q = Σ_k (Σ_j w_k(q, j) · u_j + D_k · u_q).
        """
        weights = self.delta.new_zeros(self.delta.shape[1:])
        for k, order in enumerate(self.orders):
            path = order[: int(self.steps[k, query]) + 1]
            delta = self.delta[image, k].index_select(0, path)
            since = F.pad(delta[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))  # Σ_{i=j+1..q} Δ_i
            written = self.B[image, k].index_select(0, path) * self.C[image, k, query]
            total = torch.zeros_like(delta)
            for n in range(self.A.shape[-1]):
                total.addcmul_(torch.exp(since * self.A[k, :, n]), written[:, n, None])
            weights[k].index_copy_(0, path, total.mul_(delta))
        return weights


@dataclass(frozen=True, eq=False)
class Recording:
    """The scans of one pass over a batch of pictures, from which any query in any block is answered at once.

    Attributes:
        seen: the pictures.
        scans: by the name of the block, in the order of computation.
    """

    seen: Seen
    scans: dict[str, Scan]

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, in the order of computation."""
        return tuple(self.scans)

    def scan(self, block: int | str = -1) -> Scan:
        """The scan of a block, by its name or its number in the order of computation (negative ones from the end).

        Raises:
            RecipeError: there is no such block.
        """
        names = self.blocks
        if hasattr(block, "__index__") and -len(names) <= (number := operator.index(block)) < len(names):
            return self.scans[names[number]]
        if isinstance(block, str) and block.removesuffix(".ss2d") in self.scans:
            return self.scans[block.removesuffix(".ss2d")]
        known = (
            f"a number from 0 to {len(names) - 1}, or from the end {-len(names)} to -1, or one of: {', '.join(names)}"
        )
        raise RecipeError(f"there is no block {block!r}; expected {known}")

    def cell(self, block: int | str = -1) -> tuple[float, float]:
        """Height and width of a block's patches in pixels of the pictures seen."""
        return self.seen.cell(self.scan(block).grid)

    def patch(self, query: tuple[float, float] | None, block: int | str = -1) -> tuple[int, int]:
        """Row and column of the patch at a place (x, y), in pixels of the pictures seen; None for the middle.

        Raises:
            RecipeError: the place is outside the pictures.
        """
        (height, width), grid, cell = self.seen.size, self.scan(block).grid, self.cell(block)
        x, y = (width / 2, height / 2) if query is None else query
        if not (0 <= x < width and 0 <= y < height):
            raise RecipeError(
                f"the query ({x:g}, {y:g}) is outside the {width}×{height} pixels that the model sees; expected x from"
                f" 0 to {width - 1} and y from 0 to {height - 1}"
            )
        return min(int(y / cell[0]), grid[0] - 1), min(int(x / cell[1]), grid[1] - 1)

    def maps(
        self, query: tuple[float, float] | Sequence[tuple[float, float]] | None = None, block: int | str = -1
    ) -> Any:
        """What the output of a patch is made of, as `vmamba.explain.ActivationMaps`.

        Args:
            query: a place (x, y) in pixels of the pictures seen, or one for each picture; None for the middle.
            block: name or number.

        Raises:
            RecipeError: a place is outside the pictures, there are not as many as pictures, or no such block.
        """
        several = query is not None and not (len(query) and isinstance(query[0], Real))
        places: Any = query if several else [query] * len(self.seen)
        if len(places) != len(self.seen):
            raise RecipeError(
                f"{len(places)} places were given for {len(self.seen)} pictures; expected one, or one each"
            )
        return self._read("activation_maps:maps_of", block, [self.patch(place, block) for place in places])

    def selectivity(self, block: int | str = -1, share: float = FORGOTTEN) -> Any:
        """The step that each patch chooses, and how long it is remembered, as `vmamba.explain.Selectivity`."""
        return self._read("selectivity:selectivity_of", block, share)

    def matrix(self, block: int | str = -1, image: int = 0) -> Any:
        """How much every patch gets from every other, of a small grid, as `vmamba.explain.AttentionMatrix`."""
        return self._read("attention:matrix_of", block, image)

    def _read(self, reader: str, *arguments: Any) -> Any:
        """What one of the modules that are built on recordings makes of this one; named, since they import this one."""
        return resolve_name(f"vmamba.explain.{reader}")(self, *arguments)


def place_of(block: str) -> tuple[int | None, int | None]:
    """The numbers, from 0, of a block's stage and of the block in it, as its name has them; None where it has not."""
    found = re.search(r"stages[._](\d+)(?:\.blocks\.(\d+)$)?", block)
    stage, number = found.groups() if found else (None, None)
    return None if stage is None else int(stage), None if number is None else int(number)


def record_scans(model: nn.Module, pictures: AnyPictures, size: int | tuple[int, int] | None = None) -> Recording:
    """Show pictures to a model once, and keep what every scan in it was given and returned.

    The numbers are those of the operator's calls, so a model that was changed (hooks, replaced layers, parametrised
    weights, patterns of one's own) gives its own. It is put in evaluation mode for this, and back as it was.

    Args:
        model: any network with SS2D in it: a VMamba, a model for segmentation or detection, a block, one's own.
        pictures, size: see `see`.

    Raises:
        RecipeError: no scan was computed, as in a ResNet.
        ImageError: a file cannot be used.
    """
    seen = see(model, pictures, size)
    scans: dict[str, Scan] = {}
    inside = [""]  # names of the modules at work, the innermost last

    def keep(arguments: SS2DArguments, y: Tensor) -> None:
        name = inside[-1].replace("_orig_mod.", "").removesuffix("_orig_mod")
        name = "" if name == "ss2d" else name.removesuffix(".ss2d")
        while name in scans:  # a module that is used twice
            name += "'"
        # Copies: what comes after the scan may write over its result, and training over the parameters.
        arguments = in_state_dtype(
            SS2DArguments._make(v.detach().clone() if isinstance(v, Tensor) else v for v in arguments)
        )
        height, width = y.shape[1:3]
        orders = scan_orders(arguments.pattern, height, width, y.device)
        result = y.detach().flatten(1, 2).to(arguments.u.dtype, copy=True)
        scans[name] = Scan(name, arguments, result, orders, (height, width))

    network = model.backbone if isinstance(model, DenseModel) else model
    with (
        evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), watch_scans(keep),
        _named(model, inside),
    ):  # fmt: skip
        network(seen.images)
    if not scans:
        raise RecipeError(
            f"{type(model).__name__} computed no selective scan, and activation maps are made of scans: expected a"
            " network with SS2D blocks, such as vmamba.create_model('vmamba_tiny_s1l8'). Stage maps and class maps can"
            " be had of any network"
        )
    return Recording(seen, scans)


@contextmanager
def _named(model: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keep the name of the module at work, in this thread, at the end of a list."""
    thread = threading.get_ident()

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if threading.get_ident() == thread:
                inside.append(name)

        return hook

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread:
            inside.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
