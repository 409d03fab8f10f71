"""The same weights in another place are the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import clipsys
from clipsys.cli import main
from clipsys.errors import ModelError
from clipsys.retrieval import Collection
from tests.retrieval.colours import COLOURS, ColourEncoder


@pytest.fixture
def moved(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection whose model was moved from old/ to new/, beside a model with other weights."""

    def load(spec: str, **_: object) -> ColourEncoder:
        if not Path(spec).is_dir():
            raise ModelError(f"{spec}: there is no such model folder")
        return ColourEncoder(seed=1 if Path(spec).name == "other" else 0)

    monkeypatch.setattr(clipsys, "load", load)
    for name in ("old", "other"):
        (tmp_path / name).mkdir()
    with Collection.create(tmp_path / "c", ColourEncoder(), model=str(tmp_path / "old")) as made:
        made.add(photos, show_progress=False)
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "c"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def model_of(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    return str(json.loads(run(capsys, "info", path, "--json")[1])["model"])


def test_search_names_the_way_and_goes_it(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "search", moved, "red")
    assert (status, f"clipsys index {moved} --model PLACE" in err) == (1, True)
    status, out, _ = run(capsys, "search", moved, "red", "--json", "--model", "new")
    assert (status, json.loads(out)["hits"][0]["caption"]) == (0, "a red square")
    assert model_of(capsys, moved).endswith("/old"), "a search records nothing"
    status, _, err = run(capsys, "search", moved, "red", "--model", "other")
    assert (status, "not of colours-1" in err) == (1, True)


def test_index_records_the_new_place(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "index", moved, "--model", "new")
    assert (status, f"{len(COLOURS)} unchanged" in out) == (0, True)
    assert model_of(capsys, moved) == str(moved.parent / "new")
    assert run(capsys, "search", moved, "red")[0] == 0
    status, _, err = run(capsys, "index", moved, "--model", "other")
    assert (status, "not of colours-1" in err) == (1, True)
    assert model_of(capsys, moved) == str(moved.parent / "new")


def test_migration_to_the_same_weights_says_what_to_do(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "index", moved, "--migrate", "--model", "new")
    assert status == 1
    assert f"clipsys index {moved} --model {moved.parent / 'new'}" in err


def test_reader_that_is_open_follows_the_recorded_place(moved: Path) -> None:
    with Collection.open(moved, ColourEncoder()) as reader, Collection.open(moved) as writer:
        writer.record_model("new")
        writer.remove([1])
        assert len(reader.search("red", k=99)) == len(COLOURS) - 1
        reader.remove([2])
        assert len(writer) == len(COLOURS) - 2
