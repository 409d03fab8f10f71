"""open_clip's ``model_cfg``: found by its name, checked key by key, made to fit itself.

Checked means: every key is one that open_clip knows, of the type that open_clip declares, and the
values fit together. What passes and still cannot be built is an error of `build_model`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, create_model

from clipsys.errors import ModelError

#: The parts of a ``model_cfg`` that are mappings themselves.
SECTIONS = ("vision_cfg", "text_cfg", "multimodal_cfg")

#: What open_clip takes of keys that it declares as any text, and otherwise ends on a bare assert.
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("vision_cfg", "pool_type"): ("tok", "avg", "none"),
    ("vision_cfg", "pos_embed_type"): ("learnable", "sin_cos_2d"),
    ("vision_cfg", "timm_proj"): ("linear", "mlp", "none", ""),
    ("text_cfg", "pool_type"): ("first", "last", "argmax", "eos", "none"),
    ("text_cfg", "hf_proj_type"): ("linear", "mlp"),
    ("text_cfg", "hf_pooler_type"): (
        *("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler"),
    ),
    ("text_cfg", "tokenizer_mode"): ("", "clips"),
}
#: Keys whose values are counts.
_COUNTS = (
    *(("vision_cfg", key) for key in ("width", "head_width", "patch_size")),
    *(("text_cfg", key) for key in ("context_length", "vocab_size", "width", "heads", "layers")),
)

_logger = logging.getLogger(__name__)


def architecture_config(architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a name that it knows; a copy of what is one already.

    Raises:
        ModelError: the name is not known, or the ``model_cfg`` has a fault.
    """
    import open_clip

    if not isinstance(architecture, str):
        config = deepcopy(dict(architecture))
        _check(config)
        return _with_fitting_trunk(config)
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ModelError(unknown_name(architecture))
    return _with_trunk_size(deepcopy(config))


def unknown_name(name: str) -> str:
    """What is wrong with a name that is none of open_clip's architectures."""
    import open_clip

    near = get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name!r} is not a model that open_clip knows{hint}"


