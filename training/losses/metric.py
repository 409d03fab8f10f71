"""Losses with a margin between distances, over all ranks: triplets, and pairs.

Shapes: B rows of this rank, C rows of all ranks, D width, T rows of a tile, P positives of the row
of a tile that has most.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.losses.distances import Terms, Tile, mean_over_distances

Mining = Literal["all", "semi-hard", "inverted", "hard"]
_MINING: tuple[Mining, ...] = ("all", "semi-hard", "inverted", "hard")


def triplet(
    features_BD: torch.Tensor,
    labels_B: torch.Tensor,
    margin: float = 0.2,
    mining: Mining = "semi-hard",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Triplet loss: an anchor is nearer to each positive than to each negative, by a margin.

    A triplet is an anchor, another row of its label and a row of another label, of any rank, and
    costs relu(d_ap - d_an + margin), d being the Euclidean distance. The loss is the mean over the
    triplets that ``mining`` takes, those that cost nothing included:

    - ``all``: every triplet.
    - ``semi-hard``: those with d_ap < d_an <= d_ap + margin: in order, but not by the margin.
    - ``inverted``: those with d_an <= d_ap, which are in the wrong order.
    - ``hard``: one of each anchor, its farthest positive with its nearest negative.

    Inputs:
        ``features_BD`` (B, D) of this rank, usually of unit norm; ``labels_B`` (B,) integers. B is
        the same on every rank.

    Recommendations:
        ``semi-hard`` is the safe choice. ``hard`` learns fastest and may collapse all rows to one
        point, where the loss is the margin; FaceNet warns of it too. With ``all``, most triplets
        soon cost nothing and the mean fades. Time is O(C² log C) and memory O(tile · C), although
        there are O(C³) triplets: sorted distances and their running sums give each pair's triplets
        at once.

    Relations:
        Distances are not squared, as in pytorch-metric-learning and in Hermans et al. 2017, who
        found squared ones to collapse more readily; FaceNet squares them. The modes are those of
        pytorch-metric-learning's TripletMarginMiner (``all`` with no miner, ``semi-hard``
        "semihard", ``inverted`` "hard") and BatchHardMiner (``hard``), with its MeanReducer: its
        default reducer leaves out triplets that cost nothing, and is another loss. FaceNet takes
        one semi-hard negative of each pair, not all.

    References:
        Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        equations 3 and 4; Hermans et al. 2017, "In Defense of the Triplet Loss for Person
        Re-Identification", equation 5 (``hard``).

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features): averaged over ranks, as
        DDP and DeepSpeed do with gradients, it is the loss of the whole batch. 0 where there is no
        such triplet. Equal rows have no gradient towards each other.

    Raises:
        ConfigError: the shapes do not fit, ``margin`` is not positive, or ``mining`` is unknown.
    """
    if mining not in _MINING:
        raise ConfigError(f"triplet: mining is {mining!r}; expected one of {', '.join(_MINING)}")
    _check_margin("triplet", margin)
    loss = partial(_hardest, margin=margin)
    if mining != "hard":
        loss = partial(_every, margin=margin, mining=mining)
    return mean_over_distances("triplet", features_BD, labels_B, loss, group)


