"""Activation maps: what the output of one patch is made of, patch by patch and route by route (section 5 of the paper).

Attention compares the query with every patch and writes the weights down. SS2D never does, but it is linear in what it
scans, so that they can be computed: see `Scan.weights`. They are exact: contributions and skip add up to the output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vmamba.explain.images import AnyPictures, Seen, in_pixels
from vmamba.explain.scans import Recording, Scan, record_scans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["size", "share", "weight"]
"""Of a patch's contribution to the query's output y_q, a vector of D channels: its Euclidean length; the share of y_q
that it makes up, (contribution · y_q) / |y_q|², of either sign, which with the skip add up to 1; or the mean absolute
weight over the channels, which says what could arrive, whatever the patch holds."""


@dataclass(frozen=True, eq=False)
class ActivationMaps:
    """What the output of one patch of one block is made of, for B pictures and the K = 4 routes on a grid of H×W.

    y_q = Σ_k (Σ_j contributions[k, j] + skip[k]).

    Attributes:
        seen: the pictures.
        scan: of the block; `scan.grid` is H×W, `scan.label` names the block, `scan.route_names` the routes.
        cell: height and width of a patch in pixels of the pictures seen.
        queries: one a picture: row and column of the patch asked about.
        weights: (B, K, H, W, D), what plays the part of attention; 0 for patches that come after the query.
        visited: bool (B, K, H, W), the patches that come before the query on the route, and itself.
    """

    seen: Seen
    scan: Scan
    cell: tuple[float, float]
    queries: tuple[tuple[int, int], ...]
    weights: Tensor
    visited: Tensor

    @cached_property
    def contributions(self) -> Tensor:
        """(B, K, H, W, D): w(q, j) · u_j, what of each patch is in the query's output."""
        return self.weights * self.scan.on_grid(self.scan.u, 1)[:, None]

    @property
    def skip(self) -> Tensor:
        """(B, K, D): D · u_q, what the query adds to its own output past the states."""
        return torch.stack([self.scan.u[i, q] * self.scan.D for i, q in enumerate(self._flat)])

    @property
    def returned(self) -> Tensor:
        """(B, D): what the scan returned for the query."""
        return torch.stack([self.scan.y[i, q] for i, q in enumerate(self._flat)])

    @property
    def error(self) -> float:
        """Largest difference between the sum of all contributions and what was returned, over the largest of these."""
        total = self.contributions.sum((1, 2, 3)) + self.skip.sum(1)
        return float((total - self.returned).abs().max() / self.returned.abs().max().clamp(min=1e-30))

    @property
    def _flat(self) -> list[int]:
        return [row * self.scan.grid[1] + column for row, column in self.queries]

    def routes(self, measure: Measure = "size") -> Tensor:
        """(B, K, H, W): of each patch and route, one number; see `Measure`."""
        return self._measured(self.weights if measure == "weight" else self.contributions, measure)

    def merged(self, measure: Measure = "size") -> Tensor:
        """(B, H, W): the same of what all routes bring together."""
        return self._measured((self.weights if measure == "weight" else self.contributions).sum(1), measure)

    def _measured(self, values: Tensor, measure: Measure) -> Tensor:
        if measure == "weight":
            return values.abs().mean(-1)
        if measure == "size":
            return values.norm(dim=-1)
        if measure != "share":
            raise ValueError(f"measure is {measure!r}; expected 'size', 'share' or 'weight'")
        y = self.returned / self.returned.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return (values * y.view(-1, *[1] * (values.ndim - 2), y.shape[-1])).sum(-1)

    @property
    def skip_share(self) -> Tensor:
        """(B,): the share of the skips in the query's output; with those of all contributions it makes 1."""
        return (self.skip.sum(1) * self.returned).sum(-1) / self.returned.square().sum(-1).clamp(min=1e-30)

    def in_pixels(self, values: Tensor) -> Tensor:
        """Maps (..., H, W) in pixels of the pictures seen, each patch as the rectangle that it stands for."""
        return in_pixels(values, self.cell, self.seen.size)

    def frame(self, image: int = 0) -> tuple[float, float, float, float]:
        """Left, top, width and height of the query's patch in pixels of the picture seen."""
        row, column = self.queries[image]
        left, top = column * self.cell[1], row * self.cell[0]
        return left, top, min(self.cell[1], self.seen.size[1] - left), min(self.cell[0], self.seen.size[0] - top)

    def reach(self) -> Tensor:
        """(B, K): mean distance of what arrives, in pixels, weighted by its size."""
        sizes = self.routes()
        rows, columns = (torch.arange(n, device=sizes.device).to(sizes) for n in self.scan.grid)
        distances = torch.stack([
            torch.hypot((rows[:, None] - row) * self.cell[0], (columns - column) * self.cell[1])
            for row, column in self.queries
        ])  # fmt: skip
        return (sizes * distances[:, None]).sum((2, 3)) / sizes.sum((2, 3)).clamp(min=1e-30)

    def numbers(self, image: int = 0) -> dict[str, Any]:
        """The figures of one picture in plain values, for JSON."""
        shares = self.routes("share")[image].sum((1, 2))
        return {
            "block": self.scan.block,
            "grid": list(self.scan.grid),
            "patch": list(self.queries[image]),
            "frame": list(self.frame(image)),
            "routes": [
                {"name": name, "share": float(share), "reach": float(reach)}
                for name, share, reach in zip(self.scan.route_names, shares, self.reach()[image], strict=True)
            ],
            "skip_share": float(self.skip_share[image]),
            "error": self.error,
            "merged": self.merged()[image].tolist(),
        }

    def figure(self, image: int = 0, measure: Measure = "size") -> Figure:
        """The picture with the query, the merged map, and those of the routes; sizes as shares of the output's."""
        from vmamba.explain import figures as f

        routes, merged = self.routes(measure)[image], self.merged(measure)[image]
        if measure == "size":
            length = self.returned[image].norm().clamp(min=1e-30)
            routes, merged = routes / length, merged / length
        signed = measure == "share"
        norm = f.scale(f.array(torch.cat([routes, merged[None]])), signed=signed)
        routes = routes.masked_fill(~self.visited[image], float("nan"))
        row, column = self.queries[image]
        skip = float(self.skip_share[image])
        shares = self.routes("share")[image].sum((1, 2)).tolist()
        titles = [
            f"{name}\n{f.percent(share)} of the output"
            for name, share in zip(self.scan.route_names, shares, strict=True)
        ]
        above = "the patch asked about", "all routes together"
        label = {
            "size": "size of a patch's contribution, as a share of the output's",
            "share": "share of the output",
            "weight": "mean absolute weight",
        }[measure]
        figure, panels, (bar,) = f.picture_grid(
            2, 3, self.seen.size,
            f"What a patch is made of: {self.scan.label}, row {row + 1}, column {column + 1} of"
            f" {self.scan.grid[0]}×{self.scan.grid[1]}",
            f"The routes bring {f.percent(1 - skip)} of the patch's output, its own skip {f.percent(skip)}. Not yet"
            " visited: left grey. Axes in pixels.",
            titles=[*above, *titles], bars=[label],
        )  # fmt: skip
        colours = f.SIGNED if signed else f.HEAT
        picture = self.seen.pictures[image]
        f.show(panels[0, 0], picture, above[0])
        f.overlay(panels[1, 0], picture, f.array(self.in_pixels(merged)), norm, above[1], colours)
        for axes, values, title in zip(panels[:, 1:].flat, routes, titles, strict=True):
            f.overlay(axes, picture, f.array(self.in_pixels(values)), norm, title, colours)
        f.colour_bar(figure, bar, norm, colours, form=None if measure == "weight" else f.percent)
        for axes in panels.flat:
            f.mark(axes, *self.frame(image))
        return figure

    def save(self, path: str | os.PathLike[str], image: int = 0, measure: Measure = "size") -> None:
        """Write the figure."""
        from vmamba.explain import figures

        figures.write(self.figure(image, measure), path)


