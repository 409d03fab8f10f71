"""BERT-like text towers in numpy: BERT (MiniLM), RoBERTa, XLM-R as open_clip's HFTextEncoder.

Like `clipsys.inference.numpy_text_tower`, whose `verify` decides whether this module computes a
model correctly. One text is computed at a time and without padding, which the tower would mask.
Post-norm blocks, exact GELU, absolute positions; RoBERTa counts positions from its padding token's
id on. Tokens come from the ``tokenizers`` library and the folder's ``tokenizer.json``: importing it
takes 20 to 50 ms and imports neither transformers nor torch.

Shapes: L tokens, W tower width, D embedding width, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.inference.bpe import clean
from clipsys.inference.numpy_layers import Floats, MappedLayers, attend, gelu
from clipsys.inference.numpy_text_tower import unit

#: What tokenizers read of a folder.
TOKENIZER_NAME = "tokenizer.json"
#: Poolers by the names of open_clip's classes.
_POOLERS = {"MeanPooler": "mean", "ClsPooler": "cls", "ClsLastHiddenStatePooler": "cls"}
_KINDS = ("bert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class BertShape:
    """What the weights do not say of a BERT-like tower and its tokenizer.

    Attributes:
        num_heads: attention heads of each block.
        epsilon: of the layer norms.
        pooling: ``mean`` over the tokens; ``cls``: the first one; ``pooler``: the first one through
            the tower's own pooling layer.
        first_position: that of a text's first token.
        padding: the token behind a text's end, which is masked.
        context_length: tokens at most.
        is_lowered: whether open_clip lowers a text before it is tokenized.
    """

    num_heads: int
    epsilon: float
    pooling: str
    first_position: int
    padding: int
    context_length: int
    is_lowered: bool


class LightBertTower:
    """Encodes texts with weights that are mapped, not read. Thread-safe."""

    def __init__(self, weights: Path, shape: BertShape, tokenizer: Path) -> None:
        """Opens a safetensors file.

        Raises:
            OSError, ValueError, KeyError: the file is not one, or not of such a tower.
        """
        self._shape = shape
        self._layers = MappedLayers(weights, "text.")
        self._tokenizer_path = tokenizer
        self._num_blocks = self._layers.count("transformer.encoder.layer.")
        self.padding = shape.padding

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(self._tokenizer_path))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{self._tokenizer_path}: {error}") from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(self._shape.context_length)
        return tokenizer

    def tokens(self, text: str) -> list[int]:
        """Token ids up to the end of the text."""
        text = clean(text)
        ids: list[int] = self._tokenizer.encode(
            text.lower() if self._shape.is_lowered else text
        ).ids
        return ids

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """Texts as unit vectors, (N, D) float32."""
        return unit([self._features(self.tokens(text)) for text in texts])

    def _features(self, tokens_L: list[int]) -> Floats:
        hidden_LW = self._embedded(tokens_L)
        for number in range(self._num_blocks):
            hidden_LW = self._block(f"transformer.encoder.layer.{number}.", hidden_LW)
        if self._shape.pooling == "mean":
            pooled_1W: Floats = hidden_LW.mean(axis=0, keepdims=True)
        else:
            pooled_1W = hidden_LW[:1]
        if self._shape.pooling == "pooler":
            pooled_1W = np.tanh(self._layers.linear("transformer.pooler.dense", pooled_1W))
        features_D: Floats = self._projected(pooled_1W)[0]
        return features_D

    def _embedded(self, tokens_L: list[int]) -> Floats:
        name, layers = "transformer.embeddings.", self._layers
        first = self._shape.first_position
        words_LW = layers[f"{name}word_embeddings.weight"][tokens_L].astype(np.float32)
        positions_LW = layers[f"{name}position_embeddings.weight"][first : first + len(tokens_L)]
        type_W = layers[f"{name}token_type_embeddings.weight"][0]
        return self._norm(f"{name}LayerNorm", words_LW + type_W + positions_LW)

    def _block(self, block: str, x_LW: Floats) -> Floats:
        linear = self._layers.linear
        q_LW, k_LW, v_LW = (
            linear(f"{block}attention.self.{one}", x_LW) for one in ("query", "key", "value")
        )
        mixed_LW = attend(q_LW, k_LW, v_LW, self._shape.num_heads)
        output_LW = linear(f"{block}attention.output.dense", mixed_LW)
        x_LW = self._norm(f"{block}attention.output.LayerNorm", output_LW + x_LW)
        wide_LX = gelu(linear(f"{block}intermediate.dense", x_LW))
        return self._norm(
            f"{block}output.LayerNorm", linear(f"{block}output.dense", wide_LX) + x_LW
        )

    def _projected(self, pooled_1W: Floats) -> Floats:
        if "proj.0.weight" in self._layers:
            return self._layers.linear("proj.2", gelu(self._layers.linear("proj.0", pooled_1W)))
        if "proj.weight" in self._layers:
            return self._layers.linear("proj", pooled_1W)
        return pooled_1W

    def _norm(self, name: str, x_LW: Floats) -> Floats:
        return self._layers.norm(name, x_LW, self._shape.epsilon)


def bert_shape_of(model: Any, tokenizer: Any) -> BertShape | None:
    """What a torch model and its tokenizer say; None where they are not of this kind."""
    try:
        tower, config = model.text, model.text.config
        pooling = _POOLERS.get(type(tower.pooler).__name__)
        if pooling == "cls" and getattr(tower.pooler, "use_pooler_output", False):
            pooling = "pooler" if getattr(tower.transformer, "pooler", None) else "cls"
        cleaning = tokenizer.clean_fn.__name__
        is_known = (
            config.model_type in _KINDS
            and config.hidden_act == "gelu"
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and pooling is not None
            and cleaning in ("_clean_whitespace", "_clean_lower")
            and not tokenizer.strip_sep_token
            and not tokenizer.tokenizer_mode
        )
        if not is_known or pooling is None:
            return None
        return BertShape(
            num_heads=int(config.num_attention_heads),
            epsilon=float(config.layer_norm_eps),
            pooling=pooling,
            first_position=0 if config.model_type == "bert" else int(config.pad_token_id) + 1,
            padding=int(config.pad_token_id),
            context_length=int(tokenizer.context_length),
            is_lowered=cleaning == "_clean_lower",
        )
    except (AttributeError, TypeError):
        return None
