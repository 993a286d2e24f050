"""One worker, without a cluster: what it makes of a unit, for every task."""

from __future__ import annotations

import io
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vmamba import __version__
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.batch.journal import Journal
from vmamba.deploy.batch.sources import Extent, Segment, find
from vmamba.deploy.batch.work import Work, work_for
from vmamba.deploy.batch.worker import Done, LostError, Worker, ahead
from vmamba.errors import BatchError, CheckpointError
from vmamba.models.registry import create_model
from vmamba.tasks.detector import Detector
from vmamba.tasks.prediction import Classifier, Weights, load_weights
from vmamba.tasks.segmenter import Segmenter

from .conftest import files_in, picture, tar_of


def journal_of(folder, extents, part_size) -> Journal:
    journal = Journal(str(folder))
    journal.begin({})
    journal.plan(extents, part_size)
    return journal


def rows_of(work: Work, sources, folder, **options) -> list[dict]:
    journal = journal_of(folder, find([str(source) for source in sources]), 1000)
    done = Worker(work, str(folder), "model", **options).do(0)
    rows = pq.read_table(journal.part(0)).to_pylist()
    assert done == Done(0, len(rows), sum(row["error"] is not None for row in rows))
    assert {(row["model"], row["version"]) for row in rows} == {("model", __version__)}
    return rows


@pytest.mark.parametrize("threads", [1, 3])
def test_classes_are_those_of_predict_in_batches_across_files(pictures, weights, tmp_path, monkeypatch, threads):
    work = work_for(load_weights(weights), BatchConfig("", topk=2, batch_size=16))
    sizes = []
    confidences = Classifier.confidences
    monkeypatch.setattr(Classifier, "confidences", lambda self, x: (sizes.append(len(x)), confidences(self, x))[1])
    rows = rows_of(work, [pictures], tmp_path, threads=threads)
    assert sizes == [16] * 4  # 24 files, one of them in error between, and 40 in a shard
    monkeypatch.undo()
    files = [row["file"] for row in rows if ".tar" not in row["file"]]
    assert len(files) == 25
    by_name = {row["file"]: row for row in rows}
    for expected in Classifier.load(weights).predict(files, topk=2):
        row = by_name[expected.file]
        assert row["error"] == expected.error
        if expected.error is None:
            assert [score["label"] for score in row["scores"]] == [c.name for c in expected.classes]
            assert np.allclose([s["confidence"] for s in row["scores"]], [c.confidence for c in expected.classes])
            assert (row["label"], row["index"]) == (expected.classes[0].name, expected.classes[0].index)
        else:
            assert row["label"] is row["scores"] is None


def test_features_are_what_the_head_takes(pictures, weights, tmp_path):
    work = work_for(load_weights(weights), BatchConfig("", task="features"))
    rows = rows_of(work, [pictures / "02.png"], tmp_path)
    model = load_weights(weights).model
    head = model.get_classifier()
    logits = torch.nn.functional.linear(torch.tensor(rows[0]["features"]), head.weight, head.bias)
    expected = next(Classifier.load(weights).predict([str(pictures / "02.png")])).classes
    assert len(rows[0]["features"]) == model.num_features
    assert logits.softmax(0)[expected[0].index].item() == pytest.approx(expected[0].confidence, rel=1e-4)


def test_features_of_a_backbone_without_a_head(tmp_path, pictures):
    model = create_model("vmamba_femto_s2", num_classes=0).eval()
    rows = rows_of(work_for(Weights(model, {}, "x"), BatchConfig("", task="features")), [pictures / "02.png"], tmp_path)
    assert len(rows[0]["features"]) == model.num_features
    with pytest.raises(CheckpointError, match="cannot tell classes apart"):
        work_for(Weights(model, {}, "x"), BatchConfig(""))


