"""Equal labels attract, others repel up to a margin: the contrastive loss of pairs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat

from clipsys.training.losses import margin_contrastive
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.label_views import LabelConfig, LabelViewsObjective
from clipsys.training.objectives.protocol import Labels


class MarginConfig(LabelConfig):
    """Squared distances: small within a label, larger than a margin between labels.

    Labels are the ``.cls`` members, or what ``data.label_key`` names.
    """

    name: Literal["margin"] = Field("margin", description="which objective")
    margin: PositiveFloat = Field(1.0, description="distance from which others do not repel")
    unit_norm: bool = Field(
        True, description="compare unit vectors; the paper's have any length, which the margin sets"
    )


class Margin(LabelViewsObjective[MarginConfig]):
    """Contrastive loss with a margin over all pairs of the batch.

    Inputs:
        Views of each image, each from its own seed, and a label of each sample. A sample without a
        label is skipped and counted.

    Recommendations:
        A margin of about 1 between unit vectors, which are 1.41 apart if unrelated. `SupCon` and
        `Triplet` learn more from a batch: here a pair counts by its own distance alone.

    Relations:
        `Triplet` compares distances with each other.

    References:
        Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping",
        equation 4.
    """

    config = MarginConfig

    @property
    def has_unit_norm(self) -> bool:
        """As the recipe says."""
        return self.settings.unit_norm

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`margin_contrastive` of all views of all ranks."""
        rows_RD, labels_R = self.flattened(outputs, labels)
        return margin_contrastive(rows_RD, labels_R, self.settings.margin), state
