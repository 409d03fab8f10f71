"""Contrastive losses of feature matrices with their gradients, a tile of logits at a time.

Both losses are scalars, so their gradients are known up to a factor as soon as they are: each
function here returns the value and the gradients together, and no logit is kept. What is computed
of an (R, C) matrix of logits L = scale · q kᵀ, a tile of T x U at a time::

    one_way     row softmax.  1 product forward and 2 backward where a tile has whole rows, and 1
                more where it does not: rows are then complete only after the last tile.
    two_way     row and column softmax of the same logits, complete only after the last tile: 1
                product, then 1 again and 2 backward; the dense loss, which keeps two matrices of
                logits, has 2 forward and 4 backward.
    sigmoid     one term per logit: 1 product forward, 2 backward.

Positives never enter the tiles: the mean logit of a row with its positives is its logit with their
mean (logits are linear in the keys), so that part of loss and gradient takes O(C·D).

Shapes: R query rows, C key rows, D width, T rows and U columns of a tile, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from clipsys.training.losses.tiles import LogitTiles, Pairing


class Gradients(NamedTuple):
    """Gradients towards queries (R, D), keys (C, D), scale () and bias (); None: not needed."""

    query_RD: torch.Tensor
    key_CD: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None


#: Gives the value and gradients towards its tensors, in their order.
def inverse_temperature(temperature: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """() the scale of logits for features ``like`` these, float32 at least; keeps its gradient."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return 1 / torch.as_tensor(temperature, dtype=dtype, device=like.device).reshape(())


Compute = Callable[..., tuple[torch.Tensor, "tuple[torch.Tensor | None, ...] | None"]]

#: From so many rows on a tile of `one_way` keeps them whole.
_WHOLE_ROWS = 160


def differentiable(compute: Compute, *tensors: torch.Tensor) -> torch.Tensor:
    """The value of ``compute(*tensors, needs_gradients)``, with the gradients that it returns.

    ``needs_gradients`` says whether gradients are needed. The value can be differentiated once.
    """
    value: torch.Tensor = _WithGivenGradients.apply(compute, *tensors)
    return value


class _WithGivenGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, *tensors: torch.Tensor) -> torch.Tensor:
        # Autocast would silently take the products in 16 bits.
        with torch.autocast(tensors[0].device.type, enabled=False):
            value, gradients = compute(*tensors, any(ctx.needs_input_grad))
        if gradients is not None:
            ctx.save_for_backward(*gradients[: len(tensors)])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *(gradient * upstream[0] for gradient in ctx.saved_tensors))


