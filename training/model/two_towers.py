"""Two pretrained towers and new heads: settings, and from settings to a model.

Each tower comes with its weights, its preprocessing or tokenizer, and a head that maps what it
gives into the common space. The result is open_clip's CustomTextCLIP, whatever the towers are::

    timm trunk  -> visual.trunk, visual.head     \\
    open_clip   -> visual                          CustomTextCLIP of width embed_dim
    Hugging Face encoder -> text.transformer, text.proj   /
    open_clip   -> text

Locked image towers with a trained text tower are LiT (Zhai et al. 2022, "LiT: Zero-Shot Transfer
with Locked-image text Tuning").
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import nn

from clipsys.config import PathText, Settings
from clipsys.errors import ConfigError, ModelError, TrainingError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models import hub
from clipsys.models.architectures import complete_config, contrastive_pair
from clipsys.models.construction import one_line
from clipsys.models.model_folders import CONFIG_NAME
from clipsys.models.open_clip_models import ModelParts, build_model, load_model
from clipsys.models.tokenization import make_tokenizer
from clipsys.training.model.layers import TEMPERATURE_NAMES, Tower, tower_depths
from clipsys.training.model.tower_weights import load_trunk, read_weights

_logger = logging.getLogger(__name__)

TIMM, HUGGING_FACE, OPEN_CLIP = "timm:", "hf:", "open_clip:"
#: Width of the common space unless the recipe or a tower with its own head sets it.
DEFAULT_WIDTH = 512
#: Tokens of a text for a Hugging Face tower whose own limit is higher, as CLIP's.
DEFAULT_CONTEXT = 77
#: sentence-transformers' names of how token vectors become one, and open_clip's poolers.
_POOLERS = {
    "pooling_mode_mean_tokens": "mean_pooler",
    "pooling_mode_cls_token": "cls_last_hidden_state_pooler",
    "pooling_mode_max_tokens": "max_pooler",
}


class TowerConfig(Settings):
    """A pretrained tower, what is trained of it, and its head."""

    name: PathText = Field(
        description="timm:NAME (images), hf:NAME_OR_FOLDER (texts), open_clip:NAME/TAG, or a "
        "model folder, whose own head is used unless another one is set"
    )
    unlocked_blocks: NonNegativeInt | None = Field(
        0, description="train the last blocks too; 0: the head alone; null: the whole tower"
    )
    head: Literal["linear", "mlp"] | None = Field(
        None,
        description="a new head: one matrix, or two with a GELU between them; default linear for "
        "timm and Hugging Face, none for a tower of open_clip, which has one",
    )
    locked_head: bool = Field(False, description="do not train the tower's own head either (LiT)")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the values that are left out before the head's last"
        " matrix, in training",
    )

    @model_validator(mode="after")
    def _check(self) -> TowerConfig:
        if self.locked_head and (self.head or self.unlocked_blocks != 0):
            raise ValueError(
                "locked_head is for a locked tower with its own head; leave out head and "
                "unlocked_blocks"
            )
        if self.locked_head and self.name.startswith((TIMM, HUGGING_FACE)):
            raise ValueError(f"locked_head: {self.name} has no head of its own; leave it out")
        return self


class ImageTowerConfig(TowerConfig):
    """A pretrained image tower."""

    weights: PathText | None = Field(
        None,
        description="file with the weights of a timm model (.safetensors, .pth, .bin), where its "
        "hub is not to be asked; random: none",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> ImageTowerConfig:
        if self.name.startswith(HUGGING_FACE):
            raise ValueError(
                f"name is {self.name}, a text encoder; use timm:NAME, open_clip:NAME/TAG or a "
                "model folder"
            )
        if self.weights and not self.name.startswith(TIMM):
            raise ValueError("weights is for a tower of timm (name timm:NAME); leave it out")
        if self.weights == "random" and self.unlocked_blocks is not None:
            raise ValueError(
                "weights is random, so that all blocks must be trained; set unlocked_blocks to null"
            )
        return self


class TextTowerConfig(TowerConfig):
    """A pretrained text tower."""

    pooling: Literal["mean", "cls", "max"] | None = Field(
        None,
        description="how the vectors of a Hugging Face encoder's tokens become one; default what "
        "its sentence-transformers folder says, else mean",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> TextTowerConfig:
        if self.name.startswith(TIMM):
            raise ValueError(
                f"name is {self.name}, an image model; use hf:NAME_OR_FOLDER, open_clip:NAME/TAG "
                "or a model folder"
            )
        return self


class _TowerSource(NamedTuple):
    """Where a tower comes from: its part of the ``model_cfg``, and its weights."""

    config: dict[str, Any]
    width: int | None
    parts: ModelParts | None = None


def build_two_towers(
    image: ImageTowerConfig,
    text: TextTowerConfig,
    *,
    embed_dim: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    bias: Mapping[str, float] | None = None,
) -> ModelParts:
    """Makes a model of two towers with their weights, and new heads where they are asked for.

    Args:
        image: the image tower.
        text: the text tower.
        embed_dim: width of the common space; None takes that of a tower with its own head, else
            512.
        preprocess: what differs from the image tower's own ``preprocess_cfg``.
        image_size: pixels of the images; None takes the tower's.
        context_length: tokens of a text; None takes the tower's, at most 77 of Hugging Face's.
        bias: further keys of the ``model_cfg``, such as ``init_logit_bias``.

    Raises:
        ModelError: a tower's weights are unavailable or damaged.
        ConfigError: heads and widths contradict each other.
        TrainingError: weights do not fit their tower.
    """
    visual = _image_source(image, image_size)
    textual = _text_source(text, context_length)
    width = _common_width(embed_dim, (image, visual, "image_tower"), (text, textual, "text_tower"))
    _require_head_kind(image, visual, "image_tower")
    _require_head_kind(text, textual, "text_tower")
    config = {
        "embed_dim": width,
        "vision_cfg": visual.config,
        "text_cfg": textual.config,
        "custom_text": True,
        "quick_gelu": _activation(visual, textual),
        **(bias or {}),
    }
    tokenizer = textual.parts.tokenizer if textual.parts else None
    if textual.parts and context_length is not None:
        tokenizer = make_tokenizer(config)
    own = visual.parts.preprocessing.to_open_clip() if visual.parts else _timm_look(visual.config)
    own["size"] = complete_config(config)["vision_cfg"]["image_size"]
    parts = build_model(
        config, preprocess={**own, **(preprocess or {})}, for_training=True, tokenizer=tokenizer
    )
    # A folder with this configuration has all weights itself.
    parts.config["text_cfg"]["hf_model_pretrained"] = False
    _load_image(parts.model, image, visual)
    if textual.parts is not None:
        _load_own_tower(parts.model, textual.parts, "text", keep_head=text.head is None)
    _add_dropout(parts.model, image, text)
    _logger.info(
        "two towers: %s and %s, heads %s and %s, %d values wide",
        *(image.name, text.name, _head_kind(image, visual), _head_kind(text, textual), width),
    )
    name = f"{image.name.rpartition('/')[2]} + {text.name.rpartition('/')[2]}"
    return replace(parts, name=name)


def lock_towers(model: nn.Module, image: TowerConfig, text: TowerConfig) -> None:
    """Freezes what the two settings say: everything but heads and unlocked blocks.

    Raises:
        ConfigError: the blocks of a tower are not known, or fewer than asked for.
    """
    towers: tuple[tuple[Tower, TowerConfig], ...] = (("image", image), ("text", text))
    for tower, settings in towers:
        unlocked = settings.unlocked_blocks
        if unlocked is None:
            continue
        heads = head_names(model, tower)
        depths: dict[str, int] = {}
        if unlocked:
            setting = f"model.{tower}_tower.unlocked_blocks"
            depths = tower_depths(model, tower, setting=setting)
            deepest = max(depths.values()) - 1
            if unlocked > deepest:
                raise ConfigError(
                    f"{setting} is {unlocked}, but the {tower} tower has {deepest} blocks; set it "
                    "to null to train the whole tower"
                )
        for name, parameter in tower_parameters(model, tower):
            is_head = name in heads
            parameter.requires_grad = (is_head and not settings.locked_head) or (
                name in depths and unlocked > 0 and depths[name] <= unlocked
            )


def tower_parameters(model: nn.Module, tower: Tower) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of a tower of open_clip's CLIP or CustomTextCLIP."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name not in TEMPERATURE_NAMES and name.startswith("visual.") == (tower == "image")
    ]


#: Beginnings of the names of heads, by tower: timm's, those of open_clip's own transformers, its
#: attention pool; Hugging Face's, and open_clip's.
_HEADS: dict[Tower, tuple[str, ...]] = {
    "image": ("visual.head.", "visual.proj", "visual.attnpool.c_proj."),
    "text": ("text.proj.", "text.text_projection", "text_projection"),
}


def head_names(model: nn.Module, tower: Tower) -> frozenset[str]:
    """Names of the parameters of a tower's head: what follows its last layer and its pooling."""
    names = [name for name, _ in tower_parameters(model, tower)]
    return frozenset(name for name in names if name.startswith(_HEADS[tower]))


