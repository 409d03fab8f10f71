from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from clipsys.evaluation.comparison import compare
from clipsys.evaluation.reports.mistakes import mistake_sheets
from clipsys.evaluation.reports.sheets import Sheet, Tile
from clipsys.evaluation.reports.writing import write_report
from clipsys.evaluation.results import Figure
from tests.clipsys.evaluation.reports.made import (
    HOSTILE,
    classification,
    curves,
    read,
    retrieval,
)

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def check_self_contained(self) -> None:
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(set(ids)) == len(ids)
        allowed = {"src", "href", "id", "class", "alt", "title", "lang", "charset", "name"}
        allowed |= {"content", "scope", "tabindex", "aria-label"}
        for tag, attributes in self.elements:
            assert tag not in {"script", "link", "iframe", "object", "form", "base"}
            assert set(attributes) <= allowed
            source, target = attributes.get("src"), attributes.get("href")
            assert source is None or re.match("data:image/(png|jpeg);base64,", source)
            assert target is None or target.removeprefix("#") in ids


def _sheets() -> list[Sheet]:
    own = Tile(("maps",), image=Image.new("RGB", (30, 20)))
    found = [*mistake_sheets(classification(), read), *mistake_sheets(retrieval(), read)]
    return [*found, Sheet("Feature maps", "One image a row.", [[own]], read)]


def _write(folder: Path) -> Path:
    first, second = classification(images=8), classification(images=8, model="B", wrong=False)
    results = [first, second, retrieval(), curves(2)]
    return write_report(folder, results, comparisons=[compare(first, second)], sheets=_sheets())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "new" / "report"
    return _write(folder).parent


def test_the_page_refers_to_nothing_outside(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    page.check_self_contained()
    assert "url(" not in text
    assert "@import" not in text
    shown = "".join(page.texts)
    for part in ("B against A", "Samples that changed", "Most frequent confusions", "Worst"):
        assert part in shown
    plots, tiles = 1 + 1 + 3 + 3 + 1 + 1, 1 + 2 + 1 + 1
    assert sum(tag == "img" for tag, _ in page.elements) == plots + tiles


def test_pictures_of_the_document_are_files_beside_it(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    named = set(re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text))
    found = {path.relative_to(report).as_posix() for path in report.glob("*/*")}
    assert named == found
    for path in report.glob("*/*"):
        with Image.open(path) as picture:
            picture.load()


def test_the_document_has_the_tables_of_the_page(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "| accuracy@1 | 0.5000 | 0.2000 to 0.8000 | 8 | 0.5000 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for before, line in pairwise(rows):
        if re.fullmatch(r"\|( --- \|)+", line):
            assert len(re.findall(r"(?<!\\)\|", before)) == len(re.findall(r"(?<!\\)\|", line))


def test_the_folder_of_changed_samples_is_named_once(tmp_path: Path) -> None:
    uris = [f"/data/cats/{number}.png" for number in range(8)]
    first = classification(images=8, uris=uris)
    second = classification(images=8, uris=uris, model="B", wrong=False)
    folder = write_report(tmp_path / "r", [], comparisons=[compare(first, second)]).parent
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "### Samples that changed, in /data/cats\n" in text
    assert "| 1.png | dog | cat | dog |" in text


def test_figures_are_a_list_with_one_shape(report: Path) -> None:
    *results, comparison = json.loads((report / "results.json").read_text(encoding="utf-8"))
    assert comparison["task"] == "compare"
    assert set(comparison["metrics"]["accuracy@1"]) >= {"first", "second", "interval", "p_value"}
    assert [one["task"] for one in results] == ["zeroshot", "zeroshot", "retrieval", "robustness"]
    for one in results:
        assert set(one) == {
            "task", "model", "data", "protocol", "metrics", "intervals", "samples"
        }  # fmt: skip
        assert set(one["intervals"]) <= set(one["samples"]) <= set(one["metrics"])
        for name, (low, high) in one["intervals"].items():
            assert low <= one["metrics"][name] <= high


def test_what_is_no_number_is_null_in_the_figures(tmp_path: Path) -> None:
    never = {"median_rank": Figure(3.0, 9, None, float("inf")), "f1": Figure(float("nan"), 0)}
    folder = write_report(tmp_path / "r", [replace(classification(), figures=never)]).parent

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "results.json").read_text(encoding="utf-8")
    metrics = json.loads(text, parse_constant=refuse)[0]["metrics"]
    assert metrics["chance_median_rank"] is metrics["f1"] is None
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<td>never</td>" in page


def test_reports_differ_in_their_date_alone(report: Path, tmp_path: Path) -> None:
    again = _write(tmp_path / "again").parent
    for path in sorted(report.rglob("*")):
        if path.is_file():
            other = again / path.relative_to(report)
            ours, theirs = (
                re.sub(rb"\d{4}(\\?-)\d\d\\?-\d\d \d\d:\d\d UTC", b"DATE", one.read_bytes())
                for one in (path, other)
            )
            assert ours == theirs, path.name


def test_hostile_text_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["clipsys", *HOSTILE])
    first = classification(HOSTILE, model=HOSTILE[0], uris=HOSTILE)
    second = classification(HOSTILE, model=HOSTILE[1], uris=HOSTILE, wrong=False)
    found = retrieval(HOSTILE[1], uri=HOSTILE[9])
    sheets = [sheet for one in (first, found) for sheet in mistake_sheets(one, read)]
    sheets.append(Sheet(HOSTILE[0], HOSTILE[1], [[Tile(HOSTILE)]], read))
    written = write_report(
        tmp_path / HOSTILE[0], [first, found], comparisons=[compare(first, second)], sheets=sheets
    )
    page = Page(written.read_text(encoding="utf-8"))
    page.check_self_contained()
    shown = "".join(page.texts)
    for name in (HOSTILE[0], HOSTILE[1], HOSTILE[2], "\\x1b[31m", "\\u202e", "\\ud800", "日本語"):
        assert name in shown
    markdown = (written.parent / "report.md").read_text(encoding="utf-8")
    for text in (shown, markdown):
        assert not {"\x1b", "\x07", "\r", "\t", "\u202e", "\u2066"} & set(text)
    assert "http://" not in markdown
    assert "www.evil" not in markdown
    assert "someone@evil" not in markdown
    rendered = Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))
    rendered_text = "".join(rendered.texts)
    for name in (*HOSTILE[:3], *HOSTILE[10:]):
        assert name in rendered_text
    allowed = {"h1", "h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in rendered.elements} == allowed | {"img", "br"}
    sources = [attributes["src"] for tag, attributes in rendered.elements if tag == "img"]
    assert all(re.fullmatch(r"(plots|sheets)/[\w-]+\.\w+", str(source)) for source in sources)
    json.loads((written.parent / "results.json").read_text(encoding="utf-8"))


def test_an_unreadable_image_is_a_grey_tile(tmp_path: Path) -> None:
    tiles = [
        [Tile(("gone",), "gone.png"), Tile(("torn",), "torn.png"), Tile(("good",), "good.png")]
    ]
    folder = write_report(tmp_path / "r", [], sheets=[Sheet("Tiles", "", tiles, read)]).parent
    colours = []
    for path in (folder / "sheets").iterdir():
        with Image.open(path) as picture:
            pixel = picture.getpixel((5, 5))
            assert isinstance(pixel, tuple)
            colours.append(max(pixel) - min(pixel) < 5)
    assert sorted(colours) == [False, True, True]
