from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.inference.text_tower import text_encoder
from clipsys.models.open_clip_models import build_model
from tests.conftest import TINY_MODEL
from tests.tiny_models import (
    HF_TEXT_TOWERS,
    coca_config,
    hf_text_config,
    siglip_config,
    write_text_model,
    write_tokenizer,
)

_TEXTS = ["a dog", "a somewhat longer caption of a dog", ""]


def _model(**text_settings: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    custom = text_settings.pop("custom", False)
    config = {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], **text_settings}}
    parts = build_model({**config, "custom_text": True} if custom else config)
    return parts.model.eval(), parts.tokenizer(_TEXTS)


@pytest.mark.parametrize("custom", [False, True])
def test_a_causal_tower_is_cut_and_gives_the_same(custom: bool) -> None:
    model, tokens_BL = _model(custom=custom)
    encode = text_encoder(model)
    seen: list[int] = []
    tower = model if hasattr(model, "transformer") else model.text
    tower.transformer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    actual = encode(tokens_BL)
    assert seen == [int(tokens_BL.argmax(1).max()) + 1]
    torch.testing.assert_close(actual, model.encode_text(tokens_BL), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"no_causal_mask": True, "custom": True}, {"pool_type": "last"}, {"pool_type": "eos"}],
)
def test_a_tower_that_sees_padding_is_not_cut(settings: dict[str, Any]) -> None:
    model, tokens_BL = _model(**settings)
    assert torch.equal(text_encoder(model)(tokens_BL), model.encode_text(tokens_BL))
    assert text_encoder(model) == model.encode_text


def test_the_comparison_leaves_the_model_in_its_mode() -> None:
    model, _ = _model()
    text_encoder(model.train())
    assert model.training


@pytest.mark.parametrize("kind", ["siglip", "coca", *HF_TEXT_TOWERS])
def test_a_tower_of_another_kind_keeps_its_full_length(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "siglip":
        config = siglip_config(write_tokenizer(tmp_path))
    else:
        config = (
            coca_config() if kind == "coca" else hf_text_config(write_text_model(tmp_path, kind))
        )
    model = build_model(config).model.eval()
    assert text_encoder(model) == model.encode_text
