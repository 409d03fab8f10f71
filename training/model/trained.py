"""The module that DeepSpeed trains: towers, an objective's heads, and their momentum copy.

Its parameters are named ``clip.*`` (open_clip's model), ``heads.*`` (the objective's) and
``momentum.clip.*``, ``momentum.heads.*`` (frozen copies that follow them).
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from clipsys.training.model.adapters import Adapters
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes
from clipsys.training.model.towers import TowerOptions, Towers

if TYPE_CHECKING:
    from typing_extensions import Self

#: What the names of the momentum copy's parameters begin with.
MOMENTUM_PREFIX = "momentum."


class Method(Protocol):
    """What this module needs to know of an objective."""

    num_texts: int
    momentum: float | None

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """What is trained beside the towers."""

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """With gradients."""

    def targets(self, momentum_towers: Towers, inputs: Inputs) -> Rows:
        """Without gradients."""


class TrainedModel(Towers):
    """Towers with the heads of an objective, and with the objective's forward."""

    def __init__(
        self,
        clip: nn.Module,
        objective: Method,
        options: TowerOptions = TowerOptions(),
        *,
        sizes: Sizes,
        adapters: Adapters | None = None,
    ) -> None:
        """
        Args:
            clip: open_clip's model.
            objective: what is minimised.
            options: precision, checkpointing, compilation, batch norm.
            sizes: what the heads are shaped by.
            adapters: those that the model has.
        """
        heads = objective.heads(sizes)
        has_text = objective.num_texts > 0
        # Copied first: compilation cannot be copied.
        copies: tuple[nn.Module, nn.ModuleDict] | None = None
        if objective.momentum is not None:
            copies = deepcopy(clip) if has_text else _ImageOnly(clip), deepcopy(heads)
        super().__init__(clip, heads, options)
        self.adapters = adapters
        self._objective = objective
        self.momentum: Towers | None = None
        if copies:
            self.momentum = Towers(*copies, TowerOptions(options.precision), has_text=has_text)
            self.momentum.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Training mode; momentum towers stay in evaluation mode, but for their batch norm.

        That takes the statistics of the batch, as in MoCo, unless batch norm is frozen. With the
        running ones of the trained towers the keys of a ResNet on emoji all became equal, and with
        them the queries.
        """
        super().train(mode)
        if self.freezes_batch_norm:
            return self
        for module in self.momentum.modules() if self.momentum is not None else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    def use_precision(self, precision: str) -> str:
        """Computes in another precision from now on; returns the one until now."""
        usual, self.precision = self.precision, precision
        if self.momentum is not None:
            self.momentum.precision = precision
        return usual

    def forward(self, inputs: Inputs, *, wants_targets: bool = False) -> Outputs | Rows:
        """The outputs that the loss is taken of, or the targets of the momentum towers."""
        if wants_targets:
            assert self.momentum is not None
            return self._objective.targets(self.momentum, inputs)
        rows, shared = self._objective.forward(self, inputs)
        # ZeRO-3 empties a parameter when its module is done: what is returned must be a copy.
        copied = {
            name: tensor.clone() if isinstance(tensor, nn.Parameter) else tensor
            for name, tensor in shared.items()
        }
        return Outputs(rows, copied)


class _ImageOnly(nn.Module):
    """The image tower of an open_clip model, copied; nothing of its text."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.visual = deepcopy(clip.visual)

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.visual(image_BCHW)
        return features
