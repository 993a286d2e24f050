"""Training and validation, of any task: the two calls, the devices they use, and how a run ends before its time."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vmamba.errors import RecipeError, needing
from vmamba.files import atomic_write, json_bytes
from vmamba.tasks import parts_of
from vmamba.tasks.memory import memory_kept
from vmamba.tasks.prediction import load_weights
from vmamba.tasks.recipe import BaseTrainConfig, BaseValidateConfig, TrainerConfig, load_recipe
from vmamba.tasks.runs import LATEST, METRICS, RunFolder, report

with needing("train", "training and validation need more packages"):
    import lightning as L
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.callbacks import LambdaCallback
    from lightning.pytorch.plugins.environments import SLURMEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from vmamba.tasks.checkpointing import AtomicCheckpointIO, Recorder
    from vmamba.tasks.progress import Progress, ValidationProgress
    from vmamba.tasks.task import Task


def train(config: BaseTrainConfig) -> Path:
    """Train a model, or go on training one.

    The run's folder then holds ``config.yaml``, ``metrics.csv``, ``learning_curve.png``, ``checkpoints/last.ckpt`` and
    ``model.safetensors``.

    Returns:
        The run's folder.

    Raises:
        RecipeError: settings that are wrong or contradict each other, or a folder that holds another run.
        DataError: images or what is to be learned of them are missing or do not fit together.
        ImageError: a file turned out to be unusable in mid-training; the message names it.
        NonFiniteError: the loss or gradient is not finite; the last good checkpoint is kept.
        SystemExit: the process was told to end, by SIGTERM (status 143) or from the keyboard (130); it has said so, and
            the last checkpoint is kept.
    """
    task_type: type[Task] = _part(config, "train_config", "task")
    config.check()
    settings = config.to_dict()
    run = RunFolder(config.folder)
    checkpoint = run.decide(settings, config.resume, config.overwrite)
    with _stopping(run) as stop:
        task = task_type.from_recipe(config)

        def prepare(trainer: L.Trainer, *_: Any) -> None:  # when loaders and devices exist: nothing old is lost in vain
            if trainer.is_global_zero:
                run.prepare(settings, fresh=checkpoint is None)
                if checkpoint is not None:
                    report(f"going on from {checkpoint}")

        def listen(trainer: L.Trainer, *_: Any) -> None:  # again: Lightning's own handler has replaced ours by now
            stop.listen(trainer.strategy.launcher)

        recorder = Recorder(run)
        callbacks = [recorder, LambdaCallback(on_fit_start=prepare, on_train_start=listen)]
        callbacks += [Progress(recorder)] if config.trainer.progress else []
        trainer = make_trainer(
            config.trainer, callbacks=callbacks, max_epochs=config.optim.epochs, default_root_dir=run.path,
            accumulate_grad_batches=config.trainer.accumulate, gradient_clip_val=config.optim.clip_grad,
            check_val_every_n_epoch=config.validated_every,
        )  # fmt: skip
        if config.model.compile:
            task.model.compile()
        with memory_kept() if isinstance(trainer.accelerator, CPUAccelerator) else nullcontext():
            trainer.fit(task, ckpt_path=checkpoint, weights_only=True)
    return run.path


def validate(config: BaseValidateConfig, given: Collection[str] = ()) -> dict[str, Any]:
    """Measure a model on the validation split.

    Writes ``metrics.json`` and the task's pictures to the output folder.

    Args:
        config: where its data name no place, the data settings of the model's run take the place of the defaults.
        given: names of data settings that count even if they are the defaults.

    Returns:
        What metrics.json holds: the task's results and details, and where "weights" and "data" came from; "output",
        the folder; and a "summary" in one line.

    Raises:
        CheckpointError: the weights cannot be read.
        DataError: images are missing, or their classes are not the model's.
        ImageError: a file cannot be used; the message names it.
        RecipeError: the settings are wrong, or for another task than the model.
    """
    config.check()
    weights = load_weights(config.checkpoint, config.pretrained, config.ema)
    if weights.task != config.task:
        raise RecipeError(f"{weights.source} is a model for {weights.task}: set task to {weights.task}")
    task_type: type[Task] = _part(config, "validate_config", "task")
    task = task_type.from_weights(replace(config, data=_data_of_run(config, given)), weights)
    task.detailed = True
    trainer = make_trainer(config.trainer, callbacks=[ValidationProgress()] if config.trainer.progress else [])
    trainer.validate(task, verbose=False)
    output = Path(config.output or (f"runs/{config.pretrained}" if config.pretrained else Path(weights.source).parent))
    results = {**task.found, "weights": weights.source, **task.details()}
    if trainer.is_global_zero:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / METRICS) as file:
            file.write(json_bytes(results))
        task.show(output)
    return {**results, "output": str(output), "summary": task.summary(results)}


def _part(config: BaseTrainConfig | BaseValidateConfig, settings: str, part: str) -> Any:
    """A class of the task that the settings name."""
    parts = parts_of(config.task)
    if not isinstance(config, expected := parts.load(settings)):
        raise RecipeError(f"the settings of {config.task} are a {expected.__name__}, not a {type(config).__name__}")
    return parts.load(part)


def _data_of_run(config: BaseValidateConfig, given: Collection[str]) -> Any:
    """The configured data; where no place is given, that of the run whose folder the checkpoint lies in."""
    if config.data.root is not None or getattr(config.data, "dataset", None) or config.pretrained:
        return config.data
    folder = Path(config.checkpoint).parent if config.checkpoint else LATEST
    settings = next((f for f in (folder, folder.parent) if RunFolder(f).config.exists()), None)
    if settings is None:
        return config.data
    stored = load_recipe(RunFolder(settings).config)["data"]
    default = asdict(type(config.data)())
    own = {k: v for k, v in asdict(config.data).items() if k in given or v != default[k]}
    return type(config.data)(**stored | own)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes


def is_first_process() -> bool:
    """Whether this is the one process, of all that take part, that checks files and tells results."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _machines(config: TrainerConfig) -> tuple[int | str, int]:
    """Devices on each machine, and machines: as configured, or as torchrun or SLURM started processes."""
    devices, nodes = config.devices, config.num_nodes
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local and world:  # torchrun
        devices = int(local) if devices == "auto" else devices
        nodes = int(world) // int(local) if nodes == "auto" else nodes
    elif SLURMEnvironment.detect():
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
        devices = int(tasks) if devices == "auto" and tasks else devices
        nodes = int(os.environ.get("SLURM_NNODES", 1)) if nodes == "auto" else nodes
    if devices == "auto" and config.strategy == "fsdp":
        devices = max(torch.cuda.device_count(), 1)
    return devices, 1 if nodes == "auto" else nodes