def test_regions_are_run_lengths_of_what_predict_finds(pictures, tmp_path):
    mask = pytest.importorskip("faster_coco_eval.core.mask")
    model = create_model("upernet", backbone="vmamba_femto_s2", num_classes=4, channels=16).eval()
    weights = Weights(model, {"class_names": ["a", "b", "c", "d"], "img_size": [64, 256]}, "x")
    rows = rows_of(work_for(weights, BatchConfig("")), [pictures / "02.png", pictures / "bad.jpg"], tmp_path)
    assert rows[1]["error"].endswith("recognition")
    assert rows[1]["regions"] is None
    labels = Segmenter.from_weights(weights).segment(pictures / "02.png").labels
    assert (rows[0]["height"], rows[0]["width"]) == labels.shape == (40, 36)
    found = np.full(labels.shape, -1)
    for region in rows[0]["regions"]:
        where = mask.decode(region["mask"]).astype(bool)
        assert (found[where] == -1).all()
        assert region["share"] == pytest.approx(where.mean())
        found[where] = region["index"]
    assert np.array_equal(found, labels)
    assert rows[0]["label"] == "abcd"[np.bincount(labels.ravel()).argmax()]


def test_objects_are_those_that_predict_finds(pictures, tmp_path):
    mask = pytest.importorskip("faster_coco_eval.core.mask")
    torch.manual_seed(1)
    model = create_model("maskrcnn", backbone="vmamba_femto_s2", num_classes=3).eval()
    weights = Weights(model, {"class_names": ["a", "b", "c"], "sides": [96, 128]}, "x")
    rows = rows_of(work_for(weights, BatchConfig("", threshold=0.05)), [pictures / "04.png"], tmp_path)
    expected = Detector.from_weights(weights).detect(pictures / "04.png", threshold=0.05)
    assert len(rows[0]["objects"]) == len(expected) > 0
    for found, true in zip(rows[0]["objects"], expected.objects, strict=True):
        assert (found["label"], found["category_id"]) == (true.name, true.category_id)
        assert np.allclose([found["score"], *found["box"]], [true.score, *true.box], atol=1e-4)
        assert np.array_equal(mask.decode(found["mask"]), mask.decode(true.mask))


