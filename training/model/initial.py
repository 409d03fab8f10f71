"""The model that a run begins with: made or loaded, with its temperature and its locked towers."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from clipsys.config import PathText, Settings
from clipsys.errors import ConfigError
from clipsys.images.preprocessing import check_preprocess
from clipsys.models.architectures import (
    architecture_config,
    check_patch_dropout,
    image_size_of,
    with_image_size,
)
from clipsys.models.model_folders import config_in
from clipsys.models.open_clip_models import ModelParts, build_model, load_model
from clipsys.models.tokenization import Tokenizer, with_context_length
from clipsys.training.model.adapters import LoraConfig
from clipsys.training.model.layers import TEMPERATURE_NAMES, Tower, tower_depths
from clipsys.training.model.pretrained import config_of_weights, load_weights
from clipsys.training.model.tower_config import ImageTowerConfig, TextTowerConfig
from clipsys.training.model.two_towers import build_two_towers, lock_towers

#: Where Zhai et al. 2023 (section 3.2) start the sigmoid loss: a bias of -10, since nearly all
#: pairs are negatives, and a scale of 10.
SIGMOID_BIAS, SIGMOID_SCALE = -10.0, 10.0
DEFAULT_ARCHITECTURE = "ViT-B-32"
#: The image tower of a model whose architecture names none, where no image is trained: open_clip
#: has no model without one. It keeps its random weights (about 0.1 M).
SMALLEST_IMAGE_TOWER: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 32,
    "width": 64,
    "head_width": 64,
    "layers": 1,
}

_logger = logging.getLogger(__name__)


class ModelConfig(Settings):
    """What is trained."""

    architecture: str | dict[str, Any] | None = Field(
        None,
        description="a name that open_clip knows, or a model_cfg of its own; default that of "
        "model.pretrained, else ViT-B-32",
    )
    pretrained: PathText | None = Field(
        None, description="start from these weights: NAME/TAG, hf-hub:ORG/REPO or a model folder"
    )
    image_tower: ImageTowerConfig | None = Field(
        None, description="a pretrained image tower; with text_tower, in the place of architecture"
    )
    text_tower: TextTowerConfig | None = Field(
        None, description="a pretrained text tower; with image_tower"
    )
    embed_dim: PositiveInt | None = Field(
        None,
        description="width of the common space of image_tower and text_tower; default that of a "
        "tower with its own head, else 512",
    )
    preprocess: dict[str, Any] = Field(
        default_factory=dict,
        description="what differs from the preprocess_cfg of model.pretrained or image_tower, or "
        "from open_clip's default",
    )
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="side, or height and width, of the images that the tower takes; default the "
        "architecture's; positions of pretrained weights are interpolated",
    )
    context_length: PositiveInt | None = Field(None, description="tokens of a text, likewise")
    initial_logit_scale: PositiveFloat | None = Field(
        None, description="inverse temperature at the start; default the model's (1/0.07)"
    )
    initial_logit_bias: float | None = Field(
        None, description="bias of the sigmoid loss at the start; default -10"
    )
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of image patches left out in training (FLIP)"
    )
    unlocked_image_blocks: NonNegativeInt | None = Field(
        None,
        description="train only the last blocks of the image tower and what follows; 0 locks all "
        "of it (LiT); default: train everything",
    )
    unlocked_text_blocks: NonNegativeInt | None = Field(
        None, description="the same for the text tower"
    )
    lora: LoraConfig | None = Field(
        None, description="train adapters in the place of a tower's weights"
    )
    freeze_batch_norm: bool | None = Field(
        None,
        description="keep the statistics of the towers' batch norm as they are; default true where "
        "the weights are pretrained, else false",
    )

    @property
    def begins_with_weights(self) -> bool:
        """Whether a tower begins with weights that were trained before."""
        if self.pretrained is not None or self.towers is not None:
            return True
        config = self.architecture if isinstance(self.architecture, dict) else {}
        sections = (
            ("vision_cfg", "timm_model_pretrained"),
            ("text_cfg", "hf_model_pretrained"),
        )
        return any((config.get(section) or {}).get(key) for section, key in sections)

    @property
    def rests_batch_norm(self) -> bool:
        """Whether batch norm of the towers keeps its statistics."""
        if self.freeze_batch_norm is not None:
            return self.freeze_batch_norm
        # Statistics of random weights are worth nothing.
        is_random = self.image_tower is not None and self.image_tower.weights == "random"
        return self.begins_with_weights and not is_random

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.image_tower is None) != (self.text_tower is None):
            missing, given = ("image_tower", "text_tower")[:: 1 if self.text_tower else -1]
            raise ValueError(f"{given} needs {missing} beside it; set both")
        if self.towers is None:
            if self.embed_dim is not None:
                raise ValueError("embed_dim is for image_tower and text_tower; leave it out")
            return self
        for setting in ("architecture", "pretrained"):
            if getattr(self, setting) is not None:
                raise ValueError(
                    f"{setting} and image_tower exclude each other; leave one of them out"
                )
        for tower in ("image", "text"):
            if getattr(self, f"unlocked_{tower}_blocks") is not None:
                raise ValueError(
                    f"unlocked_{tower}_blocks is for model.pretrained; set "
                    f"{tower}_tower.unlocked_blocks"
                )
        if self.patch_dropout:
            raise ValueError("patch_dropout does nothing for image_tower; leave it out")
        return self

    @property
    def towers(self) -> tuple[ImageTowerConfig, TextTowerConfig] | None:
        """The two pretrained towers, where the model is made of them."""
        if self.image_tower is None or self.text_tower is None:
            return None
        return self.image_tower, self.text_tower

    @property
    def stored_towers(self) -> tuple[Tower, ...]:
        """The towers whose features are computed once and stored: both, or that of the images.

        An image tower that is trained takes so much longer than a locked text tower that storing
        the texts would gain nothing.
        """
        if self.towers is None or self.lora is not None:
            return ()
        image, text = (one.unlocked_blocks == 0 for one in self.towers)
        if not image:
            return ()
        return ("image", "text") if text else ("image",)


def initial_model(
    settings: ModelConfig, *, with_bias: bool = False, trains_images: bool = True
) -> ModelParts:
    """Makes the model, with random weights or pretrained ones.

    Args:
        settings: the recipe's section.
        with_bias: whether the objective needs a model with a ``logit_bias``.
        trains_images: whether images pass the model; else an architecture may leave out its
            ``vision_cfg``, and gets the smallest tower that open_clip can make.

    Raises:
        ModelError: the architecture or the weights are not known or do not load.
        TrainingError: the weights are of another architecture.
        ConfigError: a tower to be locked has no blocks that could stay unlocked, or
            ``model.preprocess`` does not fit.
    """
    if settings.towers is not None:
        return _two_towers(settings, *settings.towers, with_bias=with_bias)
    if not trains_images:
        settings = _with_image_tower(settings)
    source = load_model(settings.pretrained) if settings.pretrained else None
    config = _configuration(settings, source, with_bias=with_bias)
    parts = build_model(
        config,
        preprocess=_preprocessing(settings.preprocess, source, image_size_of(config)),
        for_training=True,
        tokenizer=None if source is None else _tokenizer_for(source.tokenizer, config),
    )
    if source is not None:
        load_weights(parts.model, source)
        _announce(source, parts, with_bias=with_bias)
    _set(parts.model, "logit_scale", settings.initial_logit_scale, math.log)
    _set(parts.model, "logit_bias", settings.initial_logit_bias, float)
    if settings.unlocked_image_blocks is not None:
        lock_tower(parts.model, "image", settings.unlocked_image_blocks)
    if settings.unlocked_text_blocks is not None:
        lock_tower(parts.model, "text", settings.unlocked_text_blocks)
    return parts


def _two_towers(
    settings: ModelConfig, image: ImageTowerConfig, text: TextTowerConfig, *, with_bias: bool
) -> ModelParts:
    check_preprocess(settings.preprocess, setting="model.preprocess")
    bias: dict[str, float] = {}
    if with_bias:
        bias = {"init_logit_bias": SIGMOID_BIAS, "init_logit_scale": math.log(SIGMOID_SCALE)}
    parts = build_two_towers(
        image,
        text,
        embed_dim=settings.embed_dim,
        preprocess=settings.preprocess,
        image_size=settings.image_size,
        context_length=settings.context_length,
        bias=bias,
    )
    _set(parts.model, "logit_scale", settings.initial_logit_scale, math.log)
    _set(parts.model, "logit_bias", settings.initial_logit_bias, float)
    lock_towers(parts.model, image, text)
    return parts


def _with_image_tower(settings: ModelConfig) -> ModelConfig:
    asked = settings.architecture
    if asked is None or isinstance(asked, str) or "vision_cfg" in asked or settings.pretrained:
        return settings
    complete = {**asked, "vision_cfg": dict(SMALLEST_IMAGE_TOWER)}
    return settings.model_copy(update={"architecture": complete})


def resumed_settings(settings: ModelConfig, model_folder: Path) -> ModelConfig:
    """What the model of a resumed run is made from.

    A run that began with pretrained weights goes on with the architecture, the preprocessing and
    the tokenizer of its checkpoint: the weights that it began with may be gone, or changed.

    Args:
        settings: the recipe's section.
        model_folder: the checkpoint's model.
    """
    if settings.towers is not None:
        return with_towers_of(settings, model_folder)
    if settings.pretrained is None:
        return settings
    from_checkpoint: dict[str, Any] = {
        "pretrained": str(model_folder),
        "architecture": None,
        "preprocess": {},
    }
    as_they_are = ("image_size", "context_length", "initial_logit_scale", "initial_logit_bias")
    return settings.model_copy(update={**from_checkpoint, **dict.fromkeys(as_they_are)})


def with_towers_of(settings: ModelConfig, folder: Path) -> ModelConfig:
    """Both towers with their heads out of a model folder, and all that belongs to them.

    What is locked of them stays as the settings say.
    """
    assert settings.towers is not None
    image, text = settings.towers
    own = {"name": str(folder), "head": None}
    return settings.model_copy(
        update={
            "image_tower": image.model_copy(update={**own, "weights": None}),
            "text_tower": text.model_copy(update={**own, "pooling": None}),
            "embed_dim": None,
            "preprocess": {},
            **dict.fromkeys(("image_size", "context_length", "initial_logit_scale")),
            "initial_logit_bias": None,
        }
    )


def fingerprint(parts: ModelParts, *, weights: bool) -> str:
    """Equal for equal architectures, preprocessings and, with ``weights``, parameters.

    The sum of the bits of each tensor, at the speed of memory; for comparing ranks, not files.
    """
    digest = hashlib.blake2b(digest_size=8)
    # Machines may have the same folder in different places.
    config = config_in(Path("/"), parts.config)
    digest.update(repr((config, parts.preprocessing)).encode())
    for name, tensor in parts.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if weights:
            bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            words = bits[: len(bits) - len(bits) % 4].view(torch.int32)
            digest.update(f"{int(words.sum())} {int(bits[len(words) * 4 :].sum())}".encode())
    return digest.hexdigest()


def _configuration(
    settings: ModelConfig, source: ModelParts | None, *, with_bias: bool
) -> dict[str, Any]:
    """The architecture, the weights' own or the recipe's, with what the recipe adds to it."""
    if source is None:
        config = architecture_config(settings.architecture or DEFAULT_ARCHITECTURE)
    else:
        config = config_of_weights(source, settings.architecture)
    if settings.patch_dropout:
        check_patch_dropout(config, "model.patch_dropout")
        config["vision_cfg"] = {**config["vision_cfg"], "patch_dropout": settings.patch_dropout}
    if settings.image_size is not None:
        config = with_image_size(config, settings.image_size)
    if settings.context_length is not None:
        config["text_cfg"] = {**config["text_cfg"], "context_length": settings.context_length}
    if with_bias:
        if config.get("init_logit_bias") is None:
            config["init_logit_bias"] = SIGMOID_BIAS
        if config.get("init_logit_scale") is None:
            config["init_logit_scale"] = math.log(SIGMOID_SCALE)
    return config


def _preprocessing(
    asked: Mapping[str, Any], source: ModelParts | None, image_size: tuple[int, int]
) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``: the weights' own with what the recipe sets.

    Raises:
        ConfigError: a key is not known, or a value is none for it.
    """
    check_preprocess(asked, setting="model.preprocess")
    size = asked.get("size", image_size)
    if ((size, size) if isinstance(size, int) else tuple(size)) != image_size:
        raise ConfigError(
            f"model.preprocess.size is {size}, and the image tower takes "
            f"{image_size[0]} x {image_size[1]}; leave it out, and set model.image_size for a "
            "tower of another size"
        )
    base = {} if source is None else source.preprocessing.to_open_clip()
    for key, value in asked.items():
        if source is not None and key != "size" and base[key] != _plain(value):
            _logger.warning(
                "model.preprocess.%s is %s, and the weights of %s were trained with %s: the "
                "recipe's is used",
                *(key, value, source.name, base[key]),
            )
    return {**base, **asked}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tokenizer_for(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Tokenizer:
    length = config["text_cfg"].get("context_length")
    return tokenizer if length is None else with_context_length(tokenizer, length)


def _announce(source: ModelParts, parts: ModelParts, *, with_bias: bool) -> None:
    """Says what came with the weights."""
    look = parts.preprocessing
    _logger.info(
        "model.pretrained %s: quick_gelu %s, images of %d x %d px (%s, %s, mean %s), texts of %s "
        "tokens",
        source.name,
        str(bool(parts.config.get("quick_gelu"))).lower(),
        *look.size,
        look.resize_mode,
        look.interpolation,
        ", ".join(f"{value:g}" for value in look.mean),
        parts.config["text_cfg"].get("context_length", 77),
    )
    if not with_bias and getattr(source.model, "logit_bias", None) is not None:
        _logger.info(
            "the weights of %s have a bias, as the sigmoid loss trains it; this objective leaves "
            "it as it is",
            source.name,
        )


def _set(model: nn.Module, name: str, value: float | None, transform: Any) -> None:
    if value is None:
        return
    parameter: torch.Tensor | None = getattr(model, name, None)
    if parameter is None:
        raise ConfigError(f"model.initial_{name} is {value}, but the model has no {name}")
    with torch.no_grad():
        parameter.fill_(transform(value))


def lock_tower(model: nn.Module, tower: Tower, unlocked_blocks: int) -> None:
    """Freezes a tower but for its last blocks and what follows them (LiT; Zhai et al. 2022).

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        tower: ``image`` or ``text``.
        unlocked_blocks: how many of the last blocks are trained, with what follows them; 0 freezes
            everything, the projection too. Blocks are a transformer's layers or the bottlenecks of
            a ResNet.

    Raises:
        ConfigError: the tower's blocks are not known, or fewer than asked for.
    """
    depths = tower_depths(model, tower, setting=f"model.unlocked_{tower}_blocks")
    deepest = max(depths.values()) - 1
    if unlocked_blocks > deepest:
        raise ConfigError(
            f"model.unlocked_{tower}_blocks is {unlocked_blocks}, but the {tower} tower has "
            f"{deepest} blocks; leave it out to train the whole tower"
        )
    for name, parameter in model.named_parameters():
        if name in depths:
            parameter.requires_grad = unlocked_blocks > 0 and depths[name] <= unlocked_blocks


def freeze_unused(model: nn.Module, *, image: bool, text: bool, temperature: bool) -> None:
    """Freezes what an objective does not train: it gets no gradient, and must not decay.

    Args:
        model: open_clip's CLIP or CustomTextCLIP.
        image: whether the image tower is trained.
        text: whether the text tower is trained.
        temperature: whether ``logit_scale`` and ``logit_bias`` are trained.
    """
    for name, parameter in model.named_parameters():
        used = image if name.startswith("visual.") else text
        if name in TEMPERATURE_NAMES:
            used = temperature
        if not used:
            parameter.requires_grad = False
