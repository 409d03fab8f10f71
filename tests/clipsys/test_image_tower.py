from __future__ import annotations

from typing import Any

import pytest
import torch

from clipsys.image_tower import CPU_CHUNK, image_encoder
from clipsys.models import build_model
from tests.conftest import TINY_MODEL


def _model(**vision_settings: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    vision = {**TINY_MODEL["vision_cfg"], "layers": 3, **vision_settings}
    model = build_model({**TINY_MODEL, "vision_cfg": vision}).model.eval()
    return model, torch.randn(2 * CPU_CHUNK + 3, 3, 32, 32)


def _tokens_seen_by_the_last_mlp(model: Any, seen: list[int]) -> None:
    mlp = model.visual.transformer.resblocks[-1].mlp
    mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))


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
        assert seen == [1, 1, 1]
        torch.testing.assert_close(actual, model.encode_image(image_BCHW), atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", [{"pool_type": "avg"}, {"attentional_pool": True}])
def test_tower_that_needs_every_token_keeps_them(settings: dict[str, Any]) -> None:
    model, image_BCHW = _model(**settings)
    encode = image_encoder(model)
    seen: list[int] = []
    _tokens_seen_by_the_last_mlp(model, seen)
    with torch.no_grad():
        actual = encode(image_BCHW)
        assert seen == [5, 5, 5]
        torch.testing.assert_close(actual, model.encode_image(image_BCHW), atol=2e-6, rtol=0)


def test_the_comparison_leaves_the_model_in_its_mode() -> None:
    model, _ = _model()
    image_encoder(model.train())
    assert model.training
