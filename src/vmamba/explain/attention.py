"""The whole matrix of who hears whom, for small grids: SS2D's, which it never writes down, beside a ViT's attention."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vmamba.errors import RecipeError
from vmamba.explain.images import AnyPictures, Seen, evaluating, in_pixels, see, token_grid
from vmamba.explain.resolution import seeing
from vmamba.explain.scans import Recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PATCHES = 1024  # of a grid, for a matrix of its square
_MOST_INCHES = 4.0  # of a picture's height in a figure


@dataclass(frozen=True, eq=False)
class AttentionMatrix:
    """How much each patch of a grid gets from each, L = H·W patches counted row by row.

    Attributes:
        name: what to call it.
        seen: one picture.
        grid: H and W.
        cell: height and width of a patch in pixels.
        values: (L, L), from 0: row q holds what arrives in q, from everywhere. Of SS2D the size of the contribution,
            Euclidean, of all routes together; of a ViT the mean of its heads' attention, between patches alone.
        routes: of SS2D, (K, L, L), the same along each route.
        route_names: names of these.
    """

    name: str
    seen: Seen
    grid: tuple[int, int]
    cell: tuple[float, float]
    values: Tensor
    routes: Tensor | None = None
    route_names: tuple[str, ...] = ()

    def row(self, query: tuple[float, float]) -> Tensor:
        """(H, W): what arrives in the patch at a place (x, y), in pixels of the picture seen."""
        rows, columns = (
            max(min(int(at / side), n - 1), 0)
            for at, side, n in zip(reversed(query), self.cell, self.grid, strict=True)
        )
        return self.values[rows * self.grid[1] + columns].unflatten(0, self.grid)

    def parts(self) -> list[AttentionMatrix]:
        """Of SS2D the matrices of the single routes, each zero for what comes later on its route; else none."""
        return [] if self.routes is None else [
            replace(self, name=name, values=values, routes=None)
            for name, values in zip(self.route_names, self.routes, strict=True)
        ]  # fmt: skip

    def figure(self, *others: AttentionMatrix, query: tuple[float, float] | None = None) -> Figure:
        """The matrix, its routes' and others beside it; below each the row of one query, over the picture.

        Args:
            *others: of the same picture; a ViT's, for instance.
            query: a place (x, y) in pixels of the picture seen; None for the middle.
        """
        from vmamba.explain import figures as f

        every = [self, *self.parts(), *others]
        height, width = self.seen.size
        below = min(2.6 * height / width, _MOST_INCHES)
        at = self.seen.given(*((width / 2, height / 2) if query is None else query))
        figure = f.new_figure(
            2.6 * len(every) + 0.3, 3.4 + below, "Who hears whom",
            "Above: each row a listening patch, each column one that is heard, counted row by row. Below: the row of"
            " the framed patch, over the picture. Each scaled to its own largest value, small ones lifted.",
        )  # fmt: skip
        panels = figure.subplots(2, len(every), squeeze=False, height_ratios=(2.6, below + 0.2))
        for column, each in enumerate(every):
            place = each.seen.seen_at(*at)
            norm = f.scale(f.array(each.values), power=1 / 3)
            f.show(panels[0, column], f.array(each.values), each.name, norm=norm, cmap=f.HEAT)
            over = f.array(in_pixels(each.row(place), each.cell, each.seen.size))
            f.overlay(panels[1, column], each.seen.pictures[0], over, f.scale(over, power=1 / 3))
            left, top = (int(at / side) * side for at, side in zip(place, reversed(each.cell), strict=True))
            f.mark(panels[1, column], left, top, each.cell[1], each.cell[0])
        return figure

    def save(self, path: str | os.PathLike[str], *others: AttentionMatrix, query: Any = None) -> None:
        """Write the figure."""
        from vmamba.explain import figures

        figures.write(self.figure(*others, query=query), path)


def matrix_of(recording: Recording, block: int | str, image: int = 0) -> AttentionMatrix:
    """The matrix of SS2D in one block: all `Scan.weights` times u, query by query.

    Raises:
        RecipeError: the grid has more than `MOST_PATCHES` patches.
    """
    scan = recording.scan(block)
    length = len(scan.orders[0])
    if length > MOST_PATCHES:
        raise RecipeError(
            f"the grid of {scan.label} has {length} patches, whose matrix has {length**2:,} entries; expected at most"
            f" {MOST_PATCHES} patches: ask for a later block or a smaller size, or for the maps of one query"
        )
    merged, routes = [], []
    for query in range(length):
        contributions = scan.weights(query, image) * scan.u[image]
        routes.append(contributions.norm(dim=-1))
        merged.append(contributions.sum(0).norm(dim=-1))
    return AttentionMatrix(
        f"SS2D, {scan.label}", recording.seen.one(image), scan.grid, recording.cell(block), torch.stack(merged),
        torch.stack(routes, 1), scan.route_names,
    )  # fmt: skip


def vit_attention(
    model: nn.Module, pictures: AnyPictures, block: int = -1, size: int | tuple[int, int] | None = None
) -> AttentionMatrix:
    """The attention of one block of a ViT of timm, mean of its heads, between the patches of one picture.

    Args:
        model: a vision transformer of timm, or another whose blocks have an `attn` with the attribute `fused_attn`.
        pictures: the picture; of several, the first.
        block: its number (negative ones count from the end).
        size: see `see`.

    Raises:
        RecipeError: the model has no such attention, no such block, or does not take images of this size.
        ImageError: the file cannot be used.
    """
    seen = see(model, pictures, size).one(0)
    matrices: list[Tensor] = []
    with seeing(model, seen.size) as model, evaluating(model), torch.no_grad(), ExitStack() as undo:
        fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
        for module in fused:  # the fused kernels keep no matrix
            setattr(module, "fused_attn", False)  # noqa: B010
            undo.callback(setattr, module, "fused_attn", True)
        for name, module in model.named_modules():
            if name.endswith(".attn_drop"):
                undo.callback(module.register_forward_hook(lambda _, __, y: matrices.append(y)).remove)
        model(seen.images)
    grid = token_grid(model, seen.size)
    height, width = grid or (0, 0)
    found = matrices[block] if -len(matrices) <= block < len(matrices) else torch.empty(0, 1)
    # Attention in windows has fewer rows than there are patches, that of a class's token alone has one.
    if grid is None or not height * width <= found.shape[-2] == found.shape[-1]:
        raise RecipeError(
            f"{type(model).__name__} has {len(matrices)} blocks of attention, of which number {block} was asked for;"
            " expected one that compares all patches of the picture, in a vision transformer such as timm's"
            " deit_tiny_patch16_224"
        )
    values = found.mean(1)[0, -height * width :, -height * width :]  # without the tokens for classes
    number = range(len(matrices))[block] + 1
    cell = (seen.size[0] / height, seen.size[1] / width)
    return AttentionMatrix(f"{type(model).__name__}, block {number}", seen, (height, width), cell, values)
