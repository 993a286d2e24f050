"""Class maps: which places of each stage spoke for a class, for the pixels of a mask, or for a found object.

Grad-CAM (Selvaraju et al., 2017): at each place, the channels weighted by their mean gradient, Σ_c mean(∂s/∂x_c) · x_c;
what is negative is left out. Gradient × activation: Σ_c ∂s/∂x_c · x_c, place by place, of either sign. Both by captum.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vmamba.errors import RecipeError, needing
from vmamba.explain.images import AnyPictures, Seen, evaluating, in_patches, see, token_grid
from vmamba.explain.resolution import seeing
from vmamba.models.detection import MaskRCNN
from vmamba.models.feature_maps import DenseModel
from vmamba.models.segmentation import UPerNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Score = Callable[[Tensor], Tensor]  # from images (B, C, H, W) to what is explained, (B,)


class NothingFoundError(RecipeError):
    """A detector finds no object at all in a picture."""


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """Which places of the stages spoke for what a model answered, for B pictures.

    Attributes:
        seen: the pictures.
        targets: one a picture: what is explained, in words.
        scores: (B,), the logit that is explained: of the class; its mean over the region; of the object's score.
        regions: bool (B, H, W) in pixels of the pictures seen: the pixels of the mask, or of the object's box; None for
            a class of the whole picture.
        stages: the stages looked at, from 1.
        grad_cam: one a stage: (B, h, w), 0 or more.
        gradient_activation: one a stage: (B, h, w), of either sign.
    """

    seen: Seen
    targets: tuple[str, ...]
    scores: Tensor
    regions: Tensor | None
    stages: tuple[int, ...]
    grad_cam: tuple[Tensor, ...]
    gradient_activation: tuple[Tensor, ...]

    @property
    def cells(self) -> tuple[tuple[float, float], ...]:
        """Of each stage the height and width of a patch in pixels of the pictures seen."""
        return tuple(self.seen.cell((cam.shape[1], cam.shape[2])) for cam in self.grad_cam)

    def inside(self, image: int = 0) -> list[float | None] | None:
        """Of each stage the share of Grad-CAM's map that lies in the region, None where nothing spoke for it.

        Without a region, None.
        """
        if self.regions is None:
            return None
        region = self.regions[image].float()
        shares: list[float | None] = []
        for cam, cell in zip(self.grad_cam, self.cells, strict=True):
            weight = in_patches(region, cell, (cam.shape[1], cam.shape[2]))
            total = float(cam[image].sum())
            shares.append(float((cam[image] * weight).sum()) / total if total else None)
        return shares

    def numbers(self, image: int = 0) -> dict[str, Any]:
        """The figures of one picture in plain values, for JSON."""
        about: dict[str, Any] = {"target": self.targets[image], "score": float(self.scores[image])}
        if self.regions is not None:
            about["region_share"] = float(self.regions[image].float().mean())
        inside = self.inside(image)
        about["stages"] = [
            {"stage": stage, "grad_cam": self.grad_cam[i][image].tolist()} | ({"inside": inside[i]} if inside else {})
            for i, stage in enumerate(self.stages)
        ]
        return about

    def figure(self, image: int = 0) -> Figure:
        """The picture, and for each stage both maps over it."""
        from vmamba.explain import figures as f

        picture, inside = self.seen.pictures[image], self.inside(image)
        region = None if self.regions is None else f.array(self.regions[image])
        first, second = f"logit {float(self.scores[image]):.2f};  Grad-CAM →", "gradient × activation →"
        titles = []
        for i, (stage, heat) in enumerate(zip(self.stages, self.grad_cam, strict=True)):
            titles.append(f"stage {stage}: {heat.shape[1]}×{heat.shape[2]}")
            if not heat[image].any():
                titles[-1] += "\nnothing spoke for it"
            elif inside and (share := inside[i]) is not None:
                titles[-1] += f", {f.percent(share)} inside"
        figure, panels, _ = f.picture_grid(
            2, len(self.stages) + 1, self.seen.size, f"What made this {self.targets[image]}",
            "Grad-CAM: what spoke for it. Gradient × activation: red for, blue against. Each map scaled to its own"
            f" largest value.{'' if region is None else ' Outlined: the pixels that are explained.'} Axes in pixels.",
            side=2.5, titles=[first, second, *titles],
        )  # fmt: skip
        f.show(panels[0, 0], picture, first)
        panels[1, 0].axis("off")
        panels[1, 0].text(1, 0.5, second, ha="right", va="center", fontsize=10, color=f.INK)
        for i, (title, cell) in enumerate(zip(titles, self.cells, strict=True)):
            cam, signed = f.array(self.grad_cam[i][image]), f.array(self.gradient_activation[i][image])
            f.overlay(panels[0, i + 1], picture, cam, f.scale(cam, power=1), title, cell=cell)
            f.overlay(panels[1, i + 1], picture, signed, f.scale(signed, signed=True), "", f.SIGNED, cell)
        if region is not None:
            for axes in [panels[0, 0], *panels[:, 1:].flat]:
                f.outline(axes, region)
        return figure

    def save(self, path: str | os.PathLike[str], image: int = 0) -> None:
        """Write the figure."""
        from vmamba.explain import figures

        figures.write(self.figure(image), path)


def class_maps(
    model: nn.Module,
    pictures: AnyPictures,
    target: int | None = None,
    place: tuple[float, float] | None = None,
    region: Tensor | NDArray[Any] | None = None,
    stages: Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
) -> ClassMaps:
    """What made this class, this mask, this object: which places of each stage spoke for it.

    Args:
        model: a classifier of ours or of timm, `UPerNet` or `MaskRCNN`.
        pictures, size: see `see`. A model for segmentation or detection is shown one.
        target: number of the class; by default the one that the model answers. Of a detector, number of the object,
            the one with the highest score being 0.
        place: instead: a place (x, y) in pixels of the picture given. For segmentation, the mask that hangs together
            there is explained; for detection, the object with the smallest box around it.
        region: for segmentation, (H, W) in pixels of the picture seen, True or not 0 for those whose class is
            explained; by default all that the model gives to that class.
        stages: numbers of the stages to look at, from 1; by default all.
        class_names: names of the classes; by default those that the model has.

    Raises:
        RecipeError: there is no such class, object or stage; the model has no stages or no classes, its tokens make no
            grid, or it does not take images of this size.
        NothingFoundError: a detector finds no object at all, and none was asked for.
        ImageError: a file cannot be used.
    """
    with needing("explain", "class maps need one more package"):
        from captum.attr import LayerGradCam, LayerGradientXActivation
    seen = see(model, pictures, size)
    names = class_names or getattr(model, "class_names", None) or ()
    at = None if place is None else place if isinstance(pictures, Seen) else seen.locate(*place)
    with (
        seeing(model, seen.size) as model, evaluating(model), torch.inference_mode(False), torch.enable_grad(),
        torch.compiler.set_stance("force_eager"), _tapped(model, seen.size) as taps,
    ):  # fmt: skip
        score, targets, regions = _goal(model, seen, target, at, region, names)
        count = len(model.backbone.channels) if isinstance(model, DenseModel) else len(taps)
        chosen = tuple(stages) if stages else tuple(range(1, count + 1))
        if unknown := [stage for stage in chosen if not 1 <= stage <= count]:
            raise RecipeError(f"there is no stage {unknown[0]}; this model has stages 1 to {count}")
        images = seen.images.detach().clone()  # of inference mode no gradient could be taken
        with torch.no_grad():
            scores = score(images).float().cpu()
        if any(isinstance(tap, _Tap) and not tap.was_called for tap in taps):
            raise RecipeError(f"{type(model).__name__} does not compute the stages that its feature_info names")
        layers = taps if len(taps) < count else [taps[stage - 1] for stage in chosen]
        cams = [LayerGradCam(score, layer).attribute(images, relu_attributions=True) for layer in layers]
        products = LayerGradientXActivation(score, layers).attribute(images)
    if len(taps) < count:  # one tap for all maps
        cams, products = ([found[0][stage - 1] for stage in chosen] for found in (cams, products))
    sums = [tuple(x.detach().sum(1).float().cpu() for x in found) for found in (cams, products)]
    return ClassMaps(seen, targets, scores, regions, chosen, *sums)


# --- what is explained -----------------------------------------------------------------------------------------------


def _goal(
    model: nn.Module, seen: Seen, target: int | None, at: Any, region: Any, names: Sequence[str]
) -> tuple[Score, tuple[str, ...], Tensor | None]:
    """The score that is explained, what it is in words, and the pixels that it is about."""
    if isinstance(model, DenseModel) and len(seen) > 1:
        raise RecipeError(f"{len(seen)} pictures were given; a model for {model.task} is shown one at a time")
    if isinstance(model, UPerNet):
        return _mask_goal(model, seen, target, at, region, names)
    if isinstance(model, MaskRCNN):
        return _object_goal(model, seen, target, at, names)
    with torch.no_grad():
        logits: Tensor = model(seen.images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or getattr(model, "num_classes", None) == 0:
        raise RecipeError(f"{type(model).__name__} has no classes, of which one could be explained")
    answers = logits.argmax(1) if target is None else torch.full_like(logits[:, 0], _known(target, logits.shape[1]))
    answers = answers.long()
    words = tuple(f"“{_name(int(i), names)}”" for i in answers)
    return lambda images: model(images).gather(1, answers[:, None])[:, 0], words, None


def _mask_goal(
    model: UPerNet, seen: Seen, target: int | None, at: Any, region: Any, names: Sequence[str]
) -> tuple[Score, tuple[str, ...], Tensor]:
    with torch.no_grad():
        labels = model(seen.images).argmax(1)
    there = None if at is None else int(labels[0, int(at[1]), int(at[0])])
    if region is not None:
        region = torch.as_tensor(region, device=labels.device).bool()
        if region.shape != labels.shape[1:]:
            raise RecipeError(f"the region is {tuple(region.shape)}; expected {tuple(labels.shape[1:])}, one a pixel")
        if not region.any():
            raise RecipeError("no pixel is in the region; expected one or more that are True")
    if target is None:
        chosen = labels if region is None else labels[:, region]
        target = int(chosen.flatten().bincount().argmax()) if there is None else there
    _known(target, model.num_classes)
    pixels = labels == target if region is None else region[None]
    if there is not None and region is None:
        if there != target:
            raise RecipeError(
                f"the pixel at ({at[0]:.0f}, {at[1]:.0f}) of what the model sees is “{_name(there, names)}”, not"
                f" “{_name(target, names)}”: give the place alone, or one where the model finds that class"
            )
        pixels = _connected(pixels, int(at[0]), int(at[1]))
    if not pixels.any():
        found = ", ".join(_name(int(i), names) for i in labels.unique())
        raise RecipeError(f"no pixel of the picture is “{_name(target, names)}”; the model finds: {found}")
    weight = pixels.float() / pixels.sum()

    def score(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        return (logits[:, target] * weight).sum((1, 2))

    return score, (f"mask of “{_name(target, names)}”",), pixels.cpu()


def _connected(pixels: Tensor, x: int, y: int) -> Tensor:
    """Of a mask, bool (1, H, W), the part that hangs together with one pixel, over corners too."""
    part, before = torch.zeros_like(pixels), 0
    part[0, y, x] = pixels[0, y, x]
    while before < (size := int(part.sum())):
        before = size
        part = (nn.functional.max_pool2d(part.float(), 3, 1, 1) > 0) & pixels
    return part


def _object_goal(
    model: MaskRCNN, seen: Seen, target: int | None, at: Any, names: Sequence[str]
) -> tuple[Score, tuple[str, ...], Tensor]:
    height, width = seen.drawn()

    def detections(images: Tensor) -> dict[str, Tensor]:  # as `vmamba predict` has them
        return model(images, sizes=[(height, width)])[0]

    with torch.no_grad():
        found = detections(seen.images)
    boxes = found["boxes"]
    if not len(boxes) and target is None and at is None:
        raise NothingFoundError(f"the model finds no object in {seen.names[0]}; expected a picture in which it does")
    if target is None and at is not None:
        point = boxes.new_tensor(at)
        holds = ((boxes[:, :2] <= point) & (point < boxes[:, 2:])).all(1).nonzero().flatten()
        areas = (boxes[holds, 2:] - boxes[holds, :2]).prod(1)
        target = int(holds[areas.argmin()]) if len(holds) else len(boxes)
    target = target or 0
    if not 0 <= target < len(boxes):
        where = f"at ({at[0]:.0f}, {at[1]:.0f})" if at is not None else f"number {target}"
        raise RecipeError(f"there is no object {where}; the model finds {len(boxes)} objects in the picture")
    box, label = boxes[target], int(found["labels"][target])
    rows, columns = (torch.arange(n, device=box.device) + 0.5 for n in seen.size)
    inside = ((rows >= box[1]) & (rows < box[3]))[:, None] & (columns >= box[0]) & (columns < box[2])
    region = inside
    if "masks" in found and found["masks"][target].any():
        region = torch.zeros_like(inside)
        region[:height, :width] = found["masks"][target]

    def score(images: Tensor) -> Tensor:
        probability = detections(images)["scores"][target]
        return torch.logit(probability.clamp(1e-6, 1 - 1e-6))[None]

    return score, (f"“{_name(label, names)}”, object {target}",), region[None].cpu()


def _known(target: int, classes: int) -> int:
    if not 0 <= target < classes:
        raise RecipeError(f"there is no class {target}; the model has classes 0 to {classes - 1}")
    return target


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"class {index}"


# --- where it is looked at -------------------------------------------------------------------------------------------


@contextmanager
def _tapped(model: nn.Module, size: tuple[int, int]) -> Iterator[list[nn.Module]]:
    """Modules that the outputs of the stages, as (B, C, H, W), pass through: what captum takes for layers.

    One for each stage, for images of this height and width; of a dense model one for all of them, through which they
    pass together.
    """
    source: Any = getattr(model, "_orig_mod", model)
    with ExitStack() as hooks:
        if isinstance(source, DenseModel):
            taps: list[nn.Module] = [_Together()]
            together = _here(lambda maps: list(taps[0](*maps)))
            hooks.callback(source.backbone.register_forward_hook(together).remove)
        else:
            entries = [entry for entry in getattr(source, "feature_info", None) or () if entry.get("module")]
            # After its last block a ViT reads the class's token alone: the patches had their say before.
            entries = entries[:-1] if getattr(source, "global_pool", None) == "token" else entries
            places = {entry["reduction"]: entry for entry in entries}
            coarse = {stride: entry for stride, entry in places.items() if stride >= 4} if len(places) > 4 else places
            named = dict(source.named_modules())
            if not coarse or any(entry["module"] not in named for entry in coarse.values()):
                raise RecipeError(
                    f"{type(model).__name__} does not say where its stages are; expected a model of ours, or one of"
                    " timm whose feature_info names modules that it has"
                )
            taps = [_Tap() for _ in coarse]
            for tap, (stride, entry) in zip(taps, coarse.items(), strict=True):
                grid = token_grid(source, size) or (-(-size[0] // stride), -(-size[1] // stride))
                through = _tapping(source, tap, entry.get("num_chs"), grid)
                hooks.callback(named[entry["module"]].register_forward_hook(through).remove)
        yield taps


class _Tap(nn.Module):
    """Passes on what a stage puts out."""

    was_called = False

    def forward(self, x: Tensor) -> Tensor:
        self.was_called = True
        return x


class _Together(nn.Module):
    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return maps


def _here(function: Callable[[Any], Any]) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that changes a module's output, of passes in this thread alone."""
    thread = threading.get_ident()
    return lambda _, __, output: function(output) if threading.get_ident() == thread else output


