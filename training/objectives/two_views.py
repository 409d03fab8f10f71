"""Two views of each image, projected: what objectives over pairs of views share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.model.outputs import Inputs, Outputs, Sizes
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import HeadConfig, features_of, projection_heads
from clipsys.training.objectives.protocol import Objective, View

HeadConfigT = TypeVar("HeadConfigT", bound=HeadConfig)


class TwoViewObjective(Objective[HeadConfigT]):
    """Projects two views of each image; the rows are named ``first`` and ``second``."""

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """Two, drawn alike."""
        return View(augmentation), View(augmentation)

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection, and the temperature if there is one that is learned."""
        return projection_heads(self.settings, sizes.width)

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Projections of both views, which pass the tower together."""
        projected = features_of(self.settings, towers, torch.cat(inputs.views))
        first_BD, second_BD = projected.chunk(2)
        return Outputs({"first": first_BD, "second": second_BD}, {})
