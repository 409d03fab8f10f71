"""What belongs to a folder of images, and what is left out of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipsys.corpora.folders import count_images
from clipsys.corpora.sources import iterate_source
from clipsys.errors import DataError
from tests.conftest import noise_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image."""
    noise_image(1).save(tmp_path / "a.png")
    return tmp_path


def names(source: Path, **options: object) -> list[str]:
    return [Path(record.uri).name for record in iterate_source(source, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "place",
    ["@eaDir/a.png", ".thumbnails/a.png", "#recycle/a.png", "$RECYCLE.BIN/a.png",
     ".Trash-1000/a.png", "__MACOSX/a.png", "._a.png", "deep/@EADIR/a.png", "lost+found/a.png"],
)  # fmt: skip
def test_what_systems_keep_for_themselves_is_left_out_and_said(
    folder: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    noise_image(2).save(folder / place)
    with caplog.at_level("INFO"):
        assert names(folder) == ["a.png"]
    assert count_images(folder) == 1
    if "." not in place[:1] and not place.startswith("._"):
        assert "1 file or folder is excluded by name" in caplog.text


def test_patterns_are_matched_against_names_or_paths(folder: Path) -> None:
    for place in ("thumb_a.png", "raw/b.png", "kept/raw.png", "deep/raw/c.png"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        noise_image(2).save(folder / place)
    assert names(folder, exclude=("THUMB_*",)) == ["a.png", "c.png", "raw.png", "b.png"]
    assert names(folder, exclude=("raw/*", "thumb_*")) == ["a.png", "c.png", "raw.png"]
    assert names(folder, exclude=("raw", "thumb_*")) == ["a.png", "raw.png"]


def test_collection_inside_a_folder_is_no_part_of_it(folder: Path) -> None:
    (folder / "c" / "segments").mkdir(parents=True)
    for name in ("manifest.json", "writer.lock"):
        (folder / "c" / name).touch()
    noise_image(2).save(folder / "c" / "thumbnail.webp")
    assert names(folder) == ["a.png"]


@pytest.mark.timeout(20)
def test_what_is_no_file_is_a_record_that_fails_or_a_text_that_is_not_there(folder: Path) -> None:
    for name in ("cam.jpg", "a.txt", "a.json"):
        os.mkfifo(folder / name)
    (folder / "dangling.jpg").symlink_to("gone.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "folder.jpg").mkdir()
    found = {Path(record.uri).name: record for record in iterate_source(folder)}
    assert list(found) == ["a.png", "cam.jpg", "dangling.jpg", "loop.jpg"]
    assert found.pop("a.png").captions == ()
    for name, reason in zip(found, ("named pipe", "No such file", "symbolic links"), strict=True):
        with pytest.raises(DataError, match=reason):
            found[name].read()


def test_an_image_is_a_source(folder: Path) -> None:
    (folder / "a.txt").write_text("its caption", encoding="utf-8")
    noise_image(2).save(folder / "b.png")
    (record,) = iterate_source(folder / "a.png")
    assert (record.uri, record.captions) == (str(folder / "a.png"), ("its caption",))
