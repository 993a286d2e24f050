"""What the page answers to a visitor, well-behaved or not, without a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import threading

import gradio as gr
import numpy as np
import pytest
import torch
from app.conftest import CLASSES
from PIL import Image

import vmamba
from vmamba.app import drawing, guard, texts
from vmamba.app.models import Catalogue, Loaded
from vmamba.app.session import RefusedError, Session
from vmamba.app.tabs import TABS, routes
from vmamba.cli import main
from vmamba.errors import CheckpointError, RecipeError
from vmamba.explain.activation_maps import maps_of
from vmamba.explain.class_maps import class_maps
from vmamba.explain.receptive_field import receptive_field
from vmamba.models.checkpoints import save_checkpoint


def event(**data: object) -> gr.EventData:
    return gr.EventData(None, data)


def sent(data: bytes, name: str = "mine.png") -> gr.EventData:
    return event(name=name, size=len(data), data=base64.b64encode(data).decode())


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def session(page) -> Session:
    return page.start(None)[0]


@pytest.fixture
def odd(desk) -> Loaded:
    """A model that sees grey pictures of sides that are no multiples of its patches'."""
    kwargs = {"depths": [1, 1], "dims": [8, 16], "d_state": 2}
    model = vmamba.create_model("vmamba_femto", num_classes=2, in_chans=1, **kwargs)
    metadata = {"img_size": [27, 35], "model_kwargs": kwargs, "crop_pct": 1.0}
    (desk / "odd").mkdir(exist_ok=True)
    save_checkpoint(model, desk / "odd/model.safetensors", metadata)
    return Catalogue(runs=desk).load(f"trained {desk}/odd")


def pixels(address: str) -> np.ndarray:
    """The picture that an address holds."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))


def test_it_begins_with_the_demo_and_every_text_in_both_languages(page, session):
    assert page.catalogue.first == "trained " + str(next(iter(page.catalogue.choices.values())).name)
    assert session.loaded.choice.task == "classification"
    assert (session.stage, session.block, session.grid) == (1, 1, (8, 8))
    for english, chinese in texts.TEXTS.values():
        assert sorted(re.findall(r"{\w+[^}]*}", english)) == sorted(re.findall(r"{\w+[^}]*}", chinese))
        assert re.search(r"[\u4e00-\u9fff]", chinese)
        assert not re.search(r"[\u4e00-\u9fff]", english)


def test_runs_come_first_and_untrained_models_say_so(page, desk, capsys):
    catalogue = Catalogue(runs=desk / "runs")
    assert "broken" in capsys.readouterr().err
    labels = [label for label, _ in catalogue.labels("en")]
    assert labels[0].endswith("demo · classification")
    assert "vmamba_tiny_s1l8 · untrained, random weights" in labels
    assert not any("published" in label for label in labels)
    twice = [catalogue.load("untrained vmamba_femto").model, Catalogue(runs=desk).load("untrained vmamba_femto").model]
    for one, other in zip(*(model.state_dict().values() for model in twice), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError):
        Catalogue([str(desk / "secret.txt")], runs=desk)
    with pytest.raises(RecipeError, match="no published weights"):
        Catalogue(pretrained=["vmamba_femto"], runs=desk)


def test_published_weights_are_offered_once_they_are_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = vmamba.models.registry.ENTRIES["vmamba_tiny_s1l8"].url
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / url.rpartition("/")[2]).touch()
    labels = [label for label, _ in Catalogue(runs=tmp_path).labels("zh")]
    assert labels[0] == "vmamba_tiny_s1l8 · 官方发布权重"
    assert sum("官方发布权重" in label for label in labels) == 1


def test_a_click_shows_the_numbers_of_the_library(page, session):
    session, panel, style = page.choose_patch(session, event(row=2, column=5))
    maps = maps_of(session.recording, session.name, [(2, 5)])
    assert 'data-at-row="2" data-at-column="5"' in panel
    merged = pixels(re.search(r"url\((data:[^)]+)\)", style)[1])
    assert merged.shape == (8, 8, 4)
    expected = maps.merged()[0].numpy()
    assert np.array_equal(merged, drawing.heat_rgba(expected / expected.max()))
    heats = [pixels(address) for address in re.findall(r"url\((data:[^)]+)\)", panel)]
    for k, heat in enumerate(heats):  # what a route has not met is veiled, and nothing else
        assert np.array_equal((heat == (128, 128, 128, 170)).all(2), ~maps.visited[0, k].numpy())
    sizes = maps.routes()[0].sum((1, 2))
    for share in sizes / sizes.sum():
        assert f"{float(share):.0%} of what it hears" in panel


def test_a_click_takes_no_new_pass_through_the_network(page, session, monkeypatch):
    monkeypatch.setattr(type(session.loaded.model), "forward", lambda *_: pytest.fail("a new pass"))
    assert page.choose_patch(session, event(row=0, column=0))[0].recording is session.recording
    assert page.choose_block(session, event(stage="0", block="0"))[0].recording is session.recording


def test_the_patch_stays_in_its_place_when_the_block_changes(page, session):
    session = page.choose_patch(session, event(row=7, column=2))[0]
    assert session.grid == (8, 8)
    finer = page.choose_block(session, event(stage=0, block=0))[0]
    assert (finer.grid, finer.row, finer.column) == ((16, 16), 15, 5)


def test_patches_that_are_cut_off_are_shown_so(page, odd):
    session, canvas, _ = page.choose_block(page.start(None)[0].with_model(odd), event(stage=1, block=0))
    assert (session.seen.size, session.grid, session.cell) == ((35, 27), (4, 5), (8, 8))
    assert f"--rows:4;--columns:5;--down:{8 / 27:.6g};--across:{8 / 35:.6g};aspect-ratio:35/27" in canvas
    assert (session.row, session.column) == (1, 2)  # where (17.5, 13.5) is
    assert canvas.count("--down:") == 1
    for name, count in (("routes", 4), ("memory", 8)):
        assert TABS[name].draw(session).count(f"--down:{8 / 27:.6g};--across:{8 / 35:.6g}") == count
    for name in ("stages", "classes"):
        panel = TABS[name].draw(session)
        assert [float(share) * 27 for share in re.findall("--down:([0-9.]+)", panel)[:2]] == pytest.approx(
            [4, 8], rel=1e-4
        )
    corner = session.with_patch(3, 4)
    finer = page.choose_block(corner, event(stage=0, block=0))[0]
    assert (finer.row, finer.column) == (6, 8)


@pytest.mark.parametrize(
    "choice",
    [{"row": 8, "column": 0}, {"row": -1, "column": 0}, {"row": "x", "column": 0}, {"row": 1.5, "column": 0},
     {"row": [1], "column": 0}, {"row": "9" * 5000, "column": 0}, {"row": True, "column": 0}, {"column": 0}, {}],
)  # fmt: skip
def test_patches_and_blocks_that_do_not_exist_are_refused(page, session, choice):
    with pytest.raises(RefusedError):
        page.choose_patch(session, event(**choice))
    with pytest.raises(RefusedError):
        page.choose_block(session, event(stage=choice.get("row"), block=choice.get("column")))


def test_models_that_are_not_in_the_list_are_refused(page, session, desk):
    for key in ("runs/demo", str(desk / "runs/demo/model.safetensors"), "/etc/passwd", None, 3, ["a"], {"a": 1}):
        with pytest.raises(RefusedError) as caught:
            page.choose_model(session, key)
        assert caught.value.key == "no_model"


def test_a_picture_that_is_sent_in_takes_the_place_of_the_other(page, session):
    mine = page.choose_picture(session, "", sent(png(64, 48)))[0]
    assert mine.picture.size == (64, 48)
    assert np.array_equal(mine.recording.seen.pictures[0], np.full((32, 32, 3), (255, 0, 0)))
    assert mine.number != session.number
    assert page.choose_picture(None, page.catalogue.first, event(example="1"))[0].picture.size == (48, 40)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (sent(b"no picture"), "bad_picture"), (sent(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"), "bad_picture"),
        (sent(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'), "bad_picture"),
        (sent(b""), "bad_picture"), (sent(png(8000, 6000)), "bad_picture"), (event(), "no_data"),
        (event(name="a", size=3, data="not base64!"), "no_data"), (event(data=["a"]), "no_data"),
        (event(data={"path": "/etc/passwd"}), "no_data"), (event(example="99"), "no_data"),
        (event(example="../a.png"), "no_data"), (event(example=-1), "no_data"),
        (event(name="a", size=guard.MOST_BYTES + 1), "too_large"),
        (event(data=base64.b64encode(bytes(guard.MOST_BYTES + 1)).decode()), "too_large"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(page, session, given, key):
    with pytest.raises(RefusedError) as caught:
        page.choose_picture(session, "", given)
    assert caught.value.key == key


def test_refusals_are_told_in_words_and_accidents_without_their_insides(page, session, monkeypatch, capsys):
    choose = _handler(page, "choose_picture")
    with pytest.raises(gr.Error) as caught:
        choose(session, "", sent(b"no picture", "<script>.png"))
    assert '<span lang="en">This picture cannot be used.</span><span lang="zh">无法使用这张图片。</span>' in str(
        caught.value
    )
    assert "&lt;script&gt;.png: not an image" in str(caught.value)
    for error in (CheckpointError, RecipeError, ImportError):
        monkeypatch.setattr(
            "vmamba.app.page.received_picture", lambda sent, error=error: (_ for _ in ()).throw(error("x"))
        )
        with pytest.raises(gr.Error, match=r"This cannot be shown.*<small>x</small>"):
            choose(session, "", sent(png(9, 9)))
    monkeypatch.setattr("vmamba.app.page.received_picture", lambda sent: 1 / 0)
    with pytest.raises(gr.Error) as caught:
        choose(session, "", sent(png(9, 9)))
    assert "ZeroDivisionError" not in str(caught.value)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_names_that_others_chose_are_shown_and_not_run(page, session):
    assert "red &lt;b&gt;" in TABS["prediction"].draw(session)
    assert "red <b>" not in TABS["prediction"].draw(session)


def test_predictions_are_those_of_the_network(page, session):
    panel = TABS["prediction"].draw(session)
    with torch.inference_mode():
        best = session.loaded.model(session.recording.seen.images)[0].softmax(0)
    assert f"{float(best.max()):.1%}</b>" in panel
    assert len(CLASSES) == panel.count('class="bar"')


def test_visitors_at_the_same_time_do_not_see_each_others_pictures(page):
    """Two threads, one model: the recordings are those that each gets alone."""
    pictures = [png(40, 40, "red"), png(40, 40, "blue")]

    def choose(picture: bytes) -> Session:
        return page.choose_picture(None, page.catalogue.first, sent(picture))[0]

    alone = [choose(picture).recording for picture in pictures]
    together: dict[int, list[Session]] = {0: [], 1: []}

    def visit(number: int) -> None:
        together[number] += [choose(pictures[number]) for _ in range(8)]

    visitors = [threading.Thread(target=visit, args=(number,)) for number in together]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    for number, sessions in together.items():
        assert len(sessions) == 8
        for one in sessions:
            assert one.recording.blocks == alone[number].blocks
            for name in one.recording.blocks:
                assert torch.equal(one.recording.scan(name).y, alone[number].scan(name).y)


def test_a_session_holds_one_picture_and_one_pass(session):
    held = [field.name for field in dataclasses.fields(session)]
    assert held == ["loaded", "picture", "number", "recording", "stages", "stage", "block", "row", "column"]


@pytest.mark.parametrize("name", list(TABS))
def test_every_tab_of_a_grey_picture_of_odd_sides_is_finite_and_in_both_languages(page, name, odd, monkeypatch):
    monkeypatch.setattr("vmamba.app.tabs._SIDES", (32, 64))
    session = page.start(None)[0].with_model(odd).with_block(0, 0)
    assert session.grid == (7, 9)
    session = session.with_patch(6, 8)
    panel = TABS[name].draw(session) + routes(session)[1]
    assert "nan" not in re.sub(r"base64,[^)\"]+", "", panel)
    assert panel.count('lang="en"') == panel.count('lang="zh"') > 0


DENSE = {
    "upernet": {"backbone": "vmamba_femto_s2", "num_classes": 4, "channels": 8, "auxiliary_channels": 8},
    "maskrcnn": {"backbone": "vmamba_femto_s2", "num_classes": 4, "channels": 8, "hidden": 16, "score_thr": 0.0},
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_are_explained_as_they_predict(page, name, tmp_path, monkeypatch):
    """At one size, though it is not the one that they were made for; and what is explained is outlined."""
    monkeypatch.setattr("vmamba.app.models._DENSE_SIDE", 64)
    torch.manual_seed(1)
    model = vmamba.create_model(name, img_size=(96, 128), **DENSE[name])
    (tmp_path / "runs/dense").mkdir(parents=True)
    metadata = {"model_kwargs": DENSE[name], "img_size": [96, 128], "sides": [96, 128]}
    save_checkpoint(model, tmp_path / "runs/dense/model.safetensors", metadata)
    loaded = Catalogue(runs=tmp_path / "runs").load(f"trained {tmp_path}/runs/dense")
    session = page.start(None)[0].with_model(loaded)
    session = session.with_picture(session.picture.resize((64, 48)))
    height, width = session.recording.seen.drawn()
    assert (height, width) == (48, 64)
    assert "shown to it in 64×48 pixels" in TABS["prediction"].draw(session)
    explained = class_maps(session.loaded.model, session.recording.seen).regions[0, :height, :width].numpy()
    predictor = session.loaded.predictor
    if name == "upernet":
        labels = predictor.segment(session.picture).labels
        expected = labels == np.bincount(labels.ravel()).argmax()
    else:
        expected = predictor.detect(session.picture, threshold=0.0).masks[0]
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(explained, expected)
    panel = TABS["classes"].draw(session)
    assert "Outlined" in panel
    outlines = re.findall(r'<div style="background-image:url\((data:[^)]+)\)">', panel)
    assert len(outlines) == panel.count('class="stack') == 3
    outline = pixels(outlines[0])
    assert set(np.unique(outline[..., 3])) == {0, 255}
    assert outline.shape[:2] == (384 // 64 * session.seen.height, 384)


def test_outlines_run_along_the_edges():
    region = np.zeros((48, 64), bool)
    region[10:20, 5:30] = True
    outline = drawing.outline_rgba(region)
    assert outline.shape == (288, 384, 4)
    drawn = outline[..., 3] > 0
    assert drawn[60, 30:180].all()
    assert not drawn[70:110, 40:170].any()
    assert not drawn[:50].any()
    assert drawing.outline_rgba(np.ones((500, 400), bool)).shape == (500, 400, 4)


def test_a_detector_that_finds_nothing_says_so(page, tmp_path):
    (tmp_path / "runs/blind").mkdir(parents=True)
    options = {"backbone": "vmamba_femto", "num_classes": 2, "channels": 8, "hidden": 16, "img_size": (64, 64)}
    model = vmamba.create_model("maskrcnn", score_thr=0.999, **options)
    save_checkpoint(model, tmp_path / "runs/blind/model.safetensors")
    loaded = Catalogue(runs=tmp_path / "runs").load(f"trained {tmp_path}/runs/blind")
    session = page.start(None)[0].with_model(loaded)
    assert "The network finds no object in this picture." in TABS["classes"].draw(session)


def test_a_stage_where_nothing_spoke_for_the_answer_says_so(page, session, monkeypatch):
    assert "of which none spoke for it" not in TABS["classes"].draw(session)
    model = session.loaded.model
    silent = model.stages[2].register_forward_hook(lambda _, __, y: y.detach() * 0 + y * 0)
    panel = TABS["classes"].draw(session)
    silent.remove()
    assert "4×4 patches, of which none spoke for it" in panel


def test_a_first_picture_is_for_the_model_that_is_chosen(page):
    """Where there are no examples, or the session has ended meanwhile."""
    session = page.choose_picture(None, "untrained vmamba_femto", sent(png(32, 32)))[0]
    assert session.loaded.choice.name == "vmamba_femto"
    with pytest.raises(gr.Error):
        _handler(page, "choose_picture")(None, "untrained nothing", sent(png(32, 32)))


def test_a_session_that_has_ended_is_told(page):
    redraw = _handler(page, "redraw")
    assert redraw(None, "memory", {})[-1] == {}
    with pytest.raises(gr.Error, match="Choose a picture"):
        redraw(None, "memory", {"memory": 1})


def test_choices_wait_for_each_other(page):
    """Each begins with the session that the last one has left."""
    names = {fn.fn.__name__ for fn in page.blocks.fns.values() if fn.concurrency_id == "choices"}
    assert names == {"choose_model", "choose_picture", "choose_block", "choose_patch"}


def _handler(page, name):
    return next(fn.fn for fn in page.blocks.fns.values() if fn.fn.__name__ == name)


def test_stages_are_numbered_as_in_the_network_where_the_first_do_not_scan(page):
    session, _, network = page.choose_model(page.start(None)[0], "untrained vmamba_pico_local")
    assert re.findall(r'lang="en">stage (\d)', network) == ["4"]
    assert 'data-stage="0" data-block="0" aria-pressed="true" aria-label="Stage 4, block 1"' in network
    for panel in (routes(session)[0], TABS["memory"].draw(session), TABS["field"].draw(session)):
        assert "in stage 4" in panel or "the middle of stage 4" in panel
    expected = receptive_field(session.loaded.model, session.recording.seen.images, 3)
    assert texts.both("field_of", half=expected.side(0.5), most=expected.side(0.9), area=expected.area(0.9)) in panel


def test_charts_put_their_points_where_the_numbers_are():
    line = drawing.Line("a", "#000", [1, 10, 100, 1000], [0.0, 0.5, float("nan"), 1.0])
    svg = drawing.chart([line], "x", "y", log="x", percent=True)
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    (left, bottom), (middle, half), (right, top) = points
    assert half == pytest.approx((bottom + top) / 2, abs=0.1)
    assert (middle - left) / (right - left) == pytest.approx(1 / 3, abs=1e-3)
    assert all(f">{text}</text>" in svg for text in ("0%", "100%", "1", "10", "100", "1 k"))
    assert drawing.chart([drawing.Line("a", "#000", [0], [1])], "x", "y", log="xy") == ""


def test_numbers_and_names_that_are_long(page, session, monkeypatch):
    monkeypatch.setattr("vmamba.app.tabs._SIDES", (32, 64))
    long = dataclasses.replace(session.loaded.choice, name="/home/somebody/" + "very_" * 9 + "long/runs/demo")
    panel = TABS["scaling"].draw(dataclasses.replace(session, loaded=session.loaded._replace(choice=long)))
    assert f"…\u2060{long.name[-25:]}" in panel
    assert long.name[-30:] not in panel
    model = session.loaded.model.stages[1].blocks[1].ss2d
    kept = model.D.detach().clone()
    with torch.no_grad():
        model.D.mul_(1e-9)  # what the patch says itself becomes next to nothing
    says = re.search("bring together is (.*?) times", routes(session.with_picture(session.picture))[0])[1]
    with torch.no_grad():
        model.D.copy_(kept)
    assert re.fullmatch(r"[0-9.]+ [kMG]", says)


def test_a_port_in_use_is_told_in_a_line(page, address, desk, capsys, monkeypatch):
    monkeypatch.chdir(desk)
    port = address.rpartition(":")[2]
    assert main(["explore", "--no-open", "--port", port]) == 1
    assert f"nothing can listen on port {port} of 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["gradio", "starlette.responses"])
def test_without_gradio_the_extra_is_named(missing, capsys, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, missing, None)
    for name in ("page", "guard"):
        monkeypatch.delitem(modules, f"vmamba.app.{name}", raising=False)
    assert main(["explore", "--no-open"]) == 1
    assert 'pip install "vmamba[explore]"' in capsys.readouterr().err
