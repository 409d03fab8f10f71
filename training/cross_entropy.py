"""Contrastive losses of feature matrices with their gradients, a tile of logits at a time.

Both losses are scalars, so their gradients are known up to a factor as soon as they are: each
function here returns the value and the gradients together, and no logit is kept. What is computed
of an (R, C) matrix of logits L = scale · q kᵀ, T rows at a time::

    one_way     row softmax.  Rows are complete within a tile: 1 product forward, 2 backward.
    two_way     row and column softmax of the same logits. Columns are complete only after the last
                tile: 1 product, then 1 again and 2 backward; the dense loss, which keeps two
                matrices of logits, has 2 forward and 4 backward.
    sigmoid     one term per logit: 1 product forward, 2 backward.

Positives never enter the tiles: the mean logit of a row with its positives is its logit with their
mean (logits are linear in the keys), so that part of loss and gradient takes O(C·D).

Shapes: R query rows, C key rows, D width, T rows of a tile, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Gradients(NamedTuple):
    """Of a loss, towards queries (R, D), keys (C, D), scale () and bias (); None: not wanted."""

    query_RD: torch.Tensor
    key_CD: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Pairing:
    """Which keys belong to which query.

    Attributes:
        start: query r's own key is key ``start + r``.
        ids_C: (C,) int64 ids of the keys' samples; equal ids form a group. None: all differ.
        ignore: others of a query's group are left out of its loss; else they are positives.
    """

    start: int = 0
    ids_C: torch.Tensor | None = None
    ignore: bool = False

    def own(self, num_queries: int) -> slice:
        """The queries' own keys."""
        return slice(self.start, self.start + num_queries)


Compute = Callable[..., tuple[torch.Tensor, "Gradients | None"]]


def differentiable(compute: Compute, *tensors: torch.Tensor) -> torch.Tensor:
    """The value of ``compute(*tensors, wanted)``, connected to autograd by the gradients it gives.

    ``wanted`` says whether gradients are needed. The value can be differentiated once.
    """
    value: torch.Tensor = _Known.apply(compute, *tensors)
    return value


class _Known(torch.autograd.Function):
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
    wanted: bool,
    *,
    pairing: Pairing,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    """Mean over queries of the cross-entropy over all keys against evenly spread positives."""
    positives = _Positives(query_RD, key_CD, pairing)
    mean = 1 / len(query_RD)
    entropy = scale.new_zeros((), dtype=torch.float64)
    query_gradient_RD = torch.empty_like(query_RD) if wanted else query_RD
    key_gradient_CD = torch.zeros_like(key_CD) if wanted else key_CD
    for rows, logits_TC in _tiles(query_RD, key_CD, scale, tile_size):
        if pairing.ignore:
            logits_TC.masked_fill_(_ignored(rows, pairing), -math.inf)
        largest_T1 = logits_TC.amax(dim=1, keepdim=True)
        weight_TC = logits_TC.sub_(largest_T1).exp_()
        sum_T1 = weight_TC.sum(dim=1, keepdim=True)
        entropy += (sum_T1.log() + largest_T1).sum(dtype=torch.float64)
        if wanted:
            weight_TC.mul_(mean / sum_T1)
            torch.mm(weight_TC, key_CD, out=query_gradient_RD[rows])
            key_gradient_CD.addmm_(weight_TC.T, query_RD[rows])
    value = entropy * mean - positives.sum_of_means() * scale * mean
    if not wanted:
        return value.to(query_RD.dtype), None
    query_gradient_RD.sub_(positives.mean_key_RD, alpha=mean)
    key_gradient_CD.sub_(positives.spread_queries(), alpha=mean)
    return value.to(query_RD.dtype), _scaled(query_RD, query_gradient_RD, key_gradient_CD, scale)


