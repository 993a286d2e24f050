"""The page in a real browser, as a visitor uses it."""

from __future__ import annotations

import base64
import io
import shutil
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from app.test_page import png
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page for one more visitor, and in the end looks at all that their browsers asked for."""
    contexts, asked, answered = [], [], []

    def open_page(language: str = "en-GB", **options):
        contexts.append(browser.new_context(locale=language, viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda response: answered.append((response.status, response.url)))
        page.goto(address)
        page.wait_for_selector('[role="tabpanel"] .stack')
        return page

    yield open_page
    for context in contexts:
        context.close()
    here = urlsplit(address).netloc
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith("data:") and urlsplit(url).netloc != here] == []
    assert [answer for answer in answered if answer[0] >= 400] == []


def click(page, row: int, column: int) -> float:
    """Click on a patch; the seconds until the routes are shown."""
    canvas = page.locator(".canvas")
    rows, columns = (int(canvas.get_attribute(f"data-{name}")) for name in ("rows", "columns"))
    box, start = canvas.bounding_box(), time.perf_counter()
    canvas.click(position={"x": (column + 0.5) / columns * box["width"], "y": (row + 0.5) / rows * box["height"]})
    page.wait_for_selector(f'[data-at-row="{row}"][data-at-column="{column}"]', state="attached")
    return time.perf_counter() - start


def photo(page) -> str:
    """The address of the picture that is shown."""
    return page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--photo')")


def upload(page, name: str, content: bytes) -> None:
    page.set_input_files('input[type="file"]', {"name": name, "mimeType": "image/png", "buffer": content})


def test_a_click_lights_up_the_routes(visit):
    page = visit()
    assert page.locator('[role="tabpanel"] .stack').count() == 4
    before = page.locator('[role="tabpanel"] .heat').nth(1).get_attribute("style")
    merged = page.evaluate("getComputedStyle(document.querySelector('.canvas .heat')).backgroundImage")
    assert click(page, 2, 6) < 10
    assert page.locator('[role="tabpanel"] .heat').nth(1).get_attribute("style") != before
    assert page.evaluate("getComputedStyle(document.querySelector('.canvas .heat')).backgroundImage") != merged
    frame, canvas = page.locator(".canvas .query").bounding_box(), page.locator(".canvas").bounding_box()
    page.wait_for_timeout(200)  # the frame glides
    frame = page.locator(".canvas .query").bounding_box()
    assert (frame["x"] + frame["width"] / 2 - canvas["x"]) / canvas["width"] == pytest.approx(6.5 / 8, abs=0.01)
    page.locator(".canvas").press("ArrowLeft")
    page.wait_for_selector('[data-at-row="2"][data-at-column="5"]', state="attached")
    page.locator('[role="tabpanel"] .stack').nth(3).click(position={"x": 12, "y": 12})
    page.wait_for_selector('[data-at-row="0"][data-at-column="0"]', state="attached")


def test_patches_that_are_cut_off_are_framed_and_clicked_where_they_are(visit):
    """Of 28×28 pixels the last of 4 patches of 8 are half outside of the picture."""
    page = visit()
    page.get_by_label("Model").click()
    page.get_by_role("option", name="vmamba_femto · untrained, random weights").click()
    page.wait_for_selector('.canvas[data-rows="7"]')
    page.get_by_role("button", name="Stage 2, block 1").click()
    page.wait_for_selector('.canvas[data-rows="4"]')
    canvas = page.locator(".canvas")
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 23.5 / 28, "y": box["height"] * 24.5 / 28})
    page.wait_for_selector('[data-at-row="3"][data-at-column="2"]', state="attached")
    page.wait_for_timeout(200)  # the frame glides
    frame = page.locator(".canvas .query").bounding_box()
    assert (frame["x"] - box["x"]) / box["width"] == pytest.approx(16 / 28, abs=0.01)
    assert frame["width"] / box["width"] == pytest.approx(8 / 28, abs=0.01)
    heat = canvas.locator(".heat").evaluate("heat => getComputedStyle(heat).backgroundSize")
    assert "calc" not in heat
    assert [float(side.rstrip("%")) for side in heat.split()] == pytest.approx([100 * 32 / 28] * 2, rel=1e-3)


def test_stage_and_model_can_be_changed(visit):
    page = visit()
    page.get_by_role("button", name="Stage 1, block 1").click()
    page.wait_for_selector('.canvas[data-rows="16"]')
    click(page, 15, 15)
    assert page.locator(".beware").count() == 0
    page.get_by_label("Model").click()
    page.get_by_role("option", name="vmamba_femto_s2 · untrained, random weights").click()
    page.wait_for_selector(".beware")
    assert "random" in page.locator(".beware").inner_text()


def test_a_picture_of_ones_own_is_shown_and_a_bad_file_is_told(visit):
    page = visit()
    before = photo(page)
    upload(page, "red.png", png(50, 50))
    page.wait_for_function(
        "p => getComputedStyle(document.documentElement).getPropertyValue('--photo') != p", arg=before
    )
    shown = photo(page)
    pixels = np.asarray(Image.open(
        io.BytesIO(base64.b64decode(shown.split(",")[1].rstrip(")"))))
    )  # fmt: skip
    assert (pixels == (255, 0, 0)).all()
    click(page, 1, 1)
    upload(page, "bad.png", b"no picture")
    toast = page.get_by_text("This picture cannot be used.")
    toast.wait_for()
    assert "bad.png: not an image" in page.locator(".toast-wrap").inner_text()
    assert "Traceback" not in page.content()
    assert photo(page) == shown
    click(page, 2, 2)


def test_a_dropped_picture_is_taken(visit):
    page = visit()
    before = photo(page)
    page.evaluate(
        """data => {
          const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)), transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "blue.png", { type: "image/png" }));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
        }""",
        base64.b64encode(png(40, 40, "blue")).decode(),
    )
    page.wait_for_function(
        "p => getComputedStyle(document.documentElement).getPropertyValue('--photo') != p", arg=before
    )


def test_two_visitors_do_not_see_each_others_pictures(visit):
    one, other = visit(), visit()
    begun = photo(other)
    upload(one, "red.png", png(50, 50))
    one.wait_for_function("p => getComputedStyle(document.documentElement).getPropertyValue('--photo') != p", arg=begun)
    other.get_by_role("button", name="Stage 1, block 1").click()
    other.wait_for_selector('.canvas[data-rows="16"]')
    click(other, 3, 3)
    click(one, 5, 5)
    assert photo(other) == begun
    assert one.locator(".canvas").get_attribute("data-rows") == "8"
    assert photo(one) != begun


def test_every_tab_opens(visit):
    page = visit()
    for name, sign in (
        ("Memory", ".cards"), ("Stages", ".map"), ("Classes", ".still"), ("Prediction", ".bars"),
        ("Receptive field", ".chart"), ("Scan order", ".walk"),
    ):  # fmt: skip
        page.get_by_role("tab", name=name).click()
        page.wait_for_selector(f'[role="tabpanel"] {sign}:visible')
    page.locator(".examples button").nth(1).click()
    page.get_by_role("tab", name="Prediction").click()
    page.wait_for_selector(".bars:visible")


def test_it_speaks_the_browsers_language_and_another_on_request(visit):
    page = visit("zh-CN")
    page.get_by_role("tab", name="路线").wait_for()
    assert page.locator("h1").inner_text() == "透视 VMamba"
    page.get_by_role("button", name="English").click()
    page.get_by_role("tab", name="Routes").wait_for()
    assert page.locator("h1").inner_text() == "Inside VMamba"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_all_of_it_in_light_and_dark(visit, scheme):
    page = visit(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    canvas = page.locator(".canvas").bounding_box()
    assert canvas["x"] >= 0
    assert 340 <= canvas["width"] <= 390
    chart = page.locator(".chart:visible svg").bounding_box()
    labels = [label.bounding_box() for label in page.locator(".chart:visible svg text").all()]
    assert len(labels) > 8
    assert all(label["x"] >= chart["x"] for label in labels)
    model = page.get_by_label("Model")
    assert model.evaluate("box => getComputedStyle(box).textOverflow") == "ellipsis"
    arrow = page.locator(".dropdown-arrow").first.bounding_box()
    box, padding = model.bounding_box(), model.evaluate("box => parseFloat(getComputedStyle(box).paddingRight)")
    assert box["x"] + box["width"] - padding <= arrow["x"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(n) for n in background[background.index("(") + 1 : -1].split(",")[:3]) < 200) == (scheme == "dark")
