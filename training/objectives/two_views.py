"""Two views of each image, projected: what objectives over pairs of views share.

UnitViewObjective       on unit vectors: SimCLR, NCE
StatisticsObjective     on statistics of the batch: Barlow Twins, VICReg
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.model.outputs import Inputs, Outputs, Sizes
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    HeadConfig,
    ProjectionConfig,
    features_of,
    learned_scale,
    projection_heads,
)
from clipsys.training.objectives.protocol import Objective, Surroundings, View

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


ProjectionConfigT = TypeVar("ProjectionConfigT", bound=ProjectionConfig)


class UnitViewObjective(TwoViewObjective[ProjectionConfigT]):
    """The same with unit vectors, at a temperature."""

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit-norm projections of both views, and the temperature if it is learned."""
        rows = super().forward(towers, inputs).rows
        normalised = {name: F.normalize(row_BD, dim=-1) for name, row_BD in rows.items()}
        return Outputs(normalised, learned_scale(self.settings, towers))


class StatisticsConfig(HeadConfig):
    """Settings of an objective on statistics of the features, which wants a wide head."""

    head_layers: int = Field(3, ge=2, description="layers of head: mlp")
    head_norm: Literal["none", "batch"] = Field(
        "batch",
        description="what stands behind each hidden layer of head: mlp; batch normalisation takes "
        "the statistics of all processes and does not go with data.micro_batch_size",
    )
    head_width: PositiveInt = Field(
        2048, description="width of the projection; the paper's is 8192"
    )


StatisticsConfigT = TypeVar("StatisticsConfigT", bound=StatisticsConfig)


class StatisticsObjective(TwoViewObjective[StatisticsConfigT]):
    """The same for losses on statistics of the batch, which one row does not have."""

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """A batch without statistics."""
        if recipe.data.batch_size < 2:
            yield "data.batch_size is 1, which has no statistics; raise it"