@pytest.fixture
def mixed(tmp_path) -> list:
    """Sources of 15 pictures of four sizes, seen at three, in turns, with two files in error between them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index in range(8):
        size = ((40, 36), (36, 40), (80, 72), (50, 50))[index % 4]
        (folder / f"{index}.png").write_bytes(picture(index, size))
    (folder / "1b.png").write_bytes(b"no picture at all")
    members = [(f"{index}.png", picture(20 + index, ((40, 36), (36, 40))[index % 2])) for index in range(7)]
    members.insert(3, ("bad.png", b"neither"))
    return [folder, tar_of(members, tmp_path / "shard.tar")]


def dense(task: str, batch_size: int | None = None, **settings) -> Work:
    torch.manual_seed(1)
    if task == "segmentation":
        model = create_model("upernet", backbone="vmamba_femto_s2", num_classes=4, channels=16)
        about = {"img_size": [48, 192]}
    else:
        model = create_model(
            "maskrcnn", backbone="vmamba_femto_s2", num_classes=3, channels=32, hidden=32, max_per_img=3
        )
        with torch.no_grad():  # scores far enough from each other that rounding does not change their order
            for layer in (model.rpn_head.rpn_cls, model.roi_head.bbox_head.fc_cls):
                layer.weight *= 20
        about = {"sides": [64, 96]}
        settings = {"threshold": 0.05, **settings}
    return work_for(Weights(model.eval(), about, "x"), BatchConfig("", batch_size=batch_size, **settings))


def recorded(monkeypatch, work: Work) -> list[int]:
    """The numbers of samples that it takes together."""
    numbers: list[int] = []
    rows = work.rows
    monkeypatch.setattr(work, "rows", lambda samples: (numbers.append(len(samples)), rows(samples))[1])
    return numbers


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_pictures_seen_at_one_size_go_together_and_are_found_what_they_are_alone(
    mixed, tmp_path, monkeypatch, task, threads
):
    mask = pytest.importorskip("faster_coco_eval.core.mask")
    alone, together = dense(task), dense(task, batch_size=4)
    ones, fours = recorded(monkeypatch, alone), recorded(monkeypatch, together)
    expected = rows_of(alone, mixed, tmp_path / "one")
    found = rows_of(together, mixed, tmp_path / "four", threads=threads)
    assert ones == [1] * 15
    assert fours == [4, 4, 4, 1, 2]  # 8 upright, two of them from larger files, 5 lying, 2 square
    assert [row["file"] for row in found] == [row["file"] for row in expected]
    assert [row["error"] for row in found] == [row["error"] for row in expected]
    assert sum(row["error"] is not None for row in found) == 2
    entries = 0
    for one, four in zip(expected, found, strict=True):
        assert (one["height"], one["width"]) == (four["height"], four["width"])
        for name, numbers in (("regions", ["share"]), ("objects", ["score", "box"])):
            pairs = list(zip(one.get(name) or [], four.get(name) or [], strict=True))
            entries += len(pairs)
            for a, b in pairs:
                assert (a["label"], a["index"]) == (b["label"], b["index"])
                assert np.allclose(*(np.hstack([entry[number] for number in numbers]) for entry in (a, b)), atol=1e-3)
                assert (mask.decode(a["mask"]) != mask.decode(b["mask"])).mean() < 1e-3
    assert entries > 15


def test_few_pictures_wait_for_others_of_their_size(tmp_path, monkeypatch):
    """However many sizes there are, and fewer of large ones."""
    pytest.importorskip("faster_coco_eval.core.mask")
    folder = tmp_path / "sizes"
    folder.mkdir()
    for index in range(24):
        (folder / f"{index:02}.png").write_bytes(picture(index, (32 + 4 * (index % 12), 64)))
    work = dense("segmentation", batch_size=4)
    waiting, most, sample, rows = Counter(), [], work.sample, work.rows

    def counted(image):
        waiting["pictures"] += 1
        most.append(waiting["pictures"])
        return sample(image)

    monkeypatch.setattr(work, "sample", counted)
    monkeypatch.setattr(work, "rows", lambda samples: (waiting.subtract(pictures=len(samples)), rows(samples))[1])
    assert all(row["error"] is None for row in rows_of(work, [folder], tmp_path / "out"))
    assert max(most) == 8
    most.clear()
    monkeypatch.setattr("vmamba.deploy.batch.work._DENSE_PIXELS", 3 * 64 * 50)
    rows_of(work, [folder], tmp_path / "again")
    assert max(most) < 8


def test_dense_batches_where_nobody_chose_them():
    pytest.importorskip("faster_coco_eval.core.mask")
    for settings, on_cpu, elsewhere in (({}, 1, 8), ({"batch_size": 3}, 3, 3), ({"batch_size": 3, "window": 64}, 1, 1)):
        work = dense("segmentation", **settings)
        assert work.batch_size == on_cpu
        work.to("meta")
        assert work.batch_size == elsewhere


def test_a_digest_knows_weights_names_and_preprocessing(weights):
    def digest(**settings):
        return work_for(loaded, BatchConfig("", **settings)).digest()

    loaded = load_weights(weights)
    same = digest()
    assert digest(topk=1, batch_size=2) == same == work_for(load_weights(weights), BatchConfig("")).digest()
    assert len({same, digest(img_size=64), digest(task="features")}) == 3
    loaded.metadata["class_names"][0] = "oak"
    assert digest() != same
    loaded = load_weights(weights)
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[0] += 1e-3
    assert digest() != same


def test_wrong_tasks_and_sizes_are_refused_before_anything_is_read(weights):
    with pytest.raises(CheckpointError, match="not for detection"):
        work_for(load_weights(weights), BatchConfig("", task="detection"))
    model = create_model("upernet", backbone="vmamba_femto_s2", num_classes=4, channels=16).eval()
    with pytest.raises(CheckpointError, match="no features of a whole image"):
        work_for(Weights(model, {}, "x"), BatchConfig("", task="features"))
    with pytest.raises(BatchError, match="windows of 8 pixels are too small"):
        work_for(Weights(model, {}, "x"), BatchConfig("", window=8))


def test_files_with_any_name_and_sources_behind_addresses(bucket, pictures, weights, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes((pictures / "02.png").read_bytes())
    (bucket / "a.png").write_bytes((pictures / "02.png").read_bytes())
    (bucket / "shard.tar").write_bytes((pictures / "shard.tar").read_bytes())
    work = work_for(load_weights(weights), BatchConfig(""))
    rows = rows_of(work, [odd, "s3://bucket"], tmp_path / "out")
    assert len(rows) == 42
    assert rows[0]["file"].endswith("caf\\xe9.png")
    assert rows[0]["scores"] == rows[1]["scores"]
    assert rows[1]["file"] == "s3://bucket/a.png"


def test_an_image_that_the_network_cannot_take_costs_no_other_its_row(pictures, weights, tmp_path, monkeypatch):
    work = work_for(load_weights(weights), BatchConfig("", batch_size=8))
    confidences, culprit = Classifier.confidences, work.sample(Image.open(pictures / "deep" / "03.png"))

    def too_large(self, images):
        if any(torch.equal(image, culprit) for image in images):
            raise RuntimeError("can't allocate\nmemory")
        return confidences(self, images)

    monkeypatch.setattr(Classifier, "confidences", too_large)
    errors = {row["file"]: row["error"] for row in rows_of(work, [pictures / "deep"], tmp_path) if row["error"]}
    name = str(pictures / "deep" / "03.png")
    assert errors == {name: f"{name}: the network cannot take it: can't allocate memory"}
    assert work.batch_size == 8


# --- memory that is short


class Hungry(Work):
    """Takes so many samples, and no dark ones; ``at_first`` none, so often."""

    task = "classification"
    columns = (("size", pa.int64()),)
    source = "x"

    def __init__(self, takes, at_first=0, batch_size=8):
        self.model, self.takes, self.batch_size = torch.nn.Identity(), takes, batch_size
        self.tried, self.at_first = [], at_first

    def fits(self):
        if self.takes == 0:
            raise BatchError("x cannot be used")

    def rows(self, samples):
        self.tried.append(len(samples))
        is_dark = any(np.asarray(sample).max() < 255 for sample in samples)
        if len(samples) > self.takes or len(self.tried) <= self.at_first or is_dark:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [{"size": len(samples)} for _ in samples]


@pytest.fixture
def squares(tmp_path) -> list:
    """A .tar file of 20 white pictures."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(content, "PNG")
    return [tar_of(((f"{index:02}.png", content.getvalue()) for index in range(20)), tmp_path / "white.tar")]