def activation_maps(
    model: nn.Module,
    pictures: AnyPictures,
    query: tuple[float, float] | None = None,
    block: int | str = -1,
    size: int | tuple[int, int] | None = None,
) -> ActivationMaps:
    """What the output of one patch is made of: how much every patch contributes to it, along each route, exactly.

    To ask more than once, `record_scans` looks at the pictures once, and its `maps` answers in milliseconds.

    Args:
        model: any network with SS2D in it.
        pictures, size: see `see`.
        query: the place asked about (x, y), in pixels of the pictures as they are given; None for the middle of what
            the model sees.
        block: the name of a block, or its number in the order of computation (negative ones count from the end).

    Raises:
        RecipeError: the query is outside a picture, there is no such block, or the model has no scans.
        ImageError: a file cannot be used.
    """
    recording = record_scans(model, pictures, size)
    seen = recording.seen
    if query is None or isinstance(pictures, Seen):
        return recording.maps(query, block)
    return recording.maps([seen.locate(*query, i) for i in range(len(seen))], block)


def maps_of(recording: Recording, block: int | str, queries: Sequence[tuple[int, int]]) -> ActivationMaps:
    """The maps of one patch of each picture, by row and column."""
    scan = recording.scan(block)
    flat = [row * scan.grid[1] + column for row, column in queries]
    weights = torch.stack([scan.weights(query, image) for image, query in enumerate(flat)])
    visited = torch.stack([scan.steps <= scan.steps[:, query, None] for query in flat])
    return ActivationMaps(
        recording.seen, scan, recording.cell(block), tuple(queries), scan.on_grid(weights, 2), scan.on_grid(visited, 2)
    )
