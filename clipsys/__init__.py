"""clipsys: contrastive image-text training, and search over any corpus.

    encoder = clipsys.load("ViT-B-32/laion2b_s34b_b79k")
    vectors = encoder.encode_text(["a dog on the beach"])

Names are loaded when they are first used, so that importing clipsys imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clipsys.errors import (
    ClipsysError,
    CollectionError,
    ConfigError,
    DataError,
    ImageDecodeError,
    ModelError,
    QueryError,
    ServerError,
    TrainingError,
)

if TYPE_CHECKING:
    from clipsys.evaluation.measuring import evaluate
    from clipsys.models.encoder import Encoder, load
    from clipsys.zeroshot.classifier import Prediction, ZeroShotClassifier

__version__ = "0.2.0"

__all__ = [
    "ClipsysError",
    "CollectionError",
    "ConfigError",
    "DataError",
    "Encoder",
    "ImageDecodeError",
    "ModelError",
    "Prediction",
    "QueryError",
    "ServerError",
    "TrainingError",
    "ZeroShotClassifier",
    "evaluate",
    "load",
]

_LAZY = {
    "evaluate": "clipsys.evaluation.measuring",
    "Encoder": "clipsys.models.encoder",
    "load": "clipsys.models.encoder",
    "Prediction": "clipsys.zeroshot.classifier",
    "ZeroShotClassifier": "clipsys.zeroshot.classifier",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'clipsys' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
