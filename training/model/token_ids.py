"""What an objective needs to know of a text tower's tokens."""

from __future__ import annotations

from typing import Any

from clipsys.models.parts import ModelParts
from clipsys.training.model.outputs import TokenIds


def token_ids(parts: ModelParts) -> TokenIds:
    """The tokens of a model that still holds its weights."""
    tower: Any = getattr(parts.model, "text", parts.model)
    if hasattr(tower, "token_embedding"):
        count, padding = tower.token_embedding.num_embeddings, int(getattr(tower, "pad_id", 0) or 0)
    else:  # open_clip's HFTextEncoder
        count = tower.transformer.get_input_embeddings().num_embeddings
        padding = int(tower.config.pad_token_id or 0)
    mask = getattr(getattr(parts.tokenizer, "tokenizer", None), "mask_token_id", None)
    # CLIP's tokenizer has no token for what is hidden; that of the padding stands for nothing too.
    return TokenIds(int(count), padding, padding if mask is None else int(mask))
