"""In-batch negatives weighted by their hardness, over all ranks, a tile of logits at a time.

The loss of a query depends on its logits through four numbers alone: two log-sum-exps over its
negatives, one over its positives, and the positives' mean. A first pass over the tiles finds them,
the gradient towards them is that of a formula over rows, and a second pass takes it to the
features. No logit is kept.

Shapes: B rows of this rank, N = W·B rows of all W ranks, R query rows, C key rows, D width, T rows
and U columns of a tile.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import gather_rows, rank
from clipsys.training.losses.contrastive import auto_tile_size, check_pairs, pairing_of
from clipsys.training.losses.tiled import (
    Gradients,
    differentiable,
    inverse_temperature,
    scaled_gradients,
)
from clipsys.training.losses.tiles import LogitTiles, Pairing


def hard_info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    tile_size: int | None = None,
    groups: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    hardness: float = 0.5,
    prior: float = 0.0,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """Symmetric InfoNCE whose negatives are weighted by their hardness and freed of false ones.

    A query with positives of logits p and M negatives of logits n (cosine times scale) has the
    loss log(Σ e^p + G) - mean p. With weights w = e^(hardness · n), divided by their mean::

        G = max((Σ w e^n - prior · M · mean e^p) / (1 - prior),  M · e^(-scale))

    so harder negatives count for more, and what ``prior`` of them are expected to contribute as
    false negatives is taken off. The bound is the least that M cosines can add up to.

    Inputs:
        As `info_nce`: (B, D) unit-norm features of this rank's images and texts, and the
        exponentiated scale. ``groups`` are positives of each other, or left out.

    Recommendations:
        ``hardness`` multiplies logits, not cosines: at a scale of 100, 0.1 is much, and from 1 on
        the hardest negative stands for all. ``prior`` about the share of false negatives, 0.1 at
        most: at a high scale a pair that is clearly nearest makes the difference negative, so that
        the bound holds and the pair has all but no gradient.

    Relations:
        With ``hardness`` 0 and ``prior`` 0 this is `info_nce`; with ``hardness`` 0 alone it is
        the debiased loss of Chuang et al. 2020. `hard_nt_xent` is the same over two views.

    References:
        Robinson et al. 2021, "Contrastive Learning with Hard Negative Samples", equations 2 to 4;
        the weights act on logits, and carry gradients, as in the authors' code: its ``imp`` is not
        detached.

    Args:
        image_features: (B, D) of this rank, unit norm. B is the same on every rank.
        text_features: (B, D) of this rank, unit norm.
        logit_scale: one element, already exponentiated.
        tile_size: rows of logits held at once; None chooses by the device.
        groups: (B,) integer ids of this rank's samples.
        group: the process group; None is the default one.
        hardness: the paper's beta, 0 or more.
        prior: the paper's tau-plus, the expected share of false negatives, from 0 to below 1.
        ignore_groups: others of a sample's group are left out.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: shapes do not fit, or a number is out of its range.
    """
    check_pairs("hard_info_nce", image_features, text_features, groups, tile_size)
    _check_weights("hard_info_nce", hardness, prior)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    image_BD, text_BD = image_features.to(dtype), text_features.to(dtype)
    both_N2D = gather_rows(torch.cat([image_BD, text_BD], dim=1), group)
    image_ND, text_ND = both_N2D.chunk(2, dim=1)
    compute = partial(
        _one_way,
        pairing=pairing_of(groups, len(image_BD), group, ignore=ignore_groups),
        tile_size=tile_size or auto_tile_size(len(image_ND), image_BD.device),
        hardness=hardness,
        prior=prior,
    )
    scale = logit_scale.to(dtype).reshape(())
    there = differentiable(compute, image_BD, text_ND, scale)
    back = differentiable(compute, text_BD, image_ND, scale)
    return (there + back) / 2


def hard_nt_xent(
    first_BD: torch.Tensor,
    second_BD: torch.Tensor,
    temperature: float | torch.Tensor = 0.5,
    group: dist.ProcessGroup | None = None,
    *,
    hardness: float = 1.0,
    prior: float = 0.1,
) -> torch.Tensor:
    """`nt_xent` whose negatives are weighted by their hardness and freed of false ones.

    Each of the 2N views of all ranks is an anchor once, with the 2N - 2 views of other images as
    its negatives; what is done with them is told at `hard_info_nce`.

    Inputs:
        As `nt_xent`: ``first_BD`` and ``second_BD`` (B, D) of this rank, unit norm, row for row of
        the same image.

    Recommendations:
        The defaults are the authors' for images at a temperature of 0.5. Lower temperatures want a
        lower ``prior``: see `hard_info_nce`.

    Relations:
        With ``hardness`` 0 and ``prior`` 0 this is `nt_xent`.

    References:
        Robinson et al. 2021, "Contrastive Learning with Hard Negative Samples", equations 2 to 4
        and the criterion of the authors' code (image/main.py), to which it is equal.

    Returns:
        This rank's share, a scalar, float32 (float64 for float64 features).

    Raises:
        ConfigError: the shapes do not fit, or a number is out of its range.
    """
    if first_BD.ndim != 2 or first_BD.shape != second_BD.shape or len(first_BD) == 0:
        raise ConfigError(
            f"hard_nt_xent: views {tuple(first_BD.shape)} and {tuple(second_BD.shape)}; expected "
            "the same (B, D) with B of 1 or more"
        )
    _check_weights("hard_nt_xent", hardness, prior)
    dtype = torch.promote_types(first_BD.dtype, torch.float32)
    first_BD, second_BD = first_BD.to(dtype), second_BD.to(dtype)
    scale = inverse_temperature(temperature, first_BD)
    both_N2D = gather_rows(torch.cat([first_BD, second_BD], dim=1), group)
    first_ND, second_ND = both_N2D.chunk(2, dim=1)
    start = rank(group) * len(first_BD)
    # The other view stands first among an anchor's keys, its own view second.
    compute = partial(
        _one_way,
        pairing=Pairing(start, masked=len(first_ND) + start),
        tile_size=auto_tile_size(2 * len(first_ND), first_BD.device),
        hardness=hardness,
        prior=prior,
    )
    from_first = differentiable(compute, first_BD, torch.cat([second_ND, first_ND]), scale)
    from_second = differentiable(compute, second_BD, torch.cat([first_ND, second_ND]), scale)
    return (from_first + from_second) / 2


def _check_weights(name: str, hardness: float, prior: float) -> None:
    if hardness < 0 or not math.isfinite(hardness):
        raise ConfigError(f"{name}: hardness is {hardness}; expected a number of 0 or more")
    if not 0 <= prior < 1:
        raise ConfigError(f"{name}: prior is {prior}; expected a share from 0 to below 1")


class _Statistics(NamedTuple):
    """What the loss of each query depends on, (R,) each.

    Attributes:
        weighted: log Σ over negatives of e^((1 + hardness) · n).
        weights: log Σ over negatives of e^(hardness · n).
        positive: log Σ over positives of e^p.
        mean: mean of p.
    """

    weighted: torch.Tensor
    weights: torch.Tensor
    positive: torch.Tensor
    mean: torch.Tensor


class _Sums(NamedTuple):
    """The sums that the statistics are made of, and how many logits were counted (R,)."""

    negative: _LogSumExps
    positive: _LogSumExps
    total_positive_R: torch.Tensor
    num_negatives_R: torch.Tensor
    num_positives_R: torch.Tensor


def _one_way(
    query_RD: torch.Tensor,
    key_CD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    pairing: Pairing,
    tile_size: int,
    hardness: float,
    prior: float,
) -> tuple[torch.Tensor, Gradients | None]:
    """Mean loss of the queries and its gradients."""
    tiles = LogitTiles(query_RD, key_CD, scale, tile_size, pairing)
    sums = _measure(tiles, len(query_RD), pairing, hardness)
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in (*_statistics(sums), scale.double())]
        loss_R = _loss(
            _Statistics(*leaves[:4]), sums.num_negatives_R, sums.num_positives_R, leaves[4], prior
        )
        value = loss_R.sum() / len(query_RD)
        if not needs_gradients:
            return value.detach().to(query_RD.dtype), None
        found = torch.autograd.grad(value, leaves, materialize_grads=True)
    slopes = _Statistics(*found[:4])
    of_mean_R = (slopes.mean / sums.num_positives_R).to(query_RD.dtype)
    query_gradient_RD, key_gradient_CD = torch.zeros_like(query_RD), torch.zeros_like(key_CD)
    for rows, columns in tiles:
        logits_TU = tiles.logits(rows, columns)
        positive_TU = _positives(logits_TU, rows, columns, pairing)
        weight_TU = torch.where(
            positive_TU,
            sums.positive.gradient(rows, logits_TU, (slopes.positive,)) + of_mean_R[rows, None],
            sums.negative.gradient(rows, logits_TU, (slopes.weighted, slopes.weights)),
        )
        query_gradient_RD[rows].addmm_(weight_TU, key_CD[columns])
        key_gradient_CD[columns].addmm_(weight_TU.T, query_RD[rows])
    gradients = scaled_gradients(query_RD, query_gradient_RD, key_gradient_CD, scale)
    # The bound on the negatives depends on the scale too.
    of_scale = gradients.scale + found[4].to(scale.dtype)
    return value.detach().to(query_RD.dtype), gradients._replace(scale=of_scale)


def _positives(
    logits_TU: torch.Tensor, rows: slice, columns: slice, pairing: Pairing
) -> torch.Tensor:
    """(T, U) bool: the row's own key, and those of its group unless they are left out."""
    key_U = torch.arange(columns.start, columns.stop, device=logits_TU.device)
    own_T = torch.arange(rows.start, rows.stop, device=logits_TU.device) + pairing.start
    if pairing.ids_C is None or pairing.ignore:
        return own_T[:, None] == key_U[None, :]
    return pairing.ids_C[own_T, None] == pairing.ids_C[None, columns]


