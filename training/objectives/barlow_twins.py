"""The features of two views correlate one with one and not at all otherwise: Barlow Twins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from clipsys.training.losses import barlow_twins
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.heads import HeadConfig
from clipsys.training.objectives.protocol import Labels, Surroundings
from clipsys.training.objectives.two_views import TwoViewObjective


class BarlowTwinsConfig(HeadConfig):
    """Barlow Twins: two views of an image, whose features shall be equal and not redundant.

    Views are drawn as ``augmentation`` says. No texts, and no negatives.
    """

    name: Literal["barlow_twins"] = Field("barlow_twins", description="which objective")
    off_diagonal: NonNegativeFloat = Field(
        0.0051, description="weight of the correlations between different features"
    )
    head_layers: int = Field(3, ge=2, description="layers of head: mlp")
    head_norm: Literal["none", "batch"] = Field(
        "batch",
        description="what stands behind each hidden layer of head: mlp; batch normalisation takes "
        "the statistics of all processes and does not go with data.micro_batch_size",
    )
    head_width: PositiveInt = Field(
        2048, description="width of the projection; the paper's is 8192"
    )


class BarlowTwins(TwoViewObjective[BarlowTwinsConfig]):
    """Redundancy reduction between the projections of two views.

    Inputs:
        Two views of each image, each from its own seed. Captions are not needed.

    Recommendations:
        Where batches are small: no image is compared with another. Wide projections; the width of
        the head matters more than that of the features. The head is thrown away afterwards.

    Relations:
        `VICReg` without standardisation, `SimCLR` with comparisons of images.

    References:
        Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        equation 1. Statistics are those of all ranks.
    """

    config = BarlowTwinsConfig

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`barlow_twins` of both views."""
        rows = outputs.rows
        return barlow_twins(rows["first"], rows["second"], self.settings.off_diagonal), state

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """A batch without statistics."""
        if recipe.data.batch_size < 2:
            yield "data.batch_size is 1, which has no statistics; raise it"
