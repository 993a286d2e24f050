"""A data set and a recipe small enough to train in a second, and processes that can be killed."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vmamba import files
from vmamba.data.config import AugmentConfig, DataConfig
from vmamba.tasks import checkpointing
from vmamba.tasks.recipe import ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from vmamba.tasks.task import Task
from vmamba.tasks.training import train

CLASSES = ("blue", "green", "red")
PLAIN = AugmentConfig(
    scale=(1, 1), ratio=(1, 1), hflip=0, rand_augment=None, color_jitter=0, random_erasing=0, mixup=0, cutmix=0
)


def make_images(root: Path, train: int = 8, val: int = 3) -> Path:
    """Noisy 16-pixel images in which one colour dominates: root/train/CLASS/N.png and root/val/CLASS/N.png."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, channel in zip(CLASSES, (2, 1, 0), strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def recipe(images: Path, run: Path, **optim: Any) -> TrainConfig:
    """Every source of randomness is on: shuffling, augmentation, erasing, mixing, drop path."""
    return TrainConfig(
        model=ModelConfig("vmamba_femto_s2", drop_path_rate=0.2, kwargs={"depths": [1, 1, 1], "dims": [8, 12, 16]}),
        data=DataConfig(root=str(images), img_size=16, crop_pct=1.0, batch_size=4, workers=0),
        augment=AugmentConfig(),
        optim=OptimConfig(**{"epochs": 3, "warmup_epochs": 1, "lr_batch": 0, "lr": 0.01, "ema_decay": 0.9} | optim),
        trainer=TrainerConfig(accelerator="cpu", accumulate=2, progress=False),
        run=str(run),
    )


def checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def history(run: Path) -> list[dict[str, float]]:
    return checkpoint(run)["callbacks"]["Recorder"]["history"]


def spawn(function: Any, *args: Any, environment: dict[str, str] | None = None) -> multiprocessing.process.BaseProcess:
    """Start a function in a process of its own that has the package imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vmamba.tasks.classification", "vmamba.tasks.training"])
    process = context.Process(target=_child, args=(function, args, environment or {}))
    process.start()
    return process


def _child(function: Any, args: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if "STDERR" in environment:  # else that of whoever started the server first
        os.dup2(os.open(environment["STDERR"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    function(*args)


def distributed(function, *arguments, processes=2, exitcode=0, stderr=None):
    """Run a function in as many processes as torchrun would start for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    } | ({"STDERR": str(stderr)} if stderr else {})  # fmt: skip
    ranks = [
        spawn(function, *arguments, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [exitcode] * processes


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def train_and_die(config, moment):
    """Train, to be killed in the second epoch."""
    if moment in ("training", "asked to end"):
        batch_end = Task.on_train_batch_end

        def on_train_batch_end(self, outputs, batch, batch_idx):
            batch_end(self, outputs, batch, batch_idx)
            if self.current_epoch == 1 and batch_idx == 3:
                die(signal.SIGTERM if moment == "asked to end" else signal.SIGKILL)

        Task.on_train_batch_end = on_train_batch_end
    if moment == "validating":
        validation_end = Task.on_validation_epoch_end
        Task.on_validation_epoch_end = lambda self: die() if self.current_epoch == 1 else validation_end(self)
    if moment == "writing":
        save = torch.save

        def torch_save(contents, file):
            if contents["epoch"] == 0:
                save(contents, file)
                return
            buffer = io.BytesIO()
            save(contents, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            die()

        checkpointing.torch.save = torch_save
    if moment == "renaming":
        replace = os.replace

        def os_replace(source, target):
            if str(target).endswith("last.ckpt") and os.path.exists(target):
                die()
            replace(source, target)

        files.os.replace = os_replace
    train(config)
