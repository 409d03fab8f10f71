from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.zeroshot.classifier import ZeroShotClassifier
from clipsys.zeroshot.deciding import UNKNOWN
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
