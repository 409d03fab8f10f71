"""Two views, each a query against the momentum keys of the batch: MoCo v3."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from clipsys.training.losses import moco_v3
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    ProjectionConfig,
    learned_scale,
    mlp,
    project,
    projection_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.two_views import TwoViewObjective

_PREDICTOR = "predictor"


class MoCoV3Config(ProjectionConfig):
    """MoCo v3: both views of an image, each against the momentum keys of the batch; no queue.

    Views are drawn as ``augmentation`` says. No texts.
    """

    name: Literal["moco_v3"] = Field("moco_v3", description="which objective")
    temperature: PositiveFloat = Field(1.0, description="what cosines are divided by")
    head_width: PositiveInt = Field(256, description="width of the projection")
    predictor_hidden: PositiveInt | None = Field(
        None,
        description="width of the hidden layer of the predictor: two layers that queries pass "
        "after the projection, with head_norm between them; default that of the features",
    )
    momentum: float = Field(
        0.99, ge=0, lt=1, description="how much of themselves the momentum towers keep at each step"
    )


class MoCoV3(TwoViewObjective[MoCoV3Config]):
    """Cross-entropy of each view's prediction of the other view's key, over the keys of the batch.

    Inputs:
        Two views of each image. Both pass the trained tower, the projection and the predictor; both
        pass the momentum tower and its projection.

    Recommendations:
        Large batches, since negatives come from the batch alone: 1,024 to 4,096 in the paper. A
        temperature of 0.2 there for vision transformers, 1.0 for ResNets. The momentum is constant
        here; the paper's code lets it rise to 1 along a cosine. ``head_norm: batch`` and
        ``head_layers: 3`` are the paper's heads.

    Relations:
        `MoCo` takes its negatives from a queue, so it does with small batches. `SimCLR` has no
        momentum tower and no predictor.

    References:
        Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
        algorithm 1.
    """

    config = MoCoV3Config
    needs_negatives = True

    def __init__(self, settings: MoCoV3Config) -> None:
        super().__init__(settings)
        self.momentum = settings.momentum

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection, the predictor, and the temperature if it is learned."""
        heads = projection_heads(self.settings, sizes.width)
        width = self.settings.projected_width(sizes.width)
        hidden = self.settings.predictor_hidden or sizes.width
        heads[_PREDICTOR] = mlp(width, hidden, width, norm=self.settings.head_norm)
        return heads

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Queries: predictions from both views, which pass the tower together."""
        projected = project(self.settings, towers, torch.cat(inputs.views))
        predicted = nn.functional.normalize(towers.head(_PREDICTOR, projected), dim=-1)
        first_BD, second_BD = predicted.chunk(2)
        rows = {"first": first_BD, "second": second_BD}
        return Outputs(rows, learned_scale(self.settings, towers))

    def targets(self, momentum_towers: Towers, inputs: Inputs) -> Rows:
        """Keys: projections of both views."""
        keys = project(self.settings, momentum_towers, torch.cat(inputs.views))
        first_BD, second_BD = keys.chunk(2)
        return {"first": first_BD, "second": second_BD}

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """The sum of `moco_v3` of either view's queries with the other view's keys."""
        temperature = temperature_of(self.settings, outputs.shared)
        there = moco_v3(outputs.rows["first"], targets["second"], temperature)
        back = moco_v3(outputs.rows["second"], targets["first"], temperature)
        return there + back, state
