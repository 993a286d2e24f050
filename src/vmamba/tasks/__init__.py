"""What models are trained to do. Each task is named here, and imported only when it is used."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, NamedTuple

from vmamba.errors import RecipeError


class Parts(NamedTuple):
    """Where a task's classes are, as ``module:class``. The settings' modules are quick to import."""

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
}


def parts_of(task: str) -> Parts:
    """The classes of a task.

    Raises:
        RecipeError: there is no such task.
    """
    if task not in TASKS:
        raise RecipeError(f"there is no task {task!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[task]
