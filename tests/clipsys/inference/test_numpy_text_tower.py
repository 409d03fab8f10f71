"""numpy's text tower and tokenizer beside torch's and open_clip's."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.inference.bpe import BytePairTokenizer, vocabulary_path
from clipsys.inference.numpy_layers import gelu, map_safetensors
from clipsys.inference.numpy_text_tower import (
    PROBES,
    TOLERANCE,
    LightTextTower,
    TowerShape,
    shape_of,
    verify,
)
from clipsys.models.open_clip_models import WEIGHTS_NAME, build_model, save_model
from tests.conftest import TINY_MODEL


def variant(**text: Any) -> dict[str, Any]:
    return {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], **text}}


CONFIGS = {
    "plain": TINY_MODEL,
    "deep": variant(layers=4, heads=8, width=64, context_length=77),
    "quick gelu": {**variant(layers=2), "quick_gelu": True},
    "own text tower": {**variant(layers=2), "custom_text": True},
    "linear projection": {**variant(proj_bias=True), "custom_text": True},
}


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    path = vocabulary_path()
    assert path is not None
    return path


def scrambled(config: dict[str, Any]) -> Any:
    """A model whose every weight, biases and norms too, is random."""
    import torch

    torch.manual_seed(1)
    parts = build_model(config)
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if parameter.ndim < 2 and "logit" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return parts


@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_those_of_torch(name: str, tmp_path: Path, vocabulary: Path) -> None:
    parts = scrambled(CONFIGS[name])
    save_model(parts, tmp_path / "m")
    shape = shape_of(parts.model)
    assert shape is not None
    tower = LightTextTower(tmp_path / "m" / WEIGHTS_NAME, shape, vocabulary)
    difference = verify(tower, parts.model.eval(), parts.tokenizer)
    assert difference is not None
    assert difference <= TOLERANCE


def test_another_shape_or_other_weights_do_not_pass(tmp_path: Path, vocabulary: Path) -> None:
    parts = scrambled(CONFIGS["deep"])
    save_model(parts, tmp_path / "m")
    weights = tmp_path / "m" / WEIGHTS_NAME
    wrong = (
        TowerShape("", 4, False, 77),
        TowerShape("", 8, True, 77),
        TowerShape("", 8, False, 20),
    )
    for shape in wrong:
        tower = LightTextTower(weights, shape, vocabulary)
        difference = verify(tower, parts.model.eval(), parts.tokenizer)
        assert difference is None or difference > TOLERANCE, shape
    tower = LightTextTower(weights, TowerShape("", 8, False, 77), vocabulary)
    other = scrambled(CONFIGS["deep"])
    other.model.ln_final.bias.data.add_(0.1)
    difference = verify(tower, other.model.eval(), other.tokenizer)
    assert difference is not None
    assert difference > TOLERANCE


def test_tokens_are_those_of_open_clip(vocabulary: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer(context_length=40)
    ours = BytePairTokenizer(vocabulary, 40)
    generator = random.Random(0)
    alphabet = "abcdefgh xyz  THE 's 'll 019 .,;!? -–—'\"&<>/ éßñ中文字русский😀\u200b\u00a0\t\n"
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(60))) for _ in range(300)]
    everything = [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1FB00)]
    texts += ["".join(map(chr, generator.choices(everything, k=12))) for _ in range(300)]
    texts += [*PROBES, "", " ", "<start_of_text> x <END_OF_TEXT>", "&lt;b&gt; &amp;amp;", "ﬁne ①"]
    texts += ["İstanbul", "e\u0301", "\x00\x07 control", "ünïcödé's don't I'LL", "a" * 300]
    for text, row in zip(texts, theirs(texts).tolist(), strict=True):
        own = ours.encode(text)
        assert row == own + [0] * (40 - len(own)), text


def test_gelu_is_exact_to_single_precision() -> None:
    x = np.linspace(-9, 9, 20_001, dtype=np.float32)
    exact = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()]
    np.testing.assert_allclose(gelu(x), exact, atol=2e-6)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x05" + bytes(7) + b"12345", b"1234567890"]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises((ValueError, AttributeError)):
        map_safetensors(tmp_path / "w")


def test_mapped_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "text.a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "text.b": np.arange(4, dtype=np.float16),
        "text.c": np.arange(4),
        "d": np.float32([7]),
    }
    save_file(tensors, tmp_path / "w")
    found = map_safetensors(tmp_path / "w", "text.")
    assert sorted(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], tensors["text.a"])
    np.testing.assert_array_equal(found["b"], tensors["text.b"])