# ---- sources -----------------------------------------------------------------------------------


def _image_source(tower: ImageTowerConfig, size: int | tuple[int, int] | None) -> _TowerSource:
    if tower.name.startswith(TIMM):
        return _TowerSource(_timm_config(tower, size), None)
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
    return _TowerSource(vision, int(config["embed_dim"]), parts)


def _timm_config(tower: ImageTowerConfig, size: int | tuple[int, int] | None) -> dict[str, Any]:
    import timm

    name = tower.name.removeprefix(TIMM)
    known = timm.models.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if known is None:
        from difflib import get_close_matches

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


def _timm_look(config: Mapping[str, Any]) -> dict[str, Any]:
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


def _text_source(tower: TextTowerConfig, context_length: int | None) -> _TowerSource:
    folder = Path(tower.name.removeprefix(HUGGING_FACE)).expanduser()
    is_model_folder = any((folder / part / CONFIG_NAME).is_file() for part in ("", "model"))
    if tower.name.startswith(HUGGING_FACE) or (folder.is_dir() and not is_model_folder):
        return _TowerSource(_hugging_face_config(tower, folder, context_length), None)
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
    return _TowerSource(text, int(config["embed_dim"]), parts)


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


# ---- heads -------------------------------------------------------------------------------------


def _head_kind(tower: TowerConfig, source: _TowerSource) -> str:
    return tower.head or ("its own" if source.width is not None else "linear")


