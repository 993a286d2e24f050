"""How fast different kinds of network learn: one data set, one recipe, the same wall-clock budget for each.

Our small VMamba against a Swin-, a ConvNeXt- and a ViT-type of timm's and a ResNet, all of the same number of
parameters (within 15 %), on Fashion-MNIST. The networks take turns in short slices, so that a machine which slows down
slows all of them; the learning rate follows the share of the budget that a network has used, so each gets the whole
schedule.

    python benchmarks/learning.py                # the committed table and plot: about ten minutes on two cores
    python benchmarks/learning.py --split held-out   # to choose between designs, without a look at the test set
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from page import curves, page, sentence
from runner import RESULTS, describe
from timm.layers import LayerNorm, LayerNorm2d, NormMlpClassifierHead
from timm.models.convnext import ConvNeXtStage
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

import vmamba
from vmamba.data.config import DataConfig
from vmamba.data.loading import MemorySamples
from vmamba.data.sources import open_split
from vmamba.data.transforms import Preprocessing, crop_and_flip

DATA = Path(__file__).parents[1] / "examples"
PRE = Preprocessing((28, 28), 1, (0.286,), (0.353,))
SMALL = {"in_chans": 1, "num_classes": 10}
LAYOUT = {"learning": ("Fashion-MNIST", "network;parameters, M;accuracy, %;images/s;epochs")}


def convnext(dims: tuple[int, int, int], depths: tuple[int, int, int]) -> nn.Module:
    """timm's ConvNeXt stages behind a stem of stride 2: its own class cannot be built with three stages."""
    stages = [
        ConvNeXtStage(
            dims[max(i - 1, 0)], dim, stride=2 if i else 1, depth=depth, norm_layer=LayerNorm2d, norm_layer_cl=LayerNorm
        )
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True))
    ]
    stem = [nn.Conv2d(1, dims[0], 2, stride=2), LayerNorm2d(dims[0])]
    return nn.Sequential(*stem, *stages, NormMlpClassifierHead(dims[-1], 10))


def resnet(channels: tuple[int, int, int]) -> nn.Module:
    """timm's ResNet with the stem usual for small images: a 3×3 convolution, here of stride 2, and no pooling."""
    model = timm.models.ResNet(timm.models.resnet.BasicBlock, (2, 2, 2), channels=channels, **SMALL)
    model.conv1 = nn.Conv2d(1, model.conv1.out_channels, 3, stride=2, padding=1, bias=False)
    model.maxpool = model.layer4 = nn.Identity()
    return model


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "VMamba": lambda: vmamba.create_model("vmamba_femto", **SMALL),
    "Swin": lambda: timm.models.SwinTransformer(
        img_size=28, patch_size=2, embed_dim=44, depths=(1, 2, 1), num_heads=(2, 4, 8), window_size=7, **SMALL
    ),
    "ConvNeXt": lambda: convnext((48, 96, 192), (1, 3, 1)),
    "ViT": lambda: timm.models.VisionTransformer(
        img_size=28, patch_size=4, embed_dim=104, depth=5, num_heads=4, **SMALL
    ),
    "ResNet": lambda: resnet((32, 64, 128)),
}

BATCH, PEAK_RATE, WARM_UP, WEIGHT_DECAY, SMOOTHING, AVERAGING = 128, 1.4e-2, 0.1, 0.05, 0.05, 0.99
SLICE = 10.0  # seconds in a row


@dataclass
class Contender:
    """One network on its way through its budget."""

    name: str
    model: nn.Module
    budget: float
    used: float = 0.0
    images: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, accuracy

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = create_optimizer_v2(self.model, "muon", lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)

    def learn(self, images: Tensor, labels: Tensor, seconds: float) -> None:
        """Train for so long, or to the end of the budget."""
        self.model.train()
        stop = min(self.used + seconds, self.budget)
        while self.used < stop:
            start = time.perf_counter()
            share = self.used / self.budget
            rate = (
                share / WARM_UP if share < WARM_UP else (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2
            )
            for group in self.optimizer.param_groups:
                group["lr"] = PEAK_RATE * rate
            chosen = torch.randint(len(images), (BATCH,))
            batch = PRE.normalise(crop_and_flip(images[chosen], padding=0, hflip=0.5))
            loss = F.cross_entropy(self.model(batch), labels[chosen], label_smoothing=SMOOTHING)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            self.images += BATCH
            # The average forgets quickly at first, so that it is of use from the start.
            decay = min(AVERAGING, (1 + self.images / BATCH) / (10 + self.images / BATCH))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
                for mine, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                    mine.copy_(theirs)
            self.used += time.perf_counter() - start

    @torch.inference_mode()
    def judge(self, images: Tensor, labels: Tensor) -> None:
        """Note the accuracy of the averaged weights; this time is not counted."""
        predicted = torch.cat([self.average(PRE.normalise(part)).argmax(1) for part in images.split(500)])
        self.curve.append((round(self.used, 1), (predicted == labels).float().mean().item()))


def load(split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to learn from and to be judged by."""
    config = DataConfig(root=str(DATA), dataset="torch/fashion_mnist")
    known, test = (MemorySamples(open_split(config, training), PRE, 10) for training in (True, False))
    if split == "test":
        return known.images, known.labels, test.images, test.labels
    return known.images[:-10_000], known.labels[:-10_000], known.images[-10_000:], known.labels[-10_000:]


def run(budget: float, split: str, seed: int, only: list[str] | None = None) -> list[Contender]:
    """Train all networks side by side."""
    data = load(split)
    contenders = []
    for name in only or CONTENDERS:
        torch.manual_seed(seed)
        contenders.append(Contender(name, CONTENDERS[name](), budget))
    while any(c.used < budget for c in contenders):
        for contender in contenders:
            contender.learn(*data[:2], seconds=min(SLICE, budget / 6))
            contender.judge(*data[2:])
            print(
                f"{contender.name:10}{contender.used:4.0f} of {budget:.0f} s  {contender.curve[-1][1]:.2%}", flush=True
            )
    return contenders


def report(contenders: list[Contender], budget: float, split: str, seed: int, folder: Path) -> str:
    """Write learning.json, learning.md and learning.png; returns the page."""
    rows = [
        {
            "network": c.name,
            "params": sum(p.numel() for p in c.model.parameters()),
            "accuracy": round(c.curve[-1][1], 4),
            "images_per_second": c.images / budget,
            "epochs": c.images / 60_000,
            "curve": c.curve,
        }
        for c in contenders
    ]
    rows.sort(key=lambda row: -row["accuracy"])
    note = f"{budget:.0f} s of training each, one recipe, seed {seed}, judged by the {split} set"
    settings = {"budget_seconds": budget, "judged_by": split, "seed": seed, "batch": BATCH, "peak_rate": PEAK_RATE}
    found = {
        "environment": describe(), "settings": settings, "notes": [note], "figures": [], "skipped": {},
        "tables": {"learning": rows},
    }  # fmt: skip
    text = page("How well it learns: Fashion-MNIST", "learning.py", found, LAYOUT)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learning.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "learning.md").write_text(text)
    title, foot = "Fashion-MNIST, same budget, same recipe, same number of parameters", sentence(found["environment"])
    points = {row["network"]: [(x, 100 * y) for x, y in row["curve"]] for row in rows}
    curves(folder / "learning.png", title, "seconds of training", {"accuracy, %": points}, foot, logarithmic=False)
    return text


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds of training for each network")
    parser.add_argument("--split", choices=["test", "held-out"], default="test", help="what to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="some of the networks")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    contenders = run(arguments.budget, arguments.split, arguments.seed, arguments.only)
    print(report(contenders, arguments.budget, arguments.split, arguments.seed, arguments.output))


if __name__ == "__main__":
    main()
