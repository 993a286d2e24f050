"""Stage maps: what the stages of a backbone put out, as pictures and as numbers that say what is in them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from vmamba.errors import RecipeError
from vmamba.explain.images import AnyPictures, Seen, evaluating, in_patches, in_pixels, name_of, see
from vmamba.explain.resolution import seeing
from vmamba.models.feature_maps import DenseModel
from vmamba.tasks.overlays import LUMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRONGEST = 3


@dataclass(frozen=True, eq=False)
class StageMaps:
    """What the stages of a model put out for B pictures.

    Attributes:
        name: of the model.
        seen: the pictures.
        maps: one a stage: (B, C, H, W), float32 on the CPU, finest first.
    """

    name: str
    seen: Seen
    maps: tuple[Tensor, ...]

    @property
    def cells(self) -> tuple[tuple[float, float], ...]:
        """Of each stage the height and width of a patch in pixels of the pictures seen."""
        return tuple(self.seen.cell((x.shape[2], x.shape[3])) for x in self.maps)

    def components(self, number: int = 3) -> list[Tensor]:
        """The first principal components of each stage's map, (B, number, H, W), over the patches of all pictures.

        Directions of the centred patches x in the space of channels along which they differ most: the eigenvectors of
        Σ x xᵀ with the largest eigenvalues. Each sign is chosen so that the component's largest weight is positive.
        NaN where a stage's map is not finite.
        """
        return [_components(x, number) for x in self.maps]

    def colours(self, image: int = 0) -> list[Tensor]:
        """The first three components of each stage's map of one picture as red, green and blue: (3, H, W), 0 to 1.

        0 and 1 are the 2nd and the 98th percentile of a component over the patches of all pictures.
        """
        found = []
        for x in self.components():
            low, high = (x.transpose(0, 1).flatten(1).quantile(q, dim=1).view(3, 1, 1) for q in (0.02, 0.98))
            found.append(((x[image] - low) / (high - low).clamp(min=1e-12)).clamp(0, 1))
        return found

    def energy(self) -> list[Tensor]:
        """(B, H, W) of each stage: the Euclidean length of each patch, less what is the same everywhere.

        That is |x - mean of x over the picture|: of a patch that is like all others, nothing is left.
        """
        return [(x - x.mean((2, 3), keepdim=True)).norm(dim=1) for x in self.maps]

    def strongest(self, number: int = _STRONGEST) -> list[Tensor]:
        """Of each stage the channels that vary most over the pictures: int64 (number,), the strongest first."""
        return [x.transpose(0, 1).flatten(1).var(1).topk(min(number, x.shape[1])).indices for x in self.maps]

    def edges(self) -> Tensor:
        """How much each stage's map follows the edges of the pictures: (B, stages), from -1 to 1.

        The correlation over the patches between two lengths: that of the map's gradient, |∇x| over all channels, and
        that of the picture's, |∇ grey|, whose squares were averaged over each patch's pixels before. Gradients are
        differences between neighbours, (x[i+1] - x[i-1]) / 2.
        """
        pictures = torch.as_tensor(self.seen.pictures).float().permute(0, 3, 1, 2) / 255
        grey = (pictures * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        steep = _slope(grey).square()
        rows = []
        for x, cell in zip(self.maps, self.cells, strict=True):
            at_stage = in_patches(steep, cell, (x.shape[2], x.shape[3])).sqrt()
            rows.append(_correlation(_slope(x).flatten(1), at_stage.flatten(1)))
        return torch.stack(rows, 1)

    def numbers(self, image: int = 0) -> list[dict[str, Any]]:
        """The figures of one picture in plain values, for JSON, one dictionary a stage."""
        edges, strongest, cells = self.edges()[image].tolist(), self.strongest(), self.cells
        return [
            {"stage": i, "shape": list(x.shape[1:]), "stride": round(cells[i - 1][0]),
             "edges": edges[i - 1], "strongest_channels": strongest[i - 1].tolist()}
            for i, x in enumerate(self.maps, start=1)
        ]  # fmt: skip

    def figure(self, image: int = 0, channels: Sequence[int] | None = None) -> Figure:
        """For each stage, a column: principal components in colour, energy, and single channels.

        Args:
            image: which of the pictures.
            channels: the channels to show; by default, of each stage, those that vary most.
        """
        from vmamba.explain import figures as f

        colours, energy, strongest, edges = self.colours(image), self.energy(), self.strongest(), self.edges()
        kinds = 2 + (len(channels) if channels is not None else _STRONGEST)
        size, stages = self.seen.size, len(self.maps)
        first = "picture; components →"
        rows = ["energy", *["chosen channel" if channels else "a channel that varies much"] * (kinds - 2)]
        titles = [f"stage {i}: {x.shape[2]}×{x.shape[3]}, {x.shape[1]} channels" for i, x in enumerate(self.maps, 1)]
        figure, panels, _ = f.picture_grid(
            kinds, stages + 1, size, f"What the stages of {self.name} put out",
            "Components: the three directions in which patches differ most, as red, green and blue. Energy: how far a"
            " patch is from the picture's mean. Edges: correlation with the picture's gradient. Axes in pixels.",
            side=2.1, titles=[first, *rows, *titles],
        )  # fmt: skip
        for axes, label in zip(panels[1:, 0], rows, strict=True):
            axes.axis("off")
            axes.text(1, 0.5, label, ha="right", va="center", transform=axes.transAxes, fontsize=10, color=f.INK)
        f.show(panels[0, 0], self.seen.pictures[image], first)
        for i, (x, cell) in enumerate(zip(self.maps, self.cells, strict=True)):
            spread = functools.partial(in_pixels, cell=cell, size=size)
            column = panels[:, i + 1]
            f.show(column[0], f.array(spread(colours[i]).movedim(0, 2)), titles[i])
            f.show(column[1], f.array(spread(energy[i][image])), f"follows edges: {edges[image, i]:.2f}", cmap=f.HEAT)
            chosen = list(channels) if channels is not None else strongest[i].tolist()
            for axes, channel in zip(column[2:], chosen, strict=False):
                if channel >= x.shape[1]:
                    continue
                values = f.array(spread(x[image, channel]))
                f.show(axes, values, f"channel {channel}", norm=f.scale(values, signed=True), cmap=f.SIGNED)
            for axes in column:
                axes.axis("on" if axes.images else "off")
        return figure

    def save(self, path: str | os.PathLike[str], image: int = 0, channels: Sequence[int] | None = None) -> None:
        """Write the figure."""
        from vmamba.explain import figures

        figures.write(self.figure(image, channels), path)


def stage_maps(
    model: nn.Module, pictures: AnyPictures, size: int | tuple[int, int] | None = None, name: str | None = None
) -> StageMaps:
    """What the stages of a model put out: pictures, and numbers that tell detail from meaning.

    Args:
        model: one of ours, for any task; or any of timm that gives features (`forward_intermediates`, `features_only`).
        pictures, size: see `see`.
        name: what to call it; by default the variant, or the class.

    Raises:
        RecipeError: the model gives no maps of stages, or does not take images of this size.
        ImageError: a file cannot be used.
    """
    seen = see(model, pictures, size)
    with seeing(model, seen.size) as sized:
        maps = tuple(x.float().cpu() for x in stage_outputs(sized, seen.images))
    return StageMaps(name or name_of(model), seen, maps)


def stage_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs of the stages for normalised images (B, C, H, W): (B, C', H', W') each, finest first, without gradients.

    Of those that have the same stride, the last: a ViT's blocks give one map, and a ResNet's stem none of its own.

    Raises:
        RecipeError: the model gives none.
    """
    source: Any = model.backbone if isinstance(model, DenseModel) else getattr(model, "_orig_mod", model)
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if isinstance(model, DenseModel):
            return [x.contiguous() for x in source(images)]
        if hasattr(source, "forward_intermediates"):
            maps = source.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        elif isinstance(getattr(source, "feature_info", None), FeatureInfo):  # made with features_only=True
            maps = source(images)
            if getattr(source, "output_fmt", "NCHW") == "NHWC":
                maps = [x.permute(0, 3, 1, 2) for x in maps]
        else:
            raise RecipeError(
                f"{type(model).__name__} gives no maps of its stages; expected a model of ours, or one of timm with"
                " forward_intermediates or made with features_only=True"
            )
    by_size = {tuple(x.shape[2:]): x for x in maps}
    sizes = sorted(by_size, key=lambda size: -size[0] * size[1])
    finest_stride = images.shape[2] / sizes[0][0]
    if len(sizes) > 4 and finest_stride < 3:  # a stem before four stages
        sizes = sizes[1:]
    return [by_size[size].contiguous() for size in sizes]


def _components(x: Tensor, number: int) -> Tensor:
    if not x.isfinite().all():  # of which the eigenvectors cannot be computed
        return x.new_full((len(x), number, *x.shape[2:]), torch.nan)
    rows = x.movedim(1, 3).flatten(0, 2).double()
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # eigenvalues rise
    chosen = vectors.flip(1)[:, : min(number, x.shape[1])]
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    projected = (rows @ (chosen * largest.sign())).float()
    projected = F.pad(projected, (0, number - projected.shape[1]))
    return projected.unflatten(0, (x.shape[0], *x.shape[2:])).movedim(3, 1)


def _slope(x: Tensor) -> Tensor:
    """Length of the gradient of maps (B, C, H, W), over both directions and all channels: (B, H, W)."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    return (down.square() + across.square()).sum(1).sqrt()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's of each row of (B, n); 0 where one is constant."""
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
