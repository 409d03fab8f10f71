"""Hidden tokens: how many, which ones, and what stands in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipsys.models.open_clip_models import build_model
from clipsys.training.model.outputs import TokenIds
from clipsys.training.model.token_ids import token_ids
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.masked_words import hide
from tests.conftest import TINY_MODEL
from tests.tiny_models import HF_TEXT_TOWERS, hf_text_config, write_text_model

_TOKENS = TokenIds(1000, padding=0, mask=999)


def _texts(count: int, words: int, length: int = 60) -> torch.Tensor:
    tokens = torch.zeros(count, length, dtype=torch.int64)
    tokens[:, 0] = 1
    tokens[:, 1 : words + 1] = torch.arange(10, 10 + words)
    tokens[:, words + 1] = 2
    return tokens


def test_shares_are_those_of_bert() -> None:
    tokens, seeds = _texts(2000, 40), torch.arange(2000)
    shown, asked = hide(tokens, seeds, _TOKENS, 0.15)
    assert (asked.sum(dim=1) == 6).all()
    is_mask, is_same = shown[asked] == 999, shown[asked] == tokens[asked]
    assert abs(float(is_mask.float().mean()) - 0.8) < 0.01
    assert abs(float(is_same.float().mean()) - 0.1) < 0.01
    assert (shown[~asked] == tokens[~asked]).all()
    places = asked.float().mean(dim=0)
    assert (places[1:41] - 0.15).abs().max() < 0.04


@pytest.mark.parametrize(("words", "expected"), [(0, 0), (1, 1), (2, 1), (10, 2), (40, 6)])
def test_one_word_at_least_is_hidden_and_never_the_ends(words: int, expected: int) -> None:
    tokens = _texts(50, words)
    shown, asked = hide(tokens, torch.arange(50), _TOKENS, 0.15)
    assert (asked.sum(dim=1) == expected).all()
    assert not asked[:, 0].any() and not asked[:, words + 1 :].any()
    assert ((shown == 0) == (tokens == 0))[:, words + 2 :].all()


def test_a_row_depends_on_its_own_seed_alone() -> None:
    tokens, seeds = _texts(6, 20), torch.tensor([5, 6, 7, 8, 9, 5])
    shown, asked = hide(tokens, seeds, _TOKENS, 0.3)
    part, _ = hide(tokens[2:4], seeds[2:4], _TOKENS, 0.3)
    assert torch.equal(part, shown[2:4])
    assert torch.equal(asked[0], asked[5]) and not torch.equal(asked[0], asked[1])


@pytest.mark.parametrize("kind", [kind for kind in HF_TEXT_TOWERS if kind != "m2m_100"])
def test_features_of_tokens_are_those_that_a_tower_pools(kind: str, tmp_path: Path) -> None:
    config = hf_text_config(write_text_model(tmp_path, kind))
    config["text_cfg"]["hf_proj_type"] = "linear"  # then the mean may come after it
    parts = build_model(config, for_training=True)
    towers = Towers(parts.model).eval()
    ids = token_ids(parts)
    assert ids.number == 100 and ids.padding == parts.model.text.config.pad_token_id  # type: ignore[union-attr]
    tokens = parts.tokenizer(["a red star", "the picture of a dog on a square"])
    with torch.no_grad():
        features = towers.token_features(tokens)
        pooled = towers.text_features(tokens)
    weights = (tokens != ids.padding).float()[:, :, None]
    mean = (features * weights).sum(dim=1) / weights.sum(dim=1)
    torch.testing.assert_close(mean, pooled, rtol=1e-5, atol=1e-5)


def test_clips_tokens_have_no_mask_and_its_features_end_in_the_pooled_one() -> None:
    parts = build_model(TINY_MODEL, for_training=True)
    towers = Towers(parts.model).eval()
    assert token_ids(parts) == (49408, 0, 0)
    tokens = parts.tokenizer(["a dog", "a cat on a mat"])
    with torch.no_grad():
        features = towers.token_features(tokens)
        ends = features[torch.arange(2), tokens.argmax(dim=1)]
        torch.testing.assert_close(ends, towers.text_features(tokens))
