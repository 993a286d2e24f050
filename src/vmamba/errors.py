"""Every error meant for the person using this package: it says what was given, what was expected and what to do.

Wrong arguments of a Python call are ordinary `TypeError`s and `ValueError`s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class VmambaError(Exception):
    """Any error of this page: its message says it all, and a traceback would bury it."""


class CheckpointError(VmambaError, RuntimeError):
    """A weight file cannot be read, does not fit the model, or cannot be fetched."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such weight file."""


class HubError(VmambaError, RuntimeError):
    """The Hugging Face Hub cannot be reached, or refuses what it is asked for."""


class DataError(VmambaError, ValueError):
    """A data set is missing, empty, or not what the model or the other split needs."""


class ImageError(VmambaError, ValueError):
    """An image file cannot be used. The message starts with the file's name and says what is wrong with it."""


class RecipeError(VmambaError, ValueError):
    """Settings that are wrong or do not go together."""


class NonFiniteError(VmambaError, RuntimeError):
    """The loss or the gradient stopped being a number. The update that would have used it was not made."""


class ExportError(VmambaError, RuntimeError):
    """A model cannot be written in a format, or what was written does not compute what the model does."""


class BatchError(VmambaError, RuntimeError):
    """A job over many images cannot begin, or cannot go on with what an earlier one has written."""


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return "; ".join(names[:shown]) + (f"; and {len(names) - shown} more" if len(names) > shown else "")


def in_one_line(error: BaseException) -> str:
    """All that an error says, in one line; its type, if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for those of compilers, which go on; its type, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def needing(extra: str, needed: str) -> Iterator[None]:
    """Name the extra to install if an import in the block fails; `needed` says what needs the package.

    Raises:
        ImportError: it fails.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{needed} ({error}): pip install "vmamba[{extra}]"') from error
