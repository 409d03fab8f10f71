"""Collections of 0.1.0, which gave some weights of open_clip another activation than theirs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import open_clip
import pytest

import clipsys
from clipsys.cli import main
from clipsys.models.open_clip_models import WEIGHTS_NAME
from clipsys.retrieval import Collection
from tests.conftest import TINY_MODEL
from tests.retrieval.colours import paint_folder

SPEC = "tiny-listed/quick"


@pytest.fixture
def made_before(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection whose vectors were made with GELU by weights that are listed for QuickGELU."""
    weights = {"quick": {"file": str(model_folder / WEIGHTS_NAME), "quick_gelu": True}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-listed", TINY_MODEL)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-listed", weights)
    monkeypatch.setattr("clipsys.models.hub._ask", lambda _: "")
    with Collection.create(tmp_path / "c", clipsys.load(model_folder), model=SPEC) as made:
        made.add(paint_folder(tmp_path / "pictures", num_images=4), show_progress=False)
    return tmp_path / "c"


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert not end.value.code


def test_such_a_collection_is_searched_as_before_and_says_how_to_migrate(
    made_before: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, now = clipsys.load(model_folder), clipsys.load(SPEC)
    assert now.fingerprint != before.fingerprint, "the test needs weights of another activation"
    with caplog.at_level(logging.WARNING), Collection.open(made_before) as opened:
        hit = opened.search("a red square", k=1)[0]
        opened.search("a blue square", k=1)
        images, text = opened.encoder.encode_image([hit.uri]), before.encode_text(["a red square"])
    assert hit.score == pytest.approx(float(images[0] @ text[0]), abs=2e-3)
    assert opened.encoder.fingerprint == before.fingerprint
    warned = [one.getMessage() for one in caplog.records if "QuickGELU" in one.getMessage()]
    assert len(warned) == 1
    assert f"clipsys index {made_before} --migrate --model {SPEC}" in warned[0]


def test_index_accepts_its_model_and_migration_ends_the_difference(
    made_before: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("index", made_before, "--model", SPEC)
    assert "4 unchanged" in capfd.readouterr().out
    run("index", made_before, "--migrate", "--model", SPEC)
    capfd.readouterr()
    run("search", made_before, "red", "--json")
    out, err = capfd.readouterr()
    assert len(json.loads(out)["hits"]) == 4
    assert "QuickGELU" not in err
    with Collection.open(made_before) as opened:
        assert opened.encoder.fingerprint == clipsys.load(SPEC).fingerprint
