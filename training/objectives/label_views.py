"""Views of labelled images, all rows of a batch alike: what triplets and pairs share."""

from __future__ import annotations

from typing import TypeVar

import torch
from pydantic import Field, PositiveInt
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.data.samples import Positives
from clipsys.training.model.outputs import Inputs, Outputs, Sizes
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import HeadConfig, features_of, projection_heads
from clipsys.training.objectives.protocol import Labels, Objective, View


class LabelConfig(HeadConfig):
    """Settings of an objective over views of labelled images."""

    num_views: PositiveInt = Field(
        1, description="views of each image; with 2 or more each image has a positive of its own"
    )


LabelConfigT = TypeVar("LabelConfigT", bound=LabelConfig)


class LabelViewsObjective(Objective[LabelConfigT]):
    """Projects the views of each image; each view is a row of the loss, with its image's label."""

    needs_negatives = True

    @property
    def has_unit_norm(self) -> bool:
        """Whether rows are unit vectors."""
        return True

    @property
    def positives(self) -> Positives:
        """Equal labels."""
        return "label"

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """As many as are set, drawn alike."""
        return (View(augmentation),) * self.settings.num_views

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection."""
        return projection_heads(self.settings, sizes.width)

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Projections of all views, which pass the tower together."""
        projected = features_of(self.settings, towers, torch.cat(inputs.views))
        if self.has_unit_norm:
            projected = F.normalize(projected, dim=-1)
        views = projected.chunk(len(inputs.views))
        return Outputs({"features": torch.stack(views, dim=1)}, {})

    def flattened(self, outputs: Outputs, labels: Labels) -> tuple[torch.Tensor, torch.Tensor]:
        """(V·B, D) rows and (V·B,) labels of this rank."""
        features_BVD = outputs.rows["features"]
        labels_R = labels.groups_B.repeat_interleave(features_BVD.shape[1])
        return features_BVD.flatten(0, 1), labels_R
