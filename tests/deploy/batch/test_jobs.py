"""Whole jobs, on a cluster of two nodes and on one of their own: what is killed goes on, and no row is there twice."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from vmamba.cli import main, make_parser
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.batch.run import run_batch
from vmamba.deploy.batch.worker import Worker
from vmamba.errors import BatchError, RecipeError
from vmamba.tasks.prediction import Classifier

from .conftest import FAKES, files_in

# Not imported here: it reads some of its settings then.
pytestmark = [pytest.mark.timeout(400), pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]
IMAGES = 65
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # with 15, which is what Ray gives them, they wait for all else that runs here
}


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    return tmp_path_factory.mktemp("s3")


NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster(buckets):
    """A cluster of two nodes with a core each, for which s3:// is a folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "FAKE_S3": str(buckets), "PYTHONPATH": str(FAKES)}.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(FAKES))
        from ray.cluster_utils import Cluster

        impatient = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000}  # where a node has died
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": impatient})
        cluster.add_node(**NODE)
        try:
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster):
    """Its address."""
    return cluster.address


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """A folder where each worker leaves its number, and waits at its first unit until there is a file `open`."""
    folder = tmp_path / "gate"
    folder.mkdir()

    class Waiting(Worker):
        def do(self, unit, deaths=0):
            (folder / str(os.getpid())).touch()
            while not (folder / "open").exists():
                time.sleep(0.01)
            return super().do(unit, deaths)

    monkeypatch.setattr("vmamba.deploy.batch.run.Worker", Waiting)
    return folder


def two_at(gate: Path) -> list[psutil.Process]:
    """Two workers that have a unit each."""
    wait_until(lambda: len(os.listdir(gate)) == 2)
    return [psutil.Process(int(pid)) for pid in os.listdir(gate)]


def rows_of(output: Path | str) -> list[dict]:
    return ds.dataset(str(output)).to_table().to_pylist()


def wait_until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return result


def parts_in(output: Path) -> dict[str, int]:
    """The parts that are there, and the file that each is for the disk."""
    return {path.name: path.stat().st_ino for path in output.glob("part-*.parquet")}


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            found += [child] if child.cmdline()[0].startswith("ray::Worker") else []
        except (psutil.Error, IndexError):
            continue
    return found


def test_two_nodes_do_a_job_and_a_killed_worker_is_replaced(nodes, gate, pictures, weights, tmp_path, capsys):
    output, raylets, killed = tmp_path / "out", set(), []

    def kill_one_at_work():
        workers = two_at(gate)
        raylets.update(worker.ppid() for worker in workers)
        workers[0].kill()
        killed.append(workers[0].pid)
        (gate / "open").touch()

    thread = threading.Thread(target=kill_one_at_work, daemon=True)
    thread.start()
    done = run_batch([pictures], BatchConfig(str(output), checkpoint=weights, part_size=1, address=nodes, topk=2))
    thread.join()
    assert len(raylets) == 2  # one a node
    assert killed
    assert done.deaths == 1
    assert (done.images, done.parts, done.computed, done.bad) == (IMAGES, IMAGES, IMAGES, 1)
    message = capsys.readouterr().err
    assert message.startswith(f"classification of {IMAGES} images with {weights}\n")
    assert message.count("a worker died (out of memory, or killed) over") == 1
    rows = rows_of(output)
    assert Counter(row["file"] for row in rows).most_common(1)[0][1] == 1
    assert len(rows) == IMAGES
    names = sorted(row["file"] for row in rows if row["file"].endswith(".png") and ".tar" not in row["file"])
    predicted = {p.file: p for p in Classifier.load(weights).predict(names, topk=2)}
    assert len(predicted) == 24
    for row in rows:
        if row["file"] in predicted:
            assert row["label"] == predicted[row["file"]].classes[0].name
            assert row["confidence"] == pytest.approx(predicted[row["file"]].classes[0].confidence, abs=1e-5)
    assert {row["model"][:18] for row in rows} == {"model.safetensors "}