def margin_contrastive(
    features_BD: torch.Tensor,
    labels_B: torch.Tensor,
    margin: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Contrastive loss of pairs: equal labels attract, others repel up to a margin.

    The mean over all pairs of two rows, of any ranks, of d² where the labels are equal and of
    relu(margin - d)² where they differ, d being the Euclidean distance.

    Inputs:
        ``features_BD`` (B, D) of this rank, of any length; ``labels_B`` (B,) integers. B is the
        same on every rank.

    Recommendations:
        Two unit vectors are at most 2 apart and at 1.41 if unrelated: a margin above that asks for
        opposite ones. Positives are as rare among the pairs as equal labels are in the batch, and
        the mean weighs them so.

    Relations:
        Half of each term stands in the paper's equation. pytorch-metric-learning's ContrastiveLoss
        takes d where the paper has d², and averages positives and negatives apart: another loss.
        Two rows of different labels at the same point have no gradient, since they have no
        direction from each other.

    References:
        Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping",
        equation 4.

    Returns:
        This rank's share, as `triplet`.

    Raises:
        ConfigError: the shapes do not fit, or ``margin`` is not positive.
    """
    _check_margin("margin_contrastive", margin)
    loss = partial(_pairs, margin=margin)
    return mean_over_distances("margin_contrastive", features_BD, labels_B, loss, group)


def _check_margin(name: str, margin: float) -> None:
    if not margin > 0:
        raise ConfigError(f"{name}: margin is {margin}; expected more than 0")


def _pairs(tile: Tile, *, margin: float) -> Terms:
    distance_TC, positive_TC, negative_TC = tile
    short_TC = (margin - distance_TC).clamp(min=0) * negative_TC
    near_TC = distance_TC * positive_TC
    total = near_TC.square().sum() + short_TC.square().sum()
    return Terms(total, (positive_TC | negative_TC).sum(), 2 * (near_TC - short_TC))


def _hardest(tile: Tile, *, margin: float) -> Terms:
    """The farthest positive and the nearest negative of each row that has both."""
    distance_TC, positive_TC, negative_TC = tile
    farthest_T1, positive_T1 = distance_TC.masked_fill(~positive_TC, -torch.inf).max(
        dim=1, keepdim=True
    )
    nearest_T1, negative_T1 = distance_TC.masked_fill(~negative_TC, torch.inf).min(
        dim=1, keepdim=True
    )
    exists_T1 = farthest_T1.isfinite() & nearest_T1.isfinite()
    cost_T1 = torch.where(exists_T1, farthest_T1 - nearest_T1 + margin, 0).clamp(min=0)
    slope_T1 = (cost_T1 > 0).to(distance_TC.dtype)
    slope_TC = torch.zeros_like(distance_TC).scatter_add_(1, positive_T1, slope_T1)
    slope_TC.scatter_add_(1, negative_T1, -slope_T1)
    return Terms(cost_T1.sum(), exists_T1.sum(), slope_TC)


class _Sorted(NamedTuple):
    """The rows' negatives and positives by distance; infinite where a row has no more of them.

    Attributes:
        negative_TC: distances of negatives.
        sums_TC: sum of the first n of them, at n; C + 1 columns.
        positive_TP: distances of positives.
        column_TP: which row each positive is.
        exists_TP: whether there is one.
    """

    negative_TC: torch.Tensor
    sums_TC: torch.Tensor
    positive_TP: torch.Tensor
    column_TP: torch.Tensor
    exists_TP: torch.Tensor


def _sort(tile: Tile) -> _Sorted:
    negative_TC = tile.distance_TC.masked_fill(~tile.negative_TC, torch.inf).sort(dim=1).values
    finite_TC = negative_TC.masked_fill(negative_TC.isinf(), 0)
    sums_TC = torch.nn.functional.pad(finite_TC.cumsum(dim=1), (1, 0))
    positive_TC, column_TC = tile.distance_TC.masked_fill(~tile.positive_TC, torch.inf).sort(dim=1)
    most = int(tile.positive_TC.sum(dim=1).max())
    positive_TP = positive_TC[:, :most].contiguous()
    return _Sorted(negative_TC, sums_TC, positive_TP, column_TC[:, :most], positive_TP.isfinite())


def _every(tile: Tile, *, margin: float, mining: Mining) -> Terms:
    """All triplets of the rows that are mined.

    The negatives of a pair's triplets with a cost follow one another in order of distance: they
    are those from ``first`` up to ``end``.
    """
    by = _sort(tile)
    reach_TP = by.positive_TP + margin
    nearer_TP = torch.searchsorted(by.negative_TC, by.positive_TP, right=True)
    end_TP = torch.searchsorted(by.negative_TC, reach_TP)
    first_TP = torch.zeros_like(end_TP)
    # How many positives' triplets with a cost each row, as a negative, is in.
    distance_TC = tile.distance_TC
    times_TC = -torch.searchsorted(reach_TP, distance_TC, right=True)
    if mining == "semi-hard":
        first_TP, end_TP = nearer_TP, torch.maximum(nearer_TP, end_TP)
        mined_TP = torch.searchsorted(by.negative_TC, reach_TP, right=True) - nearer_TP
        times_TC += torch.searchsorted(by.positive_TP, distance_TC)
    elif mining == "inverted":
        mined_TP = end_TP = nearer_TP
        times_TC = tile.positive_TC.sum(dim=1, keepdim=True) - torch.searchsorted(
            by.positive_TP, distance_TC
        )
    else:
        mined_TP = tile.negative_TC.sum(dim=1, keepdim=True).expand_as(end_TP)
        times_TC += tile.positive_TC.sum(dim=1, keepdim=True)
    times_TP = torch.where(by.exists_TP, end_TP - first_TP, 0)
    distances_TP = by.sums_TC.gather(1, end_TP) - by.sums_TC.gather(1, first_TP)
    cost_TP = times_TP * reach_TP.masked_fill(~by.exists_TP, 0) - distances_TP * by.exists_TP
    slope_TC = torch.where(tile.negative_TC, -times_TC, 0).to(distance_TC.dtype)
    slope_TC.scatter_add_(1, by.column_TP, times_TP.to(distance_TC.dtype))
    return Terms(cost_TP.sum(), (mined_TP * by.exists_TP).sum(), slope_TC)
