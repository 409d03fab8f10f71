"""Logits of all queries with all keys, a tile at a time.

``tile_size`` says how many logits a tile has: those of so many rows. Its shape is chosen for speed.
A few very long rows would read all keys for so little work that memory, not arithmetic, set the
pace: 131,072 pairs in tiles of 16 rows read the keys 8,192 times, in square ones 91 times.

Shapes: R query rows, C key rows, D width, T rows and U columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Pairing:
    """Which keys belong to which query.

    Attributes:
        start: query r's own key is key ``start + r``.
        ids_C: (C,) int64 ids of the keys' samples; equal ids form a group. None: all differ.
        ignore: others of a query's group are left out of its loss; else they are positives.
        masked: query r never meets key ``masked + r`` (its own self, among keys that are queries
            too); None: every query meets every key.
        num_paired: keys from here on are no query's own: negatives of all queries but those of
            their group, which never meet them; None: all keys are paired.
    """

    start: int = 0
    ids_C: torch.Tensor | None = None
    ignore: bool = False
    masked: int | None = None
    num_paired: int | None = None

    def own(self, num_queries: int) -> slice:
        """The queries' own keys."""
        return slice(self.start, self.start + num_queries)

    @property
    def paired(self) -> slice:
        """The keys that are some query's own."""
        return slice(self.num_paired)

    def of_paired(self) -> Pairing:
        """The same queries among the paired keys alone."""
        ids_C = None if self.ids_C is None else self.ids_C[self.paired]
        return replace(self, ids_C=ids_C, num_paired=None)


class LogitTiles:
    """The logits of all queries and keys, a tile at a time, in one buffer that is overwritten."""

    def __init__(
        self,
        query_RD: torch.Tensor,
        key_CD: torch.Tensor,
        scale: torch.Tensor,
        tile_size: int,
        pairing: Pairing,
        *,
        whole_rows: bool = False,
    ) -> None:
        self._query_RD, self._key_CD, self._scale = query_RD, key_CD, scale
        self._pairing = pairing
        num_logits = min(tile_size, len(query_RD)) * len(key_CD)
        self._num_rows, self._num_columns = min(tile_size, len(query_RD)), len(key_CD)
        # A square reads queries and keys least often.
        if not whole_rows and self._num_rows < (side := math.isqrt(num_logits)):
            self._num_rows = min(len(query_RD), side)
            self._num_columns = num_logits // self._num_rows
        self._buffer = query_RD.new_empty(num_logits)
        self.dtype = query_RD.dtype

    @property
    def has_whole_rows(self) -> bool:
        """Whether a tile has the logits of its queries with every key."""
        return self._num_columns >= len(self._key_CD)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for rows in self.rows():
            for columns in self.columns():
                yield rows, columns

    def rows(self) -> Iterator[slice]:
        """The queries of each row of tiles."""
        return _slices(len(self._query_RD), self._num_rows)

    def columns(self) -> Iterator[slice]:
        """The keys of each column of tiles."""
        return _slices(len(self._key_CD), self._num_columns)

    def logits(self, rows: slice, columns: slice) -> torch.Tensor:
        """(T, U), -inf for what is ignored; holds until the next call."""
        query_TD = self._query_RD[rows] * self._scale
        key_UD = self._key_CD[columns]
        logits_TU = self._buffer[: len(query_TD) * len(key_UD)].view(len(query_TD), len(key_UD))
        torch.mm(query_TD, key_UD.T, out=logits_TU)
        if self._pairing.ignore:
            logits_TU.masked_fill_(_ignored(rows, columns, self._pairing), -math.inf)
        elif self._pairing.num_paired is not None and self._pairing.ids_C is not None:
            logits_TU.masked_fill_(_own_unpaired(rows, columns, self._pairing), -math.inf)
        if self._pairing.masked is not None:
            _mask(logits_TU, rows, columns, self._pairing.masked)
        return logits_TU

    def another_buffer(self) -> torch.Tensor:
        """Room for as many numbers as the largest tile has."""
        return torch.empty_like(self._buffer)

    def new_full(self, shape: tuple[int, ...], value: float) -> torch.Tensor:
        """A tensor of the logits' dtype, on their device."""
        return self._buffer.new_full(shape, value)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _mask(logits_TU: torch.Tensor, rows: slice, columns: slice, masked: int) -> None:
    """Puts -inf where a query of the tile meets the key that it must not meet."""
    first = max(columns.start, masked + rows.start)
    last = min(columns.stop, masked + rows.stop)
    if first < last:
        start = first - masked - rows.start
        block = logits_TU[
            start : start + last - first, first - columns.start : last - columns.start
        ]
        block.fill_diagonal_(-math.inf)


def _ignored(rows: slice, columns: slice, pairing: Pairing) -> torch.Tensor:
    """(T, U) bool: others of the row's group, but not the row's own key."""
    assert pairing.ids_C is not None
    key_C = torch.arange(len(pairing.ids_C), device=pairing.ids_C.device)
    own_T = key_C[rows.start + pairing.start : rows.stop + pairing.start]
    same_TU = pairing.ids_C[own_T, None] == pairing.ids_C[None, columns]
    return same_TU & (own_T[:, None] != key_C[None, columns])


def _own_unpaired(rows: slice, columns: slice, pairing: Pairing) -> torch.Tensor:
    """(T, U) bool: keys that are no query's own, but of the row's group."""
    assert pairing.ids_C is not None and pairing.num_paired is not None
    id_T = pairing.ids_C[rows.start + pairing.start : rows.stop + pairing.start]
    same_TU = id_T[:, None] == pairing.ids_C[None, columns]
    same_TU[:, : max(0, pairing.num_paired - columns.start)] = False
    return same_TU
