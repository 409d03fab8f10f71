"""`ModelParts`: an open_clip model with what belongs to it, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipsys.images.preprocessing import Preprocessing
from clipsys.models.tokenization import Tokenizer, vocabulary_digest

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ModelParts:
    """A model with everything needed to use or to save it.

    Attributes:
        model: open_clip's CLIP or CustomTextCLIP.
        tokenizer: texts to int64 (N, context_length).
        config: open_clip's ``model_cfg``.
        preprocessing: makes of a decoded image what the image tower sees.
        name: what messages call it.
        spec: what `load_model` takes to load it again; empty for a model that was built.
        loaded_fingerprint: what `fingerprint` gave when a folder was loaded; else empty. Hashing
            half a gigabyte twice would slow down each start.
    """

    model: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]
    preprocessing: Preprocessing
    name: str
    spec: str = ""
    loaded_fingerprint: str = ""


def fingerprint(
    parts: ModelParts,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    tokenizer: str | None = None,
) -> str:
    """SHA-256 over weights, architecture and preprocessing: equal if and only if embeddings are.

    Independent of the file format, of the order of the tensors, of the shape ([] or [1]) that
    ``logit_scale`` has in and out of training, and of the place of a folder: a tokenizer of the hub
    counts by its name, one from a folder by its vocabulary.

    Args:
        parts: the model.
        weights: its state dict where the module does not hold it; None takes the module's own.
        tokenizer: what stands for the tokenizer; None: its name or its vocabulary.
    """
    digest = hashlib.sha256()
    text = parts.config.get("text_cfg", {})
    if tokenizer is None:
        tokenizer = text.get("hf_tokenizer_name")
        if tokenizer and Path(tokenizer).is_absolute():
            tokenizer = vocabulary_digest(parts.tokenizer)
    identity = {
        "text": {
            "context_length": text.get("context_length"),
            "hf_tokenizer_name": tokenizer,
            "tokenizer_kwargs": text.get("tokenizer_kwargs"),
            "pool_type": text.get("pool_type"),
        },
        "quick_gelu": bool(parts.config.get("quick_gelu", False)),
        "preprocessing": {**parts.preprocessing.to_open_clip(), "fill_color": None},
    }
    digest.update(json.dumps(identity, sort_keys=True).encode())
    state = parts.model.state_dict() if weights is None else weights
    for name, tensor in sorted(state.items()):
        if name == "attn_mask" or name.endswith("num_batches_tracked"):
            continue
        array = tensor.detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview | bytes:
    import torch

    if not tensor.numel():
        return b""
    raw: np.ndarray[Any, np.dtype[np.uint8]] = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw.data
