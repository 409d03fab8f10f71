from __future__ import annotations

from typing import Any

import pytest
import torch

from clipsys.inference import int8
from clipsys.inference.image_tower import image_encoder, int8_image_encoder
from clipsys.models.open_clip_models import build_model
from tests.conftest import TINY_MODEL


def _model(**vision_settings: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "layers": 3, **vision_settings}
    model = build_model({**TINY_MODEL, "vision_cfg": vision}).model.eval()
    return model, torch.randn(35, 3, 32, 32)


def _tokens_seen_by_the_last_mlp(model: Any, seen: list[int]) -> None:
    before_it = model.visual.transformer.resblocks[-1].ln_2
    before_it.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"ls_init_value": 0.1}])
def test_last_block_runs_for_the_class_token_only_and_gives_the_same(
    settings: dict[str, Any],
) -> None:
    model, image_BCHW = _model(**settings)
    encode = image_encoder(model)
    seen: list[int] = []
    _tokens_seen_by_the_last_mlp(model, seen)
    with torch.no_grad():
        actual = encode(image_BCHW)
        assert seen == [1]
        torch.testing.assert_close(actual, model.encode_image(image_BCHW), atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_tower_that_needs_every_token_keeps_them(settings: dict[str, Any]) -> None:
    model, image_BCHW = _model(**settings)
    encode = image_encoder(model)
    seen: list[int] = []
    _tokens_seen_by_the_last_mlp(model, seen)
    with torch.no_grad():
        actual = encode(image_BCHW)
        assert seen == [5]
        torch.testing.assert_close(actual, model.encode_image(image_BCHW), atol=2e-6, rtol=0)


def test_the_comparison_leaves_the_model_in_its_mode() -> None:
    model, _ = _model()
    image_encoder(model.train())
    assert model.training


@pytest.mark.skipif(not int8.is_fast(), reason="this processor has no VNNI")
@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"ls_init_value": 0.1}])
def test_int8_is_close_and_the_same_for_each_image_whatever_the_batch(
    settings: dict[str, Any],
) -> None:
    model, image_BCHW = _model(**settings)
    encode = int8_image_encoder(model)
    assert encode is not None
    with torch.no_grad():
        actual, exact = encode(image_BCHW), model.encode_image(image_BCHW)
        assert torch.nn.functional.cosine_similarity(actual, exact).min() > 0.99
        assert (actual - exact).abs().max() > 1e-5, "not in int8"
        torch.testing.assert_close(encode(image_BCHW[5:6]), actual[5:6], atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_int8_is_for_class_token_transformers_only(settings: dict[str, Any]) -> None:
    assert int8_image_encoder(_model(**settings)[0]) is None
