"""Draws the pictures of the documentation, by their names, or all of them.

    python docs/draw.py routes stages

Those of a trained model want what `make demo-dense` leaves: its pictures, runs/garments, and the model that it trained
on them, runs/garments_segmentation; those beside other trained networks, what `python benchmarks/learning.py --cifar10
PATH --keep runs/cifar10` leaves, and the same PATH. The costs drawn are those that benchmarks/cpu.py found and counts
made now.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import nn

import vmamba
from vmamba.data.config import DataConfig
from vmamba.data.sources import open_split
from vmamba.explain import (
    Cost,
    Scaling,
    accuracy_by_size,
    depth,
    draw_accuracy_by_size,
    draw_receptive_fields,
    draw_scaling,
    receptive_field,
    record_scans,
    scaling,
    stage_maps,
)
from vmamba.explain.figures import Figure
from vmamba.explain.receptive_field import untrained
from vmamba.explain.scaling import fitted_exponents
from vmamba.ops import cross_scan

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
FAMILIES = {
    "VMamba-T": "vmamba_tiny_s1l8", "Swin-T": "swin_tiny_patch4_window7_224", "ConvNeXt-T": "convnext_tiny",
    "DeiT-S": "deit_small_patch16_224", "ResNet-50": "resnet50",
}  # fmt: skip
PEERS = ("VMamba", "Swin", "ConvNeXt", "ViT", "ResNet")
ROUTES = {"rows": "#0072B2", "columns": "#D55E00", "rows, backwards": "#009E73", "columns, backwards": "#CC79A7"}
QUERY = (158, 190)


def save(figure: Figure, name: str, dpi: int = 100) -> None:
    """Write a figure as a PNG; in 256 colours where it would be too large for a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    picture = Image.open(buffer).convert("RGB")
    picture.save(IMAGES / f"{name}.png", optimize=True)
    if (IMAGES / f"{name}.png").stat().st_size > 190_000:
        picture.quantize(256).save(IMAGES / f"{name}.png", optimize=True)


def routes(options: argparse.Namespace) -> None:
    """The four routes as they are walked: what the state has met is lit, the patch that it is at is framed."""
    grid, cell, gap = 7, 19, 12
    boot = Image.open(ROOT / "examples/images/ankle_boot.png").convert("L")
    boot = ImageOps.invert(boot).resize((grid * cell, grid * cell), Image.Resampling.NEAREST)
    orders = cross_scan(torch.arange(grid * grid).view(1, 1, grid, grid))[0, :, 0].tolist()
    width = 4 * grid * cell + 5 * gap
    frames = []
    for step in range(grid * grid):
        frame = Image.new("RGB", (width, grid * cell + 2 * gap + 16), "white")
        pen = ImageDraw.Draw(frame)
        for k, (order, (title, colour)) in enumerate(zip(orders, ROUTES.items(), strict=True)):
            left, top = gap + k * (grid * cell + gap), gap + 16
            pen.text((left, 8), title, fill=colour, font_size=13)
            frame.paste(ImageOps.colorize(boot, "#cfd4d8", "#f3f4f5"), (left, top))
            lit = ImageOps.colorize(boot, tuple(value // 3 for value in ImageColor.getrgb(colour)), colour)
            for age, patch in enumerate(reversed(order[: step + 1])):
                y, x = divmod(patch, grid)
                box = (x * cell, y * cell, (x + 1) * cell, (y + 1) * cell)
                seen, plain = lit.crop(box), frame.crop(tuple(np.add(box, (left, top, left, top))))
                frame.paste(Image.blend(plain, seen, max(0.4, 1 - 0.2 * age)), (left + box[0], top + box[1]))
            y, x = divmod(order[step], grid)
            pen.rectangle((left + x * cell, top + y * cell, left + (x + 1) * cell - 1, top + (y + 1) * cell - 1),
                          outline="#111111", width=2)  # fmt: skip
        frames.append(frame)
    some = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[::6]]))
    palette = some.quantize(128, method=Image.Quantize.FASTOCTREE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in [*frames, *[frames[-1]] * 12]]
    frames[0].save(IMAGES / "routes.gif", save_all=True, append_images=frames[1:], duration=110, loop=0, optimize=True)


def stages(options: argparse.Namespace) -> None:
    """What the four stages make of a picture."""
    save(stage_maps(options.model, options.photo).figure(), "stages", 72)


def activation(options: argparse.Namespace) -> None:
    """What one patch is made of, along each route."""
    recording = record_scans(options.model, options.photo)
    save(recording.maps(recording.seen.locate(*QUERY), options.block).figure(), "activation", 72)


def memory(options: argparse.Namespace) -> None:
    """How long each patch is remembered."""
    save(record_scans(options.model, options.photo).selectivity(options.block).figure(), "memory", 80)


def cifar(options: argparse.Namespace, *names: str) -> dict[str, nn.Module]:
    """Networks that benchmarks/learning.py trained and kept."""
    from vmamba.models.registry import load_model

    return {name: load_model(options.trained / f"{name}.safetensors")[0] for name in names or PEERS}


