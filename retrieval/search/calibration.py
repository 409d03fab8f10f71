"""How many unrelated items would score as high: what a cosine means for one query.

CLIP's cosines have no fixed scale: a good match of a text scores 0.3 with one model and 0.2 with
another, an image's neighbours 0.8, and "a" scores higher than "a red bicycle" everywhere. What can
be told is the relevance of a hit: how far it lies above the rest. The query is compared with a
fixed sample of the collection, and a law is fitted to the bulk of these cosines, without the
highest ones: as a rule they match. The law says how likely an item that has nothing to do with the
query scores as high as a hit, and with N items::

    relevance = -log10(N * P(cosine of an unrelated item >= score))

It is the E-value of sequence search (Karlin and Altschul 1990) on a scale of tens: at 0 one
unrelated item is expected to score as high by chance, at 2 a hundredth of one.

A relevance says that a hit is hardly chance. That no hit has one does not say that nothing matches:
where a model's right and wrong hits interleave, its scores do not tell (docs/searching.md has
figures), and `options.doubt_of` says so.

A normal law would be wrong in both directions, so two of its assumptions are dropped:

- *Cosines end at 1.* Vectors scattered evenly over a sphere of d dimensions have cosines of
  deviation 1/sqrt(d), and c sqrt(d - 1) / sqrt(1 - c^2) is Student's t with nu = d - 1 degrees of
  freedom. Small models scatter as if they had a dozen dimensions: a cosine of 0.9 is 3.1 deviations
  out, one in 1,100 for a normal law and one in 72,000 on that sphere. The deviation of the sample
  gives d; Wallace (1959) gives t as a normal score in closed form.
- *They are skewed.* A collection is clusters, and a query is closer to some of them: the upper tail
  is longer. Tukey's g (1977), the exponential of a normal score, has one more parameter, which the
  quantiles one deviation below and above give. Only skewness to the right counts, which would
  pass for relevance.

Shapes: S sampled items, K hits, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.retrieval.storage.segments import Floats
from clipsys.retrieval.storage.snapshot import Snapshot, unit_rows

#: Items in the sample: a quantile of 2,048 cosines is known to 3 % of their deviation.
SAMPLE_ITEMS = 2_048
#: With fewer items than this there is no background to compare with.
MIN_ITEMS = 20
#: `relevant_only` keeps what so many unrelated items, or fewer, are expected to match by chance.
CHANCE = 0.05
#: The relevance from which on a hit is hardly chance: 1.3.
RELEVANT = -math.log10(CHANCE)

#: A normal law has 84 % of its mass below one deviation.
_ONE_DEVIATION = 0.841345
_MAD_TO_DEVIATION = 1.4826
#: Normal scores from here on are left out of the fit: one item in 740 where nothing matches.
_MATCHING = 3.0
#: Keeps logarithms and quotients finite where all cosines are equal, or where one is 1.
_LEAST = 1e-7

Doubles = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Background:
    """A sample of a collection that queries are compared with."""

    num_items: int
    vectors_SD: Floats

    def relevance(self, query_D: Floats, scores_K: Scores) -> Doubles | None:
        """Minus the decimal logarithm of how many unrelated items would reach each score.

        Finite, and ascending with the score. None where the collection is too small to tell.
        """
        if len(self.vectors_SD) < MIN_ITEMS:
            return None
        law = fit_law(self.vectors_SD @ query_D)
        relevance_K: Doubles = -_log10_tail(law.normal_scores(scores_K)) - math.log10(
            self.num_items
        )
        return relevance_K


@dataclass(frozen=True)
class BackgroundLaw:
    """How the cosines of unrelated items scatter about one query.

    Attributes:
        middle: their median.
        freedom: nu, degrees of freedom: one less than the dimensions they scatter in.
        scale: what one deviation of the bulk is in normal scores of that sphere, about 1.
        skewness: Tukey's g, not negative; 0 where both sides are alike.
    """

    middle: float
    freedom: float
    scale: float
    skewness: float

    def normal_scores(self, cosines_K: npt.NDArray[np.floating]) -> Doubles:
        """The score of a normal deviate that is as rare, for each cosine."""
        scores_K = _sphere_scores(cosines_K, self.middle, self.freedom) / self.scale
        if self.skewness == 0:
            return scores_K
        # Below a skewed law's lower end nothing is expected: there, logarithms are cut off.
        unskewed_K: Doubles = np.log(np.maximum(1 + self.skewness * scores_K, _LEAST))
        return unskewed_K / self.skewness


def fit_law(cosines_S: npt.NDArray[np.floating]) -> BackgroundLaw:
    """Fits median, deviation and skewness to the bulk of a sample, without its highest part.

    Three numbers are taken twice, the second time without the items beyond `_MATCHING`. Those are
    few where nothing matches, however skewed the law, and most of those that match where many do.
    """
    all_S: Doubles = cosines_S.astype(np.float64)
    middle, freedom = _middle_and_freedom(all_S)
    bulk_S: Doubles = all_S[_sphere_scores(all_S, middle, freedom) < _MATCHING]
    middle, freedom = _middle_and_freedom(bulk_S)
    sides = np.quantile(bulk_S, [1 - _ONE_DEVIATION, _ONE_DEVIATION])
    below, above = np.abs(_sphere_scores(sides, middle, freedom))
    # Where many items are alike, a side may have no width.
    least = max(1e-3 * max(below, above), _LEAST)
    below, above = max(below, least), max(above, least)
    skewness = max(math.log(above / below), 0.0)
    scale = math.sqrt(above * below)
    if skewness > 0:
        scale *= skewness / (2 * math.sinh(skewness / 2))
    return BackgroundLaw(middle, freedom, scale, skewness)


def _middle_and_freedom(cosines_S: Doubles) -> tuple[float, float]:
    middle = float(np.median(cosines_S))
    deviation = _MAD_TO_DEVIATION * float(np.median(np.abs(cosines_S - middle)))
    deviation = max(deviation / max(1 - middle, _LEAST), _LEAST)
    return middle, max(deviation**-2 - 1, 1.0)


def sample_background(snapshot: Snapshot) -> Background:
    """Takes items spread evenly over the collection: the same ones until it changes."""
    count = min(SAMPLE_ITEMS, len(snapshot))
    positions = np.linspace(0, len(snapshot) - 1, count).astype(np.int64)
    return Background(len(snapshot), unit_rows(snapshot.take(positions)))


def _sphere_scores(cosines_K: npt.NDArray[np.floating], middle: float, freedom: float) -> Doubles:
    """Normal scores of cosines that scatter about ``middle`` as on a sphere, up to 1.

    Student's t as a normal score is (8 nu + 1) / (8 nu + 3) sqrt(nu log(1 + t^2 / nu)) by Wallace
    (1959); with t^2 / nu = c^2 / (1 - c^2) the logarithm is -log(1 - c^2).
    """
    away_K = (np.asarray(cosines_K, np.float64) - middle) / max(1 - middle, _LEAST)
    away_K = np.clip(away_K, _LEAST - 1, 1 - _LEAST)
    factor = (8 * freedom + 1) / (8 * freedom + 3)
    scores_K: Doubles = factor * np.sign(away_K) * np.sqrt(-freedom * np.log1p(-(away_K**2)))
    return scores_K


def _log10_tail(scores_K: Doubles) -> Doubles:
    """Decimal logarithm of the share of a normal law above each score, far below 1e-308 too."""
    near_K = np.array([math.erfc(score / math.sqrt(2)) / 2 for score in np.minimum(scores_K, 25)])
    far_K = np.maximum(scores_K, 25)
    # At 25 the asymptotic series' first term is right to 0.16 %.
    log_far_K = -(far_K**2) / 2 / math.log(10) - np.log10(far_K * math.sqrt(2 * math.pi))
    tail_K: Doubles = np.where(scores_K < 25, np.log10(near_K), log_far_K)
    return tail_K
