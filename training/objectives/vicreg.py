"""Two views agree, and the features neither vanish nor repeat one another: VICReg."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat

from clipsys.training.losses import vicreg
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.two_views import StatisticsConfig, StatisticsObjective


class VICRegConfig(StatisticsConfig):
    """VICReg: two views of an image agree, while variances stay at 1 and covariances at 0.

    Views are drawn as ``augmentation`` says. No texts, and no negatives.
    """

    name: Literal["vicreg"] = Field("vicreg", description="which objective")
    invariance: NonNegativeFloat = Field(25.0, description="weight of the distance of the views")
    variance: NonNegativeFloat = Field(
        25.0, description="weight of the deviations that are below 1"
    )
    covariance: NonNegativeFloat = Field(1.0, description="weight of the covariances")


class VICReg(StatisticsObjective[VICRegConfig]):
    """Variance, invariance and covariance of the projections of two views.

    Inputs:
        Two views of each image, each from its own seed. Captions are not needed.

    Recommendations:
        As for `BarlowTwins`. The weights belong together: with a variance below the invariance the
        features collapse (table 7 of the paper).

    Relations:
        `BarlowTwins` standardises the features instead of holding their variance.

    References:
        Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization for
        Self-Supervised Learning", equation 6. Statistics are those of all ranks.
    """

    config = VICRegConfig

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`vicreg` of both views."""
        one, rows = self.settings, outputs.rows
        weights = one.invariance, one.variance, one.covariance
        return vicreg(rows["first"], rows["second"], *weights), state
