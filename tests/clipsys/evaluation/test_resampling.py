from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from clipsys.evaluation import resampling


def test_the_interval_of_a_mean_equals_a_direct_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values = (rng.uniform(size=300) < 0.3).astype(float)
    found = resampling.mean_intervals({"a": values}, np.arange(300))["a"]
    direct = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=1)
    assert found == pytest.approx(tuple(direct.confidence_interval), abs=0.01)


def test_samples_of_one_unit_are_drawn_together() -> None:
    """Ten copies of each outcome say no more than one of each."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    once = resampling.mean_intervals({"a": values}, np.arange(50))["a"]
    often = resampling.mean_intervals({"a": values.repeat(10)}, np.arange(50).repeat(10))["a"]
    assert often == pytest.approx(once)
    alone = resampling.mean_intervals({"a": values.repeat(10)}, np.arange(500))["a"]
    assert alone is not None and once is not None
    assert alone[1] - alone[0] < (once[1] - once[0]) / 2


def test_resamples_have_as_many_units_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resampling.resampled_weights(9, num_resamples=20)))
    assert whole.shape == (20, 9)
    assert (whole.sum(axis=1) == 9).all()
    monkeypatch.setattr(resampling, "_BLOCK_BYTES", 4 * 9 * 3)  # blocks of three change nothing
    parts = list(resampling.resampled_weights(9, num_resamples=20))
    assert len(parts) == 7
    assert np.array_equal(np.concatenate(parts), whole)


def test_no_samples_have_no_interval() -> None:
    assert resampling.mean_intervals({"a": np.zeros(0)}, np.zeros(0, np.int64)) == {"a": None}
    assert resampling.statistic_intervals(lambda weights: {"a": 1.0}, 0) == {}
    one = resampling.mean_intervals({"a": np.ones(1)}, np.zeros(1, np.int64))
    assert one == {"a": (1.0, 1.0)}


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_weighted_median_equals_that_of_repeated_values(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(20):
        values, weights = np.sort(rng.integers(0, 5, size).astype(float)), rng.integers(0, 4, size)
        if weights.sum():
            found = resampling._weighted_median(values, weights)
            assert found == np.median(np.repeat(values, weights))


def test_mcnemar_equals_the_binomial_and_the_chi_square_test() -> None:
    first = np.array([1.0] * 9 + [0.0] * 2 + [1.0] * 30)
    second = np.array([0.0] * 9 + [1.0] * 2 + [1.0] * 30)
    exact = resampling.mcnemar(first, second)
    assert exact.name == "McNemar, exact"
    assert exact.p_value == pytest.approx(stats.binomtest(9, 11, 0.5).pvalue)
    many = resampling.mcnemar(first.repeat(5), second.repeat(5))
    assert many.name == "McNemar, chi-square"
    assert many.p_value == pytest.approx(stats.chi2.sf((abs(45 - 10) - 1) ** 2 / 55, 1))
    assert resampling.mcnemar(first, first).p_value == 1.0


def test_a_permutation_test_equals_all_sign_flips() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=10), rng.normal(0.4, size=10)
    found = resampling.permutation(first, second, np.arange(10))
    difference = second - first
    signs = np.array(np.meshgrid(*[(-1, 1)] * 10)).reshape(10, -1)
    exact = (np.abs(difference @ signs) >= abs(difference.sum()) - 1e-9).mean()
    assert found.p_value == pytest.approx(exact, abs=0.015)


def test_the_test_follows_the_kind_of_outcomes() -> None:
    hits, units = np.array([0.0, 1.0, 1.0, 0.0]), np.arange(4)
    assert resampling.paired_test(hits, 1 - hits, units).name.startswith("McNemar")
    assert resampling.paired_test(hits / 2, hits, units).name == "paired permutation"
    # Captions of one image are not independent, which McNemar's test takes for granted.
    assert resampling.paired_test(hits, 1 - hits, np.zeros(4, int)).name == "paired permutation"


def test_a_paired_interval_is_narrower_than_two_single_ones() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first + 0.1 + rng.normal(0, 0.01, 200)
    low, high = resampling.paired_interval(first, second, np.arange(200)) or (0, 0)
    assert 0.09 < low < 0.1 < high < 0.11


def test_the_interval_of_a_median_equals_a_direct_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=101)
    direct = stats.bootstrap((values,), np.median, n_resamples=2000, method="percentile", rng=1)
    found = resampling.median_interval(values, np.arange(101))
    assert found == pytest.approx(tuple(direct.confidence_interval), abs=0.05)
    assert resampling.median_interval(np.zeros(0), np.zeros(0, np.int64)) is None


def test_exchanging_units_of_a_mean_equals_all_sign_flips() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=9), rng.normal(0.6, size=9)

    def difference(swapped: np.ndarray | None) -> dict[str, float]:
        signs = 1 if swapped is None else np.where(swapped, -1, 1)
        return {"a": float(((second - first) * signs).mean())}

    found = resampling.permutations(difference, 9, num_permutations=4000)["a"]
    signs = np.array(np.meshgrid(*[(-1, 1)] * 9)).reshape(9, -1)
    sums = (second - first) @ signs
    exact = (np.abs(sums) >= abs((second - first).sum()) - 1e-9).mean()
    assert found.p_value == pytest.approx(exact, abs=0.025)
    assert resampling.permutations(lambda _: {"a": 0.0}, 9)["a"].p_value == 1.0
