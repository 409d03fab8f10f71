"""open_clip models: built, loaded, saved and fingerprinted. The names of four modules as one.

building         a model with random weights
loading          a model with its weights
model_folders    what lies in a model folder, and writing one
parts            `ModelParts` and its fingerprint
"""

from __future__ import annotations

from clipsys.models.building import build_model
from clipsys.models.loading import is_listed_with_other_activation, load_model
from clipsys.models.model_folders import (
    CARD_NAME,
    CONFIG_NAME,
    HEADS_NAME,
    TEXT_CONFIG_NAME,
    WEIGHTS_NAME,
    ModelCard,
    read_card,
    save_model,
)
from clipsys.models.parts import ModelParts, fingerprint

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "HEADS_NAME",
    "TEXT_CONFIG_NAME",
    "WEIGHTS_NAME",
    "ModelCard",
    "ModelParts",
    "build_model",
    "fingerprint",
    "is_listed_with_other_activation",
    "load_model",
    "read_card",
    "save_model",
]
