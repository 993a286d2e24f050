"""How a plan is made and units are shared out among workers that wait, die and come late.

With a cluster that does what it is told.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vmamba.deploy.batch import run
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.batch.journal import Journal
from vmamba.deploy.batch.sources import Extent, Segment
from vmamba.deploy.batch.worker import Done, LostError
from vmamba.errors import BatchError


class DeadError(Exception):
    """A worker has died."""


class MemoryShortError(Exception):
    """A worker was stopped, for the memory of its machine ran short."""


class LateError(Exception):
    """There is no answer yet."""


class WrongError(Exception):
    """Something went wrong in a worker."""

    cause = LostError("memory ran short: CUDA out of memory")


class Actor:
    """A worker: what is asked of it is known in the end by what `Ray.tell` says of it."""

    def __init__(self, ray, number):
        self.number, self.units = number, []
        self.ready = SimpleNamespace(remote=lambda: ray.ask(self, True))
        self.do = SimpleNamespace(remote=lambda unit, _: (self.units.append(unit), ray.ask(self, Done(unit, 1, 0)))[1])


class Ray:
    """A cluster.

    Args:
        tell: of a worker and what it would answer: whether it answers now; or raises what has become of it.
    """

    exceptions = SimpleNamespace(
        RayActorError=DeadError, WorkerCrashedError=DeadError, NodeDiedError=DeadError, RayTaskError=WrongError,
        OutOfMemoryError=MemoryShortError, GetTimeoutError=LateError,
    )  # fmt: skip

    def __init__(self, tell):
        self.tell, self.actors, self.questions, self.killed, self.waits = tell, [], {}, [], 0
        self.machines = [{"Alive": True, "Resources": {"CPU": 9}}]

    def put(self, value):
        return value

    def remote(self, **_):
        return lambda _: SimpleNamespace(remote=self.hire)

    def hire(self, *_):
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def ask(self, actor, answer):
        self.questions[number := len(self.questions)] = actor, answer
        return number

    def wait(self, asked, timeout=None):
        self.waits += 1
        assert self.waits < 100
        for number in asked:
            try:
                if self.tell(*self.questions[number]):
                    return [number], []
            except (DeadError, MemoryShortError, WrongError):
                return [number], []
        assert timeout is not None, "waits for ever"
        return [], asked

    def get(self, number, timeout=None):
        self.tell(*self.questions[number])
        return self.questions[number][1]

    def kill(self, actor):
        self.killed.append(actor.number)

    def nodes(self):
        return self.machines


def work_with(ray, folder, units=4, workers=2):
    journal = Journal(str(folder))
    journal.begin({})
    journal.plan([Extent(Segment("file", f"{number}.png")) for number in range(units)], 1)
    work = SimpleNamespace(task="classification", source="x")
    return run._work(ray, journal, BatchConfig(""), work, run._Share(1, 0, workers), "x")


def test_a_worker_without_room_gets_no_unit_and_is_not_waited_for(tmp_path):
    ray = Ray(lambda actor, answer: actor.number > 0)
    done = work_with(ray, tmp_path)
    assert (done.computed, done.deaths) == (4, 0)
    assert [actor.units for actor in ray.actors] == [[], [0, 1, 2, 3]]
    assert ray.killed == [0]


def test_no_room_at_all_is_told_once_and_waited_for(tmp_path, capsys):
    ray = Ray(lambda actor, answer: ray.waits > 5)
    assert work_with(ray, tmp_path).computed == 4
    assert capsys.readouterr().err.count("no worker has begun in 30 seconds; the job waits for room") == 1


def test_a_cluster_without_machines_ends_the_job(tmp_path):
    ray = Ray(lambda actor, answer: ray.machines[0].update(Alive=False))
    with pytest.raises(BatchError, match="no machine has room for a worker of 1 cores and 0 GPUs: all have 0 and 0"):
        work_with(ray, tmp_path)
    assert ray.killed == [0, 1]


def test_workers_that_die_before_they_begin_end_the_job(tmp_path):
    def die(actor, answer):
        raise DeadError

    ray = Ray(die)
    with pytest.raises(BatchError, match="12 workers died before they had begun"):
        work_with(ray, tmp_path, workers=1)
    assert len(ray.actors) == 12


def test_idle_workers_are_asked_again_before_they_get_the_unit_of_a_dead_one(tmp_path):
    """All are of one machine that leaves while the last unit is computed."""

    def leave(actor, answer):
        if actor.number < 3 and ray.waits > 5:  # when all have begun, and two have no more to do
            raise DeadError
        return answer is True or answer.unit > 0 or actor.number >= 3

    ray = Ray(leave)
    assert work_with(ray, tmp_path, units=3, workers=3).computed == 3
    assert sorted(unit for actor in ray.actors[:3] for unit in actor.units) == [0, 1, 2]
    assert [actor.units for actor in ray.actors[3:]] == [[0]]
    assert ray.killed == [1, 2]


def test_what_became_of_a_worker_is_told(tmp_path, capsys, monkeypatch):
    def die(actor, answer):
        if actor.number < 3 and answer is not True:
            raise (DeadError, MemoryShortError, WrongError)[actor.number]
        return True

    assert work_with(Ray(die), tmp_path, units=1, workers=1).deaths == 3
    told = capsys.readouterr().err.splitlines()[1:]
    reasons = "out of memory, or killed", "memory ran short on its machine", "memory ran short: CUDA out of memory"
    over = f"over {tmp_path}/part-00000000.parquet; another takes its place"
    assert told == [f"a worker died ({reason}) {over}" for reason in reasons]
    monkeypatch.setattr(WrongError, "cause", ZeroDivisionError("in a worker"))
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        work_with(Ray(die), tmp_path / "again", units=1, workers=1)


# --- the plan


class Lister(Ray):
    """A cluster that runs functions: ``tell`` is asked about each and its arguments, none for the one that begins."""

    def remote(self, **_):
        return lambda function: SimpleNamespace(remote=lambda *values: self.ask(function, values))

    def get(self, asked, timeout=None):
        self.waits += 1
        assert self.waits < 100
        for number in asked:
            if not self.tell(*self.questions[number]):
                raise LateError
        return [function(*values) for function, values in map(self.questions.get, asked)]


def listed(ray, *shards):
    return run._each(ray, lambda path: [path.upper()], shards)


def test_a_plan_that_waits_for_room_says_so_once(capsys):
    ray = Lister(lambda function, values: ray.waits > 5)
    assert listed(ray, "a", "b") == [["A"], ["B"]]
    assert capsys.readouterr().err == (
        "no machine has begun to look through the sources in 30 seconds; the job waits for room in the cluster\n"
    )
    assert listed(Lister(None)) == []  # without shards no machine is asked


def test_shards_that_take_long_are_no_lack_of_room(capsys):
    ray = Lister(lambda function, values: not values or ray.waits > 5)
    assert listed(ray, "a") == [["A"]]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_plan_ends_without_machines(has_begun):
    def leave(function, values):
        ray.machines[0]["Alive"] = ray.waits < 3
        return has_begun and not values

    ray = Lister(leave)
    with pytest.raises(BatchError, match="no machine has room for a worker of 1 cores and 0 GPUs: all have 0 and 0"):
        listed(ray, "a")


def test_a_plan_for_which_memory_is_short_ends_with_that():
    def die(function, values):
        if values == ("b",):
            raise MemoryShortError
        return True

    with pytest.raises(BatchError, match=r"a process that did so died \(memory ran short on its machine\)"):
        listed(Lister(die), "a", "b")