def test_a_job_ends_without_a_node_that_has_left(cluster, gate, pictures, weights, tmp_path, capsys):
    config = BatchConfig(str(tmp_path / "out"), checkpoint=weights, part_size=4, address=cluster.address)
    results = []
    job = threading.Thread(target=lambda: results.append(run_batch([pictures / "deep"], config)), daemon=True)
    job.start()
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    (leaving,) = [raylets[worker.ppid()] for worker in two_at(gate) if worker.ppid() in raylets]
    try:
        cluster.remove_node(leaving, allow_graceful=False)
        (gate / "open").touch()
        job.join(120)  # Ray's waiting cannot be interrupted by pytest's own limit
        assert not job.is_alive()
    finally:
        cluster.add_node(**NODE)
    (done,) = results
    assert (done.images, done.parts, done.bad, done.deaths) == (12, 3, 0, 1)
    assert capsys.readouterr().err.count("a worker died (out of memory, or killed) over") == 1
    assert Counter(row["file"] for row in rows_of(tmp_path / "out")).most_common(1)[0][1] == 1


def test_a_worker_that_cannot_begin_ends_the_job(nodes, pictures, weights, tmp_path, monkeypatch):
    class Broken(Worker):
        def __init__(self, *_):
            raise OSError("no such device")

    monkeypatch.setattr("vmamba.deploy.batch.run.Worker", Broken)
    config = BatchConfig(str(tmp_path / "out"), checkpoint=weights, address=nodes, actors=1)
    with pytest.raises(BatchError, match=r"^a worker cannot begin: OSError: no such device$"):
        run_batch([pictures / "02.png"], config)


def test_a_job_from_and_to_an_object_store(nodes, buckets, pictures, weights, capsys):
    (buckets / "in").mkdir()
    (buckets / "in" / "a.png").write_bytes((pictures / "02.png").read_bytes())
    (buckets / "in" / "shard.tar").write_bytes((pictures / "shard.tar").read_bytes())
    config = BatchConfig("s3://out/results", checkpoint=weights, address=nodes, actors=1)
    with pytest.raises(BatchError, match="there is no bucket out, or none that these keys may look at; make it first"):
        run_batch(["s3://in"], config)
    assert not (buckets / "out").exists()
    (buckets / "out").mkdir()
    done = run_batch(["s3://in"], config)
    assert (done.images, done.bad) == (41, 0)
    files = {row["file"] for row in rows_of(buckets / "out/results")}
    assert len(files) == 41
    assert {"s3://in/a.png", "s3://in/shard.tar/shard/039.png"} < files
    config.address = "127.0.0.1:1"  # nothing is left to do, so nobody is asked
    assert run_batch(["s3://in"], config).computed == 0
    assert capsys.readouterr().err.endswith("all 41 images are done already\n")
    config.topk = 1
    with pytest.raises(BatchError, match=r"holds another job: topk: 5 -> 1\. Choose another --output"):
        run_batch(["s3://in"], config)


