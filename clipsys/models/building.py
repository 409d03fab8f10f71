"""Models with random weights, from a name or a ``model_cfg`` of open_clip."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsys.errors import ModelError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models import hub
from clipsys.models.architectures import architecture_config, contrastive_pair
from clipsys.models.construction import hub_for, one_line, quiet_open_clip
from clipsys.models.model_folders import CONFIG_NAME
from clipsys.models.parts import ModelParts
from clipsys.models.tokenization import Tokenizer, make_tokenizer, vocabulary_size


def build_model(
    architecture: str | Mapping[str, Any],
    *,
    preprocess: Mapping[str, Any] | None = None,
    for_training: bool = False,
    tokenizer: Tokenizer | None = None,
) -> ModelParts:
    """Makes a model with random weights.

    A tower starts with the weights of its own library where the ``model_cfg`` asks for them
    (``text_cfg.hf_model_pretrained``, ``vision_cfg.timm_model_pretrained``). Of CoCa, the two
    towers are made without the decoder.

    Args:
        architecture: a name that open_clip knows (``ViT-B-32``), or a ``model_cfg``.
        preprocess: settings that differ from open_clip's default ``preprocess_cfg``.
        for_training: makes ``logit_scale`` 1-D, since DeepSpeed cannot handle 0-D parameters.
        tokenizer: the one to go with the model; None makes that of the ``model_cfg``.

    Raises:
        ModelError: the name is not known, or open_clip cannot build the configuration.
    """
    import open_clip

    config = _with_absolute_folders(contrastive_pair(architecture_config(architecture)))
    name = architecture if isinstance(architecture, str) else "custom"
    if tokenizer is None:
        tokenizer = make_tokenizer(config)
        _check_vocabulary(config, tokenizer)
    document = {"model_cfg": config, "preprocess_cfg": dict(preprocess or {})}
    options: dict[str, Any] = {"nonscalar_logit_scale": True} if for_training else {}
    options["pretrained_image"] = bool(config["vision_cfg"].get("timm_model_pretrained"))
    options["pretrained_text"] = bool(config["text_cfg"].get("hf_model_pretrained"))
    with tempfile.TemporaryDirectory(prefix="clipsys-model-") as folder:
        Path(folder, CONFIG_NAME).write_text(json.dumps(document), encoding="utf-8")
        with quiet_open_clip(), hub_for(config) as unreachable:
            try:
                model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, **options)
            except (
                *(TypeError, ValueError, KeyError, RuntimeError, AssertionError, IndexError),
                *(OSError, AttributeError, ImportError),
            ) as error:
                raise ModelError(_why_not_built(name, config, unreachable, error)) from error
    preprocessing = Preprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    return ModelParts(model, tokenizer, config, preprocessing, name)


def _with_absolute_folders(config: dict[str, Any]) -> dict[str, Any]:
    """The same with absolute paths: a relative one looks like a name of the hub."""
    text = dict(config["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name"):
        place = Path(text.get(key) or "").expanduser()
        if text.get(key) and place.is_dir():
            text[key] = str(place.absolute())
    return {**config, "text_cfg": text}


def _why_not_built(
    name: str, config: Mapping[str, Any], unreachable: str, error: BaseException
) -> str:
    if unreachable and isinstance(error, OSError):
        needed = config["text_cfg"].get("hf_model_name") or config["vision_cfg"]["timm_model_name"]
        return (
            f"model {name}: {needed} is not on this machine, and {unreachable}; set "
            f"text_cfg.hf_model_name to a folder with its config.json, or {hub.HINT}"
        )
    return f"model {name}: open_clip cannot build this configuration ({one_line(error)})"


def _check_vocabulary(config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    text = config["text_cfg"]
    known, declared = vocabulary_size(tokenizer), text.get("vocab_size", 49408)
    if not text.get("hf_model_name") and known is not None and declared < known:
        raise ModelError(
            f"model_cfg: text_cfg.vocab_size is {declared}, fewer than the {known} tokens of the "
            f"tokenizer ({text.get('hf_tokenizer_name') or 'of CLIP'})"
        )
