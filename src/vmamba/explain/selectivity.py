"""What "selective" means, made visible: the step that each patch chooses, and how long the states remember it."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vmamba.errors import RecipeError
from vmamba.explain.config import FORGOTTEN
from vmamba.explain.images import AnyPictures, Seen, in_pixels
from vmamba.explain.scans import Recording, Scan, record_scans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK = 2**22  # states times patches that are looked at together


@dataclass(frozen=True, eq=False)
class Selectivity:
    """Of B pictures, in one block, for each patch of the grid of H×W on each of the K = 4 routes.

    After a patch j the state [d, n] is multiplied by exp(Δ_i[d] · A[d, n]) at every further patch i. The patch is
    forgotten where the product of these has fallen to a share of 1: Σ_i Δ_i[d] ≥ ln(1 / share) / |A[d, n]|.

    Attributes:
        seen: the pictures.
        scan: of the block.
        cell: height and width of a patch in pixels of the pictures seen.
        share: what counts as forgotten.
        delta: (B, K, H, W), the step Δ, mean of the channels: large where a patch overwrites the states.
        decay: (B, K, H, W), exp(ΔA), mean of channels and states: what is left of the states past the patch.
        steps: (B, K, H, W), after how many steps half of the states have forgotten the patch; infinite where more than
            half still remember it at the end of the route.
        pixels: (B, K, H, W), how far from the patch the route is by then, in pixels; infinite likewise.
        kept: (B, K, H, W), the share of the states that still remember the patch at the end of the route.
    """

    seen: Seen
    scan: Scan
    cell: tuple[float, float]
    share: float
    delta: Tensor
    decay: Tensor
    steps: Tensor
    pixels: Tensor
    kept: Tensor

    def numbers(self, image: int = 0) -> dict[str, Any]:
        """The figures of one picture in plain values, for JSON: medians over the patches; None for an infinite one."""
        routes = []
        for k, name in enumerate(self.scan.route_names):
            middle = {
                key: float(getattr(self, key)[image, k].median()) for key in ("delta", "decay", "steps", "pixels")
            }
            middle["kept"] = float(self.kept[image, k].mean())
            routes.append({"name": name} | {k: v if math.isfinite(v) else None for k, v in middle.items()})
        return {"block": self.scan.block, "share": self.share, "grid": list(self.scan.grid), "routes": routes}

    def figure(self, image: int = 0) -> Figure:
        """For each route, a column: Δ, the decay, and how long each patch is remembered."""
        from vmamba.explain import figures as f

        rows = (
            ("step Δ", self.delta[image], f.HEAT),
            ("kept at each step, exp(ΔA)", self.decay[image], "viridis"),
            ("remembered for, steps", self.steps[image], "YlGnBu"),
        )
        names = self.scan.route_names
        figure, grid, bars = f.picture_grid(
            len(rows), len(names), self.seen.size, f"What each patch does to the states: {self.scan.label}",
            f"Means over channels and states; remembered until half of the states are down to {self.share:.0%}."
            " Grey: to the end of the route. Axes in pixels.",
            side=2.4, titles=names, bars=[label for label, _, _ in rows],
        )  # fmt: skip
        for row, (label, values, colours) in enumerate(rows):
            panels = f.array(in_pixels(values, self.cell, self.seen.size))
            finite = panels[panels < math.inf]
            low = float(finite.min()) if row and len(finite) else 0.0
            norm = f.scale(finite, power=1, low=low)
            for k, name in enumerate(names):
                f.show(grid[row, k], panels[k], name if row == 0 else "", norm=norm, cmap=f.ended(colours))
            f.colour_bar(figure, bars[row], norm if len(finite) else None, colours, whole=label.endswith("steps"))
        return figure

    def save(self, path: str | os.PathLike[str], image: int = 0) -> None:
        """Write the figure."""
        from vmamba.explain import figures

        figures.write(self.figure(image), path)


def selectivity(
    model: nn.Module,
    pictures: AnyPictures,
    block: int | str = -1,
    share: float = FORGOTTEN,
    size: int | tuple[int, int] | None = None,
) -> Selectivity:
    """How large a step each patch chooses, what that leaves of the states, and how long each patch is remembered.

    Args:
        model, pictures, block, size: see `activation_maps`.
        share: what counts as forgotten, between 0 and 1: 1/e, the usual time constant, unless told otherwise.

    Raises:
        RecipeError: the share is not between 0 and 1, there is no such block, or the model has no scans.
        ImageError: a file cannot be used.
    """
    return selectivity_of(record_scans(model, pictures, size), block, share)


def selectivity_of(recording: Recording, block: int | str, share: float) -> Selectivity:
    """The same of a recording."""
    if not 0 < share < 1:
        raise RecipeError(f"the share that counts as forgotten is {share}; expected one between 0 and 1, such as 0.37")
    scan, cell = recording.scan(block), recording.cell(block)
    decays = (torch.exp(scan.delta * A).mean(-1) for A in scan.A.permute(2, 0, 1)[:, :, None])
    decay = functools.reduce(torch.add, decays) / scan.A.shape[-1]
    found = [[_memory(scan, cell, share, image, k) for k in range(len(scan.orders))] for image in range(len(scan.y))]
    steps, pixels, kept = (torch.stack([torch.stack([r[i] for r in routes]) for routes in found]) for i in range(3))
    values = (scan.on_grid(each, 2) for each in (scan.delta.mean(-1), decay, steps, pixels, kept))
    return Selectivity(recording.seen, scan, cell, share, *values)


def _memory(scan: Scan, cell: tuple[float, float], share: float, image: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each patch (L,) on one route: steps, pixels, and the share of the states that remember it to the end."""
    order, (_, width), (length, states) = scan.orders[k], scan.grid, (len(scan.orders[k]), scan.A[k].numel())
    # In float64, and per channel: how much Δ has been added up on arrival at each step.
    passed = scan.delta[image, k, order].double().cumsum(0).T.contiguous()  # (D, L)
    enough = -math.log(share) / (-scan.A[k].double()).clamp(min=0)  # (D, N); infinite where a state does not decay
    steps, pixels, kept = (scan.delta.new_empty(length) for _ in range(3))
    stretch = max(1, _CHUNK // states)
    for first in range(0, length, stretch):
        here = torch.arange(first, min(first + stretch, length), device=order.device)
        wanted = passed[:, None, here] + enough[:, :, None]  # (D, N, l)
        at = torch.searchsorted(passed, wanted.flatten(1)).view(states, -1)
        middle = at.median(0).values
        is_forgotten = middle < length
        then = order[middle.clamp(max=length - 1)]
        down, across = (then // width - order[here] // width) * cell[0], (then % width - order[here] % width) * cell[1]
        steps[order[here]] = torch.where(is_forgotten, middle - here, math.inf).to(steps)
        pixels[order[here]] = torch.where(is_forgotten, torch.hypot(down.double(), across.double()), math.inf).to(steps)
        kept[order[here]] = (at == length).double().mean(0).to(steps)
    return steps, pixels, kept
