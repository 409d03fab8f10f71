"""Views of the frames of a window, for objectives over ordered frames."""

from __future__ import annotations

from typing import get_args

import torch

from clipsys.training.data.augmentation import AugmentationConfig, Family
from clipsys.training.model.outputs import Inputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.protocol import View

_ALL: frozenset[Family] = frozenset(get_args(Family))


def frame_views(augmentation: AugmentationConfig, frames: int) -> tuple[View, ...]:
    """A view of each frame, all with the draws of the first: what moves is in the frames alone."""
    rest = [View(augmentation, shares=_ALL, frame=frame) for frame in range(1, frames)]
    return View(augmentation), *rest


def frame_features(towers: Towers, inputs: Inputs) -> torch.Tensor:
    """(B, T, D): the tower's features of each frame; all frames pass it together."""
    features = towers.image_features(torch.cat(inputs.views)).chunk(len(inputs.views))
    return torch.stack(features, dim=1)
