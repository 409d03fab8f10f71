"""The pairwise sigmoid loss over images and texts: SigLIP."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipsys.training.losses import sigmoid_loss
from clipsys.training.model.outputs import Inputs, Outputs, Rows, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pairs import PairConfig, PairObjective
from clipsys.training.objectives.protocol import Labels


class SigmoidConfig(PairConfig):
    """Sigmoid loss (SigLIP): for each image and each text a decision whether they belong together.

    The model gets a bias (``model.initial_logit_bias``).
    """

    name: Literal["sigmoid"] = Field("sigmoid", description="which objective")


class Sigmoid(PairObjective[SigmoidConfig]):
    """Binary cross-entropy of every image with every text.

    Inputs:
        One view and one text of each sample, and the model's own temperature and bias, which are
        learned. The bias starts at -10 with a scale of 10, since nearly all pairs are negatives.

    Recommendations:
        Batches of a few thousand at most, and data with many partial matches: a pair's term does
        not depend on the other pairs of the batch.

    Relations:
        `InfoNCE` normalises over the batch instead.

    References:
        Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1.
    """

    config = SigmoidConfig
    needs_bias = True

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit vectors of both towers, and the bias."""
        outputs = super().forward(towers, inputs)
        return Outputs(outputs.rows, {**outputs.shared, "logit_bias": towers.logit_bias()})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`sigmoid_loss` of both towers' vectors."""
        value = sigmoid_loss(
            outputs.rows["image"],
            outputs.rows["text"],
            outputs.shared["logit_scale"],
            outputs.shared["logit_bias"],
            self.tile_size,
            labels.groups_B,
            ignore_groups=self.settings.duplicates == "ignore",
        )
        return value, state
