"""How fast different kinds of network learn: one data set, one recipe, the same budget of time for each.

Our small VMamba against a Swin-, a ConvNeXt- and a ViT-type of timm's and a ResNet, all of the same number of
parameters: within 15 % on Fashion-MNIST, 16 % on CIFAR-10 (32×32 in colour, enlarged to 64×64, so that the four stages
of networks made for photographs have something to see). The networks take turns in short slices, so that a machine
which slows down slows all of them; the learning rate follows the share of the budget that a network has used, so each
gets the whole schedule. With several seeds the pages give means and the spread, from the first seed that is done.

    OMP_NUM_THREADS=1 python benchmarks/learning.py --seeds 0 1 2 --clock processor    # the committed table and plot:
                                                 # half an hour; the clock suits a machine that has other work
    python benchmarks/learning.py                # one seed by the wall clock: about ten minutes
    python benchmarks/learning.py --split held-out   # to choose between designs, without a look at the test set
    python benchmarks/learning.py --cifar10 PATH --budget 300 --keep runs/cifar10    # PATH: train.tar and val.tar
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from vmamba.models.checkpoints import save_checkpoint

DATA = Path(__file__).parents[1] / "examples"
GREY = Preprocessing((28, 28), 1, (0.286,), (0.353,))
COLOUR = Preprocessing((64, 64), 3, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), "bilinear", 1.0)
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
    "VMamba": lambda: vmamba.create_model("vmamba_femto_local", **SMALL),
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
CLOCKS = {"wall": "perf_counter", "processor": "process_time"}  # by name, what of `time` tells the seconds
SMOOTHING, SLICE = 0.05, 10.0  # of the labels; seconds in a row


# Name and arguments, for timm, of networks whose four stages see 64×64 pixels.
COLOURED: dict[str, tuple[str, dict[str, Any]]] = {
    "VMamba": ("vmamba_pico_local", {}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 2, 2, 2), "embed_dim": 32, "num_heads": (1, 2, 4, 8), "img_size": 64, "window_size": 4},
    ),
    "ConvNeXt": ("convnext_tiny", {"depths": (1, 1, 3, 1), "dims": (44, 88, 176, 352)}),
    "ViT": ("deit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 176, "depth": 6, "num_heads": 4, "img_size": 64}),
    "ResNet": ("resnet18", {"channels": (30, 60, 120, 240)}),
}


def coloured(name: str) -> nn.Module:
    """One of them with fresh weights, for ten classes."""
    variant, arguments = COLOURED[name]
    side = {"img_size": COLOUR.img_size} if variant in vmamba.list_models() else {}
    model: nn.Module = timm.create_model(variant, num_classes=10, **arguments, **side)
    return model


@dataclass(frozen=True)
class Classes:
    """Images and labels to learn from, and to be judged by.

    Attributes:
        known, judged: images (N, C, H, W), uint8, and labels (N,) of each.
        names: of the classes.
        pre: how the networks see them; images are enlarged to its size.
        recipe: of every network.
        padding: pixels by which training moves an image at most.
    """

    known: tuple[Tensor, Tensor]
    judged: tuple[Tensor, Tensor]
    names: tuple[str, ...]
    pre: Preprocessing
    recipe: Recipe
    padding: int

    @classmethod
    def open(cls, config: DataConfig, pre: Preprocessing, recipe: Recipe, padding: int, split: str) -> Classes:
        """The training and the test set, or of the former every sixth image against the others."""
        names = open_split(config, False).class_names
        stored = replace(pre, img_size=(28, 28) if pre.in_chans == 1 else (32, 32), crop_pct=1.0)
        opened = (MemorySamples(open_split(config, training, names), stored, 10) for training in (True, False))
        known, judged = ((samples.images, samples.labels) for samples in opened)
        if split == "held-out":
            apart = torch.arange(len(known[0])) % 6 == 5
            known, judged = ((known[0][part], known[1][part]) for part in (~apart, apart))
        return cls(known, judged, tuple(names), pre, recipe, padding)

    @property
    def epoch(self) -> int:
        return len(self.known[0])

    def seen(self, images: Tensor) -> Tensor:
        """Images of a data set as a network takes them."""
        x = self.pre.normalise(images)
        if x.shape[2:] == self.pre.img_size:
            return x
        return F.interpolate(x, self.pre.img_size, mode="bilinear", align_corners=False)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Mirrored and moved at random."""
        images, labels = self.known
        while True:
            chosen = torch.randint(len(images), (self.recipe.batch,))
            yield crop_and_flip(images[chosen], padding=self.padding, hflip=0.5), labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(model(self.seen(batch[0])), batch[1], label_smoothing=SMOOTHING)

    def judge(self, model: nn.Module) -> dict[str, float]:
        """The accuracy."""
        images, labels = self.judged
        predicted = torch.cat([model(self.seen(part)).argmax(1) for part in images.split(500)])
        return {"accuracy": (predicted == labels).float().mean().item()}


@dataclass(frozen=True)
class Subject:
    """A data set with the networks for it.

    Attributes:
        name: of the files of its results.
        title: of the data set.
        networks: what builds each, by name.
        lesson: what they learn.
    """

    name: str
    title: str
    networks: Mapping[str, Callable[[], nn.Module]]
    lesson: Classes


def fashion_mnist(split: str) -> Subject:
    """Ten kinds of garments in grey."""
    config = DataConfig(root=str(DATA), dataset="torch/fashion_mnist")
    lesson = Classes.open(config, GREY, RECIPE, 0, split)
    return Subject("learning", "Fashion-MNIST", CONTENDERS, lesson)


def cifar10(root: str, split: str) -> Subject:
    """Ten kinds of animals and vehicles in colour."""
    lesson = Classes.open(DataConfig(root=root), COLOUR, RECIPE, 4, split)
    return Subject("learning_cifar10", "CIFAR-10", {name: partial(coloured, name) for name in COLOURED}, lesson)


def run(
    subject: Subject,
    budget: float,
    seed: int,
    only: list[str] | None = None,
    turn: float = SLICE,
    clock: str = "wall",
) -> list[Contender]:
    """Train all networks side by side."""
    networks = {name: subject.networks[name] for name in only or subject.networks}
    return learn_in_turns(networks, subject.lesson, budget, min(turn, budget / 6), seed, getattr(time, CLOCKS[clock]))


def write(
    subject: Subject,
    contenders: list[Contender],
    budget: float,
    split: str,
    seeds: list[int],
    folder: Path,
    clock: str = "wall",
) -> str:
    """Write the table and the plot of the results; returns the page."""
    recipe = subject.lesson.recipe
    seconds = "seconds of training" if clock == "wall" else "seconds of one process's time in training"
    one = (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))} (mean, and standard deviation)"
    )
    return Page(
        name=subject.name,
        program="learning.py",
        title=f"How well it learns: {subject.title}",
        headers="network;parameters, M;accuracy, %;± points;images/s;epochs",
        label="accuracy, %",
        seconds=seconds,
        settings={"budget_seconds": budget, "clock": clock, "judged_by": split, "seeds": seeds, **asdict(recipe)},
        notes=[f"{budget:.0f} {seconds.replace('seconds', 's', 1)} each, one recipe, {one}, judged by the {split} set"],
    ).write([contender.row() for contender in contenders], folder)


def keep(subject: Subject, contenders: list[Contender], folder: Path) -> None:
    """Write the last seed's averaged weights as model files, which `vmamba explain` and `vmamba validate` read."""
    pre = subject.lesson.pre
    known = {
        "class_names": subject.lesson.names,
        "mean": pre.mean,
        "std": pre.std,
        "interpolation": pre.interpolation,
        "crop_pct": 1.0,
        "img_size": pre.img_size,
    }
    for contender in {contender.name: contender for contender in contenders}.values():
        save_checkpoint(contender.average, folder / f"{contender.name}.safetensors", known)


def main() -> None:
    """Parse the arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", metavar="PATH", help="folder of CIFAR-10; Fashion-MNIST without")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds of training for each network")
    parser.add_argument("--split", choices=["test", "held-out"], default="test", help="what to judge by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the initial weights, a run each")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what the budget is told by")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="some of the networks")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to write the trained networks of CIFAR-10")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.keep and not options.cifar10:
        parser.error("--keep needs --cifar10: Fashion-MNIST's networks are of no variant that a file can name")
    subject = cifar10(options.cifar10, options.split) if options.cifar10 else fashion_mnist(options.split)
    contenders: list[Contender] = []
    for done, seed in enumerate(options.seeds, 1):
        turn = 4 * SLICE if options.cifar10 else SLICE
        contenders += run(subject, options.budget, seed, options.only, turn, options.clock)
        seeds = options.seeds[:done]
        print(write(subject, contenders, options.budget, options.split, seeds, options.output, options.clock))
    if options.keep:
        keep(subject, contenders, options.keep)


if __name__ == "__main__":
    main()
