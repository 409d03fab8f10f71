"""Symmetric InfoNCE over images and texts: CLIP."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from clipsys.training.losses import info_nce
from clipsys.training.model.outputs import Outputs, Rows, State
from clipsys.training.objectives.pairs import PairConfig, PairConfigT, PairObjective
from clipsys.training.objectives.protocol import Labels


class InfoNCEConfig(PairConfig):
    """InfoNCE (CLIP): a softmax over all texts for each image, and over all images for each text.

    Equal samples may be positives of each other, or left out of each other's negatives.
    """

    name: Literal["infonce"] = Field("infonce", description="which objective")


class InfoNCE(PairObjective[InfoNCEConfig]):
    """Cross-entropy from images to texts and from texts to images, averaged.

    Inputs:
        One view and one text of each sample, and the model's own temperature, which is learned.

    Recommendations:
        The default for images with captions. Large batches help; ``data.micro_batch_size`` makes
        them affordable. Name the samples that belong together (``positives``): five captions of
        one photograph are false negatives otherwise.

    Relations:
        `Sigmoid` decides for each pair alone. `SimCLR` is the same loss over two views of an image.

    References:
        Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
        Supervision", figure 3; van den Oord et al. 2018, "Representation Learning with Contrastive
        Predictive Coding", equation 4.
    """

    config = InfoNCEConfig

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """`info_nce` of both towers' vectors."""
        return info_nce_of_pairs(self, outputs, labels), state


def info_nce_of_pairs(
    objective: PairObjective[PairConfigT], outputs: Outputs, labels: Labels
) -> torch.Tensor:
    """`info_nce` of the images and texts among some outputs, as the objective's settings say."""
    return info_nce(
        outputs.rows["image"],
        outputs.rows["text"],
        outputs.shared["logit_scale"],
        objective.tile_size,
        labels.groups_B,
        ignore_groups=objective.settings.duplicates == "ignore",
    )
