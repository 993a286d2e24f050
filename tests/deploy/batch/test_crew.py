"""How units are shared out among workers that wait, die and come late: with a cluster that does what it is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vmamba.deploy.batch import run
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.batch.journal import Journal
from vmamba.deploy.batch.sources import Extent, Segment
from vmamba.deploy.batch.worker import Done
from vmamba.errors import BatchError


class DeadError(Exception):
    """A worker has died."""


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
        RayActorError=DeadError, WorkerCrashedError=DeadError, OutOfMemoryError=DeadError, RayTaskError=(),
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
            except DeadError:
                return [number], []
        assert timeout is not None, "waits for ever"
        return [], asked

    def get(self, number):
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