def two_way(
    query_RD: torch.Tensor,
    key_RD: torch.Tensor,
    scale: torch.Tensor,
    wanted: bool,
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
    sum_of_rows_R = torch.empty_like(query_RD[:, 0])
    sum_of_columns_R = torch.zeros_like(key_RD[:, 0])
    for rows, logits_TR in _tiles(query_RD, key_RD, scale, tile_size):
        weight_TR = _exponentials(rows, logits_TR, shift, pairing)
        torch.sum(weight_TR, dim=1, out=sum_of_rows_R[rows])
        sum_of_columns_R += weight_TR.sum(dim=0)
    smallest = torch.minimum(sum_of_rows_R.min(), sum_of_columns_R.min())
    if not bool(smallest > 10 * len(query_RD) * limits.tiny / limits.eps):
        return _two_calls(query_RD, key_RD, scale, wanted, pairing, tile_size)

    positives = _Positives(query_RD, key_RD, pairing)
    mean = 1 / len(query_RD)
    entropy = (sum_of_rows_R.double().log() + sum_of_columns_R.double().log()).sum() / 2
    value = (entropy - positives.sum_of_means() * scale) * mean + shift
    if not wanted:
        return value.to(query_RD.dtype), None
    of_row_R1 = (mean / 2 / sum_of_rows_R)[:, None]
    of_column_1R = (mean / 2 / sum_of_columns_R)[None, :]
    query_gradient_RD = torch.empty_like(query_RD)
    key_gradient_RD = torch.zeros_like(key_RD)
    factor_TR = query_RD.new_empty(min(tile_size, len(query_RD)), len(key_RD))
    for rows, logits_TR in _tiles(query_RD, key_RD, scale, tile_size):
        weight_TR = _exponentials(rows, logits_TR, shift, pairing)
        weight_TR.mul_(torch.add(of_row_R1[rows], of_column_1R, out=factor_TR[: len(weight_TR)]))
        torch.mm(weight_TR, key_RD, out=query_gradient_RD[rows])
        key_gradient_RD.addmm_(weight_TR.T, query_RD[rows])
    query_gradient_RD.sub_(positives.mean_key_RD, alpha=mean)
    key_gradient_RD.sub_(positives.spread_queries(), alpha=mean)
    return value.to(query_RD.dtype), _scaled(query_RD, query_gradient_RD, key_gradient_RD, scale)


def _two_calls(
    query_RD: torch.Tensor,
    key_RD: torch.Tensor,
    scale: torch.Tensor,
    wanted: bool,
    pairing: Pairing,
    tile_size: int,
) -> tuple[torch.Tensor, Gradients | None]:
    options: Any = {"pairing": pairing, "tile_size": tile_size}
    there, one = one_way(query_RD, key_RD, scale, wanted, **options)
    back, other = one_way(key_RD, query_RD, scale, wanted, **options)
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
    wanted: bool,
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
    query_gradient_RD = torch.empty_like(query_RD) if wanted else query_RD
    key_gradient_CD = torch.zeros_like(key_CD) if wanted else key_CD
    for rows, logits_TC in _tiles(query_RD, key_CD, scale, tile_size):
        logits_TC.add_(bias)
        if pairing.ignore:
            logits_TC.masked_fill_(_ignored(rows, pairing), -math.inf)
        total += torch.nn.functional.softplus(logits_TC).sum(dtype=torch.float64)
        if wanted:
            weight_TC = logits_TC.sigmoid_().mul_(mean)
            weights += weight_TC.sum(dtype=torch.float64)
            torch.mm(weight_TC, key_CD, out=query_gradient_RD[rows])
            key_gradient_CD.addmm_(weight_TC.T, query_RD[rows])
    matched = positives.sum_of_sums() * scale + positives.num_pairs() * bias
    value = (total - matched) * mean
    if not wanted:
        return value.to(query_RD.dtype), None
    query_gradient_RD.sub_(positives.sum_of_keys(), alpha=mean)
    key_gradient_CD.sub_(positives.sum_of_queries(), alpha=mean)
    gradients = _scaled(query_RD, query_gradient_RD, key_gradient_CD, scale)
    of_bias = (weights - positives.num_pairs() * mean).to(bias.dtype)
    return value.to(query_RD.dtype), gradients._replace(bias=of_bias)


def _tiles(
    query_RD: torch.Tensor, key_CD: torch.Tensor, scale: torch.Tensor, tile_size: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their (T, C) logits. The tensor is written anew for each tile."""
    buffer_TC = query_RD.new_empty(min(tile_size, len(query_RD)), len(key_CD))
    for start in range(0, len(query_RD), tile_size):
        rows = slice(start, min(start + tile_size, len(query_RD)))
        logits_TC = buffer_TC[: rows.stop - rows.start]
        torch.mm(query_RD[rows] * scale, key_CD.T, out=logits_TC)
        yield rows, logits_TC


def _exponentials(
    rows: slice, logits_TC: torch.Tensor, shift: torch.Tensor, pairing: Pairing
) -> torch.Tensor:
    weight_TC = logits_TC.sub_(shift).exp_()
    if pairing.ignore:
        weight_TC.masked_fill_(_ignored(rows, pairing), 0.0)
    return weight_TC


def _ignored(rows: slice, pairing: Pairing) -> torch.Tensor:
    """(T, C) bool: others of the row's group, but not the row's own key."""
    assert pairing.ids_C is not None
    own_T = torch.arange(rows.start, rows.stop, device=pairing.ids_C.device) + pairing.start
    mask_TC = pairing.ids_C[own_T, None] == pairing.ids_C[None, :]
    mask_TC[torch.arange(len(own_T), device=own_T.device), own_T] = False
    return mask_TC


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


def _scaled(
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
