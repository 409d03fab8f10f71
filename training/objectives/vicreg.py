"""Two views agree, and the features neither vanish nor repeat one another: VICReg."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from clipsys.training.losses import vicreg
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.heads import HeadConfig
from clipsys.training.objectives.protocol import Labels, Surroundings
from clipsys.training.objectives.two_views import TwoViewObjective


class VICRegConfig(HeadConfig):
    """VICReg: two views of an image agree, while variances stay at 1 and covariances at 0.

    Views are drawn as ``augmentation`` says. No texts, and no negatives.
    """

    name: Literal["vicreg"] = Field("vicreg", description="which objective")
    invariance: NonNegativeFloat = Field(25.0, description="weight of the distance of the views")
    variance: NonNegativeFloat = Field(
        25.0, description="weight of the deviations that are below 1"
    )
    covariance: NonNegativeFloat = Field(1.0, description="weight of the covariances")
    head_layers: int = Field(3, ge=2, description="layers of head: mlp")
    head_norm: Literal["none", "batch"] = Field(
        "batch",
        description="what stands behind each hidden layer of head: mlp; batch normalisation takes "
        "the statistics of all processes and does not go with data.micro_batch_size",
    )
    head_width: PositiveInt = Field(
        2048, description="width of the projection; the paper's is 8192"
    )


class VICReg(TwoViewObjective[VICRegConfig]):
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

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """A batch without statistics."""
        if recipe.data.batch_size < 2:
            yield "data.batch_size is 1, which has no statistics; raise it"
