"""open_clip models: made from a name or a configuration, kept as model folders, fingerprinted.

A model folder is open_clip's own local format plus one file of ours::

    open_clip_config.json          model_cfg and preprocess_cfg, as open_clip reads them
    open_clip_model.safetensors    the weights
    clipsys.json                   fingerprint and provenance
    heads.safetensors              only where asked for: what an objective trained beside the model
    tokenizer files                only where the text tower uses a Hugging Face tokenizer
    config.json                    only where the text tower is a Hugging Face model

Stock open_clip loads it: ``open_clip.create_model_from_pretrained("local-dir:PATH")``. For a text
tower of Hugging Face it asks the hub for ``text_cfg.hf_model_name``; to clipsys ``config.json`` is
enough.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipsys.errors import ModelError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models import hub
from clipsys.models.architectures import (
    architecture_config,
    contrastive_pair,
    image_size_of,
    unknown_name,
)
from clipsys.models.construction import quiet_open_clip, without_random_values
from clipsys.models.tokenization import Tokenizer, make_tokenizer, vocabulary_size

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CARD_NAME = "clipsys.json"
HEADS_NAME = "heads.safetensors"
TEXT_CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class ModelParts:
    """A model with everything needed to use or to save it.

    Attributes:
        model: open_clip's CLIP or CustomTextCLIP.
        tokenizer: texts to int64 (N, context_length).
        config: open_clip's ``model_cfg``.
        preprocessing: from a decoded image to what the image tower sees.
        name: what messages call it.
        spec: what `load_model` takes to load it again; empty for a model that was built.
        loaded_fingerprint: what `fingerprint` gave when a folder was loaded; else empty. Hashing
            half a gigabyte twice would slow down each start.
    """

    model: nn.Module
    tokenizer: Tokenizer
    config: dict[str, Any]
    preprocessing: Preprocessing
    name: str
    spec: str = ""
    loaded_fingerprint: str = ""


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

    config = contrastive_pair(architecture_config(architecture))
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
        with quiet_open_clip(), _hub_for(config) as unreachable:
            try:
                model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, **options)
            except (
                *(TypeError, ValueError, KeyError, RuntimeError, AssertionError, IndexError),
                *(OSError, AttributeError, ImportError),
            ) as error:
                raise ModelError(_why_not_built(name, config, unreachable, error)) from error
    preprocessing = Preprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    return ModelParts(model, tokenizer, config, preprocessing, name)


@contextmanager
def _hub_for(config: Mapping[str, Any]) -> Iterator[str]:
    """The hub, for an architecture that needs a file of it; else nothing."""
    text_model = config["text_cfg"].get("hf_model_name")
    local = not text_model or Path(text_model).expanduser().is_dir()
    if local and not config["vision_cfg"].get("timm_model_pretrained"):
        yield ""
        return
    with hub.quiet_hub() as unreachable:
        yield unreachable


def _why_not_built(
    name: str, config: Mapping[str, Any], unreachable: str, error: BaseException
) -> str:
    if unreachable and isinstance(error, OSError):
        needed = config["text_cfg"].get("hf_model_name") or config["vision_cfg"]["timm_model_name"]
        return (
            f"model {name}: {needed} is not on this machine, and {unreachable}; set "
            f"text_cfg.hf_model_name to a folder with its config.json, or {hub.HINT}"
        )
    return f"model {name}: open_clip cannot build this configuration ({_one_line(error)})"


def _check_vocabulary(config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    text = config["text_cfg"]
    known, declared = vocabulary_size(tokenizer), text.get("vocab_size", 49408)
    if not text.get("hf_model_name") and known is not None and declared < known:
        raise ModelError(
            f"model_cfg: text_cfg.vocab_size is {declared}, fewer than the {known} tokens of the "
            f"tokenizer ({text.get('hf_tokenizer_name') or 'of CLIP'})"
        )


def load_model(spec: str | Path, *, listed_activation: bool = False) -> ModelParts:
    """Loads a model with its weights.

    Args:
        spec: a model folder or a run folder; ``NAME/TAG`` or ``hf-hub:ORG/REPO`` of open_clip,
            which are fetched from their hub at the first use.
        listed_activation: takes the activation of the architecture ``NAME`` where the weights were
            trained with another one; see `is_listed_with_other_activation`.

    Raises:
        ModelError: there is no such model, or its files are damaged or altered.
    """
    text = str(spec).removeprefix("local-dir:")
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _load_folder(folder)
    if text.startswith("hf-hub:"):
        return _load_hub(text, pretrained=None)
    name, _, tag = text.partition("/")
    import open_clip

    if name not in open_clip.list_models() or text.startswith(("/", ".", "~")):
        if (
            "/" in name
            or text.startswith((".", "/", "~"))
            or folder.suffix
            or folder.parent.is_dir()
        ):
            hint = unknown_name(name) if _looks_like_name(name) else ""
            raise ModelError(
                f"{text}: there is no such model folder" + (f", and {hint}" if hint else "")
            )
        raise ModelError(unknown_name(name))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        known = ", ".join(f"{name}/{known}" for known in tags[:8]) or "none"
        more = ", …" if len(tags) > 8 else ""
        raise ModelError(f"model {text}: no pretrained weights of that name; known: {known}{more}")
    return _load_hub(name, pretrained=tag, listed_activation=listed_activation)


def is_listed_with_other_activation(spec: str) -> bool:
    """Whether open_clip lists these weights under an architecture of another activation.

    Of such weights (``ViT-B-32/openai``) clipsys 0.1.0 made embeddings with the activation of the
    architecture, which are not those that the weights were trained for.
    """
    import open_clip

    name, _, tag = spec.partition("/")
    config = open_clip.get_model_config(name) if _looks_like_name(name) else None
    return (
        config is not None
        and _is_trained_with_quick_gelu(name, tag)
        and not config.get("quick_gelu", False)
    )


def _looks_like_name(name: str) -> bool:
    return bool(name) and name[0].isalnum() and "/" not in name


def _load_folder(folder: Path) -> ModelParts:
    import open_clip

    if not (folder / CONFIG_NAME).is_file() and (folder / "model" / CONFIG_NAME).is_file():
        folder = folder / "model"  # a run folder
    if not (folder / CONFIG_NAME).is_file():
        raise ModelError(
            f"{folder}: not a model folder (no {CONFIG_NAME}); `clipsys export RUN OUT` writes one"
        )
    weights = folder / WEIGHTS_NAME
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ModelError(f"{folder}: the model folder has no weights ({weights.name} is missing)")
    unreachable = ""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
        own = _own_text_config(config, folder)
        with quiet_open_clip(), without_random_values(), _hub_for({**config, **own}) as reason:
            unreachable = reason
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, **own)
    except Exception as error:
        # open_clip, torch and safetensors raise anything here; all of it means: unusable folder.
        if unreachable:
            raise ModelError(
                f"{folder}: the model was written without the config.json of its text tower "
                f"{config['text_cfg']['hf_model_name']}, and {unreachable}; {hub.HINT}"
            ) from error
        raise ModelError(f"{folder}: the model cannot be loaded ({_one_line(error)})") from error
    tokenizer = make_tokenizer(config, folder=folder)
    preprocessing = Preprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    # A run's own model folder is always called "model"; the run says more.
    name = folder.parent.name if folder.name == "model" else folder.name
    parts = ModelParts(model, tokenizer, config, preprocessing, name, str(folder.absolute()))
    mark = fingerprint(parts)
    _check_card(folder, mark)
    return replace(parts, loaded_fingerprint=mark)


def _own_text_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What replaces ``text_cfg`` where the folder holds the configuration of a Hugging Face model.

    open_clip takes ``hf_model_name`` for a name of the hub, or for a folder that may have moved.
    """
    text = config["text_cfg"]
    if not text.get("hf_model_name") or not (folder / TEXT_CONFIG_NAME).is_file():
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}}


def _check_card(folder: Path, actual: str) -> None:
    card = read_card(folder)
    if card is not None and card.fingerprint != actual:
        raise ModelError(
            f"{folder}: the weights are not those that were exported ({CARD_NAME} says "
            f"{card.fingerprint[:12]}, the files are {actual[:12]}); export the run again, or "
            f"delete {CARD_NAME} if the change was meant"
        )


def _load_hub(name: str, pretrained: str | None, *, listed_activation: bool = False) -> ModelParts:
    import open_clip

    label = f"{name}/{pretrained}" if pretrained else name
    quick_gelu = not listed_activation and _is_trained_with_quick_gelu(name, pretrained)
    with hub.quiet_hub() as unreachable:
        try:
            with quiet_open_clip(), without_random_values(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # decided above
                model = open_clip.create_model(
                    name,
                    pretrained=pretrained,
                    require_pretrained=True,
                    force_quick_gelu=quick_gelu,
                )
            if pretrained is None:
                config = open_clip.get_model_config(name)
            else:
                config = architecture_config(name)
        except Exception as error:
            # Whatever the hub client raises (offline, not found, no rights), the user's next step
            # is the same.
            if unreachable:
                raise ModelError(
                    f"model {label}: its weights are not on this machine, and {unreachable}; "
                    f"{hub.HINT}"
                ) from error
            raise ModelError(
                f"model {label}: the weights cannot be fetched ({_one_line(error)}); check the "
                "name and the network, or name a model folder"
            ) from error
        if quick_gelu:
            config["quick_gelu"] = True
        tokenizer = make_tokenizer(config)
    preprocessing = Preprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    preprocessing = replace(preprocessing, size=image_size_of(config))
    return ModelParts(model, tokenizer, config, preprocessing, label, label)


def _is_trained_with_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether the weights of a tag were trained with QuickGELU, whatever the architecture says.

    open_clip lists OpenAI's, DFN's and MetaCLIP's weights under architectures with the exact GELU
    as well (``ViT-B-32/openai``), and only warns that embeddings then are not those of the weights.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    return bool((tag or {}).get("quick_gelu"))


def fingerprint(parts: ModelParts, weights: Mapping[str, torch.Tensor] | None = None) -> str:
    """SHA-256 over weights, architecture and preprocessing: equal if and only if embeddings are.

    Independent of the file format, of the order of the tensors and of the shape ([] or [1]) that
    ``logit_scale`` has in and out of training.

    Args:
        parts: the model.
        weights: its state dict where the module does not hold it; None takes the module's own.
    """
    digest = hashlib.sha256()
    identity = {
        "text": {
            key: parts.config.get("text_cfg", {}).get(key)
            for key in ("context_length", "hf_tokenizer_name", "tokenizer_kwargs", "pool_type")
        },
        "quick_gelu": bool(parts.config.get("quick_gelu", False)),
        "preprocessing": {**parts.preprocessing.to_open_clip(), "fill_color": None},
    }
    digest.update(json.dumps(identity, sort_keys=True).encode())
    state = parts.model.state_dict() if weights is None else weights
    for name, tensor in sorted(state.items()):
        if name == "attn_mask" or name.endswith("num_batches_tracked"):
            continue
        array = tensor.detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview | bytes:
    import torch

    if not tensor.numel():
        return b""
    raw: np.ndarray[Any, np.dtype[np.uint8]] = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw.data


@dataclass(frozen=True)
class ModelCard:
    """What ``clipsys.json`` says of a model folder.

    Attributes:
        fingerprint: of weights, architecture and preprocessing.
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
        raise ModelError(f"{path}: damaged ({_one_line(error)}); export the model again") from error


def save_model(
    parts: ModelParts,
    out: str | Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    heads: Mapping[str, torch.Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Writes a model folder, complete or not at all. Returns the model's fingerprint.

    Args:
        parts: the model.
        out: the folder.
        weights: its whole state dict where the module does not hold it, as while ZeRO trains it.
        heads: weights that an objective trained beside the model, written beside it. open_clip and
            `load_model` do not read them.
        provenance: what ``clipsys.json`` says of the model's origin.
        overwrite: replaces ``out`` where it exists.

    Raises:
        ModelError: ``out`` exists and is not an empty folder, and ``overwrite`` is not given.
    """
    from safetensors.torch import save_file

    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())) and not overwrite:
        raise ModelError(f"{target}: already exists; choose another folder or pass --overwrite")
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
            "model_cfg": _config_in(target, parts.config),
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
        if parts.config["text_cfg"].get("hf_model_name"):
            parts.model.text.config.save_pretrained(str(folder))  # type: ignore[union-attr,operator]
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return mark


def _config_in(target: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` as it stands in a folder.

    Stock open_clip looks for the text tower's configuration under ``hf_model_name``. A folder that
    is gone since is replaced by this one, which holds that configuration too.
    """
    text = config["text_cfg"]
    name = text.get("hf_model_name") or ""
    if not Path(name).is_absolute() or Path(name).is_dir():
        return config
    return {**config, "text_cfg": {**text, "hf_model_name": str(target.absolute())}}


def _stored(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights.items():
        # Stock open_clip expects the 0-D scale; DeepSpeed needed 1-D.
        yield name, tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
