"""The classifier is open_clip's own, for every kind of tower that people use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import clipsys
from clipsys.zeroshot.templates import TEMPLATES
from tests.conftest import TINY_MODEL, noise_image
from tests.tiny_models import (
    SIGLIP_PREPROCESS,
    coca_config,
    hf_text_config,
    siglip_config,
    write_stock_folder,
    write_text_model,
    write_tokenizer,
)

NAMES = ["cat", "dog", "red square", "blue circle", "star"]


def _config(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "siglip":
        return siglip_config(write_tokenizer(folder / "tokenizer"))
    if kind == "bert":
        return hf_text_config(write_text_model(folder / "text", "bert"))
    return coca_config() if kind == "coca" else TINY_MODEL


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert", "coca"])
def test_vectors_and_predictions_are_those_of_open_clip(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = _config(kind, tmp_path)
    folder = write_stock_folder(tmp_path / "model", config, SIGLIP_PREPROCESS)
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    encoder = clipsys.load(folder)
    sentences = [one.format for one in TEMPLATES["clip"][:5]]
    theirs_DC = open_clip.build_zero_shot_classifier(
        model, encoder.tokenizer, NAMES, sentences, device="cpu"
    )
    images = [noise_image(number) for number in range(20)]
    with torch.no_grad():
        batch = torch.stack([preprocess(image) for image in images])
        expected_NC = model.encode_image(batch, normalize=True) @ theirs_DC

    classifier = clipsys.ZeroShotClassifier(encoder, NAMES, TEMPLATES["clip"][:5], cache=False)
    cosine_C = (classifier.class_CD * theirs_DC.T.numpy()).sum(axis=1)
    assert cosine_C.min() >= 0.9999
    found = classifier.predict(images)
    scores_NC = np.array([list(one.scores.values()) for one in found])
    np.testing.assert_allclose(scores_NC, expected_NC.numpy(), atol=2e-5)
    assert [one.label for one in found] == [NAMES[place] for place in expected_NC.argmax(dim=1)]