def tested(options: argparse.Namespace, count: int) -> list[tuple[Image.Image, int]]:
    """Pictures of CIFAR-10's test set and their classes, at even distances."""
    if options.cifar10 is None:
        raise SystemExit("this picture is drawn from CIFAR-10: name its folder with --cifar10")
    split = open_split(DataConfig(root=options.cifar10), training=False)
    return [split.read(round(i * len(split) / count), 3) for i in range(count)]


def meaning(options: argparse.Namespace) -> None:
    """Edges and meaning against depth: trained networks of three families, and ours before."""
    models = cifar(options, "VMamba", "ResNet", "Swin")
    found = depth.depth_profiles(
        {**models, "VMamba, as drawn": untrained(models["VMamba"])}, tested(options, 1000), size=64
    )
    for profile in found:
        print(json.dumps(vars(profile)))
    save(depth.draw_depth(found), "depth")


def sizes(options: argparse.Namespace) -> None:
    """Accuracy of trained networks on images larger than those of training."""
    found = accuracy_by_size(cifar(options), tested(options, 2000), (64, 80, 96, 128, 160, 192))
    for each in found:
        print(json.dumps(vars(each)))
    save(draw_accuracy_by_size(found), "sizes")


def peers(options: argparse.Namespace) -> None:
    """Receptive fields of trained networks, before and after."""
    pictures = [image for image, _ in tested(options, 64)]
    trained = cifar(options)
    drawn = {name: untrained(model) for name, model in trained.items()}
    for when, models in (("before", drawn), ("after", trained)):
        stages = {name: -1 if name == "ViT" else 2 for name in models}  # of 8×8 places; ViT's and ResNet's have 16×16
        found = [
            receptive_field(model, pictures, stages[name], img_size=128, name=name) for name, model in models.items()
        ]
        print(json.dumps([field.numbers() for field in found]))
        save(draw_receptive_fields(found, columns=3), f"fields_{when}", 80)


def fields(options: argparse.Namespace) -> None:
    """Receptive fields of five families as their weights are drawn."""
    photos = sorted(options.photo.parent.glob("*.jpg"))[:8]
    models = {name: vmamba.create_model(model) if "vmamba" in model else timm.create_model(model)
              for name, model in FAMILIES.items()}  # fmt: skip
    found = [receptive_field(model, photos, img_size=224, name=name) for name, model in models.items()]
    print(json.dumps([field.numbers() for field in found]))
    save(draw_receptive_fields(found, columns=3), "fields", 80)


def training(options: argparse.Namespace) -> None:
    """Receptive fields of the trained model's last two stages, before and after."""
    photos = sorted(options.photo.parent.glob("*.jpg"))[:16]
    found = [
        receptive_field(model, photos, stage=stage, name=f"stage {stage + 1}, {when}")
        for stage in (1, 3)
        for when, model in (("as drawn", untrained(options.model)), ("trained", options.model))
    ]
    print(json.dumps([field.numbers() for field in found]))
    save(draw_receptive_fields(found, columns=2), "fields_trained", 80)


def costs(options: argparse.Namespace) -> None:
    """Cost against size: counted now; time as benchmarks/cpu.py measured it on a quiet machine."""
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["tables"]["resolution"]
    sizes = sorted({row["size"] for row in rows})
    names = {name: model for name, model in FAMILIES.items() if any(row["model"] == name for row in rows)}
    found = []
    for each in scaling(names, sizes, rounds=0, memory=False):
        seconds = {row["size"]: row["seconds"] for row in rows if row["model"] == each.name}
        all_costs = tuple(Cost(c.size, c.flops, c.params, seconds[c.size]) for c in each.costs)
        found.append(Scaling(each.name, all_costs, fitted_exponents(all_costs), fitted_exponents(all_costs[-2:])))
        print(each.name, found[-1].exponents, found[-1].last_exponents)
    save(draw_scaling(found), "costs", 80)


PICTURES: dict[str, Callable[[argparse.Namespace], None]] = {
    function.__name__: function
    for function in (routes, stages, activation, memory, meaning, fields, training, peers, sizes, costs)
}


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="all of them if none is named")
    parser.add_argument("--checkpoint", default=ROOT / "runs/garments_segmentation/model.safetensors")
    parser.add_argument("--photo", type=Path, default=ROOT / "runs/garments/images/val/0004.jpg")
    parser.add_argument("--trained", type=Path, default=ROOT / "runs/cifar10", help="folder of the networks kept")
    parser.add_argument("--cifar10", metavar="PATH", help="folder of CIFAR-10")
    parser.add_argument("--block", type=int, default=-3, help="which block the maps of the scans are of")
    options = parser.parse_args()
    names = options.names or [*PICTURES]
    if set(names) & {"stages", "activation", "memory", "fields", "training"}:
        from vmamba.models.registry import load_model

        options.model = load_model(options.checkpoint)[0]
    for name in names:
        torch.manual_seed(0)
        PICTURES[name](options)


if __name__ == "__main__":
    main()