def one_way(
    query_RD: torch.Tensor,
    key_CD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    pairing: Pairing,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    """Mean over queries of the cross-entropy over all keys against evenly spread positives."""
    positives = _Positives(query_RD, key_CD[pairing.paired], pairing.of_paired())
    mean = 1 / len(query_RD)
    entropy = scale.new_zeros((), dtype=torch.float64)
    query_gradient_RD = torch.zeros_like(query_RD) if needs_gradients else query_RD
    key_gradient_CD = torch.zeros_like(key_CD) if needs_gradients else key_CD
    # With whole rows the keys are read more often, and without them there is a product more. Both
    # cost the same at about this many rows.
    whole = tile_size >= _WHOLE_ROWS
    tiles = LogitTiles(query_RD, key_CD, scale, tile_size, pairing, whole_rows=whole)
    for rows in tiles.rows():
        weight_TU, largest_T1, sum_T1 = row_softmax(tiles, rows)
        entropy += (sum_T1.log() + largest_T1).sum(dtype=torch.float64)
        if not needs_gradients:
            continue
        for columns in tiles.columns():
            if not tiles.has_whole_rows:
                weight_TU = tiles.logits(rows, columns).sub_(largest_T1).exp_()
            weight_TU.mul_(mean / sum_T1)
            query_gradient_RD[rows].addmm_(weight_TU, key_CD[columns])
            key_gradient_CD[columns].addmm_(weight_TU.T, query_RD[rows])
    value = entropy * mean - positives.sum_of_means() * scale * mean
    if not needs_gradients:
        return value.to(query_RD.dtype), None
    query_gradient_RD.sub_(positives.mean_key_RD, alpha=mean)
    key_gradient_CD[pairing.paired].sub_(positives.spread_queries(), alpha=mean)
    return value.to(query_RD.dtype), scaled_gradients(
        query_RD, query_gradient_RD, key_gradient_CD, scale
    )


def row_softmax(tiles: LogitTiles, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(logit - largest) of the last tile (T, U); the largest logit and the sum (T, 1) of all.

    The sum is kept relative to the largest logit so far (Milakov and Gimelshein 2018).
    """
    lowest = torch.finfo(tiles.dtype).min
    largest_T1 = tiles.new_full((rows.stop - rows.start, 1), lowest)
    sum_T1 = torch.zeros_like(largest_T1)
    for columns in tiles.columns():
        weight_TU = tiles.logits(rows, columns)
        before_T1 = largest_T1
        largest_T1 = torch.maximum(before_T1, weight_TU.amax(dim=1, keepdim=True))
        weight_TU.sub_(largest_T1).exp_()
        sum_T1 = sum_T1 * (before_T1 - largest_T1).exp() + weight_TU.sum(dim=1, keepdim=True)
    return weight_TU, largest_T1, sum_T1


def two_way(
    query_RD: torch.Tensor,
    key_RD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    *,
    pairing: Pairing,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    """Mean of `one_way` from queries to keys and from keys to queries, where both are complete.

    Equal to the two calls, with two thirds of their products. All logits are shifted by one
    constant instead of each row's maximum, so that a single exponential serves rows and columns.
    Where that would lose a sum to underflow (a row or column of cosines far below all others, at a
    scale near 100), the two calls are made instead.
    """
    limits = torch.finfo(query_RD.dtype)
    room = math.log(limits.max) - math.log(len(query_RD)) - 1
    bound = scale * query_RD.norm(dim=1).max() * key_RD.norm(dim=1).max()
    shift = (bound - room).clamp(min=0)
    sum_of_rows_R = torch.zeros_like(query_RD[:, 0])
    sum_of_columns_R = torch.zeros_like(key_RD[:, 0])
    tiles = LogitTiles(query_RD, key_RD, scale, tile_size, pairing)
    for rows, columns in tiles:
        weight_TU = tiles.logits(rows, columns).sub_(shift).exp_()
        sum_of_rows_R[rows] += weight_TU.sum(dim=1)
        sum_of_columns_R[columns] += weight_TU.sum(dim=0)
    smallest = torch.minimum(sum_of_rows_R.min(), sum_of_columns_R.min())
    if not bool(smallest > 10 * len(query_RD) * limits.tiny / limits.eps):
        return _two_calls(query_RD, key_RD, scale, needs_gradients, pairing, tile_size)

    positives = _Positives(query_RD, key_RD, pairing)
    mean = 1 / len(query_RD)
    entropy = (sum_of_rows_R.double().log() + sum_of_columns_R.double().log()).sum() / 2
    value = (entropy - positives.sum_of_means() * scale) * mean + shift
    if not needs_gradients:
        return value.to(query_RD.dtype), None
    of_row_R1 = (mean / 2 / sum_of_rows_R)[:, None]
    of_column_1R = (mean / 2 / sum_of_columns_R)[None, :]
    query_gradient_RD = torch.zeros_like(query_RD)
    key_gradient_RD = torch.zeros_like(key_RD)
    factors = tiles.another_buffer()
    for rows, columns in tiles:
        weight_TU = tiles.logits(rows, columns).sub_(shift).exp_()
        factor_TU = factors[: weight_TU.numel()].view_as(weight_TU)
        weight_TU.mul_(torch.add(of_row_R1[rows], of_column_1R[:, columns], out=factor_TU))
        query_gradient_RD[rows].addmm_(weight_TU, key_RD[columns])
        key_gradient_RD[columns].addmm_(weight_TU.T, query_RD[rows])
    query_gradient_RD.sub_(positives.mean_key_RD, alpha=mean)
    key_gradient_RD.sub_(positives.spread_queries(), alpha=mean)
    return value.to(query_RD.dtype), scaled_gradients(
        query_RD, query_gradient_RD, key_gradient_RD, scale
    )


def _two_calls(
    query_RD: torch.Tensor,
    key_RD: torch.Tensor,
    scale: torch.Tensor,
    needs_gradients: bool,
    pairing: Pairing,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    options: Any = {"pairing": pairing, "tile_size": tile_size}
    there, one = one_way(query_RD, key_RD, scale, needs_gradients, **options)
    back, other = one_way(key_RD, query_RD, scale, needs_gradients, **options)
    if one is None or other is None:
        return (there + back) / 2, None
    return (there + back) / 2, Gradients(
        (one.query_RD + other.key_CD) / 2,
        (one.key_CD + other.query_RD) / 2,
        (one.scale + other.scale) / 2,
    )


def sigmoid(
    query_RD: torch.Tensor,
    key_CD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    needs_gradients: bool,
    *,
    pairing: Pairing,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    """Sum over all logits of -log σ(±logit), divided by the number of queries.

    -log σ(-x) = softplus(x) for every logit, and -log σ(x) = softplus(x) - x: the positives' own
    part is linear.
    """
    positives = _Positives(query_RD, key_CD, pairing)
    mean = 1 / len(query_RD)
    total = scale.new_zeros((), dtype=torch.float64)
    weights = scale.new_zeros((), dtype=torch.float64)
    query_gradient_RD = torch.zeros_like(query_RD) if needs_gradients else query_RD
    key_gradient_CD = torch.zeros_like(key_CD) if needs_gradients else key_CD
    tiles = LogitTiles(query_RD, key_CD, scale, tile_size, pairing)
    for rows, columns in tiles:
        logits_TU = tiles.logits(rows, columns).add_(bias)
        total += torch.nn.functional.softplus(logits_TU).sum(dtype=torch.float64)
        if needs_gradients:
            weight_TU = logits_TU.sigmoid_().mul_(mean)
            weights += weight_TU.sum(dtype=torch.float64)
            query_gradient_RD[rows].addmm_(weight_TU, key_CD[columns])
            key_gradient_CD[columns].addmm_(weight_TU.T, query_RD[rows])
    matched = positives.sum_of_sums() * scale + positives.num_pairs() * bias
    value = (total - matched) * mean
    if not needs_gradients:
        return value.to(query_RD.dtype), None
    query_gradient_RD.sub_(positives.sum_of_keys(), alpha=mean)
    key_gradient_CD.sub_(positives.sum_of_queries(), alpha=mean)
    gradients = scaled_gradients(query_RD, query_gradient_RD, key_gradient_CD, scale)
    of_bias = (weights - positives.num_pairs() * mean).to(bias.dtype)
    return value.to(query_RD.dtype), gradients._replace(bias=of_bias)


class _Positives:
    """The queries' positives, as sums over groups: O(C·D), however many pairs there are."""

    def __init__(self, query_RD: torch.Tensor, key_CD: torch.Tensor, pairing: Pairing) -> None:
        self._query_RD, self._key_CD, self._own = query_RD, key_CD, pairing.own(len(query_RD))
        self._grouped = pairing.ids_C is not None and not pairing.ignore
        if pairing.ids_C is None or pairing.ignore:
            self.mean_key_RD = key_CD[self._own]
            return
        _, self._group_C, count_G = torch.unique(
            pairing.ids_C, return_inverse=True, return_counts=True
        )
        self._group_R = self._group_C[self._own]
        self._size_R1 = count_G[self._group_R, None].to(query_RD.dtype)
        sum_GD = key_CD.new_zeros(len(count_G), key_CD.shape[1])
        sum_GD.index_add_(0, self._group_C, key_CD)
        #: (R, D) mean of each query's positive keys.
        self.mean_key_RD = sum_GD[self._group_R] / self._size_R1
        self._num_groups = len(count_G)

    def sum_of_means(self) -> torch.Tensor:
        """Σ over queries of the mean cosine with their positives, float64."""
        return (self._query_RD * self.mean_key_RD).sum(dtype=torch.float64)

    def sum_of_sums(self) -> torch.Tensor:
        """Σ over all positive pairs of the cosine, float64."""
        return (self._query_RD * self.sum_of_keys()).sum(dtype=torch.float64)

    def num_pairs(self) -> int | torch.Tensor:
        """Number of positive pairs."""
        return self._size_R1.sum() if self._grouped else len(self._query_RD)

    def sum_of_keys(self) -> torch.Tensor:
        """(R, D) sum of each query's positive keys."""
        return self.mean_key_RD * self._size_R1 if self._grouped else self.mean_key_RD

    def spread_queries(self) -> torch.Tensor:
        """(C, D): each query divided evenly among its positive keys."""
        return self._to_keys(self._query_RD / self._size_R1 if self._grouped else self._query_RD)

    def sum_of_queries(self) -> torch.Tensor:
        """(C, D) sum of the queries that each key is a positive of."""
        return self._to_keys(self._query_RD)

    def _to_keys(self, value_RD: torch.Tensor) -> torch.Tensor:
        if not self._grouped:
            value_CD = torch.zeros_like(self._key_CD)
            value_CD[self._own] = value_RD
            return value_CD
        sum_GD = value_RD.new_zeros(self._num_groups, value_RD.shape[1])
        return sum_GD.index_add_(0, self._group_R, value_RD)[self._group_C]


def scaled_gradients(
    query_RD: torch.Tensor,
    query_gradient_RD: torch.Tensor,
    key_gradient_CD: torch.Tensor,
    scale: torch.Tensor,
) -> Gradients:
    """From gradients towards cosines to gradients towards features and scale.

    The loss depends on queries and scale through their product alone, so Σ q·∂loss/∂(scale·q) is
    the scale's gradient. In float64: it is a small difference of large sums.
    """
    of_scale = (query_RD * query_gradient_RD).sum(dtype=torch.float64).to(scale.dtype)
    return Gradients(query_gradient_RD.mul_(scale), key_gradient_CD.mul_(scale), of_scale)
