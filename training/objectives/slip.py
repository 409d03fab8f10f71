"""Images with texts, and two more views of each image with each other: SLIP."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.losses import nt_xent
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import HeadConfig, project, projection_heads
from clipsys.training.objectives.infonce import info_nce_of_pairs
from clipsys.training.objectives.pairs import PairConfig, PairObjective
from clipsys.training.objectives.protocol import Labels, View


class SLIPConfig(PairConfig, HeadConfig):
    """SLIP: InfoNCE of images with texts plus SimCLR between two further views of each image.

    Those two are drawn as ``augmentation`` says; what meets the text is drawn as
    ``objective.clip_augmentation`` says.
    """

    name: Literal["slip"] = Field("slip", description="which objective")
    ssl_scale: PositiveFloat = Field(1.0, description="weight of the loss between views")
    ssl_temperature: PositiveFloat = Field(
        0.1, description="what cosines between views are divided by"
    )
    clip_augmentation: AugmentationConfig = Field(
        AugmentationConfig(crop_scale=(0.5, 1.0)),
        description="how the view that meets the text is drawn",
    )


class SLIP(PairObjective[SLIPConfig]):
    """The sum of `InfoNCE` and `SimCLR`, on one image tower.

    Inputs:
        Three views of each image and one text. The first view, with mild augmentation (crops from
        half of the area, as in the paper), meets the text; the other two, with the recipe's strong
        one, meet each other after a projection of their own. The model's temperature is learned,
        that between views is fixed.

    Recommendations:
        Where captions are few or say little. A step costs about three times the image passes of
        `InfoNCE`. The paper takes a weight of 1 for all its runs; watch that the strong
        augmentation does not also stand in ``clip_augmentation``: a caption that names a colour or
        a side is wrong after jitter or a flip.

    Relations:
        With ``ssl_scale`` near 0 it is `InfoNCE`.

    References:
        Mu et al. 2021, "SLIP: Self-supervision meets Language-Image Pre-training", algorithm 1.
        Their released code gathers the features of the InfoNCE part without gradients, which is
        another objective on several ranks; both parts are exact here.
    """

    config = SLIPConfig
    needs_negatives = True

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """What meets the text, and two that meet each other."""
        clip = View(self.settings.clip_augmentation)
        return clip, View(augmentation), View(augmentation)

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection of the views that meet each other."""
        return projection_heads(self.settings, sizes.width)

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Unit vectors of the first view and the text, and projections of the other two views."""
        outputs = super().forward(towers, inputs)
        projected = project(self.settings, towers, torch.cat(inputs.views[1:]))
        first_BD, second_BD = projected.chunk(2)
        return Outputs({**outputs.rows, "first": first_BD, "second": second_BD}, outputs.shared)

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`info_nce` and `nt_xent`, weighted."""
        rows = outputs.rows
        with_texts = info_nce_of_pairs(self, outputs, labels)
        between_views = nt_xent(rows["first"], rows["second"], self.settings.ssl_temperature)
        return with_texts + self.settings.ssl_scale * between_views, state
