"""Every error meant for the person using this package: it says what was given, what was expected and what to do.

Wrong arguments of a Python call are ordinary `TypeError`s and `ValueError`s.
"""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(RuntimeError):
    """A weight file cannot be read, does not fit the model, or cannot be fetched."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such weight file."""


class HubError(RuntimeError):
    """The Hugging Face Hub cannot be reached, or refuses what it is asked for."""


class DataError(ValueError):
    """A data set is missing, empty, or not what the model or the other split needs."""


class ImageError(ValueError):
    """An image file cannot be used. The message starts with the file's name and says what is wrong with it."""


class RecipeError(ValueError):
    """Settings that are wrong or do not go together."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient stopped being a number. The update that would have used it was not made."""


class ExportError(RuntimeError):
    """A model cannot be written in a format, or what was written does not compute what the model does."""


class BatchError(RuntimeError):
    """A job over many images cannot begin, or cannot go on with what an earlier one has written."""


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return "; ".join(names[:shown]) + (f"; and {len(names) - shown} more" if len(names) > shown else "")