def _common_width(asked: int | None, *towers: tuple[TowerConfig, _TowerSource, str]) -> int:
    """Width of the common space: what towers with their own heads give."""
    own = {
        setting: source.width
        for tower, source, setting in towers
        if source.width is not None and tower.head is None
    }
    width = asked or next((one for one in own.values() if one), DEFAULT_WIDTH)
    for setting, given in own.items():
        if given != width:
            raise ConfigError(
                f"model.{setting}: its own head gives {given} values, and the common space has "
                f"{width} (model.embed_dim, or the other tower's head); set model.{setting}.head "
                "to linear for a new one"
            )
    return int(width)


def _require_head_kind(tower: TowerConfig, source: _TowerSource, setting: str) -> None:
    from_library = any(source.config.get(key) for key in ("timm_model_name", "hf_model_name"))
    if tower.head == "mlp" and not from_library:
        raise ConfigError(
            f"model.{setting}.head is mlp, and open_clip's own transformers end in one matrix; "
            "set it to linear"
        )


def _activation(visual: _TowerSource, textual: _TowerSource) -> bool:
    """QuickGELU or not; one key of the ``model_cfg`` is for both of open_clip's own towers."""
    asked = {
        bool(source.parts.config.get("quick_gelu"))
        for source, library in ((visual, "timm_model_name"), (textual, "hf_model_name"))
        if source.parts is not None and not source.config.get(library)
    }
    if len(asked) > 1:
        raise ConfigError(
            "model.image_tower and model.text_tower were trained with different activations "
            "(quick_gelu), and open_clip has one for both; choose towers with the same"
        )
    return bool(asked and asked.pop())


