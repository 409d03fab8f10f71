from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import DataError
from clipsys.evaluation.measuring import measure
from clipsys.evaluation.tasks.probes import knn_figures, probe_figures
from clipsys.evaluation.tasks.zeroshot import zeroshot_figures
from tests.conftest import noise_image, write_training_shards


def test_an_unknown_label_is_named() -> None:
    eye = np.eye(2, dtype=np.float32)
    assert zeroshot_figures(eye, eye, ["a", "b"], ["a", "b"])["accuracy@1"] == 1.0
    with pytest.raises(DataError, match="label 'c' is not among the classes"):
        zeroshot_figures(eye, eye, ["a", "b"], ["a", "c"])


def test_a_probe_finds_what_is_linearly_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels = [str(n % 2) for n in range(80)]
    signal = np.array([[float(label), 0.0] for label in labels]) + rng.normal(0, 0.1, (80, 2))
    noise = rng.normal(size=(80, 2))
    found = probe_figures(signal[:60], labels[:60], signal[60:], labels[60:])
    nothing = probe_figures(noise[:60], labels[:60], noise[60:], labels[60:])
    assert found["accuracy@1"] == 1.0
    assert nothing["accuracy@1"] < 0.8


def test_measure_gives_the_documented_document(model_folder: Path, tmp_path: Path) -> None:
    shards = write_training_shards(tmp_path / "s", 24)
    result = measure(model_folder, "retrieval", shards, match="family")
    assert set(result) == {"task", "model", "data", "metrics"}
    assert result["metrics"]["text_to_image/queries"] == 48
    zeroshot = measure(model_folder, "zeroshot", shards)["metrics"]
    assert (zeroshot["classes"], zeroshot["chance_accuracy@1"]) == (4, 0.25)
    assert 0 <= measure(model_folder, "probe", shards)["metrics"]["accuracy@1"] <= 1


def test_images_that_cannot_be_used_are_counted_not_fatal(
    model_folder: Path, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image_folder / "cats" / "bad.png").write_bytes(b"nothing")
    result = measure(model_folder, "zeroshot", image_folder)
    assert result["metrics"]["images"] == 6
    assert "1 images cannot be used: 1 not an image" in caplog.text


def test_unlabelled_images_cannot_be_classified(model_folder: Path, tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no label; expected one folder per class"):
        measure(model_folder, "zeroshot", tmp_path)
    with pytest.raises(DataError, match="four images or more of each class"):
        (tmp_path / "x").mkdir()
        noise_image(0).save(tmp_path / "x" / "a.png")
        (tmp_path / "a.png").unlink()
        measure(model_folder, "probe", tmp_path)


def test_nearest_neighbours_vote_as_a_loop_would_let_them() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [f"class {number}" for number in rng.integers(0, 3, 60)]
    things = [number // 2 for number in range(60)]
    right = 0
    for row in range(60):
        others = [other for other in range(60) if things[other] != things[row]]
        others.sort(key=lambda other: -float(vectors[row] @ vectors[other]))
        votes: dict[str, float] = {}
        for other in others[:20]:
            vote = np.exp(float(vectors[row] @ vectors[other]) / 0.07)
            votes[labels[other]] = votes.get(labels[other], 0.0) + vote
        right += max(votes, key=votes.__getitem__) == labels[row]
    figures = knn_figures(vectors, labels, things)
    assert figures["accuracy@1"] == pytest.approx(right / 60)
    assert figures["chance_accuracy@1"] == max(labels.count(one) for one in set(labels)) / 60
    # Without saying what is the same thing, only the image itself does not vote.
    twins = np.repeat(vectors[::2], 2, axis=0)
    assert knn_figures(twins, [str(number // 2) for number in range(60)])["accuracy@1"] > 0.9


def test_an_image_without_any_neighbour_is_not_classified_by_itself() -> None:
    vectors = np.eye(2, dtype=np.float32)
    assert knn_figures(vectors, ["a", "b"], [0, 0])["images"] == 2
