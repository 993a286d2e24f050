"""Processes that are asked: each makes one object and calls its methods, one question at a time.

A process has threads, compilers and memory of its own, so that nothing of one is in another's way. It stays until it is
closed or the asking process ends; what it prints goes to a file, whose last line is told if it dies.

    python benchmarks/workers.py DESCRIPTOR    # such a process, as `Worker` starts it
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from vmamba.errors import first_line

PATIENCE, PATIENCE_IN_TURNS = 900, 120  # seconds for one answer, and for one of what stands ready


class NotMeasuredError(Exception):
    """Why there is no number."""


class WorkerError(NotMeasuredError):
    """What a process could not do."""


def brief(error: Exception) -> str:
    """An exception in one line of the results."""
    if isinstance(error, NotMeasuredError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def serve(descriptor: int) -> None:
    """Answer until the other side closes the connection."""
    os.set_inheritable(descriptor, False)  # else what this process starts would hold it open
    with Connection(descriptor) as connection:
        make, arguments = connection.recv()
        server = make(*arguments)
        while True:
            try:
                wanted, given, named = connection.recv()
            except EOFError:
                return
            try:
                answer = getattr(server, wanted)(*given, **named), None
            except Exception as error:
                answer = None, brief(error)
            connection.send(answer)


class Worker:
    """A process of `serve`.

    Args:
        name: for messages.
        make, arguments: the object that answers is what make(*arguments) returns in the process.
        environment: variables beside those of this process.
        nice: how far it stands back behind others that compute.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        nice: int = 0,
    ) -> None:
        self.name = name
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.connection, theirs = Pipe()
        command = [sys.executable, *["-S"] * sys.flags.no_site, __file__, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL, stdout=self.said,
                stderr=self.said, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        if nice:
            os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        self._send((make, arguments))

    def _send(self, message: object) -> None:
        with suppress(ConnectionError):  # where it has ended, `receive` says so
            self.connection.send(message)

    def send(self, wanted: str, *given: object, **named: object) -> None:
        """Ask, and do not wait."""
        self._send((wanted, given, named))

    def receive(self, patience: float = PATIENCE) -> Any:
        """The answer to what was asked.

        Raises:
            WorkerError: it failed, the process has ended, or was ended since `patience` seconds went by.
        """
        try:
            if not self.connection.poll(patience):
                self.process.kill()
                raise WorkerError(f"no answer in {patience:.0f} s")
            answer, error = self.connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerError(self._last_words()) from None
        if error:
            raise WorkerError(error)
        return answer

    def ask(self, wanted: str, *given: object, **named: object) -> Any:
        """The answer; raises as `receive`."""
        self.send(wanted, *given, **named)
        return self.receive()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def _last_words(self) -> str:
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.said.seek(0)
        last = self.said.read().strip().splitlines()[-1:]
        return ": ".join([f"the process {self.name} ended with status {status}", *last])[:300]

    def seconds_used(self) -> float:
        """Of processors, until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --- many at once ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What one process makes ready, in this order.

    Attributes:
        entries: any values that the server knows how to prepare, and whose text names them.
        seconds: that it takes, roughly.
        environment, nice: of its process, as in `Worker`.
    """

    entries: tuple[Any, ...]
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    nice: int = 0


class Workers:
    """Processes that make things ready side by side and keep them, to be asked for them later.

    Args:
        make, arguments: the server of each process; it has a method `ask(wanted, entry, …)`, of which the first that is
            wanted of an entry is "prepare".
        limit: of processes. With more groups than that, those that are ready take the others as well.
    """

    def __init__(self, make: Callable[..., object], *arguments: object, limit: int) -> None:
        self.make, self.arguments, self.limit = make, arguments, limit
        self.workers: list[Worker] = []
        self.homes: dict[Any, Worker] = {}
        self.answers: dict[Any, Any] = {}
        self.errors: dict[Any, str] = {}

    def prepare(
        self,
        groups: Iterable[Group],
        seconds_left: Callable[[], float],
        say: Callable[[str], None] = print,
    ) -> None:
        """Make all groups ready, those that take longest first.

        Args:
            groups: what to make ready. What goes wrong with an entry is noted, and told by `ready`.
            seconds_left: until what is not ready is given up, and its processes are ended.
            say: is told of every entry.
        """
        start = time.perf_counter()
        waiting = deque(sorted(groups, key=lambda group: -group.seconds))
        busy: dict[Any, tuple[Worker, Group]] = {}
        idle: list[Worker] = []

        def note(entry: Any, error: str | None = None) -> None:
            if error:
                self.errors[entry] = error
            say(f"  {entry}: {error or f'ready after {time.perf_counter() - start:.0f} s'}")

        def begin(group: Group, worker: Worker) -> None:
            worker.send("ask", "prepare", group.entries[0])
            busy[worker.connection] = worker, group

        while waiting or busy:
            while waiting and (idle or len(busy) < self.limit):
                group, left = waiting.popleft(), seconds_left()
                if left < group.seconds:
                    for entry in group.entries:
                        note(entry, f"{max(0, left):.0f} s were left, and it takes about {group.seconds:.0f} s")
                elif len(busy) + len(idle) < self.limit:
                    begin(group, self._start(group))
                else:
                    begin(group, idle.pop(0))
            done = wait(list(busy), max(0, min(PATIENCE, seconds_left()))) if busy else []
            for connection in done:
                worker, group = busy.pop(connection)
                entry, *others = group.entries
                try:
                    self.answers[entry] = worker.receive()
                    self.homes[entry] = worker
                    note(entry)
                except WorkerError as error:
                    note(entry, str(error))
                rest = Group(tuple(others), 0, group.environment, group.nice)
                if worker.has_ended:
                    waiting.extendleft([rest] * bool(others))
                elif others:
                    begin(rest, worker)
                else:
                    idle.append(worker)
            if busy and not done:
                for worker, group in busy.values():
                    worker.process.kill()
                    lost = [entry for entry, home in self.homes.items() if home is worker]
                    for entry in (*lost, *group.entries):
                        note(entry, f"its process was not ready after {time.perf_counter() - start:.0f} s")
                busy.clear()

    def _start(self, group: Group) -> Worker:
        name = f"of {group.entries[0]}"
        worker = Worker(name, self.make, *self.arguments, environment=group.environment, nice=group.nice)
        self.workers.append(worker)
        return worker

    def ready(self, entry: Any) -> Any:
        """What `prepare` answered in the process; raises a WorkerError that says what went wrong."""
        if entry in self.errors:
            raise WorkerError(self.errors[entry])
        return self.answers[entry]

    def ask(self, wanted: str, entry: Any, *given: object) -> Any:
        """The answer of the entry's process; raises a WorkerError that says what went wrong."""
        self.homes[entry].send("ask", wanted, entry, *given)
        return self.homes[entry].receive(PATIENCE_IN_TURNS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.close()


if __name__ == "__main__":
    import workers  # the module of this name, so that there is one class of each name

    workers.serve(int(sys.argv[1]))
