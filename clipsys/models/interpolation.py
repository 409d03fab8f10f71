"""Weights between two models: WiSE-FT.

base = load_model("ViT-B-32/laion2b_s34b_b79k")
tuned = load_model("runs/products/model")
between = interpolate(base, tuned, 0.5)
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from clipsys.errors import ConfigError, ModelError
from clipsys.models.parts import ModelParts
from clipsys.models.tokenization import PROBE_TEXTS

if TYPE_CHECKING:
    import torch

#: Keys of a ``model_cfg`` that say where a part came from or how it was begun or trained, and not
#: what it computes.
_ORIGINS = frozenset(
    {
        "hf_model_name",
        "hf_model_pretrained",
        "hf_tokenizer_name",
        "timm_model_pretrained",
        "init_logit_scale",
        "init_logit_bias",
        "patch_dropout",
        "timm_drop",
        "timm_drop_path",
        "attentional_pool_pretrained",
    }
)


def interpolate(base: ModelParts, tuned: ModelParts, alpha: float) -> ModelParts:
    """The model with the weights (1 - alpha) · base + alpha · tuned.

    Of what lies between two ends of one fine-tuning, much keeps nearly all of the new and more of
    the old than the tuned model does. All floating-point values are interpolated: weights, the
    temperature (as it is stored, in logarithm, so that temperatures are averaged geometrically),
    and the running means and variances of batch normalisation, which are not exactly those of the
    model between. Whole numbers (counters, positions) are the tuned model's, and so are the
    tokenizer and the configuration.

    References:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), equation 2.

    Args:
        base: the model that was fine-tuned.
        tuned: what became of it.
        alpha: share of the tuned model, from 0 to 1; the ends are the models themselves.

    Raises:
        ModelError: architecture, preprocessing, tokenizer, or the name or shape of a weight differ;
            the message names the first difference.
        ConfigError: alpha is not from 0 to 1.
    """
    check_interpolable(base, tuned)
    state = mixed(base.model.state_dict(), tuned.model.state_dict(), alpha)
    model = deepcopy(tuned.model)
    model.load_state_dict(state)
    return ModelParts(model, tuned.tokenizer, tuned.config, tuned.preprocessing, tuned.name)


def mixed(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """The state dict between two of equal names and shapes, with the types of the tuned one.

    Raises:
        ConfigError: alpha is not from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; expected a share of the tuned model, from 0 to 1")
    return {name: _between(base[name], tensor, alpha) for name, tensor in tuned.items()}


def _between(base: torch.Tensor, tuned: torch.Tensor, alpha: float) -> torch.Tensor:
    if not tuned.is_floating_point():
        return tuned.clone()
    first, second = base.detach().to(tuned.device).reshape(tuned.shape).double(), tuned.double()
    # Where both are infinite, as in masks, the products have no sum.
    value = ((1 - alpha) * first + alpha * second).where(first != second, second)
    return value.to(tuned.dtype)


def check_interpolable(base: ModelParts, tuned: ModelParts) -> None:
    """Refuses two models between which no model lies.

    Raises:
        ModelError: with the first difference.
    """
    difference = (
        _config_difference(base, tuned)
        or _preprocessing_difference(base, tuned)
        or _weight_difference(base, tuned)
        or _tokenizer_difference(base, tuned)
    )
    if difference:
        raise ModelError(
            f"{base.name} and {tuned.name} cannot be interpolated: {difference}; expected a model "
            "and what it became by fine-tuning"
        )


def _config_difference(base: ModelParts, tuned: ModelParts) -> str | None:
    first, second = _flat(base.config), _flat(tuned.config)
    for name in dict.fromkeys([*first, *second]):
        # Keys that say nothing more than their absence does.
        if (first.get(name) or None) != (second.get(name) or None):
            return f"{name} is {first.get(name)!r} and {second.get(name)!r}"
    return None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in _ORIGINS:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _preprocessing_difference(base: ModelParts, tuned: ModelParts) -> str | None:
    first, second = base.preprocessing.to_open_clip(), tuned.preprocessing.to_open_clip()
    for name in second:
        if _plain(first.get(name)) != _plain(second[name]):
            return f"preprocess_cfg.{name} is {first.get(name)!r} and {second[name]!r}"
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _weight_difference(base: ModelParts, tuned: ModelParts) -> str | None:
    first, second = base.model.state_dict(), tuned.model.state_dict()
    for name in dict.fromkeys([*second, *first]):
        for state, other in ((first, tuned), (second, base)):
            if name not in state:
                return f"only {other.name} has the weight {name}"
        # The scale has the shape [] or [1], out of and in training.
        shapes = [tuple(state[name].shape) for state in (first, second)]
        if shapes[0] != shapes[1] and first[name].numel() * second[name].numel() != 1:
            return f"the weight {name} has the shape {shapes[0]} and {shapes[1]}"
    return None


def _tokenizer_difference(base: ModelParts, tuned: ModelParts) -> str | None:
    for text in PROBE_TEXTS:
        first, second = base.tokenizer([text]), tuned.tokenizer([text])
        if first.shape != second.shape or bool((first != second).any()):
            return f"their tokenizers make different tokens of {text!r}"
    return None
