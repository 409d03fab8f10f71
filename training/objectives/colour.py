"""The colours of an image from its grey version: colourisation as classification."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pretext import PretextConfig, PretextObjective
from clipsys.training.objectives.protocol import Surroundings

#: Chroma beyond this, in units of the normalised image, counts as this.
_LIMIT = 2.0
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


class ColourConfig(PretextConfig):
    """Colour: the colours of a coarse grid from the grey image; no texts."""

    name: Literal["colour"] = Field("colour", description="which objective")
    grid: int = Field(4, ge=1, le=64, description="cells on a side whose colours are predicted")
    bins: int = Field(
        7, ge=2, le=32, description="steps of each of the two chroma axes; an odd number has a grey"
    )


class Colour(PretextObjective[ColourConfig]):
    """Cross-entropy of the quantised mean chroma of each cell, from the grey image.

    Inputs:
        One view of each image. The tower sees its luma in all three channels. The answers are the
        means of red minus luma and blue minus luma over each cell of a grid, each cut into equal
        steps; all of them in units of the normalised image.

    Recommendations:
        Photographs, whose colours follow from what they show. The tower never sees colours in
        training: a later task that needs them should be fine-tuned.

    Relations:
        `Rotation` and `Jigsaw` show images in colour. The paper predicts every pixel with a
        network made for it, in Lab, and gives rare colours more weight; this is its simplest form
        that any image tower can be trained with: a coarse grid, chroma of RGB, equal weights.

    References:
        Zhang et al. 2016, "Colorful Image Colorization", section 2.1 (equation 2 with v = 1 and
        one-hot targets).
    """

    config = ColourConfig

    @property
    def num_scores(self) -> int:
        """One a cell and colour."""
        return self.settings.grid**2 * self.settings.bins**2

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Scores of all colours for each cell of each grey image."""
        (image_BCHW,) = inputs.views
        grey_B1HW = luma(image_BCHW)
        answers_BT = quantised_chroma(image_BCHW, self.settings.grid, self.settings.bins)
        features_BD = towers.image_features(grey_B1HW.expand_as(image_BCHW).contiguous())
        return self.answered(towers, features_BD, answers_BT)

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """Augmentation that changes the answers at random."""
        for setting in ("saturation", "hue", "greyscale"):
            value = getattr(recipe.augmentation, setting)
            if value:
                yield (
                    f"augmentation.{setting} is {value:g}, which changes the colours that "
                    "objective.name colour predicts; leave it out"
                )


def luma(image_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W): the weighted sum of the channels."""
    weights_C11 = image_BCHW.new_tensor(_LUMA).view(3, 1, 1)
    return (image_BCHW * weights_C11).sum(dim=1, keepdim=True)


def quantised_chroma(image_BCHW: torch.Tensor, grid: int, bins: int) -> torch.Tensor:
    """(B, grid²) int64: the number of each cell's mean chroma among bins² steps, cells row by row.

    Its number is ``red · bins + blue``, of the steps of red and blue minus luma.
    """
    chroma_B2HW = image_BCHW[:, [0, 2]] - luma(image_BCHW)
    mean_B2T = F.adaptive_avg_pool2d(chroma_B2HW, grid).flatten(2)
    step_B2T = ((mean_B2T / _LIMIT + 1) / 2 * bins).floor().clamp(0, bins - 1).long()
    return step_B2T[:, 0] * bins + step_B2T[:, 1]
