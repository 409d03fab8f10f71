"""Weights of a timm trunk from a file, whatever names they have there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipsys.errors import ModelError, TrainingError
from clipsys.models.construction import one_line

_logger = logging.getLogger(__name__)

#: What wraps the weights in a checkpoint file of a training run.
_WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model", "module")
#: What stands before the names of a model that was trained inside another one.
_PREFIXES = ("", "module.", "model.", "visual.trunk.", "trunk.", "backbone.", "encoder.")
#: Names of the classifier of ImageNet, which a tower has no use for.
_CLASSIFIER = ("classifier.", "fc.", "head.fc.", "head.", "_fc.", "last_linear.", "head_dist.")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file, by name.

    Pickled files are read as weights alone: code in them is not run.

    Raises:
        ModelError: there is no such file, it is damaged, or it holds something else.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file of weights (model.image_tower.weights)")
    try:
        document: Any
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            document = load_file(path)
        else:
            document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch, pickle and safetensors raise anything here; all of it means: unusable file.
        raise ModelError(
            f"{path}: the weights cannot be read ({one_line(error)}); expected .safetensors, or "
            "what torch.save wrote of a state dict"
        ) from error
    while isinstance(document, Mapping):
        inner = next((document[key] for key in _WRAPPERS if key in document), None)
        if not isinstance(inner, Mapping):
            break
        document = inner
    tensors = (
        {str(name): value for name, value in document.items() if isinstance(value, torch.Tensor)}
        if isinstance(document, Mapping)
        else {}
    )
    if not tensors:
        raise ModelError(f"{path}: holds no weights by name; expected a state dict")
    return tensors


def load_trunk(trunk: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads weights into a trunk without a classifier: by name, else in their order.

    Other implementations of an architecture give its layers other names, and list them in the same
    order. Weights are taken in order only where all their shapes agree one by one.

    Args:
        trunk: a model of timm without its classifier.
        weights: what `read_weights` gave.
        source: where they come from, for messages.

    Raises:
        TrainingError: they are of another architecture.
    """
    own = trunk.state_dict()
    for prefix in _PREFIXES:
        named = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        if all(name in named and named[name].shape == one.shape for name, one in own.items()):
            trunk.load_state_dict({name: named[name] for name in own})
            return
    ordered = _without_classifier(weights, len(own))
    differing = next(
        (
            (name, tuple(one.shape), tuple(tensor.shape))
            for (name, one), tensor in zip(own.items(), ordered, strict=False)
            if one.shape != tensor.shape
        ),
        None,
    )
    if len(ordered) != len(own) or differing is not None:
        what = f"{len(ordered)} tensors where it has {len(own)}"
        if differing is not None:
            what = f"{differing[2]} where {differing[0]} has {differing[1]}"
        raise TrainingError(
            f"model.image_tower.weights {source}: they do not fit {type(trunk).__name__} ({what}); "
            "name the timm model that they are of"
        )
    trunk.load_state_dict(dict(zip(own, ordered, strict=True)))
    _logger.info(
        "%s: its names are another library's; the %d tensors are taken in their order, in which "
        "all shapes agree",
        *(source, len(own)),
    )


def _without_classifier(weights: Mapping[str, torch.Tensor], count: int) -> list[torch.Tensor]:
    """The tensors in their order without those of a classifier at the end, if there is one."""
    names = list(weights)
    while len(names) > count and names[-1].startswith(_CLASSIFIER):
        names.pop()
    return [weights[name] for name in names]