def _measure(tiles: LogitTiles, num_queries: int, pairing: Pairing, hardness: float) -> _Sums:
    """Goes over all logits once."""
    device = tiles.new_full((), 0).device
    zeros_R = torch.zeros(num_queries, dtype=torch.float64, device=device)
    sums = _Sums(
        # Without hardness all weights are 1, and their sum is known.
        _LogSumExps(tiles, zeros_R, (1 + hardness, hardness)[: 1 + bool(hardness)]),
        _LogSumExps(tiles, zeros_R, (1.0,)),
        *(zeros_R.clone() for _ in range(3)),
    )
    for rows, columns in tiles:
        logits_TU = tiles.logits(rows, columns)
        positive_TU = _positives(logits_TU, rows, columns, pairing)
        sums.num_positives_R[rows] += positive_TU.sum(dim=1)
        of_positives_TU = logits_TU.masked_fill(~positive_TU, 0)
        sums.total_positive_R[rows] += of_positives_TU.sum(dim=1, dtype=torch.float64)
        sums.positive.add(rows, logits_TU.masked_fill(~positive_TU, -math.inf))
        logits_TU.masked_fill_(positive_TU, -math.inf)
        sums.num_negatives_R[rows] += (logits_TU > -math.inf).sum(dim=1)
        sums.negative.add(rows, logits_TU)
    return sums


def _statistics(sums: _Sums) -> _Statistics:
    weighted_R, *rest = sums.negative.values()
    return _Statistics(
        weighted_R,
        rest[0] if rest else sums.num_negatives_R.log(),
        sums.positive.values()[0],
        sums.total_positive_R / sums.num_positives_R,
    )


class _LogSumExps:
    """log Σ e^(factor · logit) of each row for several factors, a tile at a time, in float64.

    Kept relative to the largest logit so far (Milakov and Gimelshein 2018). A difference of two
    such sums may be small: float32 was measured to put 4e-5 of error on its gradient.
    """

    def __init__(
        self, tiles: LogitTiles, zeros_R: torch.Tensor, factors: tuple[float, ...]
    ) -> None:
        self._factors = factors
        self._largest_R = tiles.new_full((len(zeros_R),), torch.finfo(tiles.dtype).min)
        self._sums = [zeros_R.clone() for _ in factors]

    def add(self, rows: slice, logits_TU: torch.Tensor) -> None:
        """Counts more logits of some rows; -inf counts for nothing."""
        before_T = self._largest_R[rows].clone()
        largest_T = torch.maximum(before_T, logits_TU.amax(dim=1))
        shifted_TU = logits_TU - largest_T[:, None]
        for factor, sum_R in zip(self._factors, self._sums, strict=True):
            sum_R[rows] *= (factor * (before_T - largest_T).double()).exp()
            sum_R[rows] += (factor * shifted_TU).exp_().sum(dim=1, dtype=torch.float64)
        self._largest_R[rows] = largest_T

    def values(self) -> list[torch.Tensor]:
        """(R,) of each factor; -inf where nothing was counted."""
        return [
            sum_R.log() + factor * self._largest_R.double()
            for factor, sum_R in zip(self._factors, self._sums, strict=True)
        ]

    def gradient(
        self, rows: slice, logits_TU: torch.Tensor, slopes: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Gradient towards the logits that were counted, from that towards `values`.

        Finite for logits that were not counted, however large they are.
        """
        shifted_TU = (logits_TU - self._largest_R[rows, None]).clamp_(max=0)
        total_TU: torch.Tensor | None = None
        for factor, sum_R, slope_R in zip(self._factors, self._sums, slopes, strict=False):
            # Where nothing was counted, the slope is 0.
            share_T = factor * slope_R[rows] / sum_R[rows].clamp(min=1)
            part_TU = (factor * shifted_TU).exp_().mul_(share_T.to(shifted_TU.dtype)[:, None])
            total_TU = part_TU if total_TU is None else total_TU.add_(part_TU)
        assert total_TU is not None
        return total_TU


def _loss(
    statistics: _Statistics,
    num_negatives_R: torch.Tensor,
    num_positives_R: torch.Tensor,
    scale: torch.Tensor,
    prior: float,
) -> torch.Tensor:
    """(R,) losses; without negatives what keeps the positives equal, 0 for a single one."""
    has_any_R = num_negatives_R > 0
    # A row without negatives has infinite statistics, whose gradients would be NaN.
    weighted_R, weights_R = (
        torch.where(has_any_R, one, 0) for one in (statistics.weighted, statistics.weights)
    )
    log_count_R = num_negatives_R.clamp(min=1).log()
    log_negatives_R = log_count_R + weighted_R - weights_R
    if prior:
        expected_R = math.log(prior) + log_count_R + statistics.positive - num_positives_R.log()
        log_negatives_R = _difference(log_negatives_R, expected_R) - math.log1p(-prior)
        log_negatives_R = torch.maximum(log_negatives_R, log_count_R - scale)
    total_R = torch.logaddexp(statistics.positive, log_negatives_R)
    return torch.where(has_any_R, total_R, statistics.positive) - statistics.mean


def _difference(first_R: torch.Tensor, second_R: torch.Tensor) -> torch.Tensor:
    """log(e^first - e^second); the lowest number, without gradient, where that is not positive."""
    gap_R = second_R - first_R
    is_positive_R = gap_R.detach() < -torch.finfo(gap_R.dtype).eps
    found_R = first_R + (-torch.expm1(torch.where(is_positive_R, gap_R, -1))).log()
    return torch.where(is_positive_R, found_R, torch.finfo(gap_R.dtype).min)
