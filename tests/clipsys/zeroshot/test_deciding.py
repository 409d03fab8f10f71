from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.errors import ConfigError
from clipsys.zeroshot.classifier import ZeroShotClassifier, check_question
from clipsys.zeroshot.deciding import UNKNOWN, Choice, Temperature, decide
from tests.retrieval.colours import ColourEncoder, paint

CLASSES = ("red", "blue", "white")


def classifier(*, bias: float | None = None, **options: Any) -> ZeroShotClassifier:
    encoder: Any = ColourEncoder()
    encoder.logit_bias = bias
    return ZeroShotClassifier(encoder, CLASSES, ["a {} square"], cache=False, **options)


def test_what_is_no_class_is_unknown(tmp_path: Path) -> None:
    paths = [paint(tmp_path / f"{name}.png", name) for name in ("red", "black", "green")]
    from PIL import Image

    image_ND = ColourEncoder().encode_image([Image.open(path) for path in paths])
    assert UNKNOWN not in classifier().decide(image_ND).labels
    found = classifier(background=("a black square", "green")).decide(image_ND)
    assert found.labels == ["red", UNKNOWN, UNKNOWN]
    assert (found.probability_N > 0.5).all()
    found = classifier(unknown_below=0.9).decide(image_ND)
    assert found.labels[0] == "red"
    assert [p < 0.9 for p in found.probability_N] == [one == UNKNOWN for one in found.labels]
    each = classifier(multi_label=True, background=("a black square",)).decide(image_ND)
    assert each.chosen is not None and each.chosen[0][0] == "red" and each.chosen[1] == []
    sigmoid = classifier(bias=-15.0).decide(image_ND)
    logits_NC = 20.0 * sigmoid.scores_NC - 15
    assert sigmoid.probability_NC == pytest.approx(1 / (1 + np.exp(-logits_NC)), abs=1e-5)


def test_synonyms_are_averaged_and_descriptions_stand_as_they_are() -> None:
    encoder: Any = ColourEncoder()
    classes = {"warm": ["red", "yellow"], "cold": "a blue square"}
    made = ZeroShotClassifier(encoder, classes, ["a {} square"], cache=False)
    warm_D = encoder.encode_text(["a red square", "a yellow square"]).mean(axis=0)
    assert made.class_CD[0] == pytest.approx(warm_D / np.linalg.norm(warm_D), abs=1e-6)
    assert made.class_CD[1] == pytest.approx(encoder.encode_text(["a blue square"])[0], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5; expected a probability from 0 to 1"),
        ({"unknown_below": float("nan")}, "unknown_below is nan; expected a probability"),
        ({"background": ["a wall", " "]}, "background has an empty text"),
        ({"classes": ["cat"]}, "needs two different classes or more"),
        ({"classes": ["cat"], "unknown_below": 0.5}, "needs two different classes or more"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    given = dict(options)
    classes = given.pop("classes", ["cat", "dog"])
    with pytest.raises(ConfigError, match=message):
        check_question(classes, "simple", Choice(**given))


def test_one_class_is_enough_where_it_can_be_refused() -> None:
    for choice in (Choice(multi_label=True), Choice(background=("a wall",))):
        assert len(check_question(["cat"], "simple", choice)[0]) == 1
    choice = Choice(unknown_below=0.5)
    assert len(check_question(["cat"], "simple", choice, is_sigmoid=True)[0]) == 1


def test_several_labels_are_those_that_reach_the_threshold() -> None:
    draw = np.random.default_rng(0)
    scores_NC, background_NK = draw.uniform(-1, 1, (50, 4)), draw.uniform(-1, 1, (50, 2))
    names = ["a", "b", "c", "d"]
    for bias in (None, -0.5):
        found = decide(
            scores_NC.astype(np.float32),
            background_NK.astype(np.float32),
            names,
            Temperature(3.0, bias),
            Choice(multi_label=True, threshold=0.6),
        )
        assert found.chosen is not None
        for row_C, back_K, chosen, label in zip(
            scores_NC, background_NK, found.chosen, found.labels, strict=True
        ):  # the naive version
            against = back_K.max() if bias is None else 0.5 / 3.0
            share_C = 1 / (1 + np.exp(-3.0 * (row_C - against)))
            hidden = bias is not None and back_K.max() > row_C.max()
            expected = {n for n, share in zip(names, share_C, strict=True) if share >= 0.6}
            assert set(chosen) == (set() if hidden else expected)
            assert label == (names[int(row_C.argmax())] if chosen else "unknown")