def test_batches_for_which_memory_is_short_become_smaller(squares, tmp_path):
    work = Hungry(takes=3)
    rows = rows_of(work, squares, tmp_path / "out")
    assert [row["error"] for row in rows] == [None] * 20
    assert work.tried == [8, 4, 2, 2, *[2] * 8]
    assert work.batch_size == 2


def test_memory_that_was_short_for_a_while_costs_nothing(squares, tmp_path):
    work = Hungry(takes=8, at_first=4)
    assert [row["error"] for row in rows_of(work, squares, tmp_path / "out")] == [None] * 20
    assert work.tried[:5] == [8, 4, 2, 1, 1]


def test_an_image_that_takes_too_much_memory_makes_no_batch_smaller(squares, tmp_path):
    Image.new("RGB", (8, 8), "black").save(tmp_path / "dark.png")
    work = Hungry(takes=8)
    rows = rows_of(work, [tmp_path / "dark.png", *squares], tmp_path / "out")
    name = tmp_path / "dark.png"
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert {row["error"] for row in rows} == {f"{name}: the network cannot take it: {reason}", None}
    assert work.batch_size == 8
    assert work.tried == [8, 4, 2, 1, 1, 1, 2, 4, 8, 5]


def test_a_worker_without_memory_for_any_image_gives_up_its_unit(squares, tmp_path):
    journal = journal_of(tmp_path / "out", find([str(squares[0])]), 100)
    with pytest.raises(LostError, match=r"^memory ran short: CUDA out of memory\. Tried to allocate 2\.00 GiB\.$"):
        Worker(Hungry(takes=0), journal.output, "model").do(0)
    assert journal.parts() == []


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "memory ran short: MemoryError"), (torch.AcceleratorError("bad"), "its accelerator failed: bad")],
)
def test_a_worker_that_is_of_no_more_use_says_so(squares, tmp_path, monkeypatch, error, message):
    def fail(image):
        raise error

    work = Hungry(takes=8)
    monkeypatch.setattr(work, "sample", fail)
    journal = journal_of(tmp_path / "out", find([str(squares[0])]), 100)
    with pytest.raises(LostError, match=f"^{message}$"):
        Worker(work, journal.output, "model").do(0)


