from __future__ import annotations

import logging

import numpy as np
import pytest

from clipsys.errors import DataError
from clipsys.evaluation.results import ClassificationDetails
from clipsys.evaluation.tasks.zeroshot import zeroshot_figures, zeroshot_result


def test_an_unknown_label_is_named() -> None:
    eye = np.eye(2, dtype=np.float32)
    assert zeroshot_figures(eye, eye, ["a", "b"], ["a", "b"])["accuracy@1"] == 1.0
    with pytest.raises(DataError, match="label 'c' is not among the classes"):
        zeroshot_figures(eye, eye, ["a", "b"], ["a", "c"])


def test_the_result_has_the_values_of_the_figures_and_calibration() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(50, 8)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    classes = [str(number) for number in range(8)]
    labels = [str(number) for number in rng.integers(0, 8, 50)]
    vectors = np.eye(8, dtype=np.float32)

    def softmax(scores_NC: np.ndarray) -> np.ndarray:
        powers = np.exp(5 * scores_NC.astype(np.float64))
        return powers / powers.sum(axis=1, keepdims=True)

    uris = [f"{number}.png" for number in range(50)]
    result = zeroshot_result(
        images, vectors, classes, labels, uris=uris, probabilities=softmax, model="m", data="d"
    )
    plain = zeroshot_figures(images, vectors, classes, labels, softmax)
    metrics = result.metrics()
    assert plain.items() <= metrics.items()
    assert metrics["chance_accuracy@5"] == 5 / 8
    details = result.details
    assert isinstance(details, ClassificationDetails)
    highest = softmax(images @ vectors.T).max(axis=1)
    right = details.predicted_N == (images @ vectors.T).argmax(axis=1)
    assert right.all()
    assert details.confidence_N == pytest.approx(highest)
    assert details.reliability is not None
    assert details.reliability.error == result.figures["calibration_error"].value


def test_a_class_without_images_is_named_and_left_out_of_the_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    eye = np.eye(3, dtype=np.float32)
    with caplog.at_level(logging.WARNING, "clipsys"):
        result = zeroshot_result(
            eye[:2], eye, ["a", "b", "c"], ["a", "b"], uris=["1", "2"], model="m", data="d"
        )
    assert "d: 1 of 3 classes have no image (c)" in caplog.text
    assert result.figures["macro_recall"].value == 1.0
    assert result.figures["accuracy@1"].chance == pytest.approx(1 / 3)


def test_two_classes_of_one_vector_tie_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong one of the two counts as better for every image, to the last bit."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(13, 33)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[11] = vectors[2]
    classes = [str(number) for number in range(13)]
    images = np.repeat(vectors[2:3], 17, axis=0) + rng.normal(0, 1e-3, (17, 33)).astype(np.float32)
    labels = ["2", "11"] * 8 + ["2"]
    found = zeroshot_figures(images, vectors, classes, labels)
    assert (found["accuracy@1"], found["accuracy@5"]) == (0.0, 1.0)
    monkeypatch.setattr("clipsys.evaluation.tasks.zeroshot._BLOCK_SCORES", 1)
    assert zeroshot_figures(images, vectors, classes, labels) == found
