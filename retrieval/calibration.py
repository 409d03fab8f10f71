"""How far a score stands out from what its query gives for the collection at large.

CLIP's cosines have no fixed scale: a good match of a text scores 0.3 with one model and 0.2 with
another, an image's neighbours 0.8, and "a" scores higher than "a red bicycle" everywhere. What can
be told is how far a hit stands out from the rest. The query is compared with a fixed sample of the
collection; the median and the median absolute deviation of these cosines (both unmoved by the few
items that do match) give the hit a robust z-score, its relevance::

    relevance = (cosine - median) / (1.4826 * MAD)

If nothing in the collection had to do with the query, cosines would scatter about normally, and the
best of N would by chance reach the (1 - 1/N) quantile or so. `relevant_only` keeps what lies above
the quantile that the best of N unrelated items pass in `CHANCE` of all queries.

Shapes: S sampled items, K hits, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.segments import Floats
from clipsys.retrieval.snapshot import Snapshot, unit_rows

#: Items in the sample: the median of 2,048 cosines is known to 3 % of their deviation.
SAMPLE_ITEMS = 2_048
#: With fewer items than this there is no background to stand out from.
MIN_ITEMS = 20
#: Share of the queries for which something unrelated passes `threshold`, were cosines normal.
CHANCE = 0.05
_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True, eq=False)
class Background:
    """A sample of a collection that queries are compared with."""

    num_items: int
    vectors_SD: Floats

    def relevance(
        self, query_D: Floats, scores_K: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64] | None:
        """The robust z-score of each score; None where the collection is too small to tell."""
        if len(self.vectors_SD) < MIN_ITEMS:
            return None
        cosines_S = (self.vectors_SD @ query_D).astype(np.float64)
        middle = float(np.median(cosines_S))
        deviation = _MAD_TO_DEVIATION * float(np.median(np.abs(cosines_S - middle)))
        # At least half of the items are the same image: anything else stands out, or nothing.
        z_K: npt.NDArray[np.float64] = (scores_K.astype(np.float64) - middle) / max(deviation, 1e-6)
        return z_K

    def threshold(self) -> float:
        """The relevance from which on a hit is hardly chance."""
        return NormalDist().inv_cdf(1 - CHANCE / max(self.num_items, 1))


def sample_background(snapshot: Snapshot) -> Background:
    """Takes items spread evenly over the collection: the same ones until it changes."""
    count = min(SAMPLE_ITEMS, len(snapshot))
    positions = np.linspace(0, len(snapshot) - 1, count).astype(np.int64)
    return Background(len(snapshot), unit_rows(snapshot.take(positions)))
