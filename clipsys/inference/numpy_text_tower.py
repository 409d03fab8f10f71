"""CLIP's causal text tower in numpy: a text query's vector without importing torch.

Importing torch and open_clip takes seconds, encoding a sentence of ten tokens takes tens of
milliseconds. The tower's weights are mapped from the model's safetensors file, of which only the
text part and only the tokens' own embeddings are read. It computes what torch computes, in float32:
pre-norm transformer blocks, exact or "quick" GELU, pooled at the end-of-text token, which is why
nothing needs to be computed behind it.

`verify` decides whether this module computes a model correctly: it runs both and compares tokens
and vectors.

BERT-like towers have a module of their own: `clipsys.inference.numpy_bert_tower`.

Shapes: L tokens, W tower width, H heads, D embedding width, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipsys.inference.bpe import BytePairTokenizer
from clipsys.inference.numpy_layers import Floats, MappedLayers, attend, gelu

#: Largest difference of a coordinate of unit vectors between torch and numpy.
TOLERANCE = 1e-5
_NORM_EPSILON = 1e-5  # torch's default, which open_clip keeps

#: Texts that models are verified with: short, long, mended, and with every kind of token.
PROBES = (
    "a",
    "a photo of a dog on the beach",
    "Two people's bicycles, 27 of them; they'll ride 3.5 km!",
    "caf\u00e9 na\u00efve \u4e2d\u6587 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600",
    "&amp; \u201cquoted\u201d \u00c3\u00a9 &lt;b&gt;",
    "supercalifragilisticexpialidocious antidisestablishmentarianism  \t tabs\nand lines",
    "the quick brown fox jumps over the lazy dog " * 12,
)  # fmt: skip


@dataclass(frozen=True)
class TowerShape:
    """What the weights do not say of a text tower.

    Attributes:
        prefix: prefix of its tensors' names: empty, or ``text.``.
        num_heads: attention heads of each block.
        quick_gelu: x * sigmoid(1.702 x) in place of the exact GELU.
        context_length: tokens at most.
    """

    prefix: str
    num_heads: int
    quick_gelu: bool
    context_length: int


class LightTower(Protocol):
    """A text tower without torch. Thread-safe.

    Attributes:
        padding: the token that torch's tokenizer appends to the tokens of a text.
    """

    padding: int

    def tokens(self, text: str) -> list[int]:
        """Token ids up to the end of the text."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Texts as unit vectors, (N, D) float32."""
        ...


class LightTextTower:
    """Encodes texts with weights that are mapped, not read. Thread-safe."""

    def __init__(self, weights: Path, shape: TowerShape, vocabulary: Path) -> None:
        """Opens a safetensors file.

        Raises:
            OSError, ValueError, KeyError: the file is not one, or not of such a tower.
        """
        self._shape = shape
        self._layers = MappedLayers(weights, shape.prefix)
        self._tokenizer = BytePairTokenizer(vocabulary, shape.context_length)
        self._num_blocks = self._layers.count("transformer.resblocks.")
        self.padding = 0

    def tokens(self, text: str) -> list[int]:
        """Token ids up to the end of the text."""
        return self._tokenizer.encode(text)

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Texts as unit vectors, (N, D) float32."""
        return unit([self._features(self.tokens(text)) for text in texts])

    def _features(self, tokens_L: list[int]) -> Floats:
        layers = self._layers
        hidden_LW = layers["token_embedding.weight"][tokens_L].astype(np.float32)
        hidden_LW = hidden_LW + layers["positional_embedding"][: len(tokens_L)]
        for number in range(self._num_blocks):
            block = f"transformer.resblocks.{number}."
            hidden_LW = hidden_LW + self._attention(block, self._norm(block + "ln_1", hidden_LW))
            hidden_LW = hidden_LW + self._mlp(block, self._norm(block + "ln_2", hidden_LW))
        pooled_1W = self._norm("ln_final", hidden_LW[-1:])
        if "text_projection.weight" in layers:
            features_1D = layers.linear("text_projection", pooled_1W)
        else:
            features_1D = pooled_1W @ layers["text_projection"]
        features_D: Floats = features_1D[0]
        return features_D

    def _attention(self, block: str, x_LW: Floats) -> Floats:
        weight, bias = (self._layers[f"{block}attn.in_proj_{one}"] for one in ("weight", "bias"))
        joint_LX: Floats = x_LW @ weight.T + bias
        q_LW, k_LW, v_LW = np.split(joint_LX, 3, axis=1)
        mixed_LW = attend(q_LW, k_LW, v_LW, self._shape.num_heads, is_causal=True)
        return self._layers.linear(f"{block}attn.out_proj", mixed_LW)

    def _mlp(self, block: str, x_LW: Floats) -> Floats:
        wide = self._layers.linear(f"{block}mlp.c_fc", x_LW)
        active = wide / (1 + np.exp(-1.702 * wide)) if self._shape.quick_gelu else gelu(wide)
        return self._layers.linear(f"{block}mlp.c_proj", active)

    def _norm(self, name: str, x_LW: Floats) -> Floats:
        return self._layers.norm(name, x_LW, _NORM_EPSILON)


def unit(vectors: Sequence[Floats]) -> Floats:
    """Vectors as rows of unit norm, (N, D)."""
    vectors_ND = np.stack(vectors)
    unit_ND: Floats = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit_ND


def shape_of(model: Any) -> TowerShape | None:
    """What a torch model says of its text tower; None where it is not like open_clip's."""
    prefix = "text." if hasattr(model, "text") else ""
    tower = model.text if prefix else model
    try:
        block = tower.transformer.resblocks[0]
        return TowerShape(
            prefix,
            int(block.attn.num_heads),
            type(block.mlp.gelu).__name__ == "QuickGELU",
            int(tower.positional_embedding.shape[0]),
        )
    except (AttributeError, IndexError, TypeError):
        return None


def verify(tower: LightTower, model: Any, tokenizer: Any) -> float | None:
    """Compares with torch, text by text. Returns the largest difference, None if tokens differ.

    Args:
        tower: made from the file that the model's weights are said to be in.
        model: open_clip's, on any device.
        tokenizer: open_clip's.
    """
    import torch

    tokens_NL = tokenizer(list(PROBES))
    for text, row in zip(PROBES, tokens_NL.tolist(), strict=True):
        own = tower.tokens(text)
        if row[: len(own)] != own or {*row[len(own) :]} - {tower.padding}:
            return None
    device = next(model.parameters()).device
    with torch.inference_mode():
        features_ND = model.encode_text(tokens_NL.to(device)).float()
        expected_ND = torch.nn.functional.normalize(features_ND, dim=-1).cpu().numpy()
    actual_ND = tower.encode_text(PROBES)
    if actual_ND.shape != expected_ND.shape:
        return None
    return float(np.abs(actual_ND - expected_ND).max())
