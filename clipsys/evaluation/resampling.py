"""Bootstrap intervals, and tests of paired differences.

Samples of one unit (the captions of one image, copies of one picture) are not independent: units
are drawn, with all their samples (the cluster bootstrap: Davison & Hinkley 1997, "Bootstrap Methods
and their Application", section 3.8). Resamples depend on the seed and on the number of units alone,
so that two models measured on the same units are compared on the same resamples.

Legend of shapes: N samples, U units, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_RESAMPLES = 1000
#: Bounds of a 95 % percentile interval (Efron & Tibshirani 1993, chapter 13).
_PERCENTILES = (2.5, 97.5)
#: Weights drawn at once: memory is this number of bytes, about.
_BLOCK_BYTES = 64_000_000
#: Discordant pairs below which McNemar's test is computed exactly.
_EXACT_PAIRS = 25


@dataclass(frozen=True)
class PairedTest:
    """Whether two models differ by more than chance.

    Attributes:
        name: which test.
        p_value: probability of a difference as large if they did not differ.
    """

    name: str
    p_value: float


def resampled_weights(
    num_units: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Iterator[npt.NDArray[np.int32]]:
    """How often each unit is drawn in each resample: blocks (r, U) whose rows sum to U."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _BLOCK_BYTES // (4 * max(num_units, 1)))
    for start in range(0, num_resamples, at_once):
        rows = min(at_once, num_resamples - start)
        weights = np.empty((rows, num_units), np.int32)
        for row in range(rows):
            weights[row] = np.bincount(rng.integers(0, num_units, num_units), minlength=num_units)
        yield weights


def interval_of(estimates_R: Doubles) -> tuple[float, float] | None:
    """The 95 % percentile interval of a figure over its resamples; None where none is finite."""
    finite = estimates_R[np.isfinite(estimates_R)]
    if len(finite) == 0:
        return None
    low, high = np.percentile(finite, _PERCENTILES)
    return float(low), float(high)


