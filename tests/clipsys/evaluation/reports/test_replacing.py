"""The folder of a report: whole or not at all, and nothing but a report is replaced."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from clipsys.errors import DataError
from clipsys.evaluation.reports.mistakes import mistake_sheets
from clipsys.evaluation.reports.writing import PAGE_NAME, check_replaceable, write_report
from tests.clipsys.evaluation.reports.made import classification, curves, read


def test_an_earlier_report_is_replaced_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "r", [curves(2)], sheets=mistake_sheets(classification(), read))
    page = write_report(tmp_path / "r", [classification()])
    assert list((page.parent / "sheets").iterdir()) == []
    assert "robustness" not in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_an_empty_folder_becomes_a_report(tmp_path: Path) -> None:
    assert write_report(tmp_path, [classification()]) == tmp_path / "report.html"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_report(tmp_path / "link", [classification()])
    write_report(tmp_path / "link", [classification()])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "report.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


@pytest.mark.parametrize(
    "names",
    [
        ["photo.jpg"],
        ["results.json", "model.pt"],
        ["report.html", "report.md", "results.json", "made-by"],
    ],
)
def test_a_foreign_folder_is_refused(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(DataError, match="is no report; name another folder") as caught:
        check_replaceable(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="exists and is no report"):
        write_report(tmp_path, [classification()])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_report_to_which_something_was_added_is_refused(tmp_path: Path) -> None:
    write_report(tmp_path / "r", [classification()])
    (tmp_path / "r" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other files in it \(notes.txt\)"):
        write_report(tmp_path / "r", [classification()])


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(DataError, match="exists and is no report"):
        write_report(tmp_path / "f", [classification()])
    with pytest.raises(DataError, match=r"cannot be written|no report can be written there"):
        write_report(tmp_path / "f" / "below", [classification()])


def test_a_full_disk_leaves_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path / "r", [classification()])
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}

    def full(path: Path, text: str, **_: str) -> int:
        path.write_bytes(text[:20].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write_report(tmp_path / "r", [curves(2)])
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before
    with pytest.raises(DataError, match="No space left"):
        write_report(tmp_path / "other", [curves(2)])
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_an_earlier_report_returns_where_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path / "r", [classification()])
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DataError, match="Input/output error"):
        write_report(tmp_path / "r", [curves(2)])
    assert "zeroshot" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_what_a_killed_process_left_does_not_matter(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f".r.{number}.partial" / "new").mkdir(parents=True)
    write_report(tmp_path / "r", [classification()])
    assert (tmp_path / "r" / PAGE_NAME).is_file()


def test_folders_have_the_permissions_that_the_user_gives(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    folder = write_report(tmp_path / "r", []).parent
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode
