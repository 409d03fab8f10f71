"""A small batch through the towers, forward and backward, before the first step.

An adapter on a layer whose weight is read without a call of the layer (the output projection of
`nn.MultiheadAttention`, the projections of a ResNet's attention pool) gets no gradient, and adding
it to the weight at the end then changes what the model computes: by 0.08 to 0.7 of a unit vector,
without a word. Both are tried here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.models.open_clip_models import ModelParts
from clipsys.training.model.layers import Tower

_TEXTS = ["a photo of a cat", "two red squares on the street 17"]
#: Norm of the difference of two unit vectors that rounding may cause.
_MERGING_TOLERANCE = 1e-3


class Probe:
    """Two images and two texts, encoded with gradients in evaluation mode."""

    def __init__(self, parts: ModelParts, towers: Sequence[Tower]) -> None:
        self._clip = parts.model
        generator = torch.Generator().manual_seed(0)
        size = parts.preprocessing.size
        self._images = torch.randn(2, 3, *size, generator=generator)
        self._tokens = parts.tokenizer(_TEXTS) if "text" in towers else None
        self._encodes_images = "image" in towers

    def features(self) -> list[torch.Tensor]:
        """Unit vectors of each tower."""
        clip, found = self._clip, []
        if self._encodes_images:
            found.append(clip.encode_image(self._images))  # type: ignore[operator]
        if self._tokens is not None:
            found.append(clip.encode_text(self._tokens))  # type: ignore[operator]
        return [F.normalize(features.float(), dim=-1) for features in found]

    def backward(self) -> None:
        """Leaves gradients of a random direction of the features."""
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros(())
        for features in self.features():
            total = total + (features * torch.randn(features.shape, generator=generator)).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]


def receiving(probe: Probe, clip: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of those layers that are called, and whose outputs receive gradients."""
    outputs: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.requires_grad:
                first.retain_grad()
                outputs.setdefault(name, []).append(first)

        return layers[name].register_forward_hook(keep)

    handles = [watch(name) for name in layers]
    try:
        with _trainable(clip), resting(clip):
            probe.backward()
    finally:
        for handle in handles:
            handle.remove()
    return [
        name
        for name in layers
        if any(one.grad is not None and bool(one.grad.any()) for one in outputs.get(name, ()))
    ]


@contextmanager
def _trainable(clip: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in clip.parameters()]
    clip.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag
            parameter.grad = None


@contextmanager
def resting(clip: nn.Module) -> Iterator[None]:
    """Evaluation mode, without drawing from the run's random numbers."""
    modes = [(module, module.training) for module in clip.modules()]
    clip.eval()
    with torch.random.fork_rng(devices=[]):
        yield
    for module, mode in modes:
        module.training = mode


def require_gradients(probe: Probe, clip: nn.Module) -> None:
    """Refuses adapters that receive no gradient. They must not be zero.

    Raises:
        ConfigError: it names them.
    """
    adapters = {name: one for name, one in clip.named_parameters() if ".lora_" in name}
    with resting(clip):
        probe.backward()
    idle = [
        name.partition(".lora_")[0].replace(".base_layer", "")
        for name, parameter in adapters.items()
        if parameter.grad is None or not bool(parameter.grad.any())
    ]
    for parameter in clip.parameters():
        parameter.grad = None
    if idle:
        names = list(dict.fromkeys(idle))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(
            f"model.lora.targets: {', '.join(names[:3])}{more} would get adapters that receive no "
            "gradient, since the tower reads these weights without calling the layers, or does not "
            "use them: nothing would be trained there, and merging would spoil the model; leave "
            "them out, or set model.lora.targets to null to take the layers that do"
        )


def require_exact_merging(
    probe: Probe, clip: nn.Module, merged: Mapping[nn.Parameter, torch.Tensor]
) -> None:
    """Refuses adapters that do something else than their merged weights. They must not be zero.

    Args:
        probe: what is encoded.
        clip: the model with adapters.
        merged: the merged weight of each adapted one.

    Raises:
        ConfigError: the outputs differ.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in clip.modules() if isinstance(module, BaseTunerLayer)]
    kept = {weight: weight.detach().clone() for weight in merged}
    with torch.no_grad(), resting(clip):
        beside = probe.features()
        for layer in layers:
            layer._disable_adapters = True
        try:
            for weight, value in merged.items():
                weight.copy_(value)
            inside = probe.features()
        finally:
            for layer in layers:
                layer._disable_adapters = False
            for weight, value in kept.items():
                weight.copy_(value)
    distance = max(
        float((one - other).norm(dim=-1).max()) for one, other in zip(beside, inside, strict=True)
    )
    if not distance <= _MERGING_TOLERANCE:
        raise ConfigError(
            "model.lora: the adapters of this model cannot be merged into its weights: embeddings "
            f"would differ by {distance:.2g}; set model.lora.targets to layers whose weights are "
            "used as they are (no weight normalisation or standardisation)"
        )
