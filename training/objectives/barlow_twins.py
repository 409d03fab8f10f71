"""The features of two views correlate one with one and not at all otherwise: Barlow Twins."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat

from clipsys.training.losses import barlow_twins
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.two_views import StatisticsConfig, StatisticsObjective


class BarlowTwinsConfig(StatisticsConfig):
    """Barlow Twins: two views of an image, whose features must be equal and not redundant.

    Views are drawn as ``augmentation`` says. No texts, and no negatives.
    """

    name: Literal["barlow_twins"] = Field("barlow_twins", description="which objective")
    off_diagonal: NonNegativeFloat = Field(
        0.0051, description="weight of the correlations between different features"
    )


class BarlowTwins(StatisticsObjective[BarlowTwinsConfig]):
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
