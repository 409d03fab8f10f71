"""Two views of each image, each other's positive among all images of the batch: SimCLR."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipsys.training.losses import nt_xent
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.heads import (
    ProjectionConfig,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.two_views import UnitViewObjective


class SimCLRConfig(ProjectionConfig):
    """SimCLR: two views of an image against all other views of the batch; no texts.

    Views are drawn as ``augmentation`` says: strong crops and colours make the task.
    """

    name: Literal["simclr"] = Field("simclr", description="which objective")


class SimCLR(UnitViewObjective[SimCLRConfig]):
    """NT-Xent between two views of each image.

    Inputs:
        Two views of each image, each from its own seed. Captions are not needed.

    Recommendations:
        Large batches (its negatives come from the batch alone), strong augmentation (crops from
        0.08 or 0.2 of the area, colours, blur), long schedules. The projection head is thrown away
        afterwards: features before it serve other tasks better.

    Relations:
        `MoCo` takes negatives from a queue, so it does with small batches. `InfoNCE` has a text
        where this has a second view.

    References:
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
        equation 1.
    """

    config = SimCLRConfig
    needs_negatives = True

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`nt_xent` of both views."""
        temperature = temperature_of(self.settings, outputs.shared)
        return nt_xent(outputs.rows["first"], outputs.rows["second"], temperature), state
