from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import clipsys
from clipsys.errors import ConfigError, DataError
from clipsys.zeroshot.calibration import calibration_error, fit, loss
from clipsys.zeroshot.deciding import Floats, Temperature

_CLASSES = ["cat", "dog", "bird"]


def _labelled(scale: float, images: int = 4_000) -> tuple[Floats, np.ndarray]:
    """Similarities, and labels that are drawn from their softmax at a known scale."""
    draw = np.random.default_rng(0)
    scores_NC = draw.uniform(-0.3, 0.3, (images, 4)).astype(np.float32)
    weight_NC = np.exp(scale * scores_NC)
    share_NC = weight_NC / weight_NC.sum(axis=1, keepdims=True)
    return scores_NC, (share_NC.cumsum(axis=1) < draw.random((images, 1))).sum(axis=1).clip(0, 3)


def test_the_temperature_of_the_labels_is_found() -> None:
    scores_NC, targets_N = _labelled(12.0)
    found = fit(scores_NC, targets_N, Temperature(100.0, None))
    assert found.scale == pytest.approx(12.0, rel=0.08)
    grid = np.linspace(8, 16, 401)
    losses = [loss(scores_NC, targets_N, Temperature(scale, None)) for scale in grid]
    assert found.scale == pytest.approx(grid[int(np.argmin(losses))], abs=0.02)


def test_scale_and_bias_of_a_sigmoid_model_are_found() -> None:
    draw = np.random.default_rng(0)
    scores_NC = draw.uniform(-0.2, 0.4, (3_000, 5)).astype(np.float32)
    targets_N = draw.integers(5, size=3_000)
    scores_NC[np.arange(3_000), targets_N] += 0.15
    found = fit(scores_NC, targets_N, Temperature(60.0, -15.0))
    assert found.bias is not None
    best = loss(scores_NC, targets_N, found)
    for scale in (0.97, 1.0, 1.03):
        for shift in (-0.05, 0.0, 0.05):
            near = Temperature(found.scale * scale, found.bias + shift)
            assert loss(scores_NC, targets_N, near) >= best - 1e-9


def test_the_calibration_error_is_the_gap_of_each_bin() -> None:
    scores_NC, targets_N = _labelled(12.0, 300)
    weight_NC = np.exp(30.0 * scores_NC.astype(np.float64))
    share_NC = weight_NC / weight_NC.sum(axis=1, keepdims=True)
    confidence_N, best_N = share_NC.max(axis=1), share_NC.argmax(axis=1)
    expected = 0.0
    for low in range(15):  # the naive version
        inside = (confidence_N >= low / 15) & (confidence_N < (low + 1) / 15)
        if inside.any():
            accuracy = (best_N == targets_N)[inside].mean()
            expected += inside.mean() * abs(accuracy - confidence_N[inside].mean())
    found = calibration_error(scores_NC, targets_N, Temperature(30.0, None))
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_calibration_is_used_from_then_on(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = clipsys.load(model_folder)
    classifier = clipsys.ZeroShotClassifier(encoder, _CLASSES, cache=False)
    draw = np.random.default_rng(0)
    image_ND = draw.normal(size=(60, encoder.dim)).astype(np.float32)
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    labels = [_CLASSES[number] for number in draw.integers(3, size=60)]
    found = classifier.calibrate(image_ND, labels)
    assert found.loss_after <= found.loss_before
    assert found.error_after < found.error_before
    assert "fitted on 60 images is uncertain" in caplog.text
    scaled = classifier.scores(image_ND).astype(np.float64) / found.temperature
    weight = np.exp(scaled)
    np.testing.assert_allclose(
        classifier.probabilities(image_ND), weight / weight.sum(axis=1, keepdims=True), atol=1e-6
    )
    with pytest.raises(DataError, match="label 'cow' is not one of the classes: cat, dog, bird"):
        classifier.calibrate(image_ND, ["cow"] * 60)
    with pytest.raises(DataError, match="60 images and 1 labels"):
        classifier.calibrate(image_ND, ["cat"])
    several = clipsys.ZeroShotClassifier(encoder, _CLASSES, multi_label=True, cache=False)
    with pytest.raises(ConfigError, match="multi_label=True of a softmax model"):
        several.calibrate(image_ND, labels)
