"""numpy's BERT-like tower beside torch's, and the tokenizers library beside transformers'."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipsys.inference.numpy_bert_tower import (
    TOKENIZER_NAME,
    BertShape,
    LightBertTower,
    bert_shape_of,
)
from clipsys.inference.numpy_text_tower import PROBES, TOLERANCE, shape_of, verify
from clipsys.models.open_clip_models import WEIGHTS_NAME, ModelParts, build_model, save_model
from tests.tiny_models import hf_text_config, write_text_model


def _scrambled(folder: Path, kind: str, **text: Any) -> ModelParts:
    """An exported model whose every weight, biases and norms too, is random."""
    import torch

    config = hf_text_config(write_text_model(folder / "source", kind))
    config["text_cfg"].update(context_length=24, **text)
    torch.manual_seed(2)
    parts = build_model(config)
    parts.model.eval()
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if "logit" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(parts, folder / "m")
    return parts


def _tower(folder: Path, shape: BertShape | None) -> LightBertTower:
    assert shape is not None
    return LightBertTower(folder / "m" / WEIGHTS_NAME, shape, folder / "m" / TOKENIZER_NAME)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize(
    "text",
    [
        {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"},
        {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"},
        {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": None},
        {"tokenizer_kwargs": {"clean": "lower"}},
    ],
    ids=["mean, mlp", "pooler, linear", "cls, none", "lowered"],
)
def test_vectors_are_those_of_torch(kind: str, text: dict[str, Any], tmp_path: Path) -> None:
    parts = _scrambled(tmp_path, kind, **text)
    assert shape_of(parts.model) is None, "it is no tower of CLIP's own kind"
    shape = bert_shape_of(parts.model, parts.tokenizer)
    difference = verify(_tower(tmp_path, shape), parts.model, parts.tokenizer)
    assert difference is not None
    assert difference <= TOLERANCE


def test_another_shape_or_other_weights_do_not_pass(tmp_path: Path) -> None:
    parts = _scrambled(tmp_path, "bert")
    shape = bert_shape_of(parts.model, parts.tokenizer)
    assert shape is not None
    for wrong in (
        replace(shape, num_heads=4),
        replace(shape, epsilon=1e-2),
        replace(shape, pooling="cls"),
        replace(shape, first_position=1),
        replace(shape, context_length=20),
        replace(shape, padding=1),
    ):
        difference = verify(_tower(tmp_path, wrong), parts.model, parts.tokenizer)
        assert difference is None or difference > TOLERANCE, wrong
    parts.model.text.proj[2].weight.data.mul_(0.5).add_(0.1)  # type: ignore[union-attr,index]
    difference = verify(_tower(tmp_path, shape), parts.model, parts.tokenizer)
    assert difference is not None
    assert difference > TOLERANCE


def test_what_numpy_does_not_compute_has_no_shape(tmp_path: Path) -> None:
    parts = _scrambled(tmp_path, "bert")
    model: Any = parts.model
    tokenizer: Any = parts.tokenizer
    assert bert_shape_of(model, tokenizer) is not None
    for thing, name, value in (
        (model.text.config, "hidden_act", "gelu_new"),
        (model.text.config, "model_type", "m2m_100"),
        (model.text.config, "position_embedding_type", "relative_key"),
        (tokenizer, "strip_sep_token", True),
        (tokenizer, "tokenizer_mode", "clips"),
        (tokenizer, "clean_fn", str.upper),
    ):
        had = getattr(thing, name, "absolute")
        setattr(thing, name, value)
        assert bert_shape_of(model, tokenizer) is None, name
        setattr(thing, name, had)
    assert bert_shape_of(model, lambda texts: texts) is None
    (tmp_path / "m" / TOKENIZER_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        _tower(tmp_path, bert_shape_of(model, tokenizer)).tokens("a cat")


def test_tokens_are_those_of_open_clip(tmp_path: Path) -> None:
    parts = _scrambled(tmp_path, "bert")
    tower = _tower(tmp_path, bert_shape_of(parts.model, parts.tokenizer))
    generator = random.Random(0)
    alphabet = "abcdefgh xyz  THE 's 019 .,;!? -–—'\"&<>/ éßñ中文русский😀\u200b\u00a0\t\n"
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(60))) for _ in range(200)]
    texts += [*PROBES, "", " ", "<s> x </S> <pad>", "&lt;b&gt; &amp;amp;", "ﬁne ①", "e\u0301"]
    for text, row in zip(texts, parts.tokenizer(texts).tolist(), strict=True):
        own = tower.tokens(text)
        assert row == own + [0] * (24 - len(own)), text


def test_tokenizers_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, tokenizers, clipsys.inference.numpy_bert_tower\n"
        "for name in ('torch', 'transformers', 'huggingface_hub', 'open_clip'):\n"
        "    assert name not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