# --- workers that have died


class Deadly(Work):
    """Dies over an all-black image."""

    task = "classification"
    columns = ()
    source = "x"

    def __init__(self):
        self.model = torch.nn.Identity()
        self.batch_size = 4

    def rows(self, samples):
        if not all(np.asarray(sample).any() for sample in samples):
            raise KeyboardInterrupt  # as abruptly as can be in one process
        return [{} for _ in samples]


def test_an_image_that_workers_die_over_is_found_and_left_out(tmp_path):
    for index in range(6):
        Image.new("RGB", (8, 8), "black" if index in (2, 5) else "white").save(tmp_path / f"{index}.png")
    journal = journal_of(tmp_path / "out", find([str(tmp_path)]), 100)
    deaths = 0
    while True:
        try:
            done = Worker(Deadly(), journal.output, "model").do(0, deaths)
            break
        except KeyboardInterrupt:
            deaths += 1
            assert journal.parts() == []
    assert deaths == 2 + 2 * 2
    assert done == Done(0, 6, 2)
    rows = pq.read_table(journal.part(0)).to_pylist()
    assert [row["error"] is not None for row in rows] == [index in (2, 5) for index in range(6)]
    assert "2.png: a worker died each time it was tried" in rows[2]["error"]
    assert files_in(tmp_path / "out") == {"_job/job.json", "_job/plan.parquet", "part-00000000.parquet"}


def test_a_part_that_a_dead_worker_had_written_is_not_computed_again(pictures, weights, tmp_path):
    journal = journal_of(tmp_path, [Extent(Segment("file", str(pictures / name))) for name in ("02.png", "bad.jpg")], 2)
    worker = Worker(work_for(load_weights(weights), BatchConfig("")), str(tmp_path), "model")
    assert worker.do(0) == Done(0, 2, 1)
    before = os.stat(journal.part(0)).st_ino
    assert worker.do(0, deaths=1) == Done(0, 2, 1)
    assert os.stat(journal.part(0)).st_ino == before


def test_a_part_that_cannot_be_written_leaves_nothing(pictures, weights, tmp_path, monkeypatch):
    journal = journal_of(tmp_path, [Extent(Segment("file", str(pictures / "02.png")))], 2)
    worker = Worker(work_for(load_weights(weights), BatchConfig("")), str(tmp_path), "model")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            worker.do(0)
    assert files_in(tmp_path) == {"_job/job.json", "_job/plan.parquet"}
    assert journal.parts() == []


def test_work_ahead_keeps_the_order_and_its_limit():
    from concurrent.futures import ThreadPoolExecutor

    taken = []

    def values():
        for value in range(20):
            taken.append(value)
            yield value

    with ThreadPoolExecutor(3) as pool:
        for place, result in enumerate(ahead(pool, lambda x: x * x, values(), 5, lambda x: x % 4)):
            assert result == (place if place % 4 == 0 else place * place)
            assert len(taken) <= place + 7
    assert len(taken) == 20