def make_trainer(config: TrainerConfig, **arguments: Any) -> L.Trainer:
    """Lightning's trainer for the configured devices, without the features that this package brings itself."""
    devices, nodes = _machines(config)
    strategy: str | Strategy = config.strategy
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(int(devices) * nodes, 1, save_distributed_checkpoint=False)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():  # its own requeueing would save, and later prefer, checkpoints in mid-epoch
        plugins.append(SLURMEnvironment(auto_requeue=False))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's advice to raise num_workers: where images lie in memory, more workers would only cost time.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Of a depthwise weight's gradient two strides are equally right; DDP warns when it meets the other one.
    warnings.filterwarnings("ignore", ".*Grad strides do not match.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # of torch, about Lightning
    try:
        return L.Trainer(
            accelerator=config.accelerator, devices=devices, num_nodes=nodes, strategy=strategy,
            precision=config.precision, plugins=plugins, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            num_sanity_val_steps=0, deterministic=config.deterministic or None, **arguments,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise RecipeError(f"trainer: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# An early end

_ENDS = (signal.SIGTERM, signal.SIGINT)


class _Stop(BaseException):
    """Raised wherever the main thread is when the process is told to end, to leave by way of every clean-up.

    Lightning's own handler of SIGTERM would start a collective operation in the middle of whatever goes on.
    """

    by: signal.Signals | None = None
    launcher: Any = None

    def listen(self, launcher: Any = None) -> None:
        """Wait for the signals, to be handed on to the processes that the launcher has started."""
        self.launcher, self.process = launcher, os.getpid()
        if threading.current_thread() is threading.main_thread():  # which alone hears signals
            for number in _ENDS:
                signal.signal(number, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if os.getpid() != self.process:  # a loader's worker, which has inherited this handler
            raise KeyboardInterrupt
        if self.by is not None:  # once is enough
            return
        self.by = signal.Signals(number)
        if hasattr(signal, "SIGCHLD"):  # where torch's handler would raise, at any later time, that a worker has ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.launcher is not None:
            self.launcher.kill(signal.SIGTERM)
        raise self


@contextmanager
def _stopping(run: RunFolder) -> Iterator[_Stop]:
    """A block that SIGTERM and the keyboard's interrupt end in order: with a line about what is kept."""
    stop, before = _Stop(), [signal.getsignal(number) for number in _ENDS]
    stop.listen()
    try:
        yield stop
    except BaseException:  # also what another process's end or a worker's has raised meanwhile
        if stop.by is None:
            raise
        if is_first_process():
            kept = "go on from its last epoch with --resume true" if run.checkpoint.exists() else "no epoch had ended"
            report(f"{run.path}: stopped by {stop.by.name}; {kept}")
        sys.exit(128 + stop.by)
    finally:
        for number, handler in zip(_ENDS, before, strict=True):
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
