"""Small pretrained towers on disk: a text encoder of Hugging Face, weights of a timm model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import write_text_model

TRUNK = "test_efficientnet"


def write_encoder(folder: Path) -> Path:
    """A sentence-transformers folder with random weights, of width 32, for texts of 20 tokens."""
    from transformers import AutoConfig, AutoModel

    write_text_model(folder, "bert")
    torch.manual_seed(5)
    AutoModel.from_config(AutoConfig.from_pretrained(str(folder))).save_pretrained(str(folder))
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    return folder


def write_trunk(path: Path, *, renamed: bool = False, num_classes: int = 7) -> Path:
    """Weights of a small timm model with a classifier, under its own names or another library's."""
    import timm

    torch.manual_seed(6)
    state = timm.create_model(TRUNK, num_classes=num_classes).state_dict()
    if renamed:
        state = {
            f"_layers.{number}.{name.rpartition('.')[2]}"
            if not name.startswith("classifier")
            else name.replace("classifier", "_fc"): tensor
            for number, (name, tensor) in enumerate(state.items())
        }
    torch.save(state, path)
    return path


def tower_sections(folder: Path, **image: Any) -> dict[str, Any]:
    """The section ``model`` of a recipe with these towers."""
    encoder, trunk = folder / "encoder", folder / "trunk.pth"
    folder.mkdir(exist_ok=True)
    if not encoder.is_dir():
        write_encoder(encoder)
        write_trunk(trunk)
    return {
        "architecture": None,
        "image_tower": {"name": f"timm:{TRUNK}", "weights": str(trunk), **image},
        "text_tower": {"name": f"hf:{encoder}"},
        "embed_dim": 16,
        "image_size": 64,
    }
