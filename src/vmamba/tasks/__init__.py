"""What models are trained to do. Each task is named here, and imported only when it is used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from vmamba.errors import RecipeError


class Parts(NamedTuple):
    """Where a task's classes are, as ``module:class``. The modules of its settings are quick to import."""

    train_config: str
    validate_config: str
    task: str
    predictor: str

    def load(self, part: str) -> Any:
        """The class itself."""
        return resolve_name(getattr(self, part))


TASKS = {
    "classification": Parts(
        "vmamba.tasks.recipe:TrainConfig",
        "vmamba.tasks.recipe:ValidateConfig",
        "vmamba.tasks.classification:ClassificationTask",
        "vmamba.tasks.prediction:Classifier",
    ),
    "segmentation": Parts(
        "vmamba.tasks.segmentation_recipe:SegmentationTrainConfig",
        "vmamba.tasks.segmentation_recipe:SegmentationValidateConfig",
        "vmamba.tasks.segmentation:SegmentationTask",
        "vmamba.tasks.segmenter:Segmenter",
    ),
    "detection": Parts(
        "vmamba.tasks.detection_recipe:DetectionTrainConfig",
        "vmamba.tasks.detection_recipe:DetectionValidateConfig",
        "vmamba.tasks.detection:DetectionTask",
        "vmamba.tasks.detector:Detector",
    ),
}


def parts_of(task: str) -> Parts:
    """The classes of a task.

    Raises:
        RecipeError: there is no such task.
    """
    if task not in TASKS:
        raise RecipeError(f"there is no task {task!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[task]


def settings_of(command: str, arguments: Sequence[str]) -> type:
    """The settings of the command "train" or "validate" for the task that its arguments are about.

    ``--task`` names it, or else a YAML file, or else, when a model is measured, the model's own file.

    Raises:
        RecipeError: there is no such task.
        CheckpointError: the model's file cannot be read.
    """
    flags = argparse.ArgumentParser(prog=f"vmamba {command}", add_help=False, allow_abbrev=False)
    for flag in ("--task", "--checkpoint", "--pretrained"):
        flags.add_argument(flag)
    flags.add_argument("--config", action="append", default=[])
    given, _ = flags.parse_known_args(arguments)
    task = given.task or next(filter(None, map(_task_in, reversed(given.config))), None)
    if task is None and command == "validate":
        task = _task_of_model(given.checkpoint, given.pretrained)
    return parts_of(task or "classification").load(f"{command}_config")


def _task_in(path: str) -> str | None:
    """The task that a YAML file names, or the one it is based on; a file that cannot be read is refused elsewhere."""
    from vmamba.tasks.recipe import load_recipe

    settings = load_recipe(Path(path)) if os.path.isfile(path) else None
    if not isinstance(settings, dict):
        return None
    return settings.get("task") or ("base" in settings and _task_in(str(Path(path).parent / settings["base"]))) or None


def _task_of_model(checkpoint: str | None, name: str | None) -> str | None:
    from vmamba.tasks.runs import LATEST, RunFolder

    file = checkpoint or (None if name else RunFolder(LATEST).model)
    if file and not os.path.exists(file) and ":" not in str(file):  # as where help is asked for, which is to be quick
        return None
    from vmamba.models import folders, registry

    if file:
        return folders.task_of(file)
    return registry.ENTRIES[name].task if name in registry.ENTRIES else None
