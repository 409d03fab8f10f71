"""Models with their weights, from a model folder or from the hub of open_clip's list."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipsys.errors import ModelError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models import hub
from clipsys.models.adapters import (
    ADAPTER_CONFIG_NAME,
    is_adapter_folder,
    merged,
    read_adapter,
)
from clipsys.models.architectures import architecture_config, image_size_of, unknown_name
from clipsys.models.construction import (
    hub_for,
    one_line,
    quiet_open_clip,
    without_random_values,
)
from clipsys.models.model_folders import (
    CARD_NAME,
    CONFIG_NAME,
    TEXT_CONFIG_NAME,
    WEIGHTS_NAME,
    config_in,
    read_card,
)
from clipsys.models.parts import ModelParts, fingerprint
from clipsys.models.quantisation import as_quantised, quantised_names
from clipsys.models.tokenization import has_tokenizer, make_tokenizer

#: Between a base and the adapter folder that is merged into it.
BASE_SEPARATOR = "::"


def load_model(spec: str | Path, *, listed_activation: bool = False) -> ModelParts:
    """Loads a model with its weights.

    Args:
        spec: a model folder or a run folder; ``NAME/TAG`` or ``hf-hub:ORG/REPO`` of open_clip,
            which are fetched from their hub at the first use; an adapter folder, which is merged
            into the base that it names, or ``BASE::FOLDER``, which names another place of the base.
        listed_activation: takes the activation of the architecture ``NAME`` where the weights were
            trained with another one; see `is_listed_with_other_activation`.

    Raises:
        ModelError: there is no such model, or its files are damaged or altered.
    """
    text = str(spec).removeprefix("local-dir:")
    folder = Path(text).expanduser()
    base, is_adapted, adapter = text.partition(BASE_SEPARATOR)
    if is_adapted and not folder.exists():
        return _load_adapted(Path(adapter).expanduser(), base)
    if folder.is_dir():
        is_base = (folder / CONFIG_NAME).is_file()
        adapted = is_adapter_folder(folder) and not is_base
        return _load_adapted(folder, None) if adapted else _load_folder(folder)
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
        own = _config_here(config, folder)
        text = {"text_cfg": own["text_cfg"]} if own["text_cfg"] != config["text_cfg"] else {}
        with quiet_open_clip(), without_random_values(), hub_for(own) as reason:
            unreachable = reason
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, **text)
    except Exception as error:
        # open_clip, torch and safetensors raise anything here; all of it means: unusable folder.
        if unreachable:
            raise ModelError(
                f"{folder}: the model was written without the config.json of its text tower "
                f"{config['text_cfg']['hf_model_name']}, and {unreachable}; {hub.HINT}"
            ) from error
        raise ModelError(f"{folder}: the model cannot be loaded ({one_line(error)})") from error
    tokenizer = make_tokenizer(own, folder=folder)
    preprocessing = Preprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    # A run's own model folder is always called "model"; the run says more.
    name = folder.parent.name if folder.name == "model" else folder.name
    parts = ModelParts(model, tokenizer, own, preprocessing, name, str(folder.absolute()))
    mark = _checked_fingerprint(folder, parts, config["text_cfg"].get("hf_tokenizer_name"))
    return replace(parts, loaded_fingerprint=mark)


def _load_adapted(folder: Path, base: str | None) -> ModelParts:
    """The base, with an adapter merged into its weights.

    Args:
        folder: the adapter folder.
        base: what to load; None takes the base that the folder names.
    """
    if not is_adapter_folder(folder):
        raise ModelError(f"{folder}: not an adapter folder (no {ADAPTER_CONFIG_NAME})")
    adapter = read_adapter(folder)
    source = base or adapter.base.model
    if not source:
        raise ModelError(
            f"{folder}: the adapter does not say what its base is; name it: "
            f"BASE{BASE_SEPARATOR}{folder}"
        )
    try:
        parts = load_model(source)
    except ModelError as error:
        if base:
            raise
        raise ModelError(
            f"{folder}: its base cannot be loaded ({error}); name the place of the base: "
            f"BASE{BASE_SEPARATOR}{folder}"
        ) from error
    mark = parts.loaded_fingerprint or fingerprint(parts)
    expected = adapter.base.fingerprint
    if expected and expected != mark:
        raise ModelError(
            f"{folder}: the adapter was trained on a base with the fingerprint {expected[:12]} "
            f"({adapter.base.model}), and {source} has {mark[:12]}; name the base that it was "
            "trained on"
        )
    state = dict(parts.model.state_dict())
    if adapter.quantised:
        state |= {name: as_quantised(state[name]) for name in quantised_names(adapter.pairs, state)}
    parts.model.load_state_dict(merged(state, adapter))
    own = fingerprint(parts) if not adapter.merged_fingerprint else adapter.merged_fingerprint
    return replace(
        parts,
        name=folder.parent.parent.name if folder.name == "adapter" else folder.name,
        spec=f"{parts.spec}{BASE_SEPARATOR}{folder.absolute()}",
        loaded_fingerprint=own,
    )


def _config_here(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The folder's ``model_cfg``, with its present place where it names a place.

    A folder that stock open_clip wrote has no ``config.json``: its ``hf_model_name`` is a name of
    the hub, and stays.
    """
    here = config_in(folder, config)
    if not (folder / TEXT_CONFIG_NAME).is_file() and config["text_cfg"].get("hf_model_name"):
        here["text_cfg"]["hf_model_name"] = config["text_cfg"]["hf_model_name"]
    if config["text_cfg"].get("hf_tokenizer_name") and not has_tokenizer(folder):
        here["text_cfg"]["hf_tokenizer_name"] = config["text_cfg"]["hf_tokenizer_name"]
    return here


def _checked_fingerprint(folder: Path, parts: ModelParts, tokenizer_name: str | None) -> str:
    """The fingerprint, which must be the one that the folder's card names.

    Up to version 0.2.0 the path of a tokenizer's folder was part of it; of such a model folder the
    fingerprint stays what it was, since collections know the model by it.
    """
    card, actual = read_card(folder), fingerprint(parts)
    if card is None or card.fingerprint == actual:
        return actual
    if tokenizer_name and fingerprint(parts, tokenizer=tokenizer_name) == card.fingerprint:
        return card.fingerprint
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
                f"model {label}: the weights cannot be fetched ({one_line(error)}); check the "
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
