"""What the version before wrote is opened, searched, resumed and exported as it was then.

``fixtures/made-by-0.1.0.tar.xz`` was written by clipsys 0.1.0 with its own commands, and holds a
model folder, shards, a recipe and its run of one epoch, a collection of a table's pictures with one
item removed and one failure, and ``expected.json``: what that version found in the collection, and
where its run went when it was resumed for a second epoch.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import clipsys
from clipsys.retrieval import Collection, Hit
from tests.training.runs import train

ARCHIVE = Path(__file__).parent / "fixtures" / "made-by-0.1.0.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive, in another place than where it was written."""
    out = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(out, filter="data")
    return out / "made-by-0.1.0"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return document


def _assert_equal_hits(hits: list[Hit], expected: dict[str, Any]) -> None:
    assert [hit.id for hit in hits] == [hit["id"] for hit in expected["hits"]]
    assert [hit.uri for hit in hits] == [hit["uri"] for hit in expected["hits"]]
    assert [hit.metadata for hit in hits] == [hit["metadata"] for hit in expected["hits"]]
    scores = [hit["score"] for hit in expected["hits"]]
    # The query is encoded again, by whichever kernels this machine has.
    np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-4)


def test_a_collection_made_before_is_searched_and_goes_on(
    folder: Path, expected: dict[str, Any]
) -> None:
    encoder = clipsys.load(str(folder / "model"))
    with Collection.open(folder / "collection", encoder) as collection:
        _assert_equal_hits(collection.search("a red square", k=20), expected["hits"])
        filtered = collection.search("a red square", where=["year>=2018"])
        _assert_equal_hits(filtered, expected["filtered"])
        assert len(collection) == 11
        assert [Path(failure.uri).name for failure in collection.failures()] == ["broken.png"]
        assert collection.verify() == []

        more = folder / "more"
        more.mkdir()
        Image.new("RGB", (20, 20), (250, 120, 0)).save(more / "orange.png")
        assert collection.add(more, show_progress=False).added == 1
        assert collection.search(image=more / "orange.png", k=1)[0].id == 13
        assert collection.verify() == []


def test_a_run_made_before_is_resumed_and_exported(
    folder: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The folder and the recipe name their files from where the run was started.
    monkeypatch.chdir(folder)
    done = train("recipe.yaml", "--nproc", "1", "--resume", "schedule.epochs=2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    resumed = expected["resumed"]
    # Another processor rounds differently, three steps long.
    np.testing.assert_allclose(losses, resumed["losses"], rtol=1e-3)
    weights = load_file("run/model/open_clip_model.safetensors")
    for name, key in (("image_projection", "visual.proj"), ("text_projection", "text_projection")):
        np.testing.assert_allclose(weights[key], resumed[name], atol=2e-3)


def test_a_run_folder_made_before_is_loaded_as_a_model(folder: Path) -> None:
    vectors_ND = clipsys.load(str(folder / "run")).encode_text(["a red square", "a blue square"])
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1.0, atol=1e-5)
