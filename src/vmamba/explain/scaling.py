"""What a model costs as images grow: counted, measured, and the power of the number of pixels that each cost follows.

Attention compares every pair of patches, so part of its cost grows with the square of the pixels; VMamba's scan visits
each patch once (section 4 of the paper). The exponents here say which of the two a model does.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from vmamba.data.sources import tracked
from vmamba.explain.memory import can_measure, peak_memory
from vmamba.explain.resolution import at_size, sizes_from
from vmamba.files import shown
from vmamba.models.complexity import profile
from vmamba.models.registry import ENTRIES, create_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vmamba.explain.run import Explanation

Source = str | nn.Module | Callable[[int], nn.Module]

# What the costs are called in figures, and what their numbers are divided by there.
COSTS = {
    "flops": ("multiply-accumulates, billions", 1e9),
    "params": ("parameters, millions", 1e6),
    "seconds": ("milliseconds", 1e-3),
    "memory": ("memory beside the weights, MB", 2**20),
}


@dataclass(frozen=True)
class Cost:
    """What one image of one size costs.

    Attributes:
        size: side of the square image, in pixels.
        flops: multiply-accumulates, counted by `vmamba.models.complexity.profile`.
        params: number of parameters.
        seconds: median time of a forward pass; None if it was not measured.
        memory: bytes that the forward pass needs beyond the weights; None if it was not measured.
    """

    size: int
    flops: int
    params: int
    seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Scaling:
    """The costs of one model, smallest image first.

    Attributes:
        name: of the model.
        costs: one for each size.
        exponents: of each cost, p in cost ∝ pixelsᵖ, fitted by least squares to the logarithms: 1 is linear.
        last_exponents: the same between the two largest sizes alone, where the fastest-growing part shows most.
    """

    name: str
    costs: tuple[Cost, ...]
    exponents: Mapping[str, float]
    last_exponents: Mapping[str, float]

    def numbers(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        costs = [vars(cost) for cost in self.costs]
        exponents = {"exponents": dict(self.exponents), "last_exponents": dict(self.last_exponents)}
        return {"name": self.name, "costs": costs, **exponents}


def scaling(
    models: Mapping[str, Source] | Iterable[str],
    sizes: Sequence[int] = (224, 384, 512, 768, 1024),
    rounds: int = 10,
    memory: bool = True,
    device: torch.device | str = "cpu",
) -> list[Scaling]:
    """Count and measure what models cost for square images of several sizes, one image at a time.

    At each size the models take turns, one forward pass each a round, after one that is not counted; a time is the
    median over the rounds, so a machine that slows down slows all models. Torch's present number of threads is used.

    Args:
        models: by the name to show, each a name for `vmamba.create_model` or `timm.create_model`, a model, or a
            function that makes a model for a size; or just names. Models with a fixed image size (ViT, Swin) are set
            to each size; those given are left as they are, for copies are measured.
        sizes: sides of the images, at least two.
        rounds: passes that are timed at each size; 0 to measure no time.
        memory: whether to measure peak memory; on the CPU that starts a process for each model and size.
        device: where to measure.

    Raises:
        ValueError: fewer than two sizes, no models, or no model of a name.
    """
    sizes = sorted(set(sizes))
    sources = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
    if len(sizes) < 2 or not sources:
        raise ValueError(
            f"scaling was given {len(sources)} models and the sizes {sizes}; expected a model and two sizes"
        )
    sources = {name: copy.deepcopy(each) if isinstance(each, nn.Module) else each for name, each in sources.items()}
    found: dict[str, list[Cost]] = {name: [] for name in sources}
    for size in tracked(sizes, "measuring"):
        ready = {name: build(source, size).to(device).eval() for name, source in sources.items()}
        images = {name: torch.randn(1, _channels(model), size, size, device=device) for name, model in ready.items()}
        seconds = _interleaved(ready, images, rounds) if rounds else {}
        for name, model in ready.items():
            counted = profile(model, size)
            peak = peak_memory(model, tuple(images[name].shape)) if memory else None
            found[name].append(Cost(size, counted.flops, counted.params, seconds.get(name), peak))
    return [
        Scaling(name, tuple(costs), fitted_exponents(costs), fitted_exponents(costs[-2:]))
        for name, costs in found.items()
    ]


def build(source: Source, size: int) -> nn.Module:
    """A model for square images of this size.

    Raises:
        ValueError: no model has that name.
    """
    if isinstance(source, nn.Module):
        return at_size(source, (size, size))
    if not isinstance(source, str):
        return source(size)
    if source in ENTRIES:
        return create_model(source, img_size=size)
    if not timm.is_model(source):
        raise ValueError(f"there is no model {source!r}, neither here nor in timm; `vmamba models` lists ours")
    return at_size(timm.create_model(source), (size, size))


def _channels(model: nn.Module) -> int:
    return getattr(model, "in_chans", None) or timm.models.get_model_input_config(model)["input_size"][0]


@torch.inference_mode()
def _interleaved(models: Mapping[str, nn.Module], images: Mapping[str, Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of a forward pass of each model."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(images[name])
            if images[name].is_cuda:
                torch.cuda.synchronize(images[name].device)
            if number:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def fitted_exponents(costs: Sequence[Cost]) -> dict[str, float]:
    """Of each cost known and above zero at every size, the slope of its logarithm against that of the pixels."""
    pixels = [2 * math.log(cost.size) for cost in costs]
    series = {name: [getattr(cost, name) for cost in costs] for name in COSTS}
    return {
        name: statistics.linear_regression(pixels, [math.log(value) for value in values]).slope
        for name, values in series.items()
        if all(values)
    }


def draw_scaling(found: Sequence[Scaling]) -> Figure:
    """Each cost that grows against the side of the image, both logarithmic, with the exponents in pixels."""
    from matplotlib.ticker import LogLocator

    from vmamba.explain.figures import COLOURS, bare, new_figure

    sizes = [cost.size for cost in found[0].costs]
    keys = [key for key in COSTS if key != "params" and any(key in each.exponents for each in found)]
    note = "in brackets: p in cost ∝ pixelsᵖ; 1 is linear in the number of pixels, 2 quadratic"
    figure = new_figure(4.4 * len(keys), 4.4, "Cost of an image against its size", note)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        label, unit = COSTS[key]
        bare(axes, label, "side of the image, pixels")
        for number, each in enumerate(found):
            if key in each.exponents:
                values = [getattr(cost, key) / unit for cost in each.costs]
                name = f"{each.name} ({each.exponents[key]:.2f})"
                axes.plot(sizes, values, color=COLOURS[number % len(COLOURS)], lw=2, marker="o", ms=4, label=name)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    return figure


def report(run: Explanation, photos: Sequence[str]) -> dict[str, Any]:
    """`vmamba explain --what scaling`: costs at one to four times the side that the model is meant for."""
    models = {shown(run.weights.source): run.model, **run.others}
    device = next(run.model.parameters()).device
    sizes = sizes_from(run.model, (1, 1.5, 2, 3, 4))
    found = scaling(models, sizes, rounds=5, memory=can_measure(device), device=device)
    return {"figure": run.write(draw_scaling(found), "scaling"), "models": [each.numbers() for each in found]}
