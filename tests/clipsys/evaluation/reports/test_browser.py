"""A report in a real browser, on a desk and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipsys.evaluation.comparison import compare
from clipsys.evaluation.reports.mistakes import mistake_sheets
from clipsys.evaluation.reports.sheets import Sheet, Tile
from clipsys.evaluation.reports.writing import write_report
from tests.clipsys.evaluation.reports.made import HOSTILE, classification, curves, read, retrieval

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uris = [f"{name}/{'long' * 40}.png" for name in HOSTILE]
    first = classification(HOSTILE, uris=uris)
    second = classification(HOSTILE, uris=uris, model="B" * 90, wrong=False)
    results = [first, second, retrieval(HOSTILE[1] + "x" * 300), curves(9)]
    row = [Tile((name,), f"{number}.png") for number, name in enumerate(HOSTILE)]
    sheets = [sheet for one in results for sheet in mistake_sheets(one, read)]
    sheets.append(Sheet("Neighbours", "A long row.", [row[:9], row[3:]], read))
    folder = tmp_path_factory.mktemp("seen") / "report"
    return write_report(folder, results, comparisons=[compare(first, second)], sheets=sheets)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_shows_all_of_itself_and_asks_for_nothing(
    width: int, report: Path, browser: playwright.Browser
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = context.new_page()
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda one: requests.append(one.url))
    page.on("console", lambda one: said.append(one.text))
    page.on("pageerror", lambda one: said.append(str(one)))
    page.on("dialog", lambda one: (said.append(one.message), one.dismiss()))
    page.goto(report.as_uri())
    pictures = page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(pictures) > 30
    assert min(pictures) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "<script>alert(1)</script>" in page.inner_text("main")
    page.locator("summary").click()  # all figures, on demand
    page.get_by_role("cell", name="line 8/4/accuracy@1").wait_for()
    page.get_by_role("link", name="Neighbours").click()
    assert page.evaluate("scrollY") > 1000
    context.close()
    assert [one for one in requests if not one.startswith(("data:", report.as_uri()))] == []
    assert said == []
