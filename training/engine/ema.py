"""Averages of the weights over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from clipsys.training.model.trained import MOMENTUM_PREFIX


class WeightAverage:
    """Exponential moving average of weights and running statistics (Polyak & Juditsky 1992).

    The decay starts low, min(decay, (1 + t) / (10 + t)), so that the first steps do not hang on to
    random weights. Batch norm's statistics are averaged with the weights that they belong to.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._decay = decay
        state = self.beginning(model)
        self._updates: int = state["updates"]
        self._shadow: list[torch.Tensor] = state["shadow"]

    @staticmethod
    def beginning(model: torch.nn.Module) -> dict[str, Any]:
        """The state of an average that begins with a model as it is."""
        return {"updates": 0, "shadow": [tensor.clone() for tensor in _averaged(model)]}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Moves the average towards the model."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._shadow, _averaged(model), 1 - decay)

    @contextmanager
    def swapped(self, model: torch.nn.Module) -> Iterator[None]:
        """Puts the average into the model for a while."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: torch.nn.Module) -> None:
        for shadow, tensor in zip(self._shadow, _averaged(model), strict=True):
            kept = tensor.clone()
            tensor.copy_(shadow)
            shadow.copy_(kept)

    def statistics(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """The averages of running statistics, which each rank has taken by itself."""
        number = len(running_statistics(model))
        return self._shadow[len(self._shadow) - number :]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self._updates, "shadow": self._shadow}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._updates = state["updates"]
        for shadow, saved in zip(self._shadow, state["shadow"], strict=True):
            shadow.copy_(saved)


def _averaged(model: torch.nn.Module) -> list[torch.Tensor]:
    """What is trained; momentum towers are an average themselves."""
    parameters = [
        parameter.detach()
        for name, parameter in model.named_parameters()
        if not name.startswith(MOMENTUM_PREFIX)
    ]
    # Not every buffer: an attention mask holds -inf, and -inf - -inf is NaN.
    return parameters + running_statistics(model)


def running_statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    """The buffers in which batch norm keeps mean and variance of what it has seen.

    Without those of momentum towers, which follow these.
    """
    return [
        buffer
        for name, buffer in model.named_buffers()
        if "running_" in name and not name.startswith(MOMENTUM_PREFIX)
    ]
