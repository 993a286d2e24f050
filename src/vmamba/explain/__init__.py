"""Seeing what a model sees: functions that give numbers first and pictures second. Each is imported when it is used."""

from typing import TYPE_CHECKING

from vmamba import lazy

if TYPE_CHECKING:
    from vmamba.explain.images import Seen, see

__all__ = ["Seen", "see"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {"vmamba.explain.images": ["Seen", "see"]},
    )
