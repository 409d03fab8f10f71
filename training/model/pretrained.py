"""A run that begins with pretrained weights: what comes with them, and what the recipe changes.

Architecture, activation, preprocessing, tokenizer and context length are those that the weights
were trained with. A recipe may set another image size or context length (position embeddings are
then interpolated), another activation or other preprocessing: that is logged. An architecture that
contradicts the weights is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from clipsys.errors import TrainingError
from clipsys.models.architectures import architecture_config, complete_config, contrastive_pair
from clipsys.models.open_clip_models import ModelParts
from clipsys.training.model.positions import interpolate_positions

#: Keys that may differ without the weights being of another architecture. Sizes are interpolated
#: or, as everything with a shape, checked when the weights are loaded.
_FREE = {
    "": {"init_logit_scale", "init_logit_bias", "custom_text", "multimodal_cfg", "pad_id"},
    "vision_cfg": {
        *("image_size", "patch_dropout", "output_tokens", "timm_model_name", "timm_drop"),
        *("timm_model_pretrained", "timm_drop_path"),
    },
    "text_cfg": {
        *("context_length", "hf_model_name", "hf_model_pretrained", "output_tokens"),
        *("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
    },
}
#: Keys that mean nothing to a tower of another library, which has its own configuration.
_UNUSED_BY_TIMM = ("layers", "width", "head_width", "patch_size", "mlp_ratio")
_UNUSED_BY_TRANSFORMERS = ("width", "heads", "layers", "mlp_ratio", "vocab_size")

_logger = logging.getLogger(__name__)


def config_of_weights(
    source: ModelParts, architecture: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    """The weights' ``model_cfg`` with what a recipe's architecture changes of it.

    Args:
        source: the weights with what they were trained with.
        architecture: the recipe's, if it sets one. Of a name only the image size and the context
            length are taken: it does not say more than the weights do.

    Raises:
        TrainingError: the architecture is another one than that of the weights.
        ModelError: the architecture is not known or has a fault.
    """
    config = contrastive_pair(source.config)
    config["vision_cfg"].pop("patch_dropout", None)  # a setting of their training, not of this one
    if architecture is None:
        return config
    asked = contrastive_pair(architecture_config(architecture))
    _check_same(source.name, config, asked)
    named = isinstance(architecture, str)
    if not named and "quick_gelu" in asked:
        if bool(asked["quick_gelu"]) != bool(config.get("quick_gelu")):
            _logger.warning(
                "model.architecture.quick_gelu is %s, and the weights of %s were trained with %s: "
                "the recipe's activation is used, and embeddings begin elsewhere",
                *(asked["quick_gelu"], source.name, bool(config.get("quick_gelu"))),
            )
        config["quick_gelu"] = asked["quick_gelu"]
    for section in ("vision_cfg", "text_cfg"):
        for key in _taken(section, asked, named=named):
            config[section][key] = asked[section][key]
    return config


def _taken(section: str, asked: Mapping[str, Any], *, named: bool) -> Iterator[str]:
    """Keys of the recipe's architecture that change the weights' own."""
    free = ["image_size", "context_length", "timm_model_name"]
    if not named:
        free += ["patch_dropout", "timm_drop", "timm_drop_path"]
    yield from (key for key in asked[section] if key in free)


def _check_same(name: str, config: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    of_weights, of_recipe = complete_config(config), complete_config(asked)
    for section, free in _FREE.items():
        left = of_weights[section] if section else of_weights
        right = of_recipe[section] if section else of_recipe
        ignored = {*free, "quick_gelu", "vision_cfg", "text_cfg"}
        if section == "vision_cfg" and left["timm_model_name"] and right["timm_model_name"]:
            ignored.update(_UNUSED_BY_TIMM)
        if section == "text_cfg" and left["hf_model_name"] and right["hf_model_name"]:
            ignored.update(_UNUSED_BY_TRANSFORMERS)
        for key in sorted({*left, *right} - ignored):
            if not _equal(left.get(key), right.get(key)):
                place = f"{section}.{key}" if section else key
                raise TrainingError(
                    f"model.architecture has {place} {right.get(key)!r}, and the weights of "
                    f"model.pretrained {name} have {left.get(key)!r}: the weights do not fit "
                    "model.architecture; leave it out to take that of the weights"
                )
    _check_tokenizer(name, config["text_cfg"], asked["text_cfg"])


def _check_tokenizer(
    name: str, of_weights: Mapping[str, Any], of_recipe: Mapping[str, Any]
) -> None:
    key = "hf_tokenizer_name"
    if of_recipe.get(key) and of_recipe[key] != of_weights.get(key):
        _logger.warning(
            "model.architecture.text_cfg.%s is %s: the tokenizer of the weights of %s (%s) is "
            "used, since its token ids are those that they were trained with",
            *(key, of_recipe[key], name, of_weights.get(key) or "CLIP's"),
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other)


def load_weights(target: nn.Module, source: ModelParts) -> None:
    """Copies the weights into a model of the same architecture, of another size if need be.

    A model without a bias may go on with the sigmoid loss, and the reverse.

    Raises:
        TrainingError: the weights are of another architecture.
    """
    own = target.state_dict()
    state = {
        name: tensor
        for name, tensor in source.model.state_dict().items()
        if not name.startswith("text_decoder.")  # CoCa's, which nothing trains here
    }
    for name in ("logit_scale", "logit_bias"):
        if name in own:
            state[name] = state.get(name, own[name]).reshape(own[name].shape)
        else:
            state.pop(name, None)
    for change in interpolate_positions(state, source.model, target):
        _logger.info("%s: %s", source.name, change)
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise TrainingError(
            f"model.pretrained {source.name}: the weights do not fit "
            f"model.architecture ({first[0].strip()})"
        ) from error
