"""Each image against the positives of all other pairs, by products of any length: N-pair."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat

from clipsys.training.data.samples import Positives
from clipsys.training.losses import n_pair
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.heads import HeadConfig
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.two_views import TwoViewObjective


class NPairConfig(HeadConfig):
    """N-pair loss: pairs of two images of a label, each against the pairs of other labels.

    Labels are the ``.cls`` members, or what ``data.label_key`` names.
    """

    name: Literal["n_pair"] = Field("n_pair", description="which objective")
    positives: Literal["label", "pair"] = Field(
        "label",
        description="what makes a pair: the first view of an image and the second view of the next "
        "of its label, or both views of one image, which needs no labels",
    )
    l2: NonNegativeFloat = Field(
        0.002, description="weight of the mean squared length of the projections"
    )


class NPair(TwoViewObjective[NPairConfig]):
    """N-pair loss over the pairs of the batch.

    Inputs:
        Two views of each image, each from its own seed, and a label of each sample, unless
        ``positives`` is pair. A sample without a label is skipped and counted.

    Recommendations:
        Batches of many labels: others of an image's label are none of its negatives. Lengths are
        learned, so compare embeddings by their cosine only if that serves you as well.

    Relations:
        `NCE` with ``form: infonce`` is the same between unit vectors at a temperature. `SupCon`
        takes all images of the label as positives at once.

    References:
        Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
        equation 7.
    """

    config = NPairConfig
    needs_negatives = True

    @property
    def positives(self) -> Positives:
        """As the recipe says."""
        return self.settings.positives

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`n_pair` of both views."""
        first_BD, second_BD = outputs.rows["first"], outputs.rows["second"]
        labels_B = labels.groups_B if self.settings.positives == "label" else None
        return n_pair(first_BD, second_BD, self.settings.l2, labels_B=labels_B), state
