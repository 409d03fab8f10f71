"""Model folders: what lies in them, and writing one whole or not at all.

A model folder is open_clip's own local format plus one file of ours::

    open_clip_config.json          model_cfg and preprocess_cfg, as open_clip reads them
    open_clip_model.safetensors    the weights
    clipsys.json                   fingerprint and provenance
    heads.safetensors              optional: what an objective trained beside the model
    background.json                optional: captions that it was trained with, for searches
    tokenizer files                only where the text tower uses a Hugging Face tokenizer
    config.json                    only where the text tower is a Hugging Face model

Stock open_clip loads it: ``open_clip.create_model_from_pretrained("local-dir:PATH")``, without a
hub. Of a Hugging Face text tower it reads the ``config.json`` of the folder that
``text_cfg.hf_model_name`` names, which is the model folder itself, by its absolute path: open_clip
resolves a relative one against the working directory. clipsys reads the ``config.json`` beside the
weights, wherever the folder has been moved to.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.errors import ModelError
from clipsys.models.construction import one_line
from clipsys.models.parts import ModelParts, fingerprint

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CARD_NAME = "clipsys.json"
HEADS_NAME = "heads.safetensors"
TEXT_CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class ModelCard:
    """What ``clipsys.json`` says of a model folder.

    Attributes:
        fingerprint: fingerprint of weights, architecture and preprocessing.
        provenance: the run, its step, configuration and measured results.
    """

    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)


def read_card(folder: str | Path) -> ModelCard | None:
    """Reads ``clipsys.json``; None where a folder has none (it was made by open_clip).

    Raises:
        ModelError: the file is damaged.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        mark, provenance = document["fingerprint"], document.get("provenance", {})
        if not isinstance(mark, str) or not isinstance(provenance, dict):
            raise TypeError("fingerprint is text, provenance an object")
        return ModelCard(mark, provenance)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: damaged ({one_line(error)}); export the model again") from error


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Refuses a place where a model folder must not be written.

    Raises:
        ModelError: ``target`` exists, is not an empty folder, and is no model folder or
            ``overwrite`` is not given.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not target.is_dir() or not (target / CONFIG_NAME).is_file():
            raise ModelError(
                f"{target}: already exists and is no model folder, which alone is replaced; choose "
                "another folder"
            )
        if not overwrite:
            raise ModelError(f"{target}: already exists; choose another folder or pass --overwrite")


def save_model(
    parts: ModelParts,
    out: str | Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    heads: Mapping[str, torch.Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    place: str | Path | None = None,
) -> str:
    """Writes a model folder, complete or not at all. Returns the model's fingerprint.

    Args:
        parts: the model.
        out: the folder.
        weights: its whole state dict where the module does not hold it, as while ZeRO trains it.
        heads: weights that an objective trained beside the model, written beside it. open_clip and
            `load_model` do not read them.
        provenance: what ``clipsys.json`` says of the model's origin.
        overwrite: replaces ``out`` where it is a model folder.
        place: the path that the folder will have in the end, where ``out`` is renamed later.

    Raises:
        ModelError: ``out`` exists, is not an empty folder, and is no model folder or ``overwrite``
            is not given.
    """
    from safetensors.torch import save_file

    target = Path(out)
    check_replaceable(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = parts.model.state_dict() if weights is None else weights
    mark = fingerprint(parts, weights)
    # Not by tempfile, whose folders are private: who may read a model is decided by the umask.
    folder = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(weights)}
        if heads:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.items()}
            save_file(kept, folder / HEADS_NAME, metadata={"format": "pt"})
        document = {
            "model_cfg": config_in(Path(place or target), parts.config),
            "preprocess_cfg": parts.preprocessing.to_open_clip(),
        }
        (folder / CONFIG_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        # safetensors 0.8 makes its file private (mode 0600) whatever the umask.
        (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)
        card = {
            "format": "clipsys-model/1",
            "fingerprint": mark,
            "provenance": dict(provenance or {}),
        }
        if heads:
            shapes = {name: list(tensor.shape) for name, tensor in heads.items()}
            card["heads"] = {"file": HEADS_NAME, "parameters": shapes}
        (folder / CARD_NAME).write_text(
            json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if hasattr(parts.tokenizer, "save_pretrained"):  # Hugging Face tokenizers only
            parts.tokenizer.save_pretrained(str(folder))
        if parts.config.get("text_cfg", {}).get("hf_model_name"):
            parts.model.text.config.save_pretrained(str(folder))  # type: ignore[union-attr,operator]
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return mark


def config_in(place: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` of a model whose folder has this path.

    The folder holds the weights of both towers and what its text tower and tokenizer need, so that
    nothing refers to the hub or to another folder. The name of a tokenizer of the hub stays: it is
    part of the fingerprint, and open_clip reads the folder's own files in its place.
    """
    text, vision = dict(config.get("text_cfg", {})), dict(config.get("vision_cfg", {}))
    if text.get("hf_model_name"):
        text.update(hf_model_name=str(place.absolute()), hf_model_pretrained=False)
    if Path(text.get("hf_tokenizer_name") or "").is_absolute():
        text["hf_tokenizer_name"] = str(place.absolute())
    if vision.get("timm_model_pretrained"):
        vision["timm_model_pretrained"] = False
    return {**config, "vision_cfg": vision, "text_cfg": text}


def set_place(folder: Path, place: Path) -> None:
    """Writes into a copied model folder the path that it will have in the end."""
    path = folder / CONFIG_NAME
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model_cfg"] = config_in(place, document["model_cfg"])
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _stored(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights.items():
        # Stock open_clip expects the 0-D scale; DeepSpeed needed 1-D.
        yield name, tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor
