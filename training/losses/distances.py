"""Losses of the distances between all rows of all ranks, some rows of distances at a time.

A loss says what a tile of distances contributes and how that changes with each distance; what is
here makes the mean over all ranks of it, and its gradient towards the features.

Shapes: B rows of this rank, C = W·B rows of all W ranks, D width, T rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank, world_size
from clipsys.training.losses.contrastive import auto_tile_size
from clipsys.training.losses.tiled import Gradients, differentiable

#: Squared distances below this share of the squared lengths are rounding: the rows are equal.
_EQUAL = 64 * torch.finfo(torch.float64).eps


class Tile(NamedTuple):
    """Distances of some rows to all rows.

    Attributes:
        distance_TC: Euclidean, float64; 0 between equal rows.
        positive_TC: whether the labels are equal; a row is no positive of itself.
        negative_TC: whether the labels differ.
    """

    distance_TC: torch.Tensor
    positive_TC: torch.Tensor
    negative_TC: torch.Tensor


class Terms(NamedTuple):
    """What a tile contributes to a mean.

    Attributes:
        total: sum of the terms.
        num_terms: their number.
        slope_TC: the derivative of the sum towards each distance.
    """

    total: torch.Tensor
    num_terms: torch.Tensor
    slope_TC: torch.Tensor


Loss = Callable[[Tile], Terms]


def mean_over_distances(
    name: str,
    features_BD: torch.Tensor,
    labels_B: torch.Tensor,
    loss: Loss,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """This rank's share of the mean of a loss's terms over the rows of all ranks.

    Everything is computed in float64: a distance is a small difference of large numbers, and the
    product that gives all distances at once would know small ones to 3e-4 only in float32.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if features_BD.ndim != 2 or 0 in features_BD.shape:
        raise ConfigError(f"{name}: features {tuple(features_BD.shape)}; expected (B, D)")
    if labels_B.shape != features_BD.shape[:1]:
        raise ConfigError(
            f"{name}: labels {tuple(labels_B.shape)} for {len(features_BD)} rows; expected "
            f"({len(features_BD)},)"
        )
    features_BD = features_BD.to(torch.promote_types(features_BD.dtype, torch.float32))
    compute = partial(
        _mean_with_gradients, label_C=gather_rows(labels_B, group), loss=loss, group=group
    )
    return differentiable(compute, features_BD, gather_rows(features_BD, group))


def _mean_with_gradients(
    row_BD: torch.Tensor,
    row_CD: torch.Tensor,
    needs_gradients: bool,
    *,
    label_C: torch.Tensor,
    loss: Loss,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, Gradients | None]:
    anchor_BD, other_CD = row_BD.double(), row_CD.double()
    anchor_gradient_BD, other_gradient_CD = torch.zeros_like(anchor_BD), torch.zeros_like(other_CD)
    start = rank(group) * len(row_BD)
    # Sorting needs several tensors of a tile's size, in float64.
    num_rows = max(1, auto_tile_size(len(row_CD), row_CD.device) // 8)
    total, count = anchor_BD.new_zeros(()), anchor_BD.new_zeros(())
    for first in range(0, len(row_BD), num_rows):
        rows = slice(first, min(first + num_rows, len(row_BD)))
        tile = _tile(anchor_BD[rows], other_CD, label_C, start + first)
        terms = loss(tile)
        total += terms.total
        count += terms.num_terms
        if needs_gradients:
            # The direction between equal rows is undefined; their part of the gradient is 0.
            weight_TC = torch.where(tile.distance_TC > 0, terms.slope_TC / tile.distance_TC, 0)
            anchor_gradient_BD[rows] += weight_TC.sum(dim=1, keepdim=True) * anchor_BD[rows]
            anchor_gradient_BD[rows] -= weight_TC @ other_CD
            other_gradient_CD += weight_TC.sum(dim=0)[:, None] * other_CD
            other_gradient_CD -= weight_TC.T @ anchor_BD[rows]
    if world_size(group) > 1:
        dist.all_reduce(count, group=group)
    # The mean over ranks of the shares is the mean over all terms.
    factor = world_size(group) / count.clamp(min=1)
    value = (total * factor).to(row_BD.dtype)
    if not needs_gradients:
        return value, None
    return value, Gradients(
        (anchor_gradient_BD * factor).to(row_BD.dtype),
        (other_gradient_CD * factor).to(row_CD.dtype),
        factor,
    )


def _tile(
    anchor_TD: torch.Tensor, other_CD: torch.Tensor, label_C: torch.Tensor, start: int
) -> Tile:
    """The tile of the rows that begin with row ``start`` of all ranks."""
    lengths_TC = anchor_TD.square().sum(dim=1)[:, None] + other_CD.square().sum(dim=1)[None, :]
    squared_TC = torch.addmm(lengths_TC, anchor_TD, other_CD.T, alpha=-2)
    squared_TC.masked_fill_(squared_TC <= _EQUAL * lengths_TC, 0)
    own = slice(start, start + len(anchor_TD))
    same_TC = label_C[own, None] == label_C[None, :]
    positive_TC = same_TC.clone()
    positive_TC[:, own].fill_diagonal_(False)
    return Tile(squared_TC.sqrt_(), positive_TC, ~same_TC)
