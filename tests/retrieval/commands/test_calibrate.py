from __future__ import annotations

import json
from pathlib import Path

import pytest

import clipsys
from tests.retrieval.commands.test_index import run
from tests.retrieval.scenes import SceneEncoder, paint_scenes, scene_captions, write_scene_model


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A collection of scenes, by a model without its captions."""
    monkeypatch.setattr(clipsys, "load", lambda _, **__: SceneEncoder())
    pictures = paint_scenes(tmp_path / "p")
    assert run(capsys, "index", tmp_path / "c", pictures, "--model", "scenes")[0] == 0
    return tmp_path / "c"


def test_captions_from_a_file_are_what_searches_are_judged_by_from_then_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(scene_captions().captions) + "\n\n")
    status, out, err = run(capsys, "calibrate", folder, "--captions", tmp_path / "captions.txt")
    assert status == 0, err
    assert "of captions and 0% of texts that describe no picture keep one" in out
    command = ["search", folder, "--relevant-only", "--json"]
    hits = json.loads(run(capsys, *command, "a red dog")[1])["hits"]
    assert "red-dog-0" in {Path(hit["uri"]).stem for hit in hits}
    found = json.loads(run(capsys, *command, "zebra ledger")[1])
    assert found["hits"] == []
    assert "'zebra', 'ledger'" in found["note"]


def test_index_calibrates_where_the_models_folder_has_captions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_scene_model(tmp_path / "model")
    assert run(capsys, "index", tmp_path / "d", tmp_path / "p", "--model", model)[0] == 0
    assert (tmp_path / "d" / "relevance.npz").is_file()
    assert not (folder / "relevance.npz").exists()
    assert run(capsys, "verify", tmp_path / "d")[0] == 0


def test_a_file_that_is_no_text_is_one_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.txt").write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, "calibrate", folder, "--captions", tmp_path / "captions.txt")
    assert (status, err.count("\n")) == (1, 1)
    assert "captions.txt: the captions cannot be read" in err
    status, _, err = run(capsys, "calibrate", folder, "--captions", tmp_path / "none.txt")
    assert (status, err.count("\n")) == (1, 1)
