"""The app in a real browser: what a person sees and does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(
    browser: playwright.Browser, address: str, request: pytest.FixtureRequest
) -> Iterator[playwright.Page]:
    """The page after loading; whatever it does, it must talk to its own server only."""
    context = browser.new_context(viewport=request.param)
    opened = context.new_page()
    foreign: list[str] = []
    own = (address, "data:", "blob:")
    opened.on("request", lambda r: None if r.url.startswith(own) else foreign.append(r.url))
    failed: list[str] = []
    opened.on("response", lambda r: failed.append(r.url) if r.status >= 400 else None)
    opened.goto(address)
    opened.locator("#query-text input").wait_for()
    yield opened
    width = opened.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert foreign == []
    assert failed == []
    assert width <= request.param["width"], "the page is wider than the screen"


def settle(last: playwright.Locator) -> None:
    """Waits until what a tab or "Options" has just shown, down to ``last``, can be filled in.

    Gradio sets the first values of newly shown components once more, a frame after the code of all
    of them has come: what was filled in by then is lost. A robot is that fast.
    """
    last.wait_for()
    frame = "await new Promise(requestAnimationFrame);"
    last.page.evaluate(f"async () => {{ {frame * 20} }}")


def open_tab(page: playwright.Page, name: str, last: str) -> playwright.Locator:
    """Opens a tab whose last component shows ``last``, a selector."""
    page.get_by_role("tab", name=name).click()
    panel = page.locator("[role=tabpanel]:visible")
    settle(panel.locator(last))
    return panel


def search(page: playwright.Page, text: str) -> None:
    field = page.locator("#query-text input")
    field.fill(text)
    field.press("Enter")
    page.get_by_text(f"for “{text}”").wait_for()


def visible_widths(page: playwright.Page) -> list[int]:
    """Natural widths of the pictures in the visible gallery, once all are loaded."""
    pictures = ".results img"
    page.wait_for_function(
        "selector => { const all = [...document.querySelectorAll(selector)]"
        ".filter(picture => picture.offsetParent);"
        "return all.length && all.every(picture => picture.complete) }",
        arg=pictures,
    )
    widths: list[int] = page.locator(pictures).evaluate_all(
        "all => all.filter(picture => picture.offsetParent).map(picture => picture.naturalWidth)"
    )
    return widths


def test_page_begins_with_a_look_around(page: playwright.Page) -> None:
    widths = visible_widths(page)
    assert len(widths) == 6
    assert min(widths) > 0


def test_search_shows_pictures_and_the_chosen_one_with_its_facts(page: playwright.Page) -> None:
    search(page, "red")
    assert min(visible_widths(page)) > 0
    first = page.locator(".results .thumbnail-item:visible").first
    assert "a red square" in first.inner_text()
    first.click()
    details = page.locator(".details:visible")
    details.get_by_text("red.png").wait_for()
    assert details.get_by_text("a red square").count() == 1
    details.get_by_role("button", name="More like this").click()
    page.get_by_text("like “a red square”").wait_for()
    details.wait_for(state="hidden")
    assert "a red square" not in page.locator(".results:visible").inner_text()


def test_options_take_words_of_the_caption_and_near_duplicates(page: playwright.Page) -> None:
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_role("button", name="Options").click()
    settle(panel.locator(".diverse input"))
    words = panel.locator(".caption-words input, .caption-words textarea")
    words.fill("blue")
    panel.locator(".diverse input").check()
    search(page, "red")
    assert words.input_value() == "blue"
    assert panel.locator(".diverse input").is_checked()
    assert "a blue square" in page.locator(".results .thumbnail-item:visible").first.inner_text()


def test_a_filter_alone_lists_in_the_chosen_order_or_says_why_it_is_empty(
    page: playwright.Page,
) -> None:
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_role("button", name="Options").click()
    settle(panel.locator(".descending input"))
    panel.locator(".sort input").first.click()
    page.get_by_role("option", name="number").click()
    panel.locator(".descending input").check()
    chosen = panel.locator(".filter input, .filter textarea")
    chosen.fill("number<3")
    page.locator("#search-text").click()
    page.get_by_text("3 images for “number<3”").wait_for()
    assert "a blue square" in page.locator(".results .thumbnail-item:visible").first.inner_text()
    chosen.fill("label=Red")
    page.locator("#search-text").click()
    page.get_by_text(
        "Nothing for “label=Red”: no 'label' is 'Red'; the nearest is 'red'"
    ).wait_for()


def test_search_by_image_finds_the_image(page: playwright.Page, photos: Path) -> None:
    panel = open_tab(page, "By image", "#search-image")
    panel.locator("input[type=file]").set_input_files(photos / "blue.png")
    panel.get_by_text("for your image").wait_for()
    assert min(visible_widths(page)) > 0
    assert "a blue square" in page.locator(".results .thumbnail-item:visible").first.inner_text()


def test_classification_names_the_colour(page: playwright.Page, photos: Path) -> None:
    panel = open_tab(page, "Classify", "#probabilities")
    panel.locator("#labels textarea").fill("red, green, blue")
    panel.locator("input[type=file]").set_input_files(photos / "green.png")
    heading = panel.locator("#probabilities [data-testid=label-output-value]")
    heading.wait_for()
    assert heading.inner_text().strip() == "green"


def test_file_that_is_no_image_gets_a_friendly_line(page: playwright.Page, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"not a photo")
    panel = open_tab(page, "Classify", "#probabilities")
    panel.locator("input[type=file]").set_input_files(tmp_path / "holiday.jpg")
    page.get_by_text("The uploaded file: not an image in a known format").wait_for()
    assert "Traceback" not in page.inner_text("body")


def test_about_lists_the_model_and_what_failed(page: playwright.Page) -> None:
    panel = open_tab(page, "About", "table.facts >> nth=0")
    panel.get_by_text("colours-0").first.wait_for()
    panel.get_by_text("broken.jpg: not an image in a known format").wait_for()
