"""info, failures, remove, compact, verify and repair on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import clipsys
from clipsys.retrieval import Collection
from tests.retrieval.colours import COLOURS, ColourEncoder, paint_folder
from tests.retrieval.commands.test_index import run
from tests.retrieval.maintenance.test_verification import cut, flip_a_bit, only_file


@pytest.fixture(autouse=True)
def model_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model 3`` is the fake encoder with seed 3."""
    monkeypatch.setattr(clipsys, "load", lambda spec, **_: ColourEncoder(seed=int(spec)))


@pytest.fixture
def folder(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A collection of six images and one failure."""
    table = tmp_path / "t.csv"
    rows = [f"photos/{name}.png,{2000 + n}" for n, name in enumerate(COLOURS)]
    table.write_text("\n".join(["path,year", *rows, "photos/bad.png,2010"]), encoding="utf-8")
    (photos / "bad.png").write_bytes(b"")
    assert run(capsys, "index", tmp_path / "c", table, "--model", "0")[0] == 0
    return tmp_path / "c"


def test_info_says_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "info", folder)
    assert (status, err) == (0, "")
    for words in ("items       6", "colours-0", "1 (1 empty)", "flat, 6 vectors", "exact", "t.csv"):
        assert words in out
    document = json.loads(run(capsys, "info", folder, "--json")[1])
    assert document["failures"] == {"empty": 1}
    assert document["index"]["num_items"] == 6
    assert document["sources"] == [str(folder.parent / "t.csv")]


def test_info_says_the_recall_that_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipsys.retrieval.indexes.planning.EXACT_ITEMS", 1)
    with Collection.open(folder, ColourEncoder()) as photos:
        kind = photos.build_index().kind
    out = run(capsys, "info", folder)[1]
    assert f"{kind}, 1 lists, 6 vectors, generation 2" in out
    effort = json.loads(run(capsys, "info", folder, "--json")[1])["index"]["effort"]
    assert f"image {effort['recall']['image']:.3f}, text {effort['recall']['text']:.3f}" in out


def test_failures_are_listed_and_retried(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "failures", folder)
    assert status == 0
    assert out == f"empty: {photos / 'bad.png'}: the file is empty\n"
    document = json.loads(run(capsys, "failures", folder, "--json")[1])
    assert document[0]["metadata"] == {"year": 2010}
    (photos / "bad.png").write_bytes((photos / "red.png").read_bytes())
    status, out, err = run(capsys, "failures", folder, "--retry")
    assert (status, out) == (0, "")
    assert "1 copied" in err
    assert run(capsys, "failures", folder, "--retry", "--json")[1] == "[]\n"


def test_remove_takes_ids_or_a_filter_and_asks_twice_for_much(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = run(capsys, "remove", folder, "1", "99")
    assert removed == (0, "1 item removed, 5 left\n", "1 id of no item\n")
    status, out, err = run(capsys, "remove", folder, "--where", "year<2003")
    assert (status, out) == (1, "")
    assert "2 of 5 items match" in err
    assert run(capsys, "remove", folder, "--where", "year<2003", "--yes")[1].startswith("2 items")
    for words in ([], ["1", "--where", "year=2004"]):
        assert run(capsys, "remove", folder, *words)[0] == 1
    with Collection.open(folder) as photos:
        assert len(photos) == 3


def test_compact_says_what_it_dropped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "remove", folder, "1", "2")
    status, out, err = run(capsys, "compact", folder)
    assert (status, out.split(",")[0]) == (0, "2 vectors dropped")
    assert "searches may still be reading" in err


def test_verify_and_repair_end_with_a_status(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "verify", folder)
    assert (status, out, err) == (0, f"{folder}: sound\n", "")
    flip_a_bit(only_file(folder, "segments"))
    status, out, err = run(capsys, "verify", folder)
    assert (status, out.count("\n")) == (1, 1)
    assert "SHA-256 differs" in out
    assert "clipsys repair" in err
    document = json.loads(run(capsys, "verify", folder, "--json")[1])
    assert document["sound"] is False
    assert document["faults"][0]["kind"] == "segment"
    status, out, err = run(capsys, "repair", folder)
    assert status == 0
    assert "6 items sent to the failure ledger" in out
    assert run(capsys, "failures", folder, "--retry")[0] == 0
    assert run(capsys, "verify", folder)[0] == 0
    assert json.loads(run(capsys, "repair", folder, "--json")[1])["remaining"] == []


def test_verify_of_a_cut_database_is_a_fault_and_not_a_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(folder / "items.sqlite")
    status, out, _ = run(capsys, "verify", folder)
    assert (status, out.count("\n")) == (1, 1)
    assert "items.sqlite: is cut off" in out
    status, out, err = run(capsys, "repair", folder)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")


def test_index_prunes_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = paint_folder(tmp_path / "many", num_images=20)
    run(capsys, "index", tmp_path / "c", pictures, "--model", "0")
    for number in range(3):
        (pictures / f"{number:04d}.png").unlink()
    assert "17 unchanged\n" in run(capsys, "index", tmp_path / "c", pictures)[1]
    status, _, err = run(capsys, "index", tmp_path / "c", pictures, "--prune")
    assert status == 1
    assert "no longer has 3 of the 20" in err
    status, out, _ = run(capsys, "index", tmp_path / "c", pictures, "--prune", "--yes")
    assert "17 unchanged, 3 pruned" in out


def test_verify_of_no_collection_is_an_error_and_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "verify", str(tmp_path / "none"))
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'none'}: there is no collection here")
