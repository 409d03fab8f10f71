"""Adapters (LoRA): what lies in an adapter folder, and merging it into the weights of its base.

An adapter folder is peft's own format plus two files of ours::

    adapter_config.json          peft's LoraConfig
    adapter_model.safetensors    the adapters, and the heads that were trained beside them
                                 (``modules_to_save``)
    trained.safetensors          optional: what else was trained, such as the temperature; peft does
                                 not read it
    clipsys.json                 the base and its fingerprint, the fingerprint of the merged model

`peft.PeftModel.from_pretrained(BASE, FOLDER)` reads it onto open_clip's model; of its own attention
see `_as_computed_by_peft`. Merging needs no peft: the weight of an adapted layer becomes
``W + alpha / rank · B · A`` (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
section 4.1).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipsys.errors import ModelError
from clipsys.models.construction import one_line

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
TRAINED_NAME = "trained.safetensors"
_CARD_NAME = "clipsys.json"
_FORMAT = "clipsys-adapter/1"
#: How peft names what belongs to the model that it wraps.
PEFT_PREFIX = "base_model.model."
_TWICE_UNTIL = (0, 21, 2)
#: Settings of peft's that change what an adapter is; merging knows the plain form alone.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_rslora": (False, None, True),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "layer_replication": (None,),
}


class Pair(NamedTuple):
    """The two factors of an adapter.

    Attributes:
        down: A, (rank, in) or, of a convolution, (rank, in, height, width).
        up: B, (out, rank) or (out, rank, 1, 1).
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on.

    Attributes:
        model: what `load_model` takes.
        fingerprint: of the model; empty where it is not known.
        changed_by: settings with which a run began elsewhere than at this model.
    """

    model: str = ""
    fingerprint: str = ""
    changed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        pairs: the factors by the name of the layer in the base.
        trained: tensors that replace the base's, by their name in its state dict.
        scale: alpha / rank.
        base: what it was trained on.
        quantised: whether the adapted weights of the base were held in NF4.
        merged_fingerprint: fingerprint of the merged model; empty where it is not known.
        digest: SHA-256 of its tensors.
    """

    pairs: dict[str, Pair]
    trained: dict[str, torch.Tensor]
    scale: float
    base: Base = field(default_factory=Base)
    quantised: bool = False
    merged_fingerprint: str = ""
    digest: str = ""


