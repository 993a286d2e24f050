"""Speed and memory of segmentation and detection on the CPU: VMamba-T against timm's Swin-T under the same heads.

UPerNet and Mask R-CNN with random weights, one picture at a time. All networks take turns, one call each a round; a
figure is a ratio of two medians. Peak memory is that of a fresh process which builds a network and calls it once.

    python benchmarks/dense_speed.py                                 # about five minutes on two idle cores
    python benchmarks/dense_speed.py --threads 1 --processor-time    # where others use the cores too
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from cpu import fresh, resident_mb
from networks import NAMES, SWIN
from page import Row
from runner import EAGER, RESULTS, Bench, Benchmark, Figures, Part, Results, Section, Settings, Tables
from scan_speed import MINE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vmamba
from vmamba.models.detection import MaskRCNN
from vmamba.models.segmentation import UPerNet

UPERNET, MASKRCNN = "UPerNet", "Mask R-CNN"
CANDIDATES = 300  # classified regions that are suppressed, about as many as a trained network has
BOUNDS = {UPERNET: 0.80, MASKRCNN: 0.85}
LAYOUT = {
    "dense": (
        "Inference",
        "network;picture;backbone;ms;backbone, ms;share of heads;heads, ms;floor, ms;peak memory, MB",
    )
}


@dataclass(frozen=True)
class DenseSettings(Settings):
    """Also the pictures' sizes by network, height and width, and the arguments of the heads."""

    pictures: tuple[tuple[str, int, int], ...] = ((UPERNET, 512, 512), (MASKRCNN, 800, 1216))
    heads: dict[str, Any] = field(default_factory=dict)


FULL = DenseSettings("cpu", batch=1, rounds=11, least=0, most=20, modes=(EAGER,), low=False, contenders=(MINE, SWIN))
SMOKE = DenseSettings(
    "cpu", batch=1, rounds=1, least=0, modes=(EAGER,), low=False, contenders=(MINE, SWIN),
    pictures=((UPERNET, 64, 64), (MASKRCNN, 64, 96)), heads={"channels": 16},
    options={
        NAMES[MINE]: {"depths": (1,) * 4, "dims": (16, 32, 64, 128)},
        NAMES[SWIN]: {"depths": (1,) * 4, "embed_dim": 24, "num_heads": (1,) * 4},
    },
)  # fmt: skip


def prepare(settings: DenseSettings, network: str, label: str, image: Tensor) -> UPerNet | MaskRCNN:
    """A network in eval mode, the detector with its threshold for this picture."""
    torch.manual_seed(0)
    name = NAMES[label]
    options = {"features_only": True, **settings.options.get(name, {})}
    if label == SWIN:
        backbone = timm.create_model(name, img_size=tuple(image.shape[2:]), **options)
    else:
        backbone = vmamba.create_model(name, **options)
    if network == UPERNET:
        return UPerNet(backbone, 150, **settings.heads).eval()
    model = MaskRCNN(backbone, 80, **settings.heads).eval()
    choose_candidates(model, image)
    return model


def picture(size: tuple[int, int]) -> Tensor:
    """A normalised one."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


def infer(model: nn.Module, image: Tensor) -> Any:
    with torch.inference_mode():
        return model(image)


def choose_candidates(model: MaskRCNN, image: Tensor) -> None:
    """Set the detector's threshold so that every network has as much to suppress, and as many masks to predict."""
    seen: list[Tensor] = []
    handle = model.roi_head.bbox_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    model.score_thr = 1.0
    infer(model, image)
    handle.remove()
    scores = seen[0].softmax(1)[:, :-1].flatten()
    model.score_thr = scores.sort(descending=True).values[min(CANDIDATES, len(scores) - 1)].item()


