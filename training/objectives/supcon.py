"""All views of all samples of a label, drawn together: SupCon."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.data.samples import Positives
from clipsys.training.losses import supcon
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.heads import (
    ProjectionConfig,
    learned_scale,
    project,
    projection,
    projection_heads,
    temperature_of,
)
from clipsys.training.objectives.protocol import Labels, Objective, View

_TEXT_PROJECTION = "text_projection"


class SupConConfig(ProjectionConfig):
    """SupCon: samples of an equal label are positives of each other; labels instead of texts.

    Labels are the ``.cls`` members, or what ``data.label_key`` names.
    """

    name: Literal["supcon"] = Field("supcon", description="which objective")
    temperature: PositiveFloat = Field(0.1, description="what cosines are divided by")
    form: Literal["out", "in"] = Field(
        "out",
        description="where the mean over positives stands: outside of the logarithm (L_out, which "
        "the paper recommends) or inside (L_in)",
    )
    num_views: PositiveInt = Field(2, description="views of each image")
    texts: bool = Field(
        False,
        description="take the caption as one more view, through the text tower and a projection "
        "of its own",
    )


class SupCon(Objective[SupConConfig]):
    """Supervised contrastive loss over views and, if they are wanted, captions.

    Inputs:
        Views of each image, each from its own seed, and a label of each sample. A sample without a
        label is skipped and counted. With ``texts``, a caption too.

    Recommendations:
        Batches in which most labels occur several times; an anchor whose label occurs once has its
        other views alone. The projection head is thrown away afterwards.

    Relations:
        With a label for each sample it is `SimCLR`. `Classification` learns the same labels by
        cross-entropy. `InfoNCE` with ``positives: label`` is the same between images and texts,
        without the pairs within a modality.

    References:
        Khosla et al. 2020, "Supervised Contrastive Learning", equations 2 and 3.
    """

    config = SupConConfig
    needs_negatives = True

    def __init__(self, settings: SupConConfig) -> None:
        super().__init__(settings)
        self.num_texts = int(settings.texts)

    @property
    def positives(self) -> Positives:
        """Equal labels."""
        return "label"

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """As many as are set, drawn alike."""
        return (View(augmentation),) * self.settings.num_views

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """The projection, that of texts, and the temperature if it is learned."""
        heads = projection_heads(self.settings, sizes.width)
        of_texts = projection(self.settings, sizes.width) if self.settings.texts else None
        if of_texts is not None:
            heads[_TEXT_PROJECTION] = of_texts
        return heads

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Projections of all views, which pass the tower together, and of the text."""
        views = project(self.settings, towers, torch.cat(inputs.views)).chunk(len(inputs.views))
        rows = [*views]
        for tokens_BL in inputs.texts:
            features_BD = towers.text_features(tokens_BL)
            if self.settings.head != "none":
                features_BD = towers.head(_TEXT_PROJECTION, features_BD)
            rows.append(F.normalize(features_BD, dim=-1))
        return Outputs({"features": torch.stack(rows, dim=1)}, learned_scale(self.settings, towers))

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`supcon` of the groups of equal labels."""
        temperature = temperature_of(self.settings, outputs.shared)
        features_BVD = outputs.rows["features"]
        return supcon(features_BVD, labels.groups_B, temperature, self.settings.form), state