def merged(state: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """The base's state dict with the adapter in it; tensors that it leaves alone are shared.

    Sums are taken in float64: the merged weight is the exact one, rounded once.

    Raises:
        ModelError: the base lacks a layer or tensor of the adapter, or has it in another shape.
    """
    result = dict(state)
    for name, value in adapter.trained.items():
        if name not in state or state[name].numel() != value.numel():
            raise ModelError(_misfit(name, state.get(name), value))
        result[name] = value.reshape(state[name].shape).to(state[name].dtype)
    for name, (down, up) in adapter.pairs.items():
        place = weight_name(name, state)
        weight = result[place]
        change = up.double().flatten(1) @ down.double().flatten(1)
        if change.numel() != weight.numel():
            raise ModelError(_misfit(place, weight, change))
        change = adapter.scale * change.reshape(weight.shape).to(weight.device)
        result[place] = (weight.double() + change).to(weight.dtype)
    return result


def weight_name(layer: str, state: Mapping[str, torch.Tensor]) -> str:
    """The name of the weight that a layer's adapter is added to.

    Raises:
        ModelError: the model has no such layer.
    """
    for name in (f"{layer}.weight", f"{layer}.in_proj_weight"):
        if name in state:
            return name
    raise ModelError(f"the base has no layer {layer}, which the adapter is for; name its own base")


def _misfit(name: str, own: torch.Tensor | None, value: torch.Tensor) -> str:
    shape = "is missing" if own is None else f"is {tuple(own.shape)}"
    return (
        f"{name} {shape} in the base, and {tuple(value.shape)} in the adapter; name the base that "
        "it was trained on"
    )


def digest_of(adapter: Adapter) -> str:
    """SHA-256 over the tensors of an adapter and their scale."""
    digest = hashlib.sha256(f"{adapter.scale!r} {adapter.quantised}".encode())
    tensors = {f"{n}/{i}": t for n, pair in adapter.pairs.items() for i, t in enumerate(pair)}
    for name, tensor in sorted({**tensors, **adapter.trained}.items()):
        array = tensor.detach().cpu().contiguous().float().reshape(-1).numpy()
        digest.update(name.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def is_adapter_folder(folder: Path) -> bool:
    """Whether it holds an adapter, ours or peft's."""
    return (folder / ADAPTER_CONFIG_NAME).is_file()


def read_base(folder: Path) -> tuple[Base, dict[str, Any]]:
    """What ``clipsys.json`` of an adapter folder says: the base, and the whole document.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / _CARD_NAME
    if not path.is_file():
        return Base(), {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        base = card["base"]
        found = Base(base["model"], base["fingerprint"], tuple(base["changed_by"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: damaged ({one_line(error)}); export the adapter again"
        ) from error
    return found, card


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter folder.

    Raises:
        ModelError: a file is missing, damaged or altered, or the adapter is no plain LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    base, card = read_base(folder)
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise ModelError(f"{folder}: the adapter folder has no {ADAPTER_WEIGHTS_NAME}")
    try:
        config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        stored = load_file(folder / ADAPTER_WEIGHTS_NAME)
        more = load_file(folder / TRAINED_NAME) if (folder / TRAINED_NAME).is_file() else {}
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: the adapter cannot be read ({one_line(error)}); export it again"
        ) from error
    for name, known in _PLAIN.items():
        if config.get(name, known[0]) not in known:
            raise ModelError(
                f"{folder / ADAPTER_CONFIG_NAME}: {name} is {config[name]!r}, and only plain LoRA "
                "is merged; merge it with peft, and load the model folder that results"
            )
    pairs, trained = _sorted_out(stored, folder)
    if not card:
        pairs = _as_computed_by_peft(pairs, stored, str(config.get("peft_version", "")), folder)
    adapter = Adapter(
        pairs,
        {**trained, **more},
        alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        base,
        bool(card.get("quantised")),
        str(card.get("fingerprint", "")),
    )
    digest = digest_of(adapter)
    if card and card.get("digest") != digest:
        raise ModelError(
            f"{folder}: the adapter is not the one that was exported ({_CARD_NAME} says "
            f"{str(card.get('digest'))[:12]}, the files are {digest[:12]}); export the run again, "
            f"or delete {_CARD_NAME} if the change was meant"
        )
    return Adapter(**{**vars(adapter), "digest": digest})


def _as_computed_by_peft(
    pairs: dict[str, Pair], stored: Mapping[str, torch.Tensor], version: str, folder: Path
) -> dict[str, Pair]:
    """Adapters that peft trained itself, as it computes them.

    Up to 0.21.2 it adds that of the output projection of `nn.MultiheadAttention` twice, in forward
    and in merging alike (huggingface/peft#3774): a model that was trained so is the one with twice
    that factor.
    """
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    marker = ".base_layer.out_proj.lora_A"
    twice = {
        key.removeprefix(PEFT_PREFIX).partition(".lora_A")[0].replace(".base_layer", "")
        for key in stored
        if marker in key
    }
    if not twice or not numbers or numbers > _TWICE_UNTIL:
        return pairs
    _logger.info(
        "%s: peft %s adds the adapters of %d output projections of attention twice; so do these "
        "merged weights",
        *(folder, version, len(twice)),
    )
    return {n: Pair(p.down, 2 * p.up) if n in twice else p for n, p in pairs.items()}


def _sorted_out(
    stored: Mapping[str, torch.Tensor], folder: Path
) -> tuple[dict[str, Pair], dict[str, torch.Tensor]]:
    """The tensors of a file of peft's as factors by layer, and as tensors of the base."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    trained = {}
    for key, tensor in stored.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer", "")
        layer, found, factor = name.rpartition(".lora_")
        if found:
            factors.setdefault(layer, {})[factor.partition(".")[0]] = tensor
        else:
            trained[name] = tensor
    for layer, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise ModelError(
                f"{folder / ADAPTER_WEIGHTS_NAME}: layer {layer} has {', '.join(sorted(pair))}, "
                "expected lora_A and lora_B"
            )
    return {layer: Pair(pair["A"], pair["B"]) for layer, pair in factors.items()}, trained


def write_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    provenance: Mapping[str, Any],
) -> None:
    """Writes an adapter folder into a new folder.

    Args:
        folder: made here.
        adapter: what is written; its digest is computed.
        config: peft's LoraConfig as a dictionary.
        names: how peft names each layer of the adapter, without `PEFT_PREFIX`.
        provenance: what ``clipsys.json`` says of its origin.
    """
    from safetensors.torch import save_file

    whole = tuple(config.get("modules_to_save") or ())
    stored: dict[str, torch.Tensor] = {}
    for layer, pair in adapter.pairs.items():
        stored[f"{PEFT_PREFIX}{names[layer]}.lora_A.weight"] = pair.down
        stored[f"{PEFT_PREFIX}{names[layer]}.lora_B.weight"] = pair.up
    more = {}
    for name, tensor in adapter.trained.items():
        if name.startswith(tuple(f"{one}." for one in whole)):
            stored[PEFT_PREFIX + name] = tensor
        else:
            more[name] = tensor
    folder.mkdir()
    for file, tensors in ((ADAPTER_WEIGHTS_NAME, stored), (TRAINED_NAME, more)):
        if tensors:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(kept, folder / file, metadata={"format": "pt"})
    _write_json(folder / ADAPTER_CONFIG_NAME, config)
    card = {
        "format": _FORMAT,
        "base": {
            "model": adapter.base.model,
            "fingerprint": adapter.base.fingerprint,
            "changed_by": list(adapter.base.changed_by),
        },
        "quantised": "nf4" if adapter.quantised else None,
        "fingerprint": adapter.merged_fingerprint,
        "digest": digest_of(adapter),
        "provenance": dict(provenance),
    }
    _write_json(folder / _CARD_NAME, card)
    for file in (ADAPTER_WEIGHTS_NAME, TRAINED_NAME):
        if (folder / file).is_file():
            # safetensors 0.8 makes its file private (mode 0600) whatever the umask.
            (folder / file).chmod((folder / _CARD_NAME).stat().st_mode)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=path.name != _CARD_NAME)
    path.write_text(text + "\n", encoding="utf-8")
