"""Whatever way leads to a file, it has one path."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.corpora.real_paths import forget_folders, real_path, real_source
from clipsys.corpora.sources import iterate_source
from tests.conftest import noise_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One image in a folder, to which a link leads."""
    (tmp_path / "img").mkdir()
    noise_image(1).save(tmp_path / "img" / "a.png")
    (tmp_path / "link").symlink_to("img")
    forget_folders()
    return tmp_path / "img" / "a.png"


def test_every_way_to_a_file_gives_its_real_path(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "img" / "b.png").symlink_to("a.png")
    (tmp_path / "img" / "c.jpeg").symlink_to("a.png")
    monkeypatch.chdir(tmp_path / "img")
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = ["a.png", "../img/a.png", "../link/a.png", "b.png", "c.jpeg"]
    assert {real_path(way) for way in [*ways, tmp_path / "link" / ".." / "img" / "a.png"]} == {
        image
    }


def test_every_way_to_a_folder_is_one_source(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = ["img", "img/", "./img", "link", "~/img", f"{tmp_path}/link/../img", image.parent]
    assert {real_source(way) for way in ways} == {str(image.parent)}
    for way in ways:
        assert [record.uri for record in iterate_source(way)] == [str(image)]


def test_link_that_leads_nowhere_or_to_another_kind_of_name_keeps_its_own(
    image: Path, tmp_path: Path
) -> None:
    image.rename(tmp_path / "img" / "3f2a")  # as the blobs of a download cache are called
    for name, target in (("a.png", "3f2a"), ("dangling.png", "gone.png"), ("loop.png", "loop.png")):
        (tmp_path / "img" / name).symlink_to(target)
        assert real_path(tmp_path / "link" / name) == tmp_path / "img" / name
    assert real_path("a\0b").name == "a\0b"


def test_table_that_is_a_link_is_read_beside_the_link(image: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "t.csv").write_text("path\nimg/a.png\n", encoding="utf-8")
    (tmp_path / "t.csv").symlink_to("store/t.csv")
    assert real_source(tmp_path / "t.csv") == str(tmp_path / "t.csv")
    assert [record.uri for record in iterate_source(tmp_path / "t.csv")] == [str(image)]


def test_remote_source_keeps_its_address() -> None:
    assert real_source("https://host/a/../b.tar") == "https://host/a/../b.tar"
