"""The folder of a cluster of this machine's own: it goes with the job, or with the next one if the job was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from vmamba.deploy.batch.cluster import _temporary_folder

HOLD = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from vmamba.deploy.batch.cluster import _temporary_folder
with _temporary_folder() as folder:
    os.mkdir(folder)
    print(folder, flush=True)
    sys.stdin.read()
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _held(place: Path, *killed: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(place), *killed]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_job_left_is_cleared_away_by_the_next(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as name:
        place = Path(name)
        monkeypatch.setattr(tempfile, "tempdir", name)
        (place / "vmamba_mine").mkdir()  # without a lock: of something else
        one, other = _held(place, "killed"), _held(place)
        dead, alive = (Path(process.stdout.readline().strip()).parent for process in (one, other))
        one.communicate()
        assert dead.exists()
        with _temporary_folder() as mine:
            assert {path.name for path in place.iterdir()} == {alive.name, Path(mine).parent.name, "vmamba_mine"}
            assert Path(mine).parents[1] == place
            assert Path(mine).parent.stat().st_mode & 0o777 == 0o700
        other.communicate()
        assert other.returncode == 0
        assert [path.name for path in place.iterdir()] == ["vmamba_mine"]
        long = place / ("long" * 10)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        with _temporary_folder() as mine:
            assert Path(mine).parents[1] == Path("/tmp")
