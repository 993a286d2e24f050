"""What a model costs: parameters, multiply-accumulates and shapes, stage by stage, without running it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba.ops import use_backend


@dataclass(frozen=True)
class Part:
    """One part of a model: of a VMamba the stem, a stage, or norm and head.

    Attributes:
        name: the attribute of the model.
        output_shape: shape of its output for one image; of a VMamba (H, W, C) of a grid, or (classes,).
        params: number of parameters.
        flops: multiply-accumulates.
    """

    name: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


@dataclass(frozen=True)
class Profile:
    """What `profile` found.

    Attributes:
        img_size: height and width of the image.
        params: number of parameters.
        flops: multiply-accumulates for one image.
        parts: the same, part by part.
    """

    img_size: tuple[int, int]
    params: int
    flops: int
    parts: tuple[Part, ...]


def profile(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Profile:
    """Count parameters and multiply-accumulates of a model for one image.

    Counted are matrix products, convolutions and scans; norms, activations and pooling are not. A "FLOP" is one
    multiply-accumulate, as in the tables of VMamba, Swin and ConvNeXt. Nothing is computed, so any size is free.

    Args:
        model: a VMamba or another of timm's; it is not changed.
        img_size: height and width, or the model's own.
    """
    config: dict[str, Any] = get_model_input_config(model)
    channels, *size = config["input_size"]
    wanted: Any = getattr(model, "img_size", size) if img_size is None else img_size
    height, width = to_2tuple(wanted)
    parts = [
        (f"{name}.{inner}" if inner else name, part)
        for name, child in model.named_children()
        for inner, part in (child.named_children() if _is_folder(child) else [("", child)])
        if next(part.parameters(), None) is not None or part is getattr(model, "head", None)
    ]

    ghost = copy.deepcopy(model).to("meta").eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            shapes[name] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

        return hook

    for name, _ in parts:
        ghost.get_submodule(name).register_forward_hook(note(name))
    # What has no fixed shape, such as a choice among boxes, costs next to nothing: the network says what to count.
    ghost.forward = getattr(ghost, "forward_fixed", ghost.forward)
    counter = FlopCounterMode(display=False, depth=2)
    with counter, torch.no_grad(), use_backend("eager"):
        ghost(torch.empty(1, channels, height, width, device="meta"))
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(model).__name__

    return Profile(
        img_size=(height, width),
        params=_params(model),
        flops=counts["Global"],
        parts=tuple(Part(n, shapes.get(n, ()), _params(part), counts.get(f"{root}.{n}", 0)) for n, part in parts),
    )


def _is_folder(module: nn.Module) -> bool:
    """Whether a module is but the list of its children."""
    return isinstance(module, nn.Sequential) or type(module).forward is nn.Module.forward


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# What `profile` says of the models without published numbers, at the size of each: parameters, and multiply-accumulates
# in units of 1e9. Listing all models would take ten seconds if they were counted each time.
COUNTED: dict[str, tuple[int, float]] = {
    "vmamba_nano": (7_019_176, 1.09),
    "vmamba_pico_s2": (3_424_808, 0.2329),
    "vmamba_femto_s2": (1_034_920, 0.03467),
    "vmamba_femto": (869_512, 0.01389),
    "vmamba_pico_local": (2_838_576, 0.04122),
    "vmamba_femto_local": (870_280, 0.02311),
    "upernet_vmamba_small_s1l20": (80_666_348, 1024),
    "upernet_vmamba_base_s1l20": (120_125_996, 1165),
    "upernet_vmamba_nano": (35_885_708, 863.5),
    "upernet_vmamba_pico_s2": (31_567_372, 3420),
    "upernet_vmamba_femto_s2": (23_774_988, 2863),
    "upernet_vmamba_femto": (18_593_100, 652.8),
    "upernet_vmamba_pico_local": (30_640_372, 849.6),
    "upernet_vmamba_femto_local": (23_149_964, 2847),
    "upernet": (61_902_572, 947.3),
    "maskrcnn_vmamba_small_s1l20": (68_519_088, 345.8),
    "maskrcnn_vmamba_base_s1l20": (105_988_080, 481.4),
    "maskrcnn_vmamba_nano": (26_724_432, 191.7),
    "maskrcnn_vmamba_pico_s2": (23_225_296, 534.2),
    "maskrcnn_vmamba_femto_s2": (20_243_152, 507.3),
    "maskrcnn_vmamba_femto": (19_490_576, 180.8),
    "maskrcnn_vmamba_pico_local": (22_628_024, 179.3),
    "maskrcnn_vmamba_femto_local": (20_113_744, 498.2),
    "maskrcnn": (49_755_312, 270.5),
}
