"""A new objective: two views of each image, both with its text and with one another.

It says what is shown to the towers and what the loss is. Negatives from all ranks, cached
micro-batches, ZeRO, checkpoints and export are the engine's work, and exact for it as well.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.losses import info_nce
from clipsys.training.model.outputs import Inputs, Outputs, Rows, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives import Labels, Objective, ObjectiveConfig, View


class TwoViewsConfig(ObjectiveConfig):
    """CLIP on two views of each image, which also have to find one another."""

    name: Literal["two_views"] = Field("two_views", description="which objective")
    view_weight: float = Field(0.5, ge=0, description="of the loss between the two views")


class TwoViews(Objective[TwoViewsConfig]):
    """The mean of `info_nce` of each view with the text, and of the views with one another."""

    config = TwoViewsConfig
    num_texts = 1
    trains_temperature = True

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """Two, drawn alike from seeds of their own."""
        return View(augmentation), View(augmentation)

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """One row a sample: unit vectors of both views and of the text."""
        rows = {
            "first": towers.encode_image(inputs.views[0]),
            "second": towers.encode_image(inputs.views[1]),
            "text": towers.encode_tokens(inputs.texts[0]),
        }
        return Outputs(rows, {"logit_scale": towers.logit_scale()})

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """This rank's share; nothing is remembered from step to step."""
        (first, second, text), weight = outputs.rows.values(), self.settings.view_weight
        scale = outputs.shared["logit_scale"]
        with_text = info_nce(first, text, scale) + info_nce(second, text, scale)
        return (with_text + weight * info_nce(first, second, scale)) / (2 + weight), state