def _tapping(
    model: Any, tap: nn.Module, channels: int | None, grid: tuple[int, int]
) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that passes a stage's output through `tap`, whatever its layout. Pruning may leave fewer channels."""

    def through(x: Any) -> Tensor:
        ndim = x.ndim if isinstance(x, Tensor) else None
        if ndim == 4:
            is_last = x.shape[3] == channels != x.shape[1] or getattr(model, "output_fmt", "NCHW") == "NHWC"
            return tap(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_last else tap(x)
        if ndim == 3:  # tokens, behind those that are no patches
            first, most = x.shape[1] - grid[0] * grid[1], getattr(model, "num_prefix_tokens", 0)
            # Some networks append the class's token behind their blocks. Hiera keeps its tokens window by window.
            if first not in (0, most) or hasattr(model, "reroll"):
                raise RecipeError(
                    f"a stage of {type(model).__name__} puts out {x.shape[1]} tokens; expected those of {grid[0]} rows"
                    f" of {grid[1]} patches, row by row, behind {most} or none: take images of another size or another"
                    " model"
                )
            patches = tap(x[:, first:].transpose(1, 2).unflatten(2, grid))
            return torch.cat([x[:, :first], patches.flatten(2).transpose(1, 2)], 1)
        given = type(x).__name__ if ndim is None else f"tensor of shape {tuple(x.shape)}"
        raise RecipeError(
            f"a stage of {type(model).__name__} puts out a {given}; expected (B, C, H, W), (B, H, W, C) or tokens"
            " (B, L, C): take another model"
        )

    return _here(through)
