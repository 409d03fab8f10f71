"""Nearer to images of the same label than to others, by a margin: triplets."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat

from clipsys.training.losses import triplet
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.label_views import LabelConfig, LabelViewsObjective
from clipsys.training.objectives.protocol import Labels


class TripletConfig(LabelConfig):
    """Triplets of an anchor, an image of its label and one of another label.

    Labels are the ``.cls`` members, or what ``data.label_key`` names.
    """

    name: Literal["triplet"] = Field("triplet", description="which objective")
    margin: PositiveFloat = Field(
        0.2, description="by how much a negative is farther than a positive, between unit vectors"
    )
    mining: Literal["all", "semi-hard", "inverted", "hard"] = Field(
        "semi-hard",
        description="which triplets of the batch count: every one, those in order but not by the "
        "margin, those in the wrong order, or each anchor's farthest positive with its nearest "
        "negative",
    )


class Triplet(LabelViewsObjective[TripletConfig]):
    """Triplet loss over all rows of the batch, on unit vectors.

    Inputs:
        Views of each image, each from its own seed, and a label of each sample. A sample without a
        label is skipped and counted.

    Recommendations:
        Batches in which labels occur several times. ``mining: hard`` at a high learning rate can
        end with all images at one point, where the loss equals the margin.

    Relations:
        `Margin` compares distances with a constant, this one with each other. `SupCon` weighs all
        negatives by nearness and needs no mining.

    References:
        Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        equations 3 and 4; Hermans et al. 2017, "In Defense of the Triplet Loss for Person
        Re-Identification", equation 5.
    """

    config = TripletConfig

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`triplet` of all views of all ranks."""
        rows_RD, labels_R = self.flattened(outputs, labels)
        return triplet(rows_RD, labels_R, self.settings.margin, self.settings.mining), state