def heads_flops(model: nn.Module, size: tuple[int, int]) -> float:
    """Operations of the heads as they are defined, for 1000 regions and 100 masks."""
    heads: Any = copy.deepcopy(model).to("meta")
    backbone: Any = heads.backbone
    maps = [
        torch.empty(1, channels, -(-size[0] // stride), -(-size[1] // stride), device="meta")
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    heads.backbone = _Given(maps)
    image = torch.empty(1, 3, *size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        heads.forward_fixed(image) if isinstance(heads, MaskRCNN) else heads(image)
    return counter.get_total_flops()


class _Given(nn.Module):
    """A backbone whose maps are known."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.maps


def convolution_rate(bench: Bench) -> float:
    """Operations a second of a large convolution: 3×3, 256 to 256 channels, 128×128 pixels, channels-last."""
    layer = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(1, 256, 128, 128).to(memory_format=torch.channels_last)
    seconds = bench.interleave({"convolution": partial(infer, layer, x)})["convolution"]
    return 2 * layer.weight.numel() * 128**2 / seconds


def inference(bench: Bench, settings: DenseSettings) -> Iterator[Part]:
    """Every network whole and its backbone alone, in turns, and the least that its heads could take."""
    rate = convolution_rate(bench)
    for network, *sides in settings.pictures:
        size = (sides[0], sides[1])
        image, calls, rows = picture(size), {}, {}
        for label in settings.contenders:
            bench.say(f"  {network}, {label}, {size[0]}×{size[1]}")
            model = prepare(settings, network, label, image)
            calls[label, "whole"] = partial(infer, model, image)
            calls[label, "backbone"] = partial(infer, model.backbone, image)
            rows[label] = {"network": network, "picture": f"{size[0]}×{size[1]}", "backbone": label}
            rows[label] |= {"floor_seconds": heads_flops(model, size) / rate}
        seconds = bench.interleave(calls)
        for label, row in rows.items():
            whole, backbone = seconds[label, "whole"], seconds[label, "backbone"]
            row |= {"seconds": whole, "backbone_seconds": backbone, "heads_seconds": whole - backbone}
            row |= {"share": 1 - backbone / whole}
            if bench.memory:
                row["peak_mb"] = bench.memory(f"{network}/{label}", 0)
        yield "dense", list(rows.values())


def measure_memory(settings: DenseSettings, what: str) -> float:
    """Most resident MB of this process while it builds a network and runs it, less what it held before."""
    network, label = what.split("/")
    image = picture(next((height, width) for name, height, width in settings.pictures if name == network))
    before = resident_mb("VmRSS")
    infer(prepare(settings, network, label, image), image)
    return resident_mb("VmHWM") - before


def figures(tables: Tables, settings: Settings) -> list[Row]:
    """What is wanted of ours over Swin-T."""
    found = Figures(tables)
    for network, bound in BOUNDS.items():
        for what, key, wanted in (("time", "seconds", bound), ("peak memory", "peak_mb", 1.0)):

            def ratio(network: str = network, key: str = key) -> tuple[float, str]:
                one, other = (
                    found.find("dense", key=key, network=network, backbone=label)[key] for label in (MINE, SWIN)
                )
                return one / other, ""

            found.add(f"{network}, {what}, {MINE} / {SWIN}", wanted, ratio)
    return found.records


def notes(settings: Settings) -> list[str]:
    """What holds for all numbers, in sentences."""
    return ["float32, random weights, batch 1; medians of rounds in which all networks take turns; peak memory is that "
            "of a fresh process",
            f"Mask R-CNN suppresses {CANDIDATES} candidates and predicts at most 100 masks",
            "The floor of the heads is the time of their definition's operations at oneDNN's rate of a large 3×3 "
            "convolution; Winograd's convolutions and UPerNet's fusion, in another order, take fewer"]  # fmt: skip


def benchmark(settings: DenseSettings) -> Benchmark:
    sections = {"inference": Section(partial(inference, settings=settings), ("dense",))}
    title = "Segmentation and detection on the CPU"
    return Benchmark("dense_speed", title, LAYOUT, sections, figures, "", notes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help="turns of each network")
    parser.add_argument("--processor-time", action="store_true", help="not that of the clock on the wall")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: whether the program works, not how fast")
    parser.add_argument("--output", type=Path, help=f"folder of the results; {RESULTS} for a full run")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = SMOKE if options.tiny else replace(FULL, rounds=options.rounds)
    if options.memory_of:
        print(measure_memory(settings, options.memory_of))
        return
    flags = ["--threads", str(options.threads), *["--tiny"] * options.tiny]
    bench = Bench(settings, memory=lambda what, _: fresh("--memory-of", what, *flags, program=__file__))
    if options.processor_time:
        bench.clock = time.process_time
    results = Results(benchmark(settings), settings, options.output or (None if options.tiny else RESULTS))
    results.data |= {"tables": {}, "skipped": {}}
    load = os.getloadavg()[0]
    results.run(bench, ["inference"])
    if options.processor_time:
        results.data["notes"].append("Times are the processor's, since other programs had a share of it")
    results.data["notes"].append(f"Load average of the machine {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    results.write()
    print(results.page)


if __name__ == "__main__":
    main()
