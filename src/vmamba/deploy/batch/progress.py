"""How far a job is: images done, images per second, time left; a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from vmamba.tasks.runs import span

_QUIET_SECONDS = 60  # elsewhere than on a terminal: time between two lines


class Progress:
    """Shows on stderr how far a job is.

    Args:
        images: of the whole job.
        done: of them, before this run.

    Attributes:
        computed: images of this run.
    """

    def __init__(self, images: int, done: int) -> None:
        self.images, self.before, self.computed = images, done, 0
        console = Console(stderr=True, highlight=False)
        self.print = console.print
        self.bar = Bar(BarColumn(), TextColumn("{task.description}"), console=console) if console.is_terminal else None

    def __enter__(self) -> Self:
        self.began = self.spoke = time.monotonic()
        if self.bar:
            self.task = self.bar.add_task(str(self), total=self.images, completed=self.before)
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def add(self, images: int) -> None:
        """So many more images are done."""
        self.computed += images
        if self.bar:
            self.bar.update(self.task, completed=self.before + self.computed, description=str(self))
        elif time.monotonic() - self.spoke >= _QUIET_SECONDS:
            self.spoke = time.monotonic()
            self.print(str(self), soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Images a second in this run."""
        return self.computed / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        done = self.before + self.computed
        text = f"{done:,} of {self.images:,} images"
        if not self.computed:
            return text
        left = (self.images - done) / self.rate
        return f"{text}, {self.rate:,.4g} a second, {span(left)} left"