def _add_dropout(model: Any, image: TowerConfig, text: TowerConfig) -> None:
    for tower, module in ((image, model.visual), (text, model.text)):
        if tower.dropout:
            add_head_dropout(module, tower.dropout)


class HeadDropout:
    """Leaves out values before a head's last matrix, in training; the weights stay as they are."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Called by torch before the layer, with its inputs."""
        if not module.training:
            return None
        return (torch.nn.functional.dropout(inputs[0], self._share), *inputs[1:])


def add_head_dropout(tower: nn.Module, share: float) -> None:
    """Adds `HeadDropout` to a tower whose head ends in a linear layer.

    A hook, not a module: names and number of the weights stay those of open_clip.

    Raises:
        ConfigError: its head is a bare matrix, as that of open_clip's own transformers.
    """
    head = getattr(tower, "head", None) or getattr(tower, "proj", None)
    layers = (
        [one for one in head.modules() if isinstance(one, nn.Linear)]
        if isinstance(head, nn.Module)
        else []
    )
    if not layers:
        raise ConfigError(
            f"dropout: the head of {type(tower).__name__} is a bare matrix; set dropout to 0"
        )
    layers[-1].register_forward_pre_hook(HeadDropout(share))


# ---- weights -----------------------------------------------------------------------------------


def _load_image(model: Any, tower: ImageTowerConfig, source: _TowerSource) -> None:
    if source.parts is not None:
        _load_own_tower(model, source.parts, "image", keep_head=tower.head is None)
        return
    if tower.weights == "random":
        return
    name = tower.name.removeprefix(TIMM)
    if tower.weights is not None:
        load_trunk(model.visual.trunk, read_weights(Path(tower.weights)), tower.weights)
        return
    import timm

    with hub.quiet_hub() as unreachable:
        try:
            fetched = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:
            # timm and the hub's client raise anything here; the next step is the same.
            reason = unreachable or one_line(error)
            raise ModelError(
                f"model.image_tower {tower.name}: its weights are not on this machine, and "
                f"{reason}; set model.image_tower.weights to a file with them, or "
                "connect this machine"
            ) from error
    load_trunk(model.visual.trunk, fetched.state_dict(), tower.name)


def _load_own_tower(model: nn.Module, source: ModelParts, tower: Tower, *, keep_head: bool) -> None:
    """Copies a tower out of an open_clip model; its head only where it is kept."""
    own = dict(tower_parameters_and_buffers(model, tower))
    heads = head_names(model, tower)
    given = {
        _custom_name(name, source.model): tensor
        for name, tensor in tower_parameters_and_buffers(source.model, tower)
    }
    for name, tensor in own.items():
        if not keep_head and name in heads:
            continue
        if name not in given or given[name].shape != tensor.shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise TrainingError(
                f"model.{tower}_tower {source.name}: {name} has shape {tuple(tensor.shape)}, the "
                f"weights have {found}; use another model"
            )
        tensor.data.copy_(given[name])
    if tower == "image":
        return
    scale: Any = model
    other: Any = source.model
    with torch.no_grad():
        scale.logit_scale.copy_(other.logit_scale.reshape(scale.logit_scale.shape))


def tower_parameters_and_buffers(model: nn.Module, tower: Tower) -> list[tuple[str, torch.Tensor]]:
    """Everything of a tower that its state dict holds."""
    is_image = tower == "image"
    return [
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in TEMPERATURE_NAMES
        and name.startswith("visual.") == is_image
        and not name.startswith("text_decoder.")
    ]


def _custom_name(name: str, source: nn.Module) -> str:
    """The name in CustomTextCLIP of a tensor of CLIP, whose text tower is spread over the model."""
    if hasattr(source, "text") or name.startswith("visual."):
        return name
    return f"text.{name}"
