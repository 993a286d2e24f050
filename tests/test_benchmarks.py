"""The benchmarks run, and compare what they say they compare."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tasks.landscapes import make_landscapes
from tasks.shapes import make_shapes

from vmamba.models.registry import load_model
from vmamba.nn import SS2D, VSSBlock
from vmamba.ops import ss2d_scan
from vmamba.tasks.prediction import preprocessing_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PACKAGE = BENCHMARKS.parent / "src" / "vmamba"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks, which find each other as when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def learning(load):
    return load("learning")


@pytest.mark.parametrize("colour", [False, True], ids=["Fashion-MNIST", "CIFAR-10"])
def test_contenders_are_of_one_size(learning, colour):
    makers = {name: partial(learning.coloured, name) for name in learning.COLOURED} if colour else learning.CONTENDERS
    sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in makers.items()}
    assert set(sizes) == {"VMamba", "Swin", "ConvNeXt", "ViT", "ResNet"}
    for name, size in sizes.items():
        assert (0.84 if colour else 0.85) < size / sizes["VMamba"] < 1.15, name


def lesson_of(learning, images, labels, batch):
    """Small images in grey, learned and judged."""
    recipe = dataclasses.replace(learning.RECIPE, batch=batch)
    return learning.Classes((images, labels), (images, labels), tuple("ab"), learning.GREY, recipe, 0)


def test_networks_that_were_kept_see_what_they_learned_from(learning, tmp_path):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    samples = (images, torch.arange(8) % 2)
    recipe = dataclasses.replace(learning.RECIPE, batch=4)
    lesson = learning.Classes(samples, samples, tuple("abcdefghij"), learning.COLOUR, recipe, 4)
    subject = learning.Subject("x", "X", {"VMamba": partial(learning.coloured, "VMamba")}, lesson)
    contenders = learning.run(subject, 0.1, seed=0)
    learning.keep(subject, contenders, tmp_path)
    model, metadata = load_model(tmp_path / "VMamba.safetensors")
    assert metadata["class_names"] == list("abcdefghij")
    pre = preprocessing_of(model, stored=metadata)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    seen = pre.normalise(pre.eval_transform()(picture))
    torch.testing.assert_close(seen, lesson.seen(images[:1])[0], atol=0.03, rtol=0)  # uint8 between
    assert lesson.loss(contenders[0].model, next(lesson.batches())).isfinite()


def test_patterns_learn_from_as_many_images_and_then_for_as_long(learning, load, monkeypatch, tmp_path):
    patterns = load("patterns")
    images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 2
    made, seconds = [], itertools.accumulate(itertools.cycle([0.0, 1.0, 0.0, 2.0]))  # the second takes twice as long
    build = patterns.vmamba.create_model
    monkeypatch.setattr(patterns.vmamba, "create_model", lambda *a, **k: made.append(k["pattern"]) or build(*a, **k))
    monkeypatch.setattr(patterns, "time", SimpleNamespace(process_time=lambda: next(seconds)))
    tallies = {"cross": patterns.Tally(), "spiral": patterns.Tally()}
    lesson = lesson_of(learning, images, labels, 4)
    patterns.add_seed(tallies, lesson, 8, seed=0)
    assert "same time, %" not in patterns.write(tallies, lesson, 8, tmp_path)
    patterns.add_same_time(tallies, lesson, 8, seed=0)
    assert made == ["cross", "spiral", "spiral"]
    assert [(tally.images, tally.seconds) for tally in tallies.values()] == [(32, 4.0), (32, 8.0)]
    assert [used for used, _ in tallies["spiral"].curve] == [8, 16, 24, 32]
    text = patterns.write(tallies, lesson, 8, tmp_path)
    assert "32 images each, 0.8 epochs, one recipe, seeds 0 to 0" in text
    rows = json.loads((tmp_path / "patterns.json").read_text())["tables"]["patterns"]
    assert [row["images_per_second"] for row in rows] == [8, 4]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_a_short_run_learns_and_reports(learning, monkeypatch, tmp_path):
    images, labels = torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 2
    images[labels == 1, :, 10:18, 10:18] = 255
    lesson = lesson_of(learning, images, labels, 16)
    subject = learning.Subject("learning", "squares", learning.CONTENDERS, lesson)
    ticks = itertools.count()  # a step takes 0.025 s, however busy the machine is
    monkeypatch.setattr(learning, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.025))
    contenders = learning.run(subject, 3.0, seed=0, only=["VMamba"])
    table = learning.write(subject, contenders, 3.0, "test", [0], tmp_path)
    assert contenders[0].curve[-1][1] > 0.9
    assert "| VMamba  | 0.74 " in table
    assert "±" not in table
    assert {path.name for path in tmp_path.iterdir()} == {"learning.json", "learning.md", "learning.png"}


def test_several_seeds_give_their_mean_and_spread(learning, monkeypatch, tmp_path):
    images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 2
    subject = learning.Subject("learning", "noise", learning.CONTENDERS, lesson_of(learning, images, labels, 8))
    ticks = itertools.count()
    monkeypatch.setattr(learning, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    contenders = []
    for seed in (3, 4):
        contenders += learning.run(subject, 4, seed, ["VMamba", "ResNet"], clock="processor")
    for contender, score in zip(contenders, (0.5, 0.9, 0.7, 0.8), strict=True):
        contender.scores = {"accuracy": score}
        contender.curve[-1] = (4.0, score)
    text = learning.write(subject, contenders, 4, "held-out", [3, 4], tmp_path, "processor")
    assert "seeds 3, 4 (mean, and standard deviation)" in text
    assert "4 s of one process's time in training each" in text
    first, second = json.loads((tmp_path / "learning.json").read_text())["tables"]["learning"]
    assert (first["network"], second["network"]) == ("ResNet", "VMamba")
    assert first["seeds"] == [0.9, 0.8]
    assert (first["accuracy"], second["accuracy"]) == pytest.approx((0.85, 0.6))
    assert (first["spread"], second["spread"]) == pytest.approx((0.1 / 2**0.5, 0.2 / 2**0.5))
    assert first["curve"][-1] == pytest.approx([4.0, 0.85])


# --- dense.py --------------------------------------------------------------------------------------------------------


def test_backbones_are_of_one_size(load):
    dense = load("dense")
    sizes = {name: sum(p.numel() for p in dense.backbone(name).parameters()) for name in dense.BACKBONES}
    assert set(sizes) == {"VMamba", "Swin", "ConvNeXt", "ResNet"}
    for name, size in sizes.items():
        assert 0.85 < size / sizes["VMamba"] < 1.15, name


@pytest.mark.parametrize(
    ("make", "option", "batch", "scores"),
    [(make_landscapes, "--camvid", 8, ["mIoU", "mAcc"]), (make_shapes, "--bccd", 4, ["AP", "AP50"])],
)
def test_backbones_learn_in_turns_what_is_in_pictures(load, monkeypatch, tmp_path, make, option, batch, scores):
    dense, ticks, seen = load("dense"), itertools.count(), {}
    monkeypatch.setattr(dense, "time", SimpleNamespace(process_time=lambda: next(ticks)))  # a step takes a second
    for kind in (dense.Streets, dense.BloodCells):
        loss = kind.loss

        def watched(self, model, chosen, loss=loss):
            seen.setdefault(model, []).append(chosen)
            return loss(self, model, chosen)

        monkeypatch.setattr(kind, "loss", watched)
    dense.main([option, str(make(tmp_path / "data")), "--tiny", "--minutes", "0.05", "--output", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").glob("*.json")
    rows = json.loads(path.read_text())["tables"]["learning"]
    assert {row["network"] for row in rows} == set(dense.BACKBONES)
    for row in rows:
        assert row["epochs"] == 3 * batch / (12 if option == "--camvid" else 8)
        assert [seconds for seconds, _ in row["curve"]] == [1, 2, 3]
        assert [name for name in row if name in scores] == scores
        assert round(row["curve"][-1][1], 4) == row[scores[0]]
        assert 0 <= row[scores[0]] <= row[scores[1]] <= 1
    first, *others = seen.values()
    assert len(others) == 3
    for batches in others:  # every network learns from the same pictures
        assert len(batches) == len(first) == 3
        for mine, theirs in zip(batches, first, strict=True):
            assert all(torch.equal(a[0], b[0]) for a, b in zip(mine, theirs, strict=True))
    columns = 6 if option == "--camvid" else 5
    assert Image.open(tmp_path / "out" / f"{path.stem}_pictures.png").width == columns * 428 + 8
    assert len({*(tmp_path / "out").iterdir()}) == 4


def test_every_seed_learns_anew_and_the_page_gives_the_spread(load, monkeypatch, tmp_path):
    dense, ticks, seen = load("dense"), itertools.count(), []
    monkeypatch.setattr(dense, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    monkeypatch.setattr(dense, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(1))
    monkeypatch.setattr(dense.BloodCells, "judge", lambda self, model: {"AP": self.seed / 10, "AP50": 0.5})
    loss = dense.BloodCells.loss

    def watched(self, model, batch):
        seen.append((self.seed, batch[0][0], next(model.parameters()).clone()))
        return loss(self, model, batch)

    monkeypatch.setattr(dense.BloodCells, "loss", watched)
    options = ["--tiny", "--minutes", "0.05", "--only", "VMamba", "--seeds", "3", "5", "--output"]
    dense.main(["--bccd", str(make_shapes(tmp_path / "data")), *options, str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "dense_blood_cells.json").read_text())["tables"]["learning"]
    assert (row["seeds"], row["AP"], row["spread"]) == ([0.3, 0.5], 0.4, pytest.approx(0.02**0.5))
    text = (tmp_path / "out" / "dense_blood_cells.md").read_text()
    assert "seeds 3, 5 (mean, and standard deviation)" in text
    assert "| VMamba  | 3.4" in text
    assert "| 40.00     | 14.14    | 50.00 " in text
    assert [seed for seed, *_ in seen] == [3, 3, 3, 5, 5, 5]
    for picture, other in zip(seen[0][1:], seen[3][1:], strict=True):  # other pictures, and other weights at first
        assert picture.shape != other.shape or not torch.equal(picture, other)


def test_data_that_are_not_there_are_named(load, tmp_path, capsys):
    load("dense").main(["--camvid", str(tmp_path / "nowhere"), "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"dense_streets is left out: there is no folder {tmp_path / 'nowhere'}" in said
    assert "dense_blood_cells is left out: its folder was not named" in said
    assert not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit, match="1"):
        load("dense").main(["--camvid", str(tmp_path), "--output", str(tmp_path)])
    assert f"{tmp_path} has no folders images/train and annotations/train" in capsys.readouterr().err


# --- cpu.py and gpu.py -----------------------------------------------------------------------------------------------


def test_figures_know_whether_they_are_met(load):
    runner, page = load("runner"), load("page")
    figures = runner.Figures({})

    def missing() -> tuple[float, str]:
        raise runner.NotMeasuredError("why")

    figures.add("a", 1.0, lambda: (0.5, ""))
    figures.add("b", 1.0, lambda: (0.5, "eager"), more=True)
    figures.add("c", 1.0, missing)
    assert [page.figure_cells(record) for record in figures.records] == [
        ("a", "0.50", "≤ 1", ""),
        ("b", "0.50", "≥ 1  not met", "eager"),
        ("c", "–", "≤ 1", "not measured: why"),
    ]
    assert [record["met"] for record in figures.records] == [True, False, False]


def test_tables_are_aligned_and_leave_empty_columns_out(load):
    rows = [{"model": "a|b", "seconds": 0.5}, {"model": "c", "error": "out of memory"}]
    assert load("page").columns(rows, ["model", "ms", "images/s"]) == [
        "| model | ms     | error         |",
        "| ----- | ------ | ------------- |",
        "| a\\|b  | 500.00 |               |",
        "| c     | –      | out of memory |",
    ]


def test_calls_take_turns_and_long_ones_have_fewer(load, monkeypatch):
    runner, order = load("runner"), []
    monkeypatch.setattr(runner, "seconds_of", lambda call, device, repeats, clock: (order.append(call), call())[1])
    long, short = (lambda: 2.0), (lambda: 0.5)
    seconds = runner.interleave({"long": long, "short": short}, rounds=10, least=1.0, most=7.0)
    assert seconds == {"long": 2.0, "short": 0.5}
    assert order[:6] == [long, short] * 3
    assert [order.count(call) - 1 for call in (long, short)] == [4, 7]  # 2 s a turn, and two of half a second a turn


@pytest.mark.timeout(120)
def test_cpu_benchmark_from_end_to_end(load, monkeypatch, tmp_path, capsys):
    cpu = load("cpu")
    if cpu.available_backends()["native"]:
        pytest.skip("the native backend is absent")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(cpu, "fresh", lambda *arguments: 100.0 + (arguments[1] == "Swin-T"))
    monkeypatch.setattr(cpu.networks, "KERNELS_SHOWN", 1000)  # of so small a network any may be among the longest
    cpu.main(["--tiny", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu.md", "cpu.png"}
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["skipped"] == {}
    assert set(results["tables"]) == {"resolution", "inference", "training", "scans", "profile", "kernels"}
    assert not [row for rows in results["tables"].values() for row in rows if "error" in row]
    figures = {figure["name"]: figure["value"] for figure in results["figures"]}
    assert figures["peak memory, ours / Swin-T, 64²"] == 100 / 101
    assert len(figures) == 9
    assert all(value > 0 for value in figures.values())
    kernels = {row["kernel"] for row in results["tables"]["kernels"]}
    assert kernels & {"_call_scan", "_call_block"}  # which torch's profiler does not see by itself
    assert results["dates"] == dict.fromkeys(results["tables"], results["environment"]["date"])
    bench = cpu.Bench(cpu.SMOKE)
    bench.interleave = lambda calls: dict(zip(calls, (0.5, 0.25), strict=True))
    assert cpu.product_rate(bench) == 2 * 1024**3 / 0.25  # of the faster
    assert "not met" in capsys.readouterr().out


@pytest.fixture
def shelf(load, tmp_path):
    return load("runtimes").Shelf.new(tmp_path, load("networks").TINY)


@pytest.mark.timeout(180)
def test_networks_run_in_processes_of_their_runtimes(load, shelf):
    """Every kind of process, with a network each; the compiled one aside, which takes long to make."""
    runtimes, networks = load("runtimes"), load("networks")
    ours = partial(runtimes.Subject, "VMamba-T", networks.NAMES["VMamba-T"], size=64)
    other = partial(runtimes.Subject, "ResNet-50", networks.NAMES["ResNet-50"], size=64)
    subjects = [
        ours(mode=runtimes.EAGER), ours(mode=runtimes.ORT), ours(mode=runtimes.OPENVINO, precision="int8"),
        ours(mode=runtimes.OPEN), ours(mode=runtimes.PRODUCTS), ours(mode=runtimes.STEP, precision="bfloat16"),
        other(mode=runtimes.CAST, batch=2, precision="bfloat16"), other(mode=runtimes.OPENVINO, batch=2),
    ]  # fmt: skip
    rows = runtimes.race(shelf, subjects, threads=1, rounds=1, least=0.0, most=1.0, say=lambda text: None)
    assert [row.get("error") for row in rows] == [None] * len(subjects)
    assert [row["mode"] for row in rows] == [subject.mode for subject in subjects]
    assert all(row["images_per_second"] == row["batch"] / row["seconds"] for row in rows)
    differences = {(row["mode"], row["precision"]): row.get("difference") for row in rows}
    assert differences[runtimes.PRODUCTS, "float32"] is None
    assert 0 < differences[runtimes.ORT, "float32"] < 1e-4 < differences[runtimes.CAST, "bfloat16"] < 5e-2
    assert differences[runtimes.OPENVINO, "int8"] > 1e-4
    files = {path.name.split("-")[0] for path in shelf.folder.glob("*.onnx")}
    assert files == {networks.NAMES["VMamba-T"], networks.NAMES["ResNet-50"]}


def test_wrong_results_and_lost_processes_are_noted_and_not_timed(load, shelf):
    import numpy as np

    runtimes = load("runtimes")
    subject = runtimes.Subject("ResNet-50", "resnet50", runtimes.EAGER, 64)
    race = partial(runtimes.race, shelf, threads=1, rounds=1, least=0.0, most=1.0, say=lambda text: None)
    np.save(shelf.path(subject, "npy"), np.ones((1, 1000), np.float32))
    (row,) = race([subject])
    assert "its result is off by" in row["error"]
    assert "seconds" not in row
    with runtimes.Worker("eager", shelf, 1) as worker:
        with pytest.raises(runtimes.WorkerError, match="KeyError"):
            worker.ask("run", subject, least=0.0)  # not loaded
        worker.process.kill()
        with pytest.raises(runtimes.WorkerError, match="the process eager ended with status -9"):
            worker.ask("load", subject)


def test_processes_that_wait_must_not_compute(load, monkeypatch):
    runtimes = load("runtimes")
    monkeypatch.setattr(runtimes.time, "sleep", lambda seconds: None)
    used = itertools.count()
    busy = SimpleNamespace(name="busy", seconds_used=lambda: next(used), ask=lambda *_, **__: {"seconds": 1.0})
    subject = runtimes.Subject("a", "a", runtimes.EAGER, 64)
    with pytest.raises(runtimes.WorkerError, match="the process busy waits and uses"):
        runtimes.turns([(busy, subject)], 1, 0, 0)
    calm = SimpleNamespace(name="calm", seconds_used=lambda: 0, ask=lambda *_, **__: {"seconds": 1.0})
    assert runtimes.turns([(calm, subject)], 9, 0, 0) == {subject: 1.0}


def test_a_turn_is_long_enough_and_leaves_its_first_call_out(load, monkeypatch):
    runtimes = load("runtimes")
    ticks = iter([0, 9, 9, 10, 10, 12, 12, 13])  # calls of 9, 1, 2 and 1 seconds
    monkeypatch.setattr(runtimes, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert runtimes.turn(lambda: None, least=13) == 1
    ticks = iter([0, 9])
    assert runtimes.turn(lambda: None, least=5) == 9


def test_the_best_of_every_runtime_is_compared(load):
    best = load("best")

    def rows(case, *found):
        base = {"size": case.size, "batch": case.batch, "precision": case.precision}
        return [base | {"model": model, "mode": mode, "seconds": seconds} for model, mode, seconds in found]

    near, far = best.Case(224, 1, "float32", 1.0), best.Case(768, 1, "float32", 0.9)
    settings = dataclasses.replace(best.FULL, cases=(near, far))
    found = rows(
        near, ("VMamba-T", "eager", 3.0), ("VMamba-T", "OpenVINO", 2.0), ("VMamba-T", best.PRODUCTS, 1.0),
        ("Swin-T", "eager", 5.0), ("Swin-T", "OpenVINO", 2.5), ("DeiT-S", "ONNX Runtime", 4.0),
        ("ResNet-50", "compiled", 1.6),
    )  # fmt: skip
    found.append({"model": "DeiT-S", "mode": "compiled", "error": "no compiler"})
    records = best.figures({"rows best-224": found}, settings)
    values = {record["name"]: (record["value"], record["met"], record.get("note")) for record in records}
    assert values["One image of 224², float32: our best / the best of Swin-T, ConvNeXt-T, DeiT-S"] == (
        0.8, True, "ours OpenVINO; Swin-T OpenVINO"
    )  # fmt: skip
    assert values["One image of 224², float32: our best / ResNet-50's best"] == (
        1.25, False, "ours OpenVINO; ResNet-50 compiled"
    )  # fmt: skip
    assert values["One image of 224², float32: our best / products alone"][:2] == (2.0, False)
    assert values["One image of 768², float32: our best / products alone"][0] is None
    (ours, swin, deit, resnet) = best.by_model(found)
    assert (ours["best"], ours["eager, ms"], ours["products alone, ms"]) == ("OpenVINO", "3,000.00", "1,000.00")
    assert (swin["products alone, ms"], resnet["best"]) == ("–", "compiled")
    assert (deit["error"], deit["ONNX Runtime, ms"]) == ("compiled: no compiler", "4,000.00")


def test_models_of_as_many_operations_are_found(load):
    best = load("best")
    (ours, wanted), *others = best.equals("vmamba_femto_s2", 32, best.FULL)
    assert (ours.model, ours.size) == ("vmamba_femto_s2", 32)
    assert {subject.model for subject, _ in others} == {"mobilenetv4_conv_small", "convnext_atto"}
    for subject, count in others:
        assert subject.size % 8 == 0
        assert abs(count / wanted - 1) <= best.APART


@pytest.mark.timeout(180)
def test_pages_of_the_cpu_keep_sections_that_were_not_run(load, monkeypatch, tmp_path):
    cpu, best = load("cpu"), load("best")
    if cpu.available_backends()["native"]:
        pytest.skip("the native backend is absent")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def raced(shelf, subjects, *_):
        return [subject.row | {"seconds": 0.5, "images_per_second": 2 * subject.batch} for subject in subjects]

    monkeypatch.setattr(best, "race", raced)
    monkeypatch.setattr(best, "peak_mb", lambda shelf, subject, threads: float(subject.size))
    path = tmp_path / "cpu_best.json"
    for names in (["best-64", "int8-64"], ["large", "steps"], ["small"]):
        cpu.main(["--tiny", "--threads", "1", "--output", str(tmp_path), "--sections", *names])
        former = json.loads(path.read_text())
        former["environment"]["date"] = "2026-01-02"
        if names == ["large", "steps"]:  # as pages were once written
            del former["dates"]
        path.write_text(json.dumps(former))
    text = (tmp_path / "cpu_best.md").read_text()
    assert "Of 2026-01-02 or before: “One image of 64², float32”, “One image of 64², int8”, “Training step" in text
    assert "“Small models, one image”" not in text  # which is of the page's day
    results = json.loads((tmp_path / "cpu_best.json").read_text())
    assert results["skipped"] == {}
    assert {"best-64", "int8-64", "large", "grids", "steps", "small"} < set(results["tables"])
    figures = {figure["name"]: figure["value"] for figure in results["figures"]}
    assert all(value is not None for value in figures.values())
    assert figures["ours, memory a pixel at 96² / at 64²"] == pytest.approx(64 / 96)
    assert {path.name for path in tmp_path.iterdir()} == {"cpu_best.json", "cpu_best.md", "cpu_best.png"}
    with pytest.raises(SystemExit, match="there is no section best-65"):
        cpu.main(["--tiny", "--sections", "best-65"])


@pytest.mark.timeout(120)
def test_dense_speed_from_end_to_end(load, monkeypatch, tmp_path):
    dense = load("dense_speed")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(dense, "fresh", lambda *arguments, program: 100.0 + arguments[1].endswith("Swin-T"))
    dense.main(["--tiny", "--processor-time", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "dense_speed.json").read_text())
    assert results["skipped"] == {}
    rows = {(row["network"], row["backbone"]): row for row in results["tables"]["dense"]}
    assert len(rows) == 4
    assert all(row["seconds"] > 0 and row["floor_seconds"] > 0 for row in rows.values())
    figures = {figure["name"]: figure["value"] for figure in results["figures"]}
    assert figures["UPerNet, peak memory, VMamba-T / Swin-T"] == 100 / 101
    ours, swin = (rows["Mask R-CNN", label]["seconds"] for label in ("VMamba-T", "Swin-T"))
    assert figures["Mask R-CNN, time, VMamba-T / Swin-T"] == ours / swin


@pytest.mark.timeout(180)
def test_cpu_benchmark_compares_two_trees(load, tmp_path, capsys):
    """With a copy of the package whose forward pass takes a tenth of a second longer."""
    cpu = load("cpu")
    if cpu.available_backends()["native"]:
        pytest.skip("the native backend is absent")
    slow = tmp_path / "src" / "vmamba"
    shutil.copytree(PACKAGE, slow)
    with (slow / "models" / "vmamba.py").open("a") as file:
        file.write(
            "\nimport time\n_forward = VMamba.forward\n"
            "VMamba.forward = lambda self, x: (time.sleep(0.1), _forward(self, x))[1]\n"
        )
    library = os.environ.get("VMAMBA_NATIVE_LIBRARY")
    library = library or importlib.util.find_spec("vmamba.ops.backends._native").origin
    (tmp_path / "_native.so").symlink_to(Path(library).resolve())
    cpu.main(["--tiny", "--threads", "1", "--rounds", "1", "--against", str(tmp_path / "src")])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    ratios = {row[0]: float(row[3]) for row in rows[2:]}
    assert ratios["resolution, 64, seconds"] < 0.5
    assert ratios["inference, 64, seconds"] < 0.5
    assert 0.5 < ratios["resolution, 64, peak_mb"] < 2
    assert "scans, first scan, seconds" in ratios


@pytest.fixture
def gpu_run(load, tmp_path_factory):
    """Runs gpu.py with tiny models on the CPU; returns the results and the folder."""

    def run(*arguments: str, folder: Path | None = None) -> tuple[dict, Path]:
        folder = folder or tmp_path_factory.mktemp("gpu")
        load("gpu").main(["--device", "cpu", "--output", str(folder), *arguments])
        return json.loads((folder / "gpu.json").read_text()), folder

    return run


def test_counts_tell_of_every_launch(load, monkeypatch, capsys):
    pytest.importorskip("triton")
    scan_counts = load("scan_counts")
    code = scan_counts.Code(("MUFU", "FADD"), registers=32, shared=0, stack=0)
    monkeypatch.setattr(scan_counts, "compile_for_hopper", lambda launch: code)
    # Enough of them for routes to be walked from end to end.
    scan_counts.main(["--batches", "512", "--grid", "14", "--channels", "384", "--tile", "8,64,4,64", "--kernels"])
    kernels = [line.split(" | ")[3] for line in capsys.readouterr().out.splitlines() if line.count("|") == 15]
    assert [*dict.fromkeys(kernels)][2:] == [
        "walk, rows", "walk, columns", "carry, rows", "gradient, rows", "carry, columns", "gradient, columns",
    ]  # fmt: skip


@pytest.mark.timeout(120)  # on one core it takes about fifteen seconds
def test_gpu_benchmark_from_end_to_end(gpu_run, capsys):
    results, folder = gpu_run()
    assert {path.name for path in folder.iterdir()} == {"gpu.json", "gpu.md", "gpu.png"}
    assert results["skipped"] == {}
    tables = results["tables"]
    assert set(tables) == {
        "checks", "rates", "operators", "inference", "training", "latency", "profile", "kernels", "resolution"
    }  # fmt: skip
    errors = {row["error"] for rows in tables.values() for row in rows if "error" in row}
    assert errors == {"mamba-ssm is absent", "there are no graphs on the CPU"}
    figures = {figure["name"]: figure for figure in results["figures"]}
    assert len(figures) == 12
    for name, figure in figures.items():
        if "mamba-ssm" in name:
            assert figure["note"] == "not measured: mamba-ssm is absent"
        assert (figure["value"] is None) == ("mamba-ssm" in name or "memory" in name), name
    page = (folder / "gpu.md").read_text()
    assert all(name in page for name in figures)
    assert "| VMamba-T, torch chain " in page
    assert "VMamba-T, compiled" in capsys.readouterr().out


def test_gpu_benchmark_keeps_what_other_runs_measured(gpu_run):
    before, folder = gpu_run("--sections", "operators")
    after, _ = gpu_run("--sections", "latency", "--modes", "eager", folder=folder)
    assert after["tables"]["operators"] == before["tables"]["operators"]
    assert [row["mode"] for row in after["tables"]["latency"]] == ["eager", "graph"] * 3


def test_gpu_benchmark_keeps_to_its_budget(gpu_run):
    results, folder = gpu_run("--budget", "1", "--sections", "inference")
    assert "inference" not in results["tables"]
    assert "takes about" in results["skipped"]["inference"]
    assert "The section `inference` is incomplete" in (folder / "gpu.md").read_text()


def test_gpu_benchmark_survives_what_fails(gpu_run, load, monkeypatch):
    models, build = load("networks"), load("networks").build

    def fail(name: str, size: int, **options: object) -> torch.nn.Module:
        if "swin" in name:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
        return build(name, size, **options)

    monkeypatch.setattr(models, "build", fail)
    results, _ = gpu_run("--sections", "inference", "--modes", "eager")
    rows = {row["model"]: row for row in results["tables"]["inference"]}
    assert rows["Swin-T"]["error"] == "out of memory"
    assert rows["VMamba-T"]["seconds"] > 0
    notes = {figure["name"]: figure.get("note") for figure in results["figures"]}
    assert notes["inference, 64², batch 2: images/s, ours / Swin-T"] == "not measured: out of memory"
    assert notes["inference, 64², batch 2: images/s, ours / ConvNeXt-T"] == "eager"


def test_gpu_benchmark_does_not_time_what_is_wrong(gpu_run, load, monkeypatch, tmp_path):
    def scan(*arguments: torch.Tensor, **options: str) -> torch.Tensor:
        return ss2d_scan(*arguments, **options) * (1 if options else 1.002)

    monkeypatch.setattr(load("scan_speed"), "ss2d_scan", scan)
    with pytest.raises(SystemExit, match=r"nothing was timed, since our scan fails its check: its .* is wrong, off by"):
        gpu_run(folder=tmp_path)
    assert set(json.loads((tmp_path / "gpu.json").read_text())["tables"]) == {"checks"}


@pytest.mark.timeout(120)  # three processes, of which each imports torch
def test_gpu_benchmark_with_contenders_in_processes(gpu_run, capsys):
    chosen = ["--sections", "inference,profile,resolution", "--modes", "eager"]
    results, _ = gpu_run(*chosen, "--workers", "3")
    assert results["skipped"] == {}
    tables = results["tables"]
    errors = {row["error"] for rows in tables.values() for row in rows if "error" in row}
    assert errors == {"mamba-ssm is absent"}
    models = ["VMamba-T", "Swin-T", "ConvNeXt-T", "DeiT-S"]
    assert [(row["model"], row["size"]) for row in tables["resolution"] if row["seconds"] > 0] == [
        (model, size) for size in (96, 64) for model in models
    ]
    assert {row["kind"] for row in tables["profile"]} > {"scan", "matrix products", "all"}
    assert "VMamba-T, eager, 2 × 64²: ready after" in capsys.readouterr().out


def test_the_same_images_and_weights_are_in_every_process(load, tmp_path):
    gpu, networks, workers, runner = (load(name) for name in ("gpu", "networks", "workers", "runner"))
    entry = networks.Entry(networks.MINE, "eager", 2, 64)
    with workers.Workers(networks.SharedStand, gpu.SMOKE, str(tmp_path / "lock"), limit=1) as found:
        found.prepare([workers.Group((entry,))], lambda: 60, say=lambda text: None)
        here = networks.Stand(runner.Bench(gpu.SMOKE)).prepare(entry)
        assert (found.ready(entry) == here).all()
        assert found.ask("turn", entry, False, 2) > 0
        found.homes[entry].process.kill()
        bench = runner.Bench(gpu.SMOKE, workers=found)
        (row,) = networks.race(bench, [entry])
        assert row["error"] == "the process of VMamba-T, eager, 2 × 64² ended with status -9"
        assert "seconds" not in row
        bench.unfit[networks.MINE] = "its scan is wrong"
        (row,) = networks.race(bench, [entry])
        assert row["error"] == "its scan is wrong"


def test_models_that_disagree_with_themselves_are_not_timed(load):
    gpu, networks, runner = load("gpu"), load("networks"), load("runner")
    first, second = (networks.Entry(networks.MINE, mode, 2, 64) for mode in ("eager", "compiled"))
    logits = torch.ones(2, 3).numpy()
    answers = {first: logits, second: logits * 1.2}
    stand = SimpleNamespace(ready=answers.get, ask=lambda wanted, *asked: {"peak_mb": 5.0, "turn": 0.5}[wanted])
    rows = networks.race(runner.Bench(gpu.SMOKE, workers=stand), [first, second])
    assert (rows[0]["seconds"], rows[0]["images_per_second"], rows[0]["peak_mb"]) == (0.5, 4, 5.0)
    assert rows[1]["error"] == "its result is wrong, off by 2.0e-01"


def test_graphs_take_part_and_give_their_memory_back(load, monkeypatch):
    gpu, networks, runner = load("gpu"), load("networks"), load("runner")
    first, second = (networks.Entry(label, "eager", 2, 64) for label in (networks.MINE, networks.SWIN))
    bench = runner.Bench(gpu.SMOKE)
    stand = networks.Stand(bench)
    monkeypatch.setattr(networks, "stand_of", lambda bench: stand)
    monkeypatch.setattr(stand, "capture", lambda entry: stand.graphs.update({entry: lambda: kept.append(entry)}))
    bench.unfit[networks.SWIN] = "its scan is wrong"
    kept = []
    rows = networks.race(bench, [first, second], graphs=True)
    assert [row["mode"] for row in rows] == ["eager", "graph"] * 2
    assert [row.get("error") for row in rows] == [None, None, "its scan is wrong", "its scan is wrong"]
    assert rows[0]["seconds"] > rows[1]["seconds"] > 0
    assert set(kept) == {first}
    assert not stand.graphs


def test_what_lacks_memory_is_made_ready_when_others_have_gone(load, monkeypatch, tmp_path):
    gpu, networks, runner = load("gpu"), load("networks"), load("runner")
    stand, entry = (
        networks.SharedStand(gpu.SMOKE, str(tmp_path / "lock")),
        networks.Entry(networks.SWIN, "eager", 2, 64),
    )
    (tmp_path / "lock").touch()
    failures, pauses, infer = [], [], networks.Contender.infer
    monkeypatch.setattr(networks.time, "sleep", pauses.append)

    def fail(contender, image):
        if failures:
            raise failures.pop()
        return infer(contender, image)

    monkeypatch.setattr(networks.Contender, "infer", fail)
    failures += [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
    assert stand.ask("prepare", entry).shape == (2, 1000)
    assert pauses == [0, 1, 2]
    pauses.clear()
    failures += [ValueError("of another kind")]
    with pytest.raises(runner.NotMeasuredError, match="ValueError: of another kind"):
        stand.ask("prepare", entry)
    assert (pauses, stand.contenders) == ([0], {})
    pauses.clear()
    failures += [torch.OutOfMemoryError("CUDA out of memory. Tried") for _ in range(20)]
    with pytest.raises(runner.NotMeasuredError, match=r"^out of memory$"):
        stand.ask("prepare", entry)
    assert pauses == [0, *networks.PAUSES]


def test_what_compiles_has_processes_of_its_own(load):
    gpu, networks = load("gpu"), load("networks")
    sections = [section for name, section in gpu.GPU.sections.items() if name != "tune"]
    ahead = [one for section in sections for one in section.ahead(gpu.FULL)]
    groups = networks.groups_of(gpu.FULL, ahead)
    entries = [entry for group in groups for entry in group.entries if isinstance(entry, networks.Entry)]
    assert len(entries) == len(set(entries)) == len({one for one in ahead if isinstance(one, networks.Entry)})
    assert all(len(group.entries) == 1 or {entry.mode for entry in group.entries} == {"eager"} for group in groups)
    assert sum(entry.mode == "compiled" for entry in entries) == 3 * 3 + 2 * 4
    assert not [entry for entry in entries if entry.mode == "compiled" and "," in entry.label]  # another scan
    scans = [case for group in groups for part in group.entries for case in getattr(part, "cases", ())]
    assert sorted(scans, key=str) == sorted({one for one in ahead if isinstance(one, tuple)}, key=str)
    longest = [group for group in groups if not group.nice]
    assert {str(group.entries[0]) for group in longest} == {
        f"{model}, compiled, 128 × 224², training" for model in ("VMamba-T", "Swin-T", "ConvNeXt-T")
    }


def test_what_was_compiled_beside_others_is_kept_when_alone(load):
    networks, compilations = load("networks"), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compilations.append(torch.backends.cudnn.deterministic)
        return graph

    layer = torch.compile(torch.nn.Conv2d(3, 4, 3), dynamic=False, backend=backend)
    for alone in (False, True, False, True):
        with networks.compilers_set(alone):
            assert torch.backends.cudnn.benchmark == alone
            layer(torch.ones(1, 3, 8, 8)).sum().backward()
    assert compilations == [True]


@pytest.fixture
def echoes(load, monkeypatch, tmp_path):
    """`Workers` of a server that does what the names of its entries say, and a function that lets them prepare."""
    source = """
        import os, time
        class Echo:
            def ask(self, wanted, entry, *given):
                if "slow" in entry:
                    time.sleep(60)
                if "bad" in entry:
                    raise ValueError("no\\nwonder")
                if "dies" in entry:
                    print("last words", flush=True)
                    os._exit(3)
                return os.getpid(), os.environ.get("SIGN"), wanted, *given
    """
    (tmp_path / "echo.py").write_text(textwrap.dedent(source))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(str(tmp_path))
    workers = load("workers")
    found = []

    def prepare(*groups, limit=2, left=lambda: 50.0):
        found.append(workers.Workers(load("echo").Echo, limit=limit))
        said = []
        found[-1].prepare([workers.Group(*group) for group in groups], left, said.append)
        return found[-1], said

    yield prepare
    for each in found:
        each.__exit__()
    sys.modules.pop("echo", None)


def test_processes_prepare_what_takes_longest_first_and_keep_it(echoes, load):
    found, said = echoes((("a", "bad", "b"), 1.0), (("c",), 2.0, {"SIGN": "x"}, 5), (("d",), 0.5))
    first, second = found.workers
    assert first.name == "of c"
    assert os.getpriority(os.PRIO_PROCESS, first.process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5
    assert found.ready("c") == (first.process.pid, "x", "prepare")
    assert found.ready("a")[0] == found.ready("b")[0] == second.process.pid
    assert found.ready("d")[0] in (first.process.pid, second.process.pid)  # there may be no more of them
    assert found.ask("turn", "c", 7) == (first.process.pid, "x", "turn", 7)
    with pytest.raises(load("workers").WorkerError, match=r"^ValueError: no$"):
        found.ready("bad")
    assert len(said) == 5
    found.__exit__()
    assert first.has_ended
    assert second.has_ended


def test_processes_that_die_are_noted_and_what_they_had_yet_to_do_is_done(echoes, load):
    found, said = echoes((("a", "dies", "b"),), limit=1)
    assert found.errors == {"dies": "the process of a ended with status 3: last words"}
    assert found.ready("b")[0] != found.ready("a")[0]
    assert said[1] == "  dies: the process of a ended with status 3: last words"
    with pytest.raises(load("workers").WorkerError, match="the process of a ended with status 3: last words"):
        found.ask("turn", "a")


def test_processes_that_are_not_ready_in_time_are_ended(echoes):
    start = time.monotonic()
    groups = (("a",), 1.0), (("b", "slow"), 1.0), (("late",), 60.0)
    found, _ = echoes(*groups, left=lambda: 2.5 + start - time.monotonic())
    assert found.ready("a")
    assert found.errors["late"] == "2 s were left, and it takes about 60 s"
    assert all(found.errors[entry].startswith("its process was not ready after") for entry in ("b", "slow"))
    assert [worker.process.wait(5) for worker in found.workers if worker is not found.homes["a"]] == [-9]


def test_who_fails_takes_no_more_turns_and_the_others_go_on(load):
    runner, rows = load("runner"), {"good": {}, "bad": {}}
    asked = []

    def turn(name: str, repeats: int) -> float:
        asked.append(name)
        if len(asked) == 4:
            raise ValueError("lost")
        return 0.5

    turns = {name: partial(turn, name) for name in rows}
    assert runner.take_turns(turns, 3, 0.0, 9.0, rows) == {"good": 0.5}
    assert rows == {"good": {}, "bad": {"error": "ValueError: lost"}}
    assert asked == ["good", "bad", "good", "bad", "good", "good"]
    with pytest.raises(ValueError, match="lost"):
        asked.clear() or runner.take_turns(turns, 3, 0.0, 9.0)


def test_gpu_benchmark_needs_a_gpu(load, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU") as exit_:
        load("gpu").main([])
    assert isinstance(exit_.value.code, str)  # which makes the exit status 1


def test_gpu_figures_are_ratios_of_the_better_modes(load):
    gpu = load("gpu")

    def row(model: str, mode: str, seconds: float, size: int = 224, **others: object) -> dict:
        return {"model": model, "mode": mode, "size": size, "batch": 4, "seconds": seconds, **others}

    tables = {
        "inference": [
            row("VMamba-T", "eager", 4.0), row("VMamba-T", "compiled", 2.0), row("Swin-T", "eager", 3.0),
            row("Swin-T", "compiled", 5.0), {"model": "ConvNeXt-T", "mode": "eager", "size": 224, "error": "out of it"},
        ],
        "training": [row("VMamba-T", "eager", 1.0, peak_mb=50.0), row("Swin-T", "eager", 1.5, peak_mb=100.0)],
        "latency": [
            row("VMamba-T", "graph", 3.0), row("VMamba-T", "compiled", 1.0), row("Swin-T", "graph", 4.0),
            row("Swin-T", "compiled", 8.0), row("Swin-T", "eager", 1.0),
        ],
        "resolution": [
            row("VMamba-T", "compiled", 40.0, 896), row("VMamba-T", "eager", 80.0, 896), row("VMamba-T", "eager", 4.0),
            row("DeiT-S", "eager", 200.0, 896),
        ],
        "operators": [
            {"scan": "operator", "grid": 56, "channels": 96, "batch": batch, "seconds": 1.0, "share": share,
             "timed": "graph"}
            for batch, share in ((1, 0.1), (128, 0.5))
        ],
    }  # fmt: skip
    settings = gpu.replace(gpu.FULL, size=224, batch=4, compiled_sizes=(896,))
    found = {figure["name"]: figure for figure in gpu.figures(tables, settings)}
    values = {
        name: (figure["value"] and round(figure["value"], 6), figure.get("note")) for name, figure in found.items()
    }
    assert values == {
        "inference, 224², batch 4: images/s, ours / mamba-ssm's scan": (None, "not measured: no run has measured it"),
        "inference, 224², batch 4: images/s, ours / Swin-T": (1.5, "Swin-T eager; VMamba-T compiled"),
        "inference, 224², batch 4: images/s, ours / ConvNeXt-T": (None, "not measured: out of it"),
        "training step, 224², batch 4: images/s, ours / mamba-ssm's scan": (
            None,
            "not measured: no run has measured it",
        ),
        "training step, 224², batch 4: images/s, ours / Swin-T": (1.5, "eager"),
        "training step, 224², batch 4: images/s, ours / ConvNeXt-T": (None, "not measured: no run has measured it"),
        "inference, 896²: images/s, ours / Swin-T": (None, "not measured: no run has measured it"),
        "inference, 896²: images/s, ours / DeiT-S": (5.0, "DeiT-S eager; VMamba-T compiled"),
        "time a pixel, ours, 896² / 224²": (1.25, "eager"),
        "scan, stage 1: bytes of u, projections and y a second / copy rate": (0.5, "56² × 96, batch 128, graph"),
        "peak training memory, 224², batch 4: ours / Swin-T": (0.5, "eager"),
        "latency, batch 1, 224²: ours / Swin-T, same mode": (0.75, "graph"),
    }
    assert [name for name, figure in found.items() if figure["met"]] == [
        name for name in found if ("Swin-T" in name and "896" not in name) or "DeiT" in name or "scan, stage" in name
    ]


def test_the_released_operator_is_ours_step_by_step(load):
    yardsticks, scans = load("scan_speed"), load("scan_speed")
    inputs = scans.scan_inputs(2, 4, 5, 32, "cpu", torch.float64)
    expected = inputs.run(ss2d_scan, torch.float64)
    found = inputs.run(yardsticks.released_with(yardsticks.plain_scan), torch.float64)
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_a_replaced_scan_is_used_in_the_block_only(load):
    yardsticks, calls = load("scan_speed"), []

    def scan(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(options)
        return yardsticks.plain_scan(*arguments, **options)

    layer, x = SS2D(32).eval(), torch.randn(1, 4, 3, 32)
    with torch.no_grad():
        expected = layer(x)
        with yardsticks.replaced_scan(scan):
            torch.testing.assert_close(layer(x), expected)
        assert len(calls) == 1
        layer(x)
    assert len(calls) == 1


def test_compiled_code_for_a_replaced_scan_is_kept(load):
    yardsticks = load("scan_speed")
    layer, x = SS2D(32).eval(), torch.randn(1, 4, 3, 32)
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, dynamic=False, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            with yardsticks.replaced_scan(yardsticks.plain_scan):
                torch.testing.assert_close(compiled(x), layer(x))
    assert len(compilations) == 1


def test_least_bytes_count_every_layer_of_a_block(load):
    gpu, models, runner = load("gpu"), load("networks"), load("runner")
    bench = runner.Bench(gpu.SMOKE)
    bench.copy_rate = 4.0

    block, x = VSSBlock(32), torch.randn(2, 4, 4, 32)
    n, projected = x.numel(), 2 * 4 * 4 * 4 * (2 + 2)
    products = 2 * (2 * n + 32 * 32) + 2 * (5 * n + 32 * 128) + n + 32 * 4 * (2 + 2) + projected
    elementwise = 2 * 3 * n + 2 * n + 2 * 4 * n  # two sums, SiLU, GELU of the MLP
    contender = models.Contender(block, block, None, bench)
    least = gpu.least_bytes(bench, contender, x, training=False)
    assert {kind: row["floor_seconds"] * 4 for kind, row in least.items()} == {
        kind: row["bytes"] for kind, row in least.items()
    }
    assert {kind: row["bytes"] for kind, row in least.items()} == {
        "matrix products": 2 * products,
        "elementwise": 2 * elementwise,
        "convolutions": 2 * (2 * n + 32 * 9),
        "normalisation": 2 * 3 * 2 * n,
        "scan": 2 * (2 * n + projected),
    }


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("scan_kernel", "scan"),
        ("triton_poi_fused_add_native_layer_norm_3", "elementwise"),
        ("triton_per_fused__to_copy_native_layer_norm_1", "normalisation"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(...)", "normalisation"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl(...)>", "elementwise"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "matrix products"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, ...>>", "sums"),
        ("something_else", "the rest"),
    ],
)
def test_kernels_are_known_by_their_names(load, kernel, kind):
    gpu, models = load("gpu"), load("networks")
    assert models.kind_of(kernel, gpu.KINDS | {"scan": ("vmamba::", "scan_kernel")}) == kind


def test_tuning_tries_configurations(load, monkeypatch):
    tuning, runner, gpu = load("tuning"), load("runner"), load("gpu")
    monkeypatch.setattr(tuning, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1))
    monkeypatch.setattr(tuning, "compile_trial", lambda trial: "too large" if trial.configuration.run == 16 else None)
    monkeypatch.setattr(tuning.Trial, "call", lambda trial, batch: lambda: None)
    bench = runner.Bench(gpu.replace(gpu.FULL, scans=((7, 768, (1, 128)), (14, 384, (1, 128)))))
    fastest = tuning.Configuration(run=8, block=32, warps=2)
    monkeypatch.setattr(
        runner.Bench,
        "interleave",
        lambda self, calls: {trial: 1.0 + (trial.configuration != fastest) for trial in calls},
    )
    groups = [part for _, part in tuning.tuning(bench, prepare=lambda call: call)]
    assert [(rows[0]["pass"], rows[0]["grid"]) for rows in groups] == [
        ("scan", 7), ("gradient", 7), ("scan", 14), ("gradient", 14)
    ]  # fmt: skip
    assert {rows[0]["configuration"] for rows in groups} == {repr(fastest)}
    assert any(row.get("error") == "too large" for rows in groups for row in rows)


def test_pages_of_exports_keep_the_rows_of_other_runs(load, monkeypatch, tmp_path):
    exports = load("exports")
    found = {
        "vmamba_nano": ["7", "", "1e-06"],
        "vmamba_femto": ["3", "99", "1e-07"],
        "vmamba_pico_s2": ["", "", "none"],
    }
    monkeypatch.setattr(exports, "write", lambda name, form, seconds: [name, form, *found[name]])
    where = ["--output", str(tmp_path), "--formats"]
    assert exports.main([*where, "torch", "--models", "vmamba_femto", "vmamba_nano"]) == 0
    found["vmamba_femto"] = ["4", "88", "2e-07"]
    assert exports.main([*where, "onnx", "torch", "--models", "vmamba_femto", "vmamba_pico_s2"]) == 1
    rows = exports.read(tmp_path / "exports.md")
    assert list(rows) == [
        ("vmamba_nano", "torch"), ("vmamba_pico_s2", "onnx"), ("vmamba_pico_s2", "torch"), ("vmamba_femto", "onnx"),
        ("vmamba_femto", "torch"),
    ]  # fmt: skip
    assert rows["vmamba_femto", "torch"] == ["vmamba_femto", "torch", "4", "88", "2e-07"]
    assert rows["vmamba_nano", "torch"] == ["vmamba_nano", "torch", "7", "", "1e-06"]
