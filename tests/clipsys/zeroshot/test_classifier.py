from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipsys
from clipsys.errors import ConfigError
from tests.conftest import noise_image


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> clipsys.Encoder:
    return clipsys.load(model_folder)


def test_probabilities_are_a_softmax_of_scaled_cosines(encoder: clipsys.Encoder) -> None:
    classes = ["cat", "dog", "bird"]
    classifier = clipsys.ZeroShotClassifier(encoder, classes, ["a {}", "my {}"])
    (prediction,) = classifier.predict([noise_image(0)])
    rows = []
    for name in classes:  # the naive version
        mean = encoder.encode_text([f"a {name}", f"my {name}"]).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    cosine = encoder.encode_image([noise_image(0)])[0] @ np.stack(rows).T
    weight = np.exp(encoder.logit_scale * cosine)
    np.testing.assert_allclose(list(prediction.scores.values()), cosine, atol=1e-5)
    assert list(prediction.scores) == classes
    assert prediction.label == classes[int(cosine.argmax())]
    assert prediction.probability == pytest.approx(weight.max() / weight.sum(), abs=1e-4)


def test_each_class_has_a_probability(encoder: clipsys.Encoder) -> None:
    classifier = clipsys.ZeroShotClassifier(encoder, ["cat", "dog", "{x}"], ["a {} {x}"])
    (prediction,) = classifier.predict([noise_image(0)])
    assert list(prediction.probabilities) == ["cat", "dog", "{x}"]
    assert sum(prediction.probabilities.values()) == pytest.approx(1)
    assert prediction.probability == prediction.probabilities[prediction.label]


def test_a_sigmoid_model_decides_on_each_class_by_itself(
    encoder: clipsys.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(encoder), "logit_bias", -3.0)
    classifier = clipsys.ZeroShotClassifier(encoder, ["cat", "dog"])
    (prediction,) = classifier.predict([noise_image(0)])
    for name, score in prediction.scores.items():
        expected = 1 / (1 + np.exp(3.0 - encoder.logit_scale * score))
        assert prediction.probabilities[name] == pytest.approx(expected)
    assert prediction.probability == max(prediction.probabilities.values())


def test_large_scales_do_not_overflow(
    encoder: clipsys.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(encoder), "logit_scale", 1e9)
    for bias in (None, -3.0):
        monkeypatch.setattr(type(encoder), "logit_bias", bias)
        classifier = clipsys.ZeroShotClassifier(encoder, ["cat", "dog"])
        (prediction,) = classifier.predict([noise_image(0)])
        assert all(0 <= one <= 1 for one in prediction.probabilities.values())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat ", "dog", "cat"], "classes 1 and 3 are both called 'cat'; name each class once"),
        (["cat", " "], "class 2 has an empty name"),
        (
            {"cat": ["cat", "pet"], "dog": ["pet"]},
            r"'pet' .* two classes, 'cat' \(class 1\) and 'dog' \(class 2\)",
        ),
        ({"cat": [], "dog": ["dog"]}, "class 'cat' has no texts"),
        ({"cat": " ", "dog": ["dog"]}, "class 'cat' has an empty text"),
        ("cat,dog", "classes is the text 'cat,dog'; expected a list"),
    ],
)
def test_classes_that_are_not_told_apart_are_refused(
    encoder: clipsys.Encoder, classes: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        clipsys.ZeroShotClassifier(encoder, classes)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        (["cat"], ["{}"], "needs two different classes or more"),
        (["cat", "dog"], ["a photo"], r"template 'a photo': expected one \{\}"),
        (["cat", "dog"], [], r"template '': expected one \{\}"),
    ],
)
def test_a_senseless_question_is_refused(
    encoder: clipsys.Encoder, classes: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        clipsys.ZeroShotClassifier(encoder, classes, templates)


def test_no_images_give_no_predictions(encoder: clipsys.Encoder) -> None:
    assert clipsys.ZeroShotClassifier(encoder, ["cat", "dog"]).predict([]) == []
