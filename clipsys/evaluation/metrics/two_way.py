"""Ranks in both directions from one product, in tiles.

    scores of the correct pairs ------------.
                                            v
    tile of texts x tile of images --> how many of a text's images score as high as its correct ones
                                  '--> how many of an image's texts do, likewise

Nothing as large as texts x images is held: memory is one tile, and a few numbers for each correct
pair. The scores of correct pairs are computed first and put into each tile in place of its own, so
that a pair never competes with itself by the last bit; equal vectors are scored once
(`clipsys.evaluation.metrics.distinct`).

Legend of shapes: M texts, N images, D embedding width, T and S distinct texts and images, E
distinct correct pairs, P correct pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from clipsys.evaluation.metrics.distinct import distinct_rows
from clipsys.evaluation.metrics.ranks import (
    Bounds,
    Ranking,
    check_finite,
    count_at_least,
    rank,
    ranking_of,
    scoring_device,
)
from clipsys.evaluation.metrics.relation import Relation

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

#: Texts and images of a tile: 16 MB of scores, which stay in a processor's cache, about.
_TILE = (1024, 4096)
#: A GPU is busy with more at once.
_GPU_TILE = (8192, 32_768)
#: Correct pairs that are held; where there are more, each direction goes through its own blocks.
_MAX_PAIRS = 20_000_000
#: Correct pairs that are scored at once.
_PAIRS_AT_ONCE = 16_384


def rank_both(
    text_MD: Floats,
    image_ND: Floats,
    relation: Relation,
    *,
    tile: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    max_pairs: int = _MAX_PAIRS,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[Ranking, Ranking]:
    """Ranks all images for each text, and all texts for each image, as `rank` does.

    Args:
        text_MD: unit vectors.
        image_ND: unit vectors.
        relation: images that are correct for each text.
        tile: texts and images that are scored at once.
        device: where scores are computed; None: a GPU where there is one.
        max_pairs: correct pairs beyond which the product is computed for each direction.
        advance: called with the number of queries done, M + N in all.

    Raises:
        ModelError: a vector is not finite.
    """
    device = scoring_device(device)
    if int(relation.counts().sum()) > max_pairs:
        reverse = relation.transposed(len(image_ND))
        return (
            rank(text_MD, image_ND, relation, device=device, advance=advance),
            rank(image_ND, text_MD, reverse, device=device, advance=advance),
        )
    check_finite(text_MD, image_ND)
    texts, images = distinct_rows(text_MD), distinct_rows(image_ND)
    text_P, image_P = relation.pairs(0, len(text_MD))
    width = max(len(images.rows_UD), 1)
    pair_E, pair_P = np.unique(
        texts.number_N[text_P] * width + images.number_N[image_P], return_inverse=True
    )
    text_E, image_E = np.divmod(pair_E, width)
    text_TD, image_SD = torch.from_numpy(texts.rows_UD), torch.from_numpy(images.rows_UD)
    score_E = _score_pairs(text_TD, image_SD, text_E, image_E, device)
    by_image_E = np.lexsort((text_E, image_E))
    text_bounds = Bounds.of(text_E, score_E, len(text_TD))
    image_bounds = Bounds.of(image_E[by_image_E], score_E[by_image_E], len(image_SD))
    for_text_E, for_image_E = np.zeros(len(pair_E), np.int64), np.zeros(len(pair_E), np.int64)
    step, wide = tile or (_GPU_TILE if device.type == "cuda" else _TILE)
    tiles = _PairsOfTiles(text_E, image_E, (step, wide), len(image_SD))
    buffer = torch.empty(step * wide, device=device)
    done, total = 0, len(text_MD) + len(image_ND)
    for top in range(0, len(text_TD), step):
        rows = slice(top, min(top + step, len(text_TD)))
        block = text_TD[rows].to(device)
        own = slice(text_bounds.starts_Q[rows.start], text_bounds.starts_Q[rows.stop])
        for left in range(0, len(image_SD), wide):
            columns = slice(left, min(left + wide, len(image_SD)))
            size = (rows.stop - rows.start, columns.stop - columns.start)
            scores = torch.mm(
                block,
                image_SD[columns].to(device).T,
                out=buffer[: size[0] * size[1]].view(size),
            )
            inside = tiles.of(top // step, left // wide)
            places = (
                torch.from_numpy(text_E[inside] - top),
                torch.from_numpy(image_E[inside] - left),
            )
            scores[places] = torch.from_numpy(score_E[inside]).to(device)
            for_text_E[own] += count_at_least(
                scores, text_bounds.take(rows.start, rows.stop), images.take(columns)
            )
            theirs = slice(
                image_bounds.starts_Q[columns.start], image_bounds.starts_Q[columns.stop]
            )
            for_image_E[theirs] += count_at_least(
                scores.T.contiguous(),
                image_bounds.take(columns.start, columns.stop),
                texts.take(rows),
            )
        share = total * rows.stop // len(text_TD)
        advance(share - done)
        done = share
    at_least_E = np.empty_like(for_image_E)
    at_least_E[by_image_E] = for_image_E
    of_images = np.argsort(image_P, kind="stable")
    score_P, turned = score_E[pair_P], pair_P[of_images]
    return (
        ranking_of(text_P, image_P, score_P, for_text_E[pair_P], len(text_MD)),
        ranking_of(
            image_P[of_images],
            text_P[of_images],
            score_P[of_images],
            at_least_E[turned],
            len(image_ND),
        ),
    )


class _PairsOfTiles:
    """Which correct pairs lie in which tile."""

    def __init__(
        self, text_E: Integers, image_E: Integers, tile: tuple[int, int], num_images: int
    ) -> None:
        self._across = -(-num_images // tile[1])
        number_E = text_E // tile[0] * self._across + image_E // tile[1]
        self._order = np.argsort(number_E, kind="stable")
        self._sorted = number_E[self._order]

    def of(self, down: int, right: int) -> Integers:
        """Those of one tile."""
        number = down * self._across + right
        start, stop = np.searchsorted(self._sorted, (number, number + 1))
        return self._order[start:stop]


def _score_pairs(
    text_TD: torch.Tensor,
    image_SD: torch.Tensor,
    text_E: Integers,
    image_E: Integers,
    device: torch.device,
) -> Floats:
    score_E = np.empty(len(text_E), np.float32)
    for start in range(0, len(text_E), _PAIRS_AT_ONCE):
        some = slice(start, start + _PAIRS_AT_ONCE)
        texts = text_TD[torch.from_numpy(text_E[some])].to(device)
        images = image_SD[torch.from_numpy(image_E[some])].to(device)
        score_E[some] = (texts * images).sum(dim=1).cpu().numpy()
    return score_E
