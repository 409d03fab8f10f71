from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clipsys.errors import TrainingError
from clipsys.models import build_model, fingerprint, load_model
from clipsys.training.recipe import ModelConfig
from clipsys.training.starting import initial_model
from clipsys.training.towers import ContrastiveModel, TowerOptions
from tests.conftest import TINY_MODEL


def _model(precision: str = "fp32") -> tuple[ContrastiveModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    parts = build_model(TINY_MODEL, for_training=True)
    model = ContrastiveModel(parts, TowerOptions(precision))
    return model, torch.randn(3, 3, 32, 32), parts.tokenizer(["a", "b c", "d e f"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_float32_unit_vectors_of_open_clip(precision: str) -> None:
    model, image, tokens = _model(precision)
    features = model.eval()(image, tokens)
    expected = model.clip.encode_image(image, normalize=True)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(features.image_BD, expected, atol=tolerance, rtol=0)
    for vectors in (features.image_BD, features.text_BD):
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert features.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)


@pytest.mark.parametrize(("start", "scale"), [(math.log(50), 50.0), (math.log(400), 100.0)])
def test_the_scale_is_clamped_and_can_come_back(start: float, scale: float) -> None:
    model, image, tokens = _model()
    with torch.no_grad():
        model.clip.logit_scale.fill_(start)
    features = model(image, tokens)
    assert features.logit_scale.item() == pytest.approx(scale, rel=1e-4)
    features.logit_scale.backward()
    # The gradient above the bound is that at the bound, not zero.
    assert model.clip.logit_scale.grad.item() == pytest.approx(scale, rel=1e-4)


def test_a_run_can_begin_with_pretrained_weights(model_folder: Path) -> None:
    settings = ModelConfig(architecture=TINY_MODEL, pretrained=str(model_folder))
    parts = initial_model(settings)
    assert fingerprint(parts) == fingerprint(load_model(model_folder))
    warmer = initial_model(settings.model_copy(update={"initial_logit_scale": 20.0}))
    assert warmer.model.logit_scale.exp().item() == pytest.approx(20.0)
    wider = {**TINY_MODEL, "embed_dim": 64}
    with pytest.raises(TrainingError, match="the weights do not fit model") as caught:
        initial_model(ModelConfig(architecture=wider, pretrained=str(model_folder)))
    assert "\n" not in str(caught.value)
