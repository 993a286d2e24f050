"""A job over many images: plan it, share the units out among workers, replace workers that die, say how far it is.

Ray starts the workers, brings the weights to them once, and tells when one has died. Ray Data, which is built on that,
is not used, for three reasons. It writes files under names of its own, and again where a task is tried again, while
here a unit of the plan is a file of a known name, which makes a job exact and able to go on from what is there. It
tries a task that kills its worker again for ever, while here an image that does so is found and left out. And no image
has to pass through shared memory, for each worker reads what it needs.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

from filelock import FileLock, Timeout

from vmamba.deploy.batch import places
from vmamba.deploy.batch.cluster import cluster, usable_cores
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.batch.progress import Progress
from vmamba.errors import BatchError, needing
from vmamba.files import shown
from vmamba.tasks.prediction import load_weights
from vmamba.tasks.recipe import check_prediction
from vmamba.tasks.runs import report

with needing("scale", "many images need more packages"):
    from vmamba.deploy.batch.journal import Journal, part_size_for
    from vmamba.deploy.batch.sources import Extent, find
    from vmamba.deploy.batch.work import Work, work_for
    from vmamba.deploy.batch.worker import Done, LostError, Worker

_MOST_DEATHS = 12  # of workers over one unit, or of one after another before they begin
_PATIENCE = 30  # seconds without room in the cluster, after which the job says that it waits for it


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        output: the folder of the results.
        images: of the whole job.
        parts: files that hold the results.
        computed: images of this run.
        bad: of them, those that could not be used.
        deaths: workers that died and were replaced.
        seconds: of this run, from the first worker's start to the last part.
    """

    output: str
    images: int
    parts: int
    computed: int
    bad: int
    deaths: int
    seconds: float


def run_batch(sources: Sequence[str | os.PathLike[str]], config: BatchConfig) -> Summary:
    """Use a model on many images, and write what it finds as Parquet files; see `BatchConfig`.

    A job that was stopped, in whatever way, goes on where it was when it is called in the same way again.

    Args:
        sources: see `vmamba.deploy.batch.sources.find`.
        config: the settings.

    Raises:
        BatchError: sources that are not there or hold no images; a folder that holds another job's results, or at
            which another process is at work; no cluster, or one without room; workers that die again and again.
        CheckpointError, RecipeError: the model cannot be used, see `vmamba.tasks.prediction.load_predictor`; a setting
            is wrong.
        ImportError: a package that is needed is missing.
        OSError: the results cannot be written.
    """
    check_prediction(config)
    weights = load_weights(config.checkpoint, config.pretrained, config.ema)
    work = work_for(weights, config)
    digest = work.digest()
    # Where a worker's own folder is another one, a path means something else.
    given = [name if places.is_remote(name) else os.path.abspath(name) for name in map(places.plain, sources)]
    output = config.output if places.is_remote(config.output) else os.path.abspath(places.plain(config.output))
    journal = Journal(output)
    about = {"task": work.task, "model": digest, "sources": [shown(name) for name in given]}
    about |= {name: getattr(config, name) for name in (*work.settings, "img_size", "column")}
    with ExitStack() as stack:
        places.make_folder(places.join(output, "_job"))
        if not places.is_remote(output):
            _lock(stack, journal)
        goes_on = journal.goes_on(about, config.overwrite)
        journal.clear_partial()
        if goes_on and journal.is_done:
            report(f"all {journal.images:,} images are done already")
            return Summary(journal.output, journal.images, journal.units, 0, 0, 0, 0.0)
        size = sum(value.nbytes for value in work.model.state_dict().values() if hasattr(value, "nbytes"))
        cores = (config.actors or 0) * (config.cpus or 1)
        ray = stack.enter_context(cluster(config.address, max(cores, usable_cores()), size))
        share = _share(ray, config)
        if not (goes_on and journal.is_planned):
            extents = _found(ray, given, config)
            if not goes_on:
                journal.begin(about)  # not before it is known that there is something to do, and somebody to do it
            images = sum(map(len, extents))
            journal.plan(
                extents, config.part_size or part_size_for(images, work.part_size, share.most, work.batch_size)
            )
        return _work(ray, journal, config, work, share, f"{os.path.basename(work.source)} {digest[:12]}")


def _lock(stack: ExitStack, journal: Journal) -> None:
    try:
        stack.enter_context(FileLock(journal.place("lock"), timeout=0))
    except Timeout as error:
        raise BatchError(f"another process is at work on {shown(journal.output)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Workers and their number


@dataclass(frozen=True)
class _Share:
    """What a worker takes of a machine, and how many there are."""

    cpus: int
    gpus: float
    most: int


def _share(ray: Any, config: BatchConfig) -> _Share:
    """Divide up what there is.

    Raises:
        BatchError: not one worker fits.
    """
    there = ray.cluster_resources()
    cores, cards = int(there.get("CPU", 0)), there.get("GPU", 0)
    gpus = config.gpus if config.gpus is not None else float(cards > 0)
    cpus = config.cpus or (max(1, min(8, int(cores * gpus / cards))) if gpus and cards else 1)
    fits = _room(ray, cpus, gpus)
    return _Share(cpus, gpus, min(fits, config.actors or fits))


def _room(ray: Any, cpus: int, gpus: float) -> int:
    """How many workers the living machines have room for, if nothing else is at work there.

    Raises:
        BatchError: not for one.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = [(has.get("CPU", 0), has.get("GPU", 0)) for has in machines]
    fits = sum(int(min(cores / cpus, cards / gpus if gpus else float("inf"))) for cores, cards in each)
    if not fits:
        cores, cards = (sum(have) for have in zip((0, 0), *each, strict=True))
        raise BatchError(
            f"no machine has room for a worker of {cpus} cores and {gpus:g} GPUs: all have {cores:g} and {cards:g}"
        )
    return fits


def _first(ray: Any, asked: Sequence[Any], cpus: int, gpus: float, waiting: str, patience: float | None) -> Any:
    """The first of the answers that is there. If that takes longer than ``patience``, what is waiting is told once.

    Raises:
        BatchError: no machine has room for it any more.
    """
    told = False
    while True:
        answers, _ = ray.wait(asked, timeout=patience)
        if answers:
            return answers[0]
        _room(ray, cpus, gpus)
        if not told:
            report(f"{waiting} in {patience} seconds; the job waits for room in the cluster")
        told = True


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def _found(ray: Any, sources: Sequence[str], config: BatchConfig) -> list[Extent]:
    """The images of the sources."""
    extents = find(sources, config.column, partial(_each, ray))
    if not sum(map(len, extents)):
        raise BatchError(f"{', '.join(map(shown, sources))}: no images")
    return extents


def _each(ray: Any, function: Callable[..., list[Extent]], *arguments: Sequence[Any]) -> list[list[Extent]]:
    """`map` over the shards of a source, on all machines.

    Raises:
        BatchError: no machine has room for it, or memory for a shard.
        Exception: what went wrong in the function.
    """
    values = list(zip(*arguments, strict=True))
    if not values:
        return []
    begun = ray.remote(num_cpus=1)(lambda: True).remote()  # for a shard may take long, however much room there is
    _first(ray, [begun], 1, 0, "no machine has begun to look through the sources", _PATIENCE)
    remote = ray.remote(num_cpus=1)(function)
    answers = [remote.remote(*each) for each in values]
    while True:
        try:
            lists: list[list[Extent]] | str = _result(ray, answers, _PATIENCE)
        except ray.exceptions.GetTimeoutError:
            _room(ray, 1, 0)
            continue
        if isinstance(lists, str):
            raise BatchError(f"the sources cannot be looked through: a process that did so died ({lists})")
        return lists


# ---------------------------------------------------------------------------------------------------------------------
# The work


def _work(ray: Any, journal: Journal, config: BatchConfig, work: Work, share: _Share, model: str) -> Summary:
    """Have all units done that are not, each by the next worker that is free."""
    done = journal.done
    left = deque(sorted({*range(journal.units)}.difference(done)))
    before = sum(map(journal.size, done))
    verb = f"{work.task} of {journal.images:,} images with {work.source}"
    report(verb + (f"; {before:,} of them are done" if before else ""))
    bad, deaths = 0, Counter[int]()
    places.remove(journal.place("attempts"))  # of a run that was killed
    weights = ray.put(work)  # once to every machine

    def hire() -> Any:
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0}
        device = "auto" if share.gpus else "cpu"
        kind = ray.remote(**options)(Worker)
        return kind.remote(weights, journal.output, model, config.column, share.cpus, device)

    with Progress(journal.images, before) as progress, _Crew(ray, share, hire, len(left)) as crew:
        while left or crew.busy:
            worker, result = crew.next()
            if isinstance(result, _Death):
                deaths[result.unit] += 1
                _mourn(journal, result, deaths[result.unit])
                left.appendleft(result.unit)
                continue
            if result is not None:
                bad += result.bad
                progress.add(result.images)
            if left:
                unit = left.popleft()
                crew.give(worker, unit, deaths[unit])
            else:
                crew.idle.append(worker)
        seconds = progress.seconds
    computed = journal.images - before
    return Summary(journal.output, journal.images, journal.units, computed, bad, crew.deaths, seconds)


class _Death(NamedTuple):
    """A unit that a worker died over, and how, in words."""

    unit: int
    how: str


class _Crew:
    """Workers. Each is asked whether it is ready before it is given a unit: there may never be room for it.

    Args:
        ray: the cluster.
        share: what each takes, and how many there are.
        hire: starts one.
        units: how many there are to do.

    Attributes:
        asked: workers that have not answered yet, and how many died one after another in the place of each.
        busy: workers that are at work, and their units.
        idle: workers that have nothing to do.
        deaths: workers that died and were replaced.
    """

    def __init__(self, ray: Any, share: _Share, hire: Callable[[], Any], units: int) -> None:
        self.ray, self.share, self.hire = ray, share, hire
        self.asked: dict[Any, tuple[Any, int]] = {}
        self.busy: dict[Any, tuple[Any, int]] = {}
        self.idle: list[Any] = []
        self.deaths = 0
        for _ in range(min(share.most, units)):
            self._ask(hire())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker, _died in self.asked.values():  # which would wait on
            self.ray.kill(worker)

    def give(self, worker: Any, unit: int, deaths: int) -> None:
        """Have a worker do a unit, over which so many died."""
        self.busy[worker.do.remote(unit, deaths)] = worker, unit

    def next(self) -> tuple[Any, Done | _Death | None]:
        """The next worker that can be given a unit, with what it says of the one it has done, if any; or a death.

        Raises:
            BatchError: no worker can begin.
            Exception: what went wrong in a worker.
        """
        while True:
            answer = self._answer()
            result = _result(self.ray, answer)
            if answer in self.busy:
                worker, unit = self.busy.pop(answer)
                if not isinstance(result, str):
                    return worker, result
                self.deaths += 1
                for other in (self.hire(), *self.idle):  # the idle ones may have died in the same way
                    self._ask(other)
                self.idle.clear()
                return None, _Death(unit, result)
            worker, died = self.asked.pop(answer)
            if not isinstance(result, str):
                return worker, None
            self.deaths += 1
            report(f"a worker without work died ({result}); another takes its place")
            if died + 1 >= _MOST_DEATHS:
                raise BatchError(
                    f"{died + 1} workers died before they had begun. If memory runs out, take fewer --actors"
                )
            self._ask(self.hire(), died + 1)

    def _ask(self, worker: Any, died: int = 0) -> None:
        self.asked[worker.ready.remote()] = worker, died

    def _answer(self) -> Any:
        """What the next worker answers, be it at work or asked whether it is ready."""
        asked, patience = [*self.busy, *self.asked], None if self.busy else _PATIENCE
        return _first(self.ray, asked, self.share.cpus, self.share.gpus, "no worker has begun", patience)


def _result(ray: Any, answer: Any, patience: float | None = None) -> Any:
    """What a worker says; if it is dead, in words how it died.

    Raises:
        Exception: what went wrong in it.
    """
    try:
        return ray.get(answer, timeout=patience)
    except ray.exceptions.OutOfMemoryError:  # Ray stops a process before the system has to
        return "memory ran short on its machine"
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        if getattr(error, "actor_init_failed", False):
            reason = str(error).strip().splitlines()[-1]  # below Ray's trace
            raise BatchError(f"a worker cannot begin: {reason}") from error
        return "out of memory, or killed"
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LostError):
            return str(error.cause)
        raise error.cause from error


def _mourn(journal: Journal, death: _Death, deaths: int) -> None:
    part = shown(journal.part(death.unit))
    report(f"a worker died ({death.how}) over {part}; another takes its place")
    if deaths >= _MOST_DEATHS:
        names = sorted({shown(os.path.basename(segment.path)) for segment in journal.segments(death.unit)})
        raise BatchError(
            f"{deaths} workers died over {part} ({', '.join(names[:5])}). If memory runs out, take fewer --actors or a "
            "smaller --batch_size"
        )