def test_a_killed_job_goes_on_where_it_was(nodes, pictures, weights, tmp_path, capsys):
    """The job has a cluster of its own, which hears this machine alone and ends with it."""
    output = tmp_path / "out"
    arguments = ["batch", str(pictures), "--output", str(output), "--checkpoint", weights, "--part_size", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "vmamba.cli", *arguments, "--actors", "1"]
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        wait_until(lambda: len(parts_in(output)) >= 2 or job.poll() is not None)
        job.send_signal(signal.SIGSTOP)
        family = psutil.Process(job.pid).children(recursive=True)
        assert len(workers_below(psutil.Process(job.pid))) == 1
        agents = {process.pid for process in family if re.match(r"ray::\w+Agent", process.cmdline()[0])}
        sockets = [s for p in [psutil.Process(job.pid), *family] for s in p.net_connections() if s.status == "LISTEN"]
        assert len(sockets) >= 4
        assert {s.laddr.ip.removeprefix("::ffff:") for s in sockets} == {"127.0.0.1"}
        assert 8265 not in {s.laddr.port for s in sockets}  # the dashboard
        environments = [p.environ() for p in family if "raylet" in p.name() or "gcs_server" in p.name()]
        assert {e["RAY_USAGE_STATS_ENABLED"] for e in environments} == {"0"}
        assert all(e["RAY_AUTH_MODE"] == "token" and len(e["RAY_AUTH_TOKEN"]) == 32 for e in environments)
        with pytest.raises(BatchError, match="another process is at work on"):
            run_batch([pictures], BatchConfig(str(output), checkpoint=weights, part_size=1))
    finally:
        job.kill()
        job.wait()
        job.stderr.close()
    # All but Ray's two agents, small processes that look for their cluster for one more minute.
    assert psutil.wait_procs([process for process in family if process.pid not in agents], timeout=200)[1] == []
    before = parts_in(output)
    assert 2 <= len(before) < IMAGES - 2
    (output / ".part-00000099.parquet.12345678.partial").write_bytes(b"half a part")
    assert main([*arguments, "--actors", "1", "--address", nodes]) == 0
    after = parts_in(output)
    assert len(after) == IMAGES
    assert before.items() <= after.items()  # not written again
    assert sorted(Counter(row["file"] for row in rows_of(output)).values()) == [1] * IMAGES
    assert not [name for name in files_in(output) if "partial" in name]
    told = capsys.readouterr().err
    assert f"; {len(before)} of them are done" in told
    assert f"{IMAGES} images in {IMAGES} files in {output}" in told
    assert f"{IMAGES - len(before)} of them in " in told
    assert all(pq.read_schema(output / name).metadata[b"images"] == b"1" for name in after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "ray://10.0.0.1:10001"}, r"^ray://10\.0\.0\.1:10001 is a door for clients outside of a cluster"),
        ({"address": "auto"}, r"^ray://10\.0\.0\.2:10001 is a door for clients outside of a cluster"),
        ({"part_size": 0}, "part_size is 0; expected 1 or more"),
        ({"threshold": 30.0}, "threshold is 30.0; expected 0 to 1"),
        ({"window": 8}, "window is 8; expected 32 or more"),
        ({"gpus": -1.0}, "gpus is -1.0; expected 0 or more"),
    ],
)
def test_settings_that_are_wrong_are_refused(settings, message, pictures, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.2:10001")
    with pytest.raises((BatchError, RecipeError), match=message):
        run_batch([pictures], BatchConfig(str(tmp_path), checkpoint=weights, **settings))


def test_a_cluster_without_room_and_sources_that_are_not_there(nodes, pictures, weights, tmp_path):
    """Neither takes the results of another job, which may be overwritten."""
    (part := tmp_path / "part-00000000.parquet").write_bytes(b"x")
    with pytest.raises(BatchError, match="no machine has room for a worker of 64 cores and 0 GPUs: all have 2 and 0"):
        run_batch([pictures], BatchConfig(str(tmp_path), checkpoint=weights, cpus=64, address=nodes, overwrite=True))
    with pytest.raises(BatchError, match="no: no such file or folder"):
        run_batch([f"{tmp_path}/no"], BatchConfig(str(tmp_path), checkpoint=weights, address=nodes, overwrite=True))
    assert part.read_bytes() == b"x"
    assert "_job/plan.parquet" not in files_in(tmp_path)


def test_commands_and_snippets_of_the_documentation(nodes, pictures, weights, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[3] / "docs/batch.md").read_text()
    commands, *snippets = re.findall(r"```(?:bash|python)\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", nodes)  # else auto is the newest cluster of the machine, be it whose it may
    Path("photos").symlink_to(pictures / "deep")
    Path("model.safetensors").symlink_to(weights)
    first, *others = [shlex.split(line)[1:] for line in commands.splitlines()]
    assert main([*first, "--actors", "1", "--address", "auto"]) == 0
    for words in others:  # these need shards, a bucket and a cluster
        make_parser("batch").parse_args(words)
    for snippet in snippets:  # the last of which finds all images done
        exec(snippet, {})
    assert capsys.readouterr().out == "12 images; 0 could not be used\n12 0 0\n"
