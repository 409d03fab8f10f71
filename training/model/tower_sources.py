"""Where pretrained towers come from: their parts of open_clip's ``model_cfg``, their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from clipsys.errors import ConfigError, ModelError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models import hub
from clipsys.models.architectures import contrastive_pair
from clipsys.models.construction import one_line
from clipsys.models.model_folders import CONFIG_NAME
from clipsys.models.open_clip_models import ModelParts, load_model
from clipsys.training.model.tower_config import (
    HUGGING_FACE,
    OPEN_CLIP,
    TIMM,
    ImageTowerConfig,
    TextTowerConfig,
)

#: Tokens of a text for a Hugging Face tower whose own limit is higher, as CLIP's.
DEFAULT_CONTEXT = 77
#: sentence-transformers' names of how token vectors become one, and open_clip's poolers.
_POOLERS = {
    "pooling_mode_mean_tokens": "mean_pooler",
    "pooling_mode_cls_token": "cls_last_hidden_state_pooler",
    "pooling_mode_max_tokens": "max_pooler",
}


class TowerSource(NamedTuple):
    """Where a tower comes from.

    Attributes:
        config: its part of the ``model_cfg``: ``vision_cfg`` or ``text_cfg``.
        width: what its own head gives; None where it has none.
        parts: the open_clip model that it is a tower of; None of timm and Hugging Face.
    """

    config: dict[str, Any]
    width: int | None
    parts: ModelParts | None = None


def image_source(tower: ImageTowerConfig, size: int | tuple[int, int] | None) -> TowerSource:
    """The image tower that a recipe names, for images of a size.

    Raises:
        ConfigError: timm has no such model, or the tower does not take another size.
        ModelError: the open_clip model is unavailable or damaged.
    """
    if tower.name.startswith(TIMM):
        return TowerSource(_timm_config(tower, size), None)
    parts = load_model(tower.name.removeprefix(OPEN_CLIP))
    config = contrastive_pair(parts.config)
    vision = dict(config["vision_cfg"])
    if size is not None:
        raise ConfigError(
            f"model.image_size is {size}, and model.image_tower {tower.name} of open_clip goes on "
            "with its own; leave model.image_size out"
        )
    vision.pop("patch_dropout", None)
    vision["timm_model_pretrained"] = False
    if tower.head is not None and vision.get("timm_model_name"):
        vision["timm_proj"] = tower.head
    return TowerSource(vision, int(config["embed_dim"]), parts)


def _timm_config(tower: ImageTowerConfig, size: int | tuple[int, int] | None) -> dict[str, Any]:
    import timm

    name = tower.name.removeprefix(TIMM)
    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if known is None:
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {TIMM}{near[0]}?" if near else ""
        raise ConfigError(f"model.image_tower.name: timm has no model {name!r}{hint}")
    if size is None:
        size = int(known.input_size[-1])
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        # The network's own pooling: the mean of a convolutional one, a transformer's class token.
        "timm_pool": "",
        "timm_proj": tower.head or "linear",
        "image_size": size if isinstance(size, int) else list(size),
    }


def timm_look(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``preprocess_cfg`` that a timm model was trained with."""
    import timm

    known = timm.models.get_pretrained_cfg(config["timm_model_name"])
    interpolation = known.interpolation if known.interpolation == "bilinear" else "bicubic"
    return vars(Preprocessing()) | {
        "mean": tuple(known.mean),
        "std": tuple(known.std),
        "interpolation": interpolation,
        "mode": "RGB",
    }


def text_source(tower: TextTowerConfig, context_length: int | None) -> TowerSource:
    """The text tower that a recipe names, for texts of a number of tokens.

    Raises:
        ConfigError: a setting does not fit the tower.
        ModelError: there is no such folder, or its files are damaged.
    """
    folder = Path(tower.name.removeprefix(HUGGING_FACE)).expanduser()
    is_model_folder = any((folder / part / CONFIG_NAME).is_file() for part in ("", "model"))
    if tower.name.startswith(HUGGING_FACE) or (folder.is_dir() and not is_model_folder):
        return TowerSource(_hugging_face_config(tower, folder, context_length), None)
    if tower.pooling is not None:
        raise ConfigError(
            f"model.text_tower.pooling is for a Hugging Face encoder, and {tower.name} is a tower "
            "of open_clip; leave it out"
        )
    parts = load_model(tower.name.removeprefix(OPEN_CLIP))
    config = contrastive_pair(parts.config)
    text = dict(config["text_cfg"])
    if context_length is not None and text.get("hf_model_name") is None:
        raise ConfigError(
            f"model.context_length is {context_length}, and model.text_tower {tower.name} of "
            "open_clip goes on with its own; leave model.context_length out"
        )
    if context_length is not None:
        text["context_length"] = context_length
    if text.get("hf_model_name"):
        if parts.spec and Path(parts.spec).is_dir():  # its folder holds the tower's configuration
            text["hf_model_name"] = parts.spec
        text["hf_model_pretrained"] = False
        if tower.head is not None:
            text["hf_proj_type"] = tower.head
    return TowerSource(text, int(config["embed_dim"]), parts)


def _hugging_face_config(
    tower: TextTowerConfig, folder: Path, context_length: int | None
) -> dict[str, Any]:
    name = str(folder.absolute()) if folder.is_dir() else tower.name.removeprefix(HUGGING_FACE)
    if not folder.is_dir() and name.startswith(("/", ".", "~")):
        raise ModelError(
            f"model.text_tower.name: {name}: there is no such folder; expected one that "
            "save_pretrained wrote, or a name of the hub"
        )
    stated, limit = _sentence_transformers_settings(name)
    pooler = {"mean": "mean_pooler", "max": "max_pooler", "cls": "cls_last_hidden_state_pooler"}
    return {
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "hf_model_pretrained": True,
        "hf_proj_type": tower.head or "linear",
        "hf_pooler_type": pooler[tower.pooling] if tower.pooling else stated,
        "context_length": context_length or min(limit, DEFAULT_CONTEXT),
    }


def _sentence_transformers_settings(name: str) -> tuple[str, int]:
    """Pooler and longest text of a sentence-transformers model; what any other one gets.

    Args:
        name: a folder, or a name of the hub.

    Raises:
        ModelError: its files are damaged, or it pools as open_clip cannot.
    """
    limit, pooler = DEFAULT_CONTEXT, "mean_pooler"
    length = _file_of(name, "sentence_bert_config.json")
    pooling = _file_of(name, "1_Pooling/config.json")
    try:
        if length is not None:
            limit = int(
                json.loads(length.read_text(encoding="utf-8")).get("max_seq_length") or limit
            )
        if pooling is not None:
            modes = json.loads(pooling.read_text(encoding="utf-8"))
            active = [mode for mode, value in modes.items() if value is True and "mode" in mode]
            if len(active) != 1 or active[0] not in _POOLERS:
                raise ModelError(
                    f"{pooling}: pools by {', '.join(active) or 'nothing known'}; open_clip knows "
                    "the mean, the maximum and the first token; set model.text_tower.pooling"
                )
            pooler = _POOLERS[active[0]]
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{length or pooling}: damaged ({one_line(error)}); fetch {name} again"
        ) from error
    return pooler, limit


def _file_of(name: str, file: str) -> Path | None:
    """A file of a folder or of a repository of the hub; None where it has none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    with hub.quiet_hub():
        try:
            return Path(hf_hub_download(name, file))
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            return None  # a plain encoder; one that is not there at all is an error of the loading
