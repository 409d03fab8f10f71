"""In which order shuffled frames belong."""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch
from pydantic import Field

from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.draws import drawn_integers
from clipsys.training.objectives.frame_views import frame_features, frame_views
from clipsys.training.objectives.pretext import PretextConfig, PretextObjective
from clipsys.training.objectives.protocol import View


class FrameOrderConfig(PretextConfig):
    """Frame order: how the frames of a window were shuffled; no texts. Needs ``data.frames``."""

    name: Literal["frame_order"] = Field("frame_order", description="which objective")
    frames: int = Field(4, ge=3, le=6, description="frames of a window, as data.frames.length")
    task: Literal["sort", "verify"] = Field(
        "sort",
        description="sort: which permutation the frames stand in; verify: whether in order",
    )


class FrameOrder(PretextObjective[FrameOrderConfig]):
    """Cross-entropy of the order of shuffled frames, from the joined features of all of them.

    Inputs:
        A view of each frame of a window, with the same crop and colours. Permutations are drawn for
        each row, anew in each epoch. Forwards and backwards count as one order (the same motion may
        run either way), which leaves T!/2 permutations; to verify, half of the rows are in order.

    Recommendations:
        Sequences in which something moves from frame to frame: a larger ``data.frames.stride``
        where they change slowly.

    Relations:
        `CPC` predicts the features of later frames, and is not told the order by a head.

    References:
        Lee et al. 2017, "Unsupervised Representation Learning by Sorting Sequences" (sort);
        Misra et al. 2016, "Shuffle and Learn" (verify). Their selection of frames by motion and
        Lee's features of pairs of frames are left out.
    """

    config = FrameOrderConfig

    @property
    def num_scores(self) -> int:
        """One a permutation, or in order and not."""
        return len(orders(self.settings.frames)) if self.settings.task == "sort" else 2

    @property
    def num_frames(self) -> int:
        """As the recipe says."""
        return self.settings.frames

    def head_width(self, width: int) -> int:
        """The features of all frames, side by side."""
        return self.settings.frames * width

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """One of each frame."""
        return frame_views(augmentation, self.settings.frames)

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Scores of the permutations of the shuffled frames."""
        features_BTD = frame_features(towers, inputs)
        assert inputs.seeds_B is not None
        order_BT, answer_B = shuffled_orders(
            inputs.seeds_B, self.settings.frames, verify=self.settings.task == "verify"
        )
        # A frame passes the tower by itself: its features may be moved in its place.
        shuffled_BTD = features_BTD.gather(1, order_BT[:, :, None].expand_as(features_BTD))
        return self.answered(towers, shuffled_BTD.flatten(1), answer_B[:, None])


@functools.cache
def orders(frames: int) -> tuple[tuple[int, ...], ...]:
    """The permutations of frames, of each and its reversal one; the first is in order."""
    every = itertools.permutations(range(frames))
    return tuple(one for one in every if one[0] < one[-1])


def shuffled_orders(
    seeds_B: torch.Tensor, frames: int, *, verify: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) the frame that stands at each place, and (B,) the answer.

    To verify, the answer is 1 for half of the rows, which are in order.
    """
    orders_PT = torch.tensor(orders(frames), device=seeds_B.device)
    if verify:
        answer_B, is_reversed_B = drawn_integers(seeds_B, 2, 2).unbind(1)
        wrong_B = 1 + drawn_integers(seeds_B + 1, 1, len(orders_PT) - 1)[:, 0]
        number_B = torch.where(answer_B == 1, 0, wrong_B)
    else:
        answer_B = number_B = drawn_integers(seeds_B, 1, len(orders_PT))[:, 0]
        is_reversed_B = drawn_integers(seeds_B + 1, 1, 2)[:, 0]
    order_BT = orders_PT[number_B]
    return torch.where(is_reversed_B[:, None] == 1, order_BT.flip(1), order_BT), answer_B
