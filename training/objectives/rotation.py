"""Which of four turns an image has undergone: RotNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from clipsys.errors import ConfigError
from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.pretext import PretextConfig, PretextObjective
from clipsys.training.objectives.protocol import Surroundings

_TURNS = 4


class RotationConfig(PretextConfig):
    """Rotation: which of four turns by 90 degrees an image has undergone; no texts.

    Images are augmented as ``augmentation`` says before they are turned.
    """

    name: Literal["rotation"] = Field("rotation", description="which objective")


class Rotation(PretextObjective[RotationConfig]):
    """Cross-entropy of the turn of each image, over all four turns of it.

    Inputs:
        One view of each image, square. All four turns pass the tower, so a step costs four times
        the forward passes of one over images; the paper found that better than one turn each.

    Recommendations:
        Photographs, which have an up. Images that look the same upside down (logos, tissue,
        satellite images) have no answer. A learning rate as for a classifier; a short run.

    Relations:
        `Jigsaw` asks for the order of tiles, `Colour` for colours. Methods that contrast images
        learn features that transfer better, given long enough runs.

    References:
        Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations",
        equations 2 and 3.
    """

    config = RotationConfig

    @property
    def num_scores(self) -> int:
        """One a turn."""
        return _TURNS

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Scores of all turns of each image, which pass the tower together."""
        (image_BCHW,) = inputs.views
        height, width = image_BCHW.shape[-2:]
        if height != width:
            raise ConfigError(
                f"objective.name rotation turns images of {height} × {width} pixels by 90 degrees; "
                "expected square ones: give the model a square image_size"
            )
        turned = [torch.rot90(image_BCHW, turn, dims=(2, 3)) for turn in range(_TURNS)]
        features = towers.image_features(torch.cat(turned)).chunk(_TURNS)
        answers_T = torch.arange(_TURNS, device=image_BCHW.device)
        return self.answered(
            towers, torch.stack(features, dim=1), answers_T.repeat(len(image_BCHW), 1)
        )

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """Turns that leave no answer."""
        degrees = recipe.augmentation.rotation_degrees
        if degrees >= 45:
            yield (
                f"augmentation.rotation_degrees is {degrees:g}, after which the turns of "
                "objective.name rotation cannot be told apart; use less than 45"
            )
