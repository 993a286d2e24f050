"""The settings of `vmamba explain`. Nothing here imports torch, so that ``--help`` stays quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vmamba.errors import RecipeError

FORGOTTEN = math.exp(-1)  # of a state what is left after the usual time constant


@dataclass
class ExplainConfig:
    """See what a model sees."""

    checkpoint: str | None = None
    """File with the weights; null, with no pretrained name either, for the model of the newest run."""
    pretrained: str | None = None
    """Instead of a file: the variant whose published weights to take."""
    ema: bool = False
    """Of a checkpoint that holds both, take the averaged weights."""
    what: str | None = None
    """What to look at, with commas between: stages, activation, memory, matrix, class, depth, field, scaling,
    accuracy, patterns; null for those of the first three and class that the model allows."""
    query: str | None = None
    """The place x,y that is asked about, in pixels of the photo; null for the middle of what the model sees."""
    block: str | None = None
    """The block to look into, its name or its number in the order of computation, with commas between several; null for
    the last of each stage."""
    share: float | None = None
    """For memory: a patch counts as forgotten once so much of it is left; null for 1/e."""
    target: int | None = None
    """For class: the number of the class to explain, of a detector that of the object, 0 being the surest; null for
    what the model answers, or what it finds at the query."""
    labelled: str | None = None
    """For depth and accuracy: pictures with known classes, a folder or archive as for `vmamba validate`."""
    beside: str | None = None
    """For depth, field, scaling and accuracy, other models to measure, and for matrix, vision transformers to show the
    attention of: files or names with published weights, with commas between."""
    limit: int = 1000
    """For depth and accuracy: how many of the pictures to take."""
    output: str = "runs/explain"
    """Folder for the figures and for explain.json, which holds their numbers."""
    img_size: int | tuple[int, int] | None = None
    """Side, or height and width, that the network sees, or for segmentation and detection the short side, or the short
    and the long one; null for the size it was trained at."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ..."""

    @property
    def place(self) -> tuple[float, float] | None:
        """The query as numbers.

        Raises:
            RecipeError: it is not two numbers.
        """
        if self.query is None:
            return None
        try:
            x, y = (float(part) for part in self.query.strip("()[] ").split(","))
        except ValueError as error:
            raise RecipeError(
                f"query is {self.query!r}; expected x,y in pixels of the photo, such as 120,80"
            ) from error
        return x, y


def listed(text: str | None) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
