"""In which order the tiles of an image stand: a jigsaw puzzle."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.outputs import Inputs, Outputs
from clipsys.training.model.towers import Towers
from clipsys.training.objectives.draws import drawn_integers
from clipsys.training.objectives.pretext import PretextConfig, PretextObjective


class JigsawConfig(PretextConfig):
    """Jigsaw: which of a set of permutations the tiles of an image stand in; no texts."""

    name: Literal["jigsaw"] = Field("jigsaw", description="which objective")
    tiles: int = Field(3, ge=2, le=3, description="tiles on a side of the image")
    num_permutations: PositiveInt = Field(
        100, description="permutations to tell apart, chosen far from one another; with tiles: 2 "
        "there are 24"
    )  # fmt: skip
    gap: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="share of a tile's side that is cut off, each time elsewhere, so that edges "
        "do not continue from tile to tile",
    )

    @model_validator(mode="after")
    def _check_number(self) -> JigsawConfig:
        most = math.factorial(self.tiles**2)
        if not 2 <= self.num_permutations <= most:
            raise ValueError(
                f"num_permutations is {self.num_permutations}; expected 2 to {most:,} with "
                f"tiles: {self.tiles}"
            )
        return self


class Jigsaw(PretextObjective[JigsawConfig]):
    """Cross-entropy of the permutation that the tiles of each image were shuffled by.

    Inputs:
        One view of each image. Its permutation and what is cut off its tiles are drawn for each
        row, anew in each epoch. The shuffled image passes the tower as a whole; the paper passes
        each tile through a network of its own with shared weights and joins their features, which
        no tower that sees whole images can do.

    Recommendations:
        Photographs of objects with parts. Colour jitter and a gap leave fewer shortcuts: edges
        that continue and colours that drift over the image tell where a tile belongs.

    Relations:
        `Rotation` turns the whole image. More permutations make the task harder; the paper's
        features improve up to 1,000.

    References:
        Noroozi and Favaro 2016, "Unsupervised Learning of Visual Representations by Solving Jigsaw
        Puzzles"; the set of permutations is that of its algorithm 1, begun with the identity.
    """

    config = JigsawConfig

    @property
    def num_scores(self) -> int:
        """One a permutation."""
        return self.settings.num_permutations

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """Scores of all permutations for each shuffled image."""
        (image_BCHW,) = inputs.views
        assert inputs.seeds_B is not None
        tiles = self.settings.tiles
        chosen_PT = distant_permutations(tiles**2, self.settings.num_permutations)
        orders_PT = torch.from_numpy(chosen_PT).to(image_BCHW.device)
        number_B1 = drawn_integers(inputs.seeds_B, 1, len(orders_PT))
        shuffled = shuffle_tiles(
            image_BCHW, orders_PT[number_B1[:, 0]], inputs.seeds_B, tiles, self.settings.gap
        )
        return self.answered(towers, towers.image_features(shuffled), number_B1)


@functools.cache
def distant_permutations(length: int, number: int) -> np.ndarray:
    """(number, length) int64: permutations whose Hamming distances are large (algorithm 1).

    Each next one has the largest sum of distances to those chosen; of equal ones, the first in
    lexicographic order. The first is the identity.
    """
    all_XT = np.array(list(itertools.permutations(range(length))), dtype=np.uint8)
    distance_X = np.zeros(len(all_XT), dtype=np.int64)
    chosen = [0]
    while len(chosen) < number:
        distance_X += (all_XT != all_XT[chosen[-1]]).sum(axis=1)
        distance_X[chosen[-1]] = np.iinfo(np.int64).min // 2  # is not chosen again
        chosen.append(int(distance_X.argmax()))
    return all_XT[chosen].astype(np.int64)


def shuffle_tiles(
    image_BCHW: torch.Tensor,
    order_BT: torch.Tensor,
    seeds_B: torch.Tensor,
    tiles: int,
    gap: float,
) -> torch.Tensor:
    """Images of the same size whose place t shows tile ``order_BT[:, t]``, places row by row.

    Args:
        image_BCHW: images.
        order_BT: permutations of tiles².
        seeds_B: decide what is cut off each tile.
        tiles: on a side.
        gap: share of a tile's side that is cut off; what is left is enlarged again.
    """
    count, channels, height, width = image_BCHW.shape
    tile_h, tile_w = height // tiles, width // tiles
    cut = image_BCHW[:, :, : tile_h * tiles, : tile_w * tiles]
    cut = cut.reshape(count, channels, tiles, tile_h, tiles, tile_w).permute(0, 2, 4, 1, 3, 5)
    cut_BTCHW = cut.reshape(count, tiles**2, channels, tile_h, tile_w)
    cut_BTCHW = cut_BTCHW.gather(1, order_BT[:, :, None, None, None].expand_as(cut_BTCHW))
    kept_h, kept_w = (max(1, round(side * (1 - gap))) for side in (tile_h, tile_w))
    if (kept_h, kept_w) != (tile_h, tile_w):
        places = tiles**2
        for dim, kept, side in ((3, kept_h, tile_h), (4, kept_w, tile_w)):
            first_BT = drawn_integers(seeds_B + dim, places, side - kept + 1)
            index = first_BT[:, :, None] + torch.arange(kept, device=first_BT.device)
            shape = [count, places, 1, 1, 1]
            shape[dim] = kept
            wanted = list(cut_BTCHW.shape)
            wanted[dim] = kept
            cut_BTCHW = cut_BTCHW.gather(dim, index.view(shape).expand(wanted))
        enlarged = F.interpolate(
            cut_BTCHW.flatten(0, 1), size=(tile_h, tile_w), mode="bilinear", align_corners=False
        )
        cut_BTCHW = enlarged.view(count, places, channels, tile_h, tile_w)
    joined = cut_BTCHW.view(count, tiles, tiles, channels, tile_h, tile_w)
    joined = joined.permute(0, 3, 1, 4, 2, 5).reshape(
        count, channels, tile_h * tiles, tile_w * tiles
    )
    if joined.shape[-2:] != (height, width):  # not divisible by the number of tiles
        joined = F.interpolate(joined, size=(height, width), mode="bilinear", align_corners=False)
    return joined