def contrastive_pair(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` of CoCa's two towers without its text decoder; any other as it is.

    CoCa (Yu et al. 2022) adds a captioning decoder to a contrastive pair. Nothing here trains or
    uses that decoder.
    """
    pair = deepcopy(dict(config))
    if pair.pop("multimodal_cfg", None) is not None:
        pair["custom_text"] = True
        for section in ("vision_cfg", "text_cfg"):
            pair[section]["output_tokens"] = False
    return pair


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``model_cfg`` with open_clip's defaults for every key that it does not set."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    complete = {"quick_gelu": False, "custom_text": False, **config}
    for section, declared in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        complete[section] = {**vars(declared()), **(config.get(section) or {})}
    return complete


def image_size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of the images that the architecture takes."""
    size = complete_config(config)["vision_cfg"]["image_size"]
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def with_image_size(config: Mapping[str, Any], size: int | tuple[int, int]) -> dict[str, Any]:
    """The architecture for images of another size.

    Raises:
        ModelError: its trunk is one of timm's that exists for other sizes only.
    """
    vision = {**config["vision_cfg"], "image_size": size if isinstance(size, int) else list(size)}
    return _with_fitting_trunk({**config, "vision_cfg": vision})


def check_patch_dropout(config: Mapping[str, Any], setting: str) -> None:
    """Refuses patch dropout for an image tower that has none.

    Raises:
        ModelError: the tower is a ResNet, or a trunk of timm without it.
    """
    vision = config["vision_cfg"]
    trunk = vision.get("timm_model_name")
    if trunk is None and isinstance(vision.get("layers"), (list, tuple)):
        raise ModelError(
            f"{setting} is for vision transformers, and the image tower is a ResNet; set it to 0"
        )
    if trunk is not None:
        import timm
        import torch

        try:
            with torch.device("meta"):
                timm.create_model(trunk, patch_drop_rate=0.5)
        except TypeError as error:
            raise ModelError(
                f"{setting} is for vision transformers, and {trunk} of timm has none; set it to 0"
            ) from error


# --- faults ---------------------------------------------------------------------------------


@cache
def _schema() -> type[BaseModel]:
    """What open_clip declares, strictly: from its own dataclasses, so that it follows them."""
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from pydantic.dataclasses import dataclass

    strict = ConfigDict(extra="forbid", strict=True)
    vision, text, multimodal = (
        dataclass(declared, config=strict)
        for declared in (CLIPVisionCfg, CLIPTextCfg, MultimodalCfg)
    )
    keys: dict[str, Any] = {
        "embed_dim": (PositiveInt, ...),
        "vision_cfg": (vision, ...),
        "text_cfg": (text, ...),
        "multimodal_cfg": (multimodal, None),
        "quick_gelu": (bool, False),
        "custom_text": (bool, False),
        "init_logit_scale": (float, None),
        "init_logit_bias": (float, None),
        "pad_id": (int, 0),
    }
    return create_model("ModelCfg", __config__=strict, **keys)


def _check(config: Mapping[str, Any]) -> None:
    faults = list(_faults(config))
    if faults:
        raise ModelError(f"model_cfg: {'; '.join(faults)}")


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    try:
        # As JSON, in which a list is a tuple; null is open_clip's way of not setting a key.
        text = json.dumps(_without_nulls(config))
    except (TypeError, ValueError) as error:
        yield f"holds what JSON cannot ({error})"
        return
    try:
        _schema().model_validate_json(text)
    except ValidationError as error:
        described = dict(_describe(dict(detail)) for detail in reversed(error.errors()))
        yield from reversed([f"{name} {problem}" for name, problem in described.items()])
        return
    yield from _misfits(complete_config(config))


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None
    }


def _describe(detail: Mapping[str, Any]) -> tuple[str, str]:
    """A key, and what is wrong with it."""
    location = [str(part) for part in detail["loc"]]
    if "[" in location[-1] or location[-1] in ("int", "float", "str"):
        location = location[:-1]  # which member of a union it is not
    name = ".".join(location)
    if detail["type"] == "missing":
        return name, "is missing"
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = get_close_matches(location[-1], _keys(location[:-1]), n=1, cutoff=0.75)
        hint = f"; did you mean {near[0]}?" if near else _elsewhere(location[-1])
        return name, f"is not a key of open_clip's{hint}"
    return name, f"is {detail['input']!r}, which {str(detail['msg']).removeprefix('Input ')}"


def _keys(location: list[str]) -> list[str]:
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    declared = dict(zip(SECTIONS, (CLIPVisionCfg, CLIPTextCfg, MultimodalCfg), strict=True))
    if not location:
        return list(_schema().model_fields)
    return [one.name for one in fields(declared[location[0]])] if location[0] in declared else []


def _elsewhere(key: str) -> str:
    """The place of a key that stands in the wrong one, or that is an option of a function."""
    if key.startswith("force_"):
        return f"; did you mean {key.removeprefix('force_')}?"
    places = [section for section in ("vision_cfg", "text_cfg") if key in _keys([section])]
    if key in _keys([]):
        return f"; it belongs to the top of the model_cfg, not to {SECTIONS[0]} or {SECTIONS[1]}"
    return f"; it belongs to {' or '.join(places)}" if places else ""


def _misfits(config: Mapping[str, Any]) -> Iterator[str]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    for section, key in _COUNTS:
        value = config[section][key]
        if value is not None and value < 1:
            yield f"{section}.{key} is {value}; expected 1 or more"
            return
    for (section, key), choices in _CHOICES.items():
        value = config[section][key]
        if value is not None and value not in choices:
            yield f"{section}.{key} is {value!r}; expected one of {', '.join(choices)}"
    if vision["timm_model_name"]:
        yield from _unknown_trunk(vision["timm_model_name"])
    elif isinstance(vision["layers"], int) and vision["layers"] < 1:
        yield f"vision_cfg.layers is {vision['layers']}; expected 1 or more"
    elif isinstance(vision["layers"], int):
        yield from _vision_transformer_misfits(vision, image_size_of(config))
    if not text["hf_model_name"] and text["width"] % text["heads"]:
        yield (
            f"text_cfg.width is {text['width']}, which text_cfg.heads {text['heads']} does not "
            "divide"
        )


def _unknown_trunk(name: str) -> Iterator[str]:
    import timm

    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"vision_cfg.timm_model_name is {name!r}, which timm does not know{hint}"


def _vision_transformer_misfits(
    vision: Mapping[str, Any], image_size: tuple[int, int]
) -> Iterator[str]:
    width, head_width, patch_size = (vision[key] for key in ("width", "head_width", "patch_size"))
    if width < head_width or width % (width // head_width):
        yield (
            f"vision_cfg.width is {width}, which is not a multiple of vision_cfg.head_width "
            f"{head_width}"
        )
    if min(image_size) < patch_size:
        yield (
            f"vision_cfg.patch_size is {patch_size}, more than vision_cfg.image_size "
            f"{min(image_size)}"
        )


# --- timm's trunks --------------------------------------------------------------------------


def _fixed_size(trunk: str) -> int | None:
    """The side of the images that a trunk of timm takes; None where it takes any."""
    import timm

    pretrained = timm.models.get_pretrained_cfg(trunk)
    if pretrained is None or not pretrained.fixed_input_size:
        return None
    return int(pretrained.input_size[-1])


def _with_trunk_size(config: dict[str, Any]) -> dict[str, Any]:
    """An architecture of open_clip's own list, with its trunk's image size.

    open_clip 3.3 lists ViTamin-XL-384 with images of 256 pixels, which its trunk refuses.
    """
    trunk = config["vision_cfg"].get("timm_model_name")
    size = _fixed_size(trunk) if trunk else None
    if size is not None:
        config["vision_cfg"]["image_size"] = size
    return config


def _with_fitting_trunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same with timm's trunk for its image size, where trunks exist for certain sizes only."""
    vision = config["vision_cfg"]
    trunk = vision.get("timm_model_name")
    fixed = _fixed_size(trunk) if trunk else None
    if trunk is None or fixed is None:
        return config
    if vision.get("image_size") is None:
        return {**config, "vision_cfg": {**vision, "image_size": fixed}}
    asked = image_size_of(config)
    if asked == (fixed, fixed):
        return config
    sizes = _sibling_sizes(trunk)
    if asked[0] != asked[1] or asked[0] not in sizes:
        raise ModelError(
            f"model_cfg: vision_cfg.image_size is {asked[0]} x {asked[1]}, and "
            f"{trunk} takes images of {fixed} x {fixed}; timm has this trunk for "
            f"{', '.join(str(size) for size in sorted(sizes))}"
        )
    fitting = re.sub(r"\d+$", str(asked[0]), trunk)
    _logger.info("image tower: %s in place of %s, for images of %d px", fitting, trunk, asked[0])
    return {**config, "vision_cfg": {**vision, "timm_model_name": fitting}}


def _sibling_sizes(trunk: str) -> set[int]:
    import timm

    stem = re.sub(r"\d+$", "", trunk)
    siblings = [
        name for name in timm.list_models(f"{stem}*") if re.fullmatch(r"\d+", name[len(stem) :])
    ]
    return {size for size in map(_fixed_size, siblings) if size is not None}
