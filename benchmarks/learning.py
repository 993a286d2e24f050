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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from runner import RESULTS
from side_by_side import Contender, Page, Recipe, learn_in_turns
from timm.layers import LayerNorm, LayerNorm2d, NormMlpClassifierHead
from timm.models.convnext import ConvNeXtStage
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

RECIPE = Recipe(batch=128, rate=1.4e-2)
SMOOTHING, SLICE = 0.05, 10.0  # of the labels; seconds in a row


class FashionMnist:
    """Ten kinds of garments: images and labels to learn from, and to be judged by."""

    recipe = RECIPE

    def __init__(self, split: str) -> None:
        *self.known, self.images, self.labels = load(split)
        self.epoch = len(self.known[0])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Mirrored at random."""
        images, labels = self.known
        while True:
            chosen = torch.randint(len(images), (self.recipe.batch,))
            yield crop_and_flip(images[chosen], padding=0, hflip=0.5), labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(model(PRE.normalise(batch[0])), batch[1], label_smoothing=SMOOTHING)

    def judge(self, model: nn.Module) -> dict[str, float]:
        """The accuracy."""
        predicted = torch.cat([model(PRE.normalise(part)).argmax(1) for part in self.images.split(500)])
        return {"accuracy": (predicted == self.labels).float().mean().item()}


def load(split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to learn from and to be judged by."""
    config = DataConfig(root=str(DATA), dataset="torch/fashion_mnist")
    known, test = (MemorySamples(open_split(config, training), PRE, 10) for training in (True, False))
    if split == "test":
        return known.images, known.labels, test.images, test.labels
    return known.images[:-10_000], known.labels[:-10_000], known.images[-10_000:], known.labels[-10_000:]


def run(budget: float, split: str, seed: int, only: list[str] | None = None) -> list[Contender]:
    """Train all networks side by side."""
    networks = {name: CONTENDERS[name] for name in only or CONTENDERS}
    return learn_in_turns(networks, FashionMnist(split), budget, min(SLICE, budget / 6), seed, time.perf_counter)


def write(contenders: list[Contender], budget: float, split: str, seed: int, folder: Path) -> str:
    """Write learning.json, learning.md and learning.png; returns the page."""
    return Page(
        name="learning",
        program="learning.py",
        title="How well it learns: Fashion-MNIST",
        headers="network;parameters, M;accuracy, %;images/s;epochs",
        label="accuracy, %",
        seconds="seconds of training",
        settings={"budget_seconds": budget, "judged_by": split, "seed": seed, **asdict(RECIPE)},
        notes=[f"{budget:.0f} s of training each, one recipe, seed {seed}, judged by the {split} set"],
    ).write(contenders, folder)


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
    print(write(contenders, arguments.budget, arguments.split, arguments.seed, arguments.output))


if __name__ == "__main__":
    main()