def mean_intervals(
    values: Mapping[str, Doubles],
    units_N: Integers,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """The 95 % intervals of the means of several outcomes (N,) of the same samples.

    Args:
        values: name -> (N,).
        units_N: (N,) unit of each sample, from 0.
        num_resamples: R.
        seed: of the draws.

    Returns:
        None where there is no sample.
    """
    if len(units_N) == 0:
        return dict.fromkeys(values)
    num_units = _count_units(units_N)
    sums_UF = np.stack(
        [np.bincount(units_N, weights=one, minlength=num_units) for one in values.values()], axis=1
    )
    counts_U = np.bincount(units_N, minlength=num_units).astype(np.float64)
    means_RF = np.concatenate(
        [
            (weights @ sums_UF) / (weights @ counts_U)[:, None]
            for weights in resampled_weights(num_units, num_resamples=num_resamples, seed=seed)
        ]
    )
    return {name: interval_of(means_R) for name, means_R in zip(values, means_RF.T, strict=True)}


def statistic_intervals(
    statistic: Callable[[npt.NDArray[np.int32]], dict[str, float]],
    num_units: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Intervals of figures that are no means.

    Args:
        statistic: the figures when units have these weights (U,).
        num_units: U.
        num_resamples: R.
        seed: of the draws.
    """
    estimates: dict[str, list[float]] = {}
    if num_units == 0:
        return {}
    for weights in resampled_weights(num_units, num_resamples=num_resamples, seed=seed):
        for row in weights:
            for name, value in statistic(row).items():
                estimates.setdefault(name, []).append(value)
    return {name: interval_of(np.array(values)) for name, values in estimates.items()}


def median_interval(
    values_N: Doubles, units_N: Integers, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % interval of a median over samples; None where there is no sample.

    Sorted once: in a resample only the weights of the values differ.
    """
    if len(values_N) == 0:
        return None
    order = np.argsort(values_N, kind="stable")
    sorted_N, units_of_N = values_N[order], units_N[order]
    medians = [
        _weighted_median(sorted_N, weights[units_of_N])
        for block in resampled_weights(
            _count_units(units_N), num_resamples=num_resamples, seed=seed
        )
        for weights in block
    ]
    return interval_of(np.array(medians))


def _weighted_median(sorted_N: Doubles, weights_N: Integers | npt.NDArray[np.int32]) -> float:
    """The median of ascending values that occur as often as their whole weights say."""
    reached = np.cumsum(weights_N)
    total = int(reached[-1])
    low = sorted_N[np.searchsorted(reached, (total - 1) // 2, side="right")]
    high = sorted_N[np.searchsorted(reached, total // 2, side="right")]
    return float(low + high) / 2 if np.isfinite(high) else float(high)


def paired_interval(
    first_N: Doubles, second_N: Doubles, units_N: Integers, *, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % interval of mean(second) - mean(first), both on the same resamples."""
    return mean_intervals({"": second_N - first_N}, units_N, seed=seed)[""]


def paired_test(first_N: Doubles, second_N: Doubles, units_N: Integers) -> PairedTest:
    """McNemar's test where outcomes are 0 or 1 of independent samples; else a permutation test."""
    outcomes = np.concatenate([first_N, second_N])
    if len(np.unique(units_N)) == len(units_N) and bool(np.isin(outcomes, (0.0, 1.0)).all()):
        return mcnemar(first_N, second_N)
    return permutation(first_N, second_N, units_N)


def mcnemar(first_N: Doubles, second_N: Doubles) -> PairedTest:
    """McNemar's test (1947) of two classifiers on the same samples.

    Exact (binomial, two-sided) below 25 discordant pairs; else chi-square with the continuity
    correction of Edwards (1948).
    """
    from scipy import stats

    only_first = int(((first_N == 1) & (second_N == 0)).sum())
    only_second = int(((first_N == 0) & (second_N == 1)).sum())
    discordant = only_first + only_second
    if discordant == 0:
        return PairedTest("McNemar, exact", 1.0)
    if discordant < _EXACT_PAIRS:
        exact = stats.binomtest(only_first, discordant, 0.5)
        return PairedTest("McNemar, exact", float(exact.pvalue))
    corrected = max(abs(only_first - only_second) - 1, 0) ** 2 / discordant
    return PairedTest("McNemar, chi-square", float(stats.chi2.sf(corrected, 1)))


def permutation(
    first_N: Doubles,
    second_N: Doubles,
    units_N: Integers,
    *,
    num_permutations: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """A permutation test of the mean difference: the signs of units are exchanged at random.

    The p value counts the observed one among the permutations, so it is never 0 (Phipson & Smyth
    2010).
    """
    sums_U = np.bincount(units_N, weights=second_N - first_N, minlength=_count_units(units_N))
    observed = abs(sums_U.sum())
    rng = np.random.default_rng(seed)
    at_once = max(1, _BLOCK_BYTES // (8 * max(len(sums_U), 1)))
    # Sums of the same terms in another order differ in their last bits.
    tolerance = 1e-9 * np.abs(sums_U).sum()
    as_large = 0
    for start in range(0, num_permutations, at_once):
        rows = min(at_once, num_permutations - start)
        signs = rng.integers(0, 2, (rows, len(sums_U)), np.int8) * 2 - 1
        as_large += int((np.abs(signs @ sums_U) >= observed - tolerance).sum())
    return PairedTest("paired permutation", (as_large + 1) / (num_permutations + 1))


def permutations(
    differences: Callable[[npt.NDArray[np.bool_] | None], dict[str, float]],
    num_units: int,
    *,
    num_permutations: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, PairedTest]:
    """A permutation test of differences of figures that are no means, by exchanging models' units.

    Approximate randomization (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses").

    Args:
        differences: by name, when the units that are True (U,) are exchanged between the models;
            None: as they are.
        num_units: U.
        num_permutations: how many exchanges are drawn.
        seed: of the draws.
    """
    observed = differences(None)
    as_large = dict.fromkeys(observed, 0)
    rng = np.random.default_rng(seed)
    for _ in range(num_permutations):
        found = differences(rng.integers(0, 2, num_units, np.int8) == 1)
        for name, value in found.items():
            as_large[name] += abs(value) >= abs(observed[name]) - 1e-12
    return {
        name: PairedTest("paired permutation", (count + 1) / (num_permutations + 1))
        for name, count in as_large.items()
    }


def _count_units(units_N: Integers) -> int:
    return int(units_N.max()) + 1 if len(units_N) else 0
