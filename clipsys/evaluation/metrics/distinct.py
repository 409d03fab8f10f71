"""Which vectors are equal.

The product of two matrices may differ in its last bits for two equal columns: where a tile ends,
other instructions add in another order. Equal vectors have to tie, so each distinct one is scored
once, and counts as often as it occurs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

#: Rows whose words are hashed at once.
_ROWS = 16_384


@dataclass(frozen=True)
class Distinct:
    """The distinct rows of a matrix of N rows.

    Attributes:
        rows_UD: each distinct row, in the order of first appearance.
        number_N: (N,) which of them each row is.
        repeats_U: (U,) how often each occurs.
    """

    rows_UD: Floats
    number_N: Integers
    repeats_U: Integers

    @property
    def has_repeats(self) -> bool:
        """Whether two rows are equal."""
        return bool((self.repeats_U != 1).any())

    def take(self, rows: slice) -> Distinct:
        """Some of the distinct rows."""
        repeats = self.repeats_U[rows]
        return Distinct(self.rows_UD[rows], np.repeat(np.arange(len(repeats)), repeats), repeats)


def distinct_rows(vectors_ND: Floats) -> Distinct:
    """Finds equal rows by a hash of 64 bits, and compares those that it takes for equal."""
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    count = len(vectors_ND)
    _, first, inverse = np.unique(_hashes(vectors_ND), return_index=True, return_inverse=True)
    if len(first) == count:
        return Distinct(vectors_ND, np.arange(count), np.ones(count, np.int64))
    leader_N = first[inverse]
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        is_equal = (vectors_ND[rows] == vectors_ND[leader_N[rows]]).all(axis=1)
        leader_N[rows] = np.where(is_equal, leader_N[rows], np.arange(count)[rows])
    positions_U, number_N, repeats_U = np.unique(leader_N, return_inverse=True, return_counts=True)
    return Distinct(vectors_ND[positions_U], number_N, repeats_U)


def _hashes(vectors_ND: Floats) -> npt.NDArray[np.uint64]:
    factors = np.random.default_rng(0).integers(0, 2**64, vectors_ND.shape[1], np.uint64) | 1
    hashes = np.empty(len(vectors_ND), np.uint64)
    for start in range(0, len(vectors_ND), _ROWS):
        # Adding 0 turns -0.0, which equals 0.0, into it.
        words = (vectors_ND[start : start + _ROWS] + np.float32(0)).view(np.uint32)
        hashes[start : start + _ROWS] = (words * factors).sum(axis=1, dtype=np.uint64)
    return hashes
