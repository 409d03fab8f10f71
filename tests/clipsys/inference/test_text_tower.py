from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.inference.text_tower import text_encoder, token_features
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
    [{"no_causal_mask": True, "custom": True}, {"pool_type": "last"}, {"pool_type": "first"}],
)
def test_a_tower_that_sees_padding_is_not_cut(settings: dict[str, Any]) -> None:
    model, tokens_BL = _model(**settings)
    assert torch.equal(text_encoder(model)(tokens_BL), model.encode_text(tokens_BL))
    assert not text_encoder(model).is_cut


@pytest.mark.parametrize("custom", [False, True])
def test_a_causal_tower_that_is_pooled_at_a_token_of_its_own_is_cut_too(custom: bool) -> None:
    """MetaCLIP 2: the end has id 2 and the padding 1, neither of them the largest or the least."""
    model, _ = _model(pool_type="eos", eos_id=2, custom=custom)
    encode = text_encoder(model)
    assert encode.is_cut
    tokens_BL = torch.ones(3, 16, dtype=torch.int64)
    for row, words in enumerate(([0, 40_000, 7, 2], [0, 2], [0, 5, 900, 3, 31, 2])):
        tokens_BL[row, : len(words)] = torch.tensor(words)
    assert encode.ends(tokens_BL).tolist() == [3, 1, 5]
    torch.testing.assert_close(encode(tokens_BL), model.encode_text(tokens_BL), atol=2e-6, rtol=0)
    filler_L = encode.texts_of_length(tokens_BL[1], 8)
    assert encode.ends(filler_L[None]).tolist() == [7]


def test_the_comparison_leaves_the_model_in_its_mode() -> None:
    model, _ = _model()
    text_encoder(model.train())
    assert model.training


@pytest.mark.parametrize("kind", ["siglip", "coca"])
def test_a_tower_of_another_kind_keeps_its_full_length(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = coca_config() if kind == "coca" else siglip_config(write_tokenizer(tmp_path))
    parts = build_model(config)
    encode = text_encoder(parts.model.eval())
    assert not encode.is_cut
    tokens_BL = parts.tokenizer(_TEXTS)
    assert encode.ends(tokens_BL).tolist() == [tokens_BL.shape[1] - 1] * len(_TEXTS)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
@pytest.mark.parametrize("kind", HF_TEXT_TOWERS)
def test_a_tower_that_masks_padding_is_cut_and_gives_the_same(
    kind: str, pooler: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = hf_text_config(write_text_model(tmp_path, kind))
    config["text_cfg"]["hf_pooler_type"] = pooler
    parts = build_model(config)
    model: Any = parts.model.eval()
    encode = text_encoder(model)
    lengths: list[int] = []
    model.text.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    tokens_BL = parts.tokenizer(_TEXTS)
    longest = int((tokens_BL != model.text.config.pad_token_id).sum(dim=1).max())
    actual_BD = encode(tokens_BL)
    assert lengths == [longest] and longest < tokens_BL.shape[1]
    torch.testing.assert_close(actual_BD, model.encode_text(tokens_BL), atol=1e-6, rtol=1e-5)
    filler_L = encode.texts_of_length(tokens_BL[0], 16)
    assert encode.ends(filler_L[None]).tolist() == [15]


def test_token_features_of_a_cut_batch_are_those_of_the_full_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = build_model(hf_text_config(write_text_model(tmp_path, "roberta")))
    model: Any = parts.model.eval()
    tokens_BL = parts.tokenizer(_TEXTS)
    mask_BL = tokens_BL != model.text.config.pad_token_id
    hidden = model.text.transformer(input_ids=tokens_BL, attention_mask=mask_BL.long())
    expected_BLD = model.text.proj(hidden.last_hidden_state)
    actual_BLD = token_features(model, tokens_BL)
    assert actual_BLD.shape == expected_BLD.shape
    torch.testing.assert_close(actual_BLD[mask_BL], expected_BLD[mask_BL], atol=1e-6, rtol=1e-5)
