"""The plan of a job, and what its folder says is left to do."""

from __future__ import annotations

import numpy as np
import pytest

from vmamba.deploy.batch.journal import Journal, part_size_for
from vmamba.deploy.batch.progress import Progress
from vmamba.deploy.batch.sources import Extent, Segment
from vmamba.errors import BatchError
from vmamba.tasks.runs import span

from .conftest import files_in

ABOUT = {"model": "abc", "topk": 5, "sources": ["/a"]}


def test_units_are_cut_without_regard_to_where_files_end(tmp_path):
    journal = Journal(str(tmp_path))
    journal.begin(ABOUT)
    starts = np.arange(10, dtype=np.int64) * 1000
    extents = [
        Extent(Segment("file", "caf\udce9.png")), Extent(Segment("tar", "a.tar", images=10), starts),
        Extent(Segment("bad", "b.tar", error="b.tar: gone")), Extent(Segment("parquet", "c.parquet", images=5)),
    ]  # fmt: skip
    assert not journal.is_planned
    journal.plan(extents, 4)
    again = Journal(str(tmp_path))
    assert again.is_planned
    assert (again.images, again.units) == (17, 5)
    assert [again.size(unit) for unit in range(5)] == [4, 4, 4, 4, 1]
    assert [again.segments(unit) for unit in range(5)] == [
        [Segment("file", "caf\udce9.png"), Segment("tar", "a.tar", 0, 3)],
        [Segment("tar", "a.tar", 3000, 4)],
        [Segment("tar", "a.tar", 7000, 3), Segment("bad", "b.tar", error="b.tar: gone")],
        [Segment("parquet", "c.parquet", 0, 4)],
        [Segment("parquet", "c.parquet", 4, 1)],
    ]


def test_another_job_is_refused_unless_it_may_overwrite(tmp_path):
    journal = Journal(str(tmp_path / "out"))
    journal.begin(ABOUT)
    journal.plan([Extent(Segment("file", f"{name}.png")) for name in "ab"], 1)
    for name in ("part-00000000.parquet", "part-00000012.parquet", "part-1.parquet", "mine.txt"):
        (tmp_path / "out" / name).write_bytes(b"x")
    (tmp_path / "out" / ".part-00000001.parquet.12345678.partial").write_bytes(b"half")
    assert journal.goes_on(dict(ABOUT))
    assert journal.goes_on(ABOUT, overwrite=True)  # the same command after a stop
    with pytest.raises(
        BatchError, match=r'another job: model: "abc" -> "xyz"; topk: 5 -> null; window: null -> 9\. Ch'
    ):
        journal.goes_on({"model": "xyz", "window": 9, "sources": ["/a"]})
    journal.clear_partial()
    assert not journal.goes_on({"model": "xyz"}, overwrite=True)
    assert journal.parts() == [0, 12]  # until the new job begins
    assert (journal.units, journal.done) == (2, [0])
    journal.begin({"model": "xyz"})
    assert files_in(tmp_path / "out") == {"_job/job.json", "part-1.parquet", "mine.txt"}
    journal.plan([Extent(Segment("file", "a.png"))], 1)
    assert journal.units == 1


def test_a_finished_job_may_be_done_again(tmp_path):
    journal = Journal(str(tmp_path))
    journal.begin(ABOUT)
    journal.plan([Extent(Segment("file", "a.png"))], 1)
    assert not journal.is_done
    (tmp_path / "part-00000000.parquet").write_bytes(b"x")
    assert journal.is_done
    assert journal.goes_on(ABOUT)
    assert not journal.goes_on(ABOUT, overwrite=True)


def test_a_job_that_came_to_no_plan_is_in_nobodys_way(tmp_path):
    journal = Journal(str(tmp_path))
    journal.begin(ABOUT)
    other = {**ABOUT, "sources": ["/b"]}
    assert not journal.goes_on(other)
    journal.begin(other)
    assert files_in(tmp_path) == {"_job/job.json"}
    journal.plan([Extent(Segment("file", "/b/a.png"))], 1)
    with pytest.raises(BatchError, match="another job: sources"):
        journal.goes_on(ABOUT)


def test_results_without_a_job_and_damaged_jobs_are_refused(tmp_path):
    journal = Journal(str(tmp_path))
    (tmp_path / "part-00000000.parquet").write_bytes(b"x")
    with pytest.raises(BatchError, match="holds results of an unknown job"):
        journal.goes_on(ABOUT)
    assert not journal.goes_on(ABOUT, overwrite=True)
    journal.begin(ABOUT)
    (tmp_path / "_job" / "job.json").write_text("{")
    with pytest.raises(BatchError, match=r"holds a damaged _job/job\.json"):
        journal.goes_on(ABOUT)
    assert not journal.goes_on(ABOUT, overwrite=True)
    journal.begin(ABOUT)
    assert journal.goes_on(ABOUT)


def test_parts_are_small_where_there_are_few_images():
    assert part_size_for(1_000_000, 1024, 8, 32) == 1024
    assert part_size_for(1000, 1024, 8, 32) == 32
    assert part_size_for(1000, 1024, 2, 32) == 128
    assert part_size_for(3, 128, 100, 1) == 1


def test_progress_tells_rate_and_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress(10_000, 1_000) as progress:
        assert str(progress) == "1,000 of 10,000 images"
        for _ in range(4):
            now[0] += 25
            progress.add(250)
        assert (progress.rate, progress.computed) == (10, 1000)
    assert capsys.readouterr().err == "1,750 of 10,000 images, 10 a second, 14 min left\n"
    assert [span(x) for x in (3, 130, 3600, 7200 * 2, 86400 * 30)] == ["3 s", "2.2 min", "60 min", "4.0 h", "30 days"]
