from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from clipsys.errors import ModelError
from clipsys.models.tokenization import make_tokenizer, vocabulary_size, with_context_length
from tests.tiny_models import write_tokenizer

TEXTS = ["a red square", "", "the picture of a star " * 20]


def _config(**text: Any) -> dict[str, Any]:
    return {"text_cfg": text}


def test_clips_tokenizer_is_the_default() -> None:
    import open_clip

    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert torch.equal(make_tokenizer(_config(tokenizer_kwargs=None))(TEXTS), expected)
    short = make_tokenizer(_config(context_length=16))
    assert torch.equal(short(TEXTS)[:2], expected[:2, :16])
    assert torch.equal(with_context_length(short, 77)(TEXTS), expected)
    assert short(TEXTS).shape == (3, 16)
    assert vocabulary_size(short) == 49408


def test_a_tokenizer_of_a_folder_cleans_pads_and_travels(tmp_path: Path) -> None:
    options = {"clean": "canonicalize"}
    name = str(write_tokenizer(tmp_path / "tokenizer"))
    tokenizer = make_tokenizer(
        _config(hf_tokenizer_name=name, tokenizer_kwargs=options, context_length=12)
    )
    tokens = tokenizer([*TEXTS, "A red, SQUARE!"])
    assert tokens.shape == (4, 12)
    assert torch.equal(tokens[0], tokens[3])
    assert tokens[1].tolist() == [2, 1, *[0] * 10]  # start, end, padding
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(TEXTS), tokens[:3])


def test_the_model_folders_own_files_come_first(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = _config(hf_tokenizer_name="nobody/no-such-tokenizer", context_length=8)
    assert make_tokenizer(config, folder=tmp_path)(["a"]).shape == (1, 8)


def test_a_vocabulary_of_sentencepiece_is_enough(tmp_path: Path) -> None:
    """mT5's repository, which ViT-L-14-worldwide's tokenizer comes from, holds nothing else."""
    import sentencepiece

    (tmp_path / "text.txt").write_text("a red square\nthe blue star on a picture\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    )
    tokens = make_tokenizer(
        _config(hf_tokenizer_name="google/mt5-base", context_length=16), folder=tmp_path
    )(["a red square"])
    assert tokens.shape == (1, 16)
    assert int((tokens == 1).sum()) == 1  # one end


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be read") as caught:
        make_tokenizer(_config(hf_tokenizer_name="any"), folder=tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
