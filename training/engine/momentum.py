"""Momentum towers: frozen copies that follow the weights that are trained.

After each update a copy moves to ``momentum · copy + (1 - momentum) · weight``, on whatever this
rank holds: whole tensors at ZeRO stages 0 to 2, its partition at stage 3. The weights are read from
their float32 masters, and where parameters have 16 bits the copies have float32 masters here: an
average kept in bfloat16 stalls, since its steps are smaller than half a unit in the last place.
Running statistics of batch norm are copied: what the trained towers have seen, on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import rank, world_size
from clipsys.training.model.trained import MOMENTUM_PREFIX, TrainedModel


class MomentumAverage:
    """Moves the momentum towers of a model that DeepSpeed trains."""

    def __init__(
        self,
        model: TrainedModel,
        momentum: float,
        *,
        is_partitioned: bool,
        exact: Mapping[str, torch.Tensor],
    ) -> None:
        """
        Args:
            model: after DeepSpeed has taken it.
            momentum: share of itself that a copy keeps at each step.
            is_partitioned: whether each rank holds a part of each parameter (ZeRO stage 3).
            exact: float32 values by name as they were before DeepSpeed rounded them to 16 bits;
                empty where parameters are float32.
        """
        self._weight = 1 - momentum
        self._is_partitioned = is_partitioned
        parameters = dict(model.named_parameters())
        copies = {n: p for n, p in parameters.items() if n.startswith(MOMENTUM_PREFIX)}
        self._pairs = [
            (parameters[name.removeprefix(MOMENTUM_PREFIX)], copy) for name, copy in copies.items()
        ]
        self._has_masters = bool(exact)
        self._held = [self._hold(copy) for copy in copies.values()]
        if self._has_masters:
            self._held = [
                self._own_part(exact[name.removeprefix(MOMENTUM_PREFIX)]).to(held.device)
                for name, held in zip(copies, self._held, strict=True)
            ]
        buffers = dict(model.named_buffers())
        self._statistics = [
            (buffers[name.removeprefix(MOMENTUM_PREFIX)], copy)
            for name, copy in buffers.items()
            if name.startswith(MOMENTUM_PREFIX) and "running_" in name
        ]

    def _hold(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this rank holds of a parameter; writing into it changes the parameter."""
        held: torch.Tensor = parameter.ds_tensor if self._is_partitioned else parameter  # type: ignore[attr-defined]
        return held.detach()

    def _own_part(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, padded as ZeRO 3 pads it."""
        if not self._is_partitioned:
            return value.clone()
        padded = F.pad(value.flatten(), (0, -value.numel() % world_size()))
        return padded.chunk(world_size())[rank()].clone()

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the weights as they are. Every rank must call it."""
        for (weight, copy), held in zip(self._pairs, self._held, strict=True):
            held.lerp_(self._master(weight).to(held).view_as(held), self._weight)
            if self._has_masters:
                self._hold(copy).copy_(held)
        for statistic, copied in self._statistics:
            copied.copy_(statistic)
        if self._is_partitioned:
            # Small parameters stay gathered; the gathered values are old now.
            copies: list[Any] = [copy for _, copy in self._pairs]
            gathered = [copy for copy in copies if copy.ds_status.name == "AVAILABLE"]
            if gathered:
                gathered[0].partition(gathered)

    def _master(self, weight: nn.Parameter) -> torch.Tensor:
        if not (self._has_masters and weight.requires_grad):
            return self._hold(weight)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        read = safe_get_local_fp32_param if self._is_partitioned else safe_get_full_fp32_param
        master: torch.Tensor = read(weight)
        return master

    def state(self) -> list[torch.Tensor]:
        """For a checkpoint: this rank's masters. Copies of 32 bits are saved with the module."""
        return self._held if self._has_masters else []

    @torch.no_grad()
    def load(self, saved: list[torch.Tensor]) -> None:
        """From a checkpoint.

        Raises:
            ConfigError: it was saved with parameters of another width.
        """
        if len(saved) != len(self.state()):
            raise ConfigError(
                "the checkpoint's momentum towers were saved with another engine.precision; resume "
                "with the same one"
            )
        for held, value in zip(self.state(), saved, strict=True):
            held.copy_(value)
