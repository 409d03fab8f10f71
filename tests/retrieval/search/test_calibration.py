"""Relevance: what a cosine means for one query, on backgrounds whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

from clipsys.retrieval.search.calibration import CHANCE, MIN_ITEMS, RELEVANT, Background, fit_law
from tests.retrieval.clustered import clustered

Doubles = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Doubles]

#: Cosines of a query with items that have nothing to do with it.
BACKGROUNDS: dict[str, Draw] = {
    "narrow and normal, as a text's": lambda rng, n: rng.normal(0.2, 0.03, n),
    "on a sphere of 12 dimensions": lambda rng, n: 2 * rng.beta(5.5, 5.5, n) - 1,
    "on a sphere of 512 dimensions": lambda rng, n: 2 * rng.beta(255.5, 255.5, n) - 1,
    "skewed to the right": lambda rng, n: 0.15 + 0.02 * rng.gamma(3, size=n),
    "skewed to the left": lambda rng, n: 0.3 - 0.02 * rng.gamma(3, size=n),
    "in two clusters": lambda rng, n: rng.normal(np.where(rng.random(n) < 0.2, 0.24, 0.18), 0.025),
}


def relevance(cosines: Doubles, of: Doubles | None = None) -> Doubles:
    """Relevance in a collection of items with these cosines, by a sample as collections take it."""
    sample = cosines[np.linspace(0, len(cosines) - 1, min(2_048, len(cosines))).astype(int)]
    background = Background(len(cosines), sample[:, None].astype(np.float32))
    scores = (cosines if of is None else of).astype(np.float32)
    found = background.relevance(np.ones(1, np.float32), scores)
    assert found is not None
    return found


def unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_something_passes_by_chance_about_as_often_as_stated(name: str) -> None:
    rng = np.random.default_rng(0)
    passed = [relevance(BACKGROUNDS[name](rng, 5_000)).max() >= RELEVANT for _ in range(200)]
    # A twentieth is stated; of 200 queries with that chance, 20 or more pass once in 300 times.
    assert np.mean(passed) < 2 * CHANCE


def test_a_normal_law_would_pass_nearly_always_on_a_skewed_background() -> None:
    rng = np.random.default_rng(0)
    threshold = NormalDist().inv_cdf(1 - CHANCE / 5_000)
    fooled = []
    for _ in range(50):
        cosines = BACKGROUNDS["skewed to the right"](rng, 5_000)
        middle = np.median(cosines)
        deviation = 1.4826 * np.median(np.abs(cosines - middle))
        fooled.append((cosines.max() - middle) / deviation >= threshold)
    assert np.mean(fooled) > 0.9


@pytest.mark.parametrize(
    "name", [name for name in BACKGROUNDS if "sphere" in name or "normal" in name]
)
def test_relevance_is_the_logarithm_of_how_many_unrelated_items_score_as_high(name: str) -> None:
    rng = np.random.default_rng(1)
    reached = np.concatenate([relevance(BACKGROUNDS[name](rng, 5_000)) for _ in range(100)])
    for exponent, tolerance in ((-2, 0.1), (-1, 0.2), (0, 0.5)):
        per_query = np.count_nonzero(reached >= exponent) / 100
        assert per_query == pytest.approx(10.0**-exponent, rel=tolerance)


@pytest.mark.parametrize("dimensions", [3, 12, 100])
def test_law_of_a_sphere_is_that_of_its_cosines(dimensions: int) -> None:
    shape = (dimensions - 1) / 2
    cosines = 2 * np.random.default_rng(2).beta(shape, shape, 200_000) - 1
    law = fit_law(cosines)
    assert law.middle == pytest.approx(0, abs=0.01)
    # The naive one: the density (1 - c^2)^((d - 3) / 2), summed up.
    grid = np.linspace(-1, 1, 400_001)
    density = (1 - grid**2) ** ((dimensions - 3) / 2)
    tail = np.cumsum(density[::-1])[::-1] / density.sum()
    for cosine in (0.1, 0.3, 0.6):
        exact = NormalDist().inv_cdf(1 - float(tail[np.searchsorted(grid, cosine)]))
        (score,) = law.normal_scores(np.array([cosine]))
        assert score == pytest.approx(exact, rel=0.06, abs=0.02)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.2])
def test_what_matches_is_found_also_where_it_is_a_good_part_of_the_collection(share: float) -> None:
    rng = np.random.default_rng(3)
    num_items = 5_000
    matches = np.arange(num_items) < round(share * num_items)
    cosines = np.where(matches, rng.normal(0.41, 0.01, num_items), rng.normal(0.2, 0.03, num_items))
    order = rng.permutation(num_items)  # the sample is spread over the collection
    passed = relevance(cosines[order]) >= RELEVANT
    assert np.mean(passed[matches[order]]) > 0.9
    assert np.count_nonzero(passed[~matches[order]]) <= 2


def test_clusters_of_vectors_are_found_and_random_directions_find_nothing() -> None:
    dim, items = 64, clustered(20_000, 64, seed=1, num_clusters=300)
    background = Background(len(items), items[:2_048])
    centres = unit(np.random.default_rng(99).normal(size=(300, dim)))
    for centre in centres[:20]:
        scores = items @ centre
        found = background.relevance(centre, scores)
        assert found is not None
        assert (found[np.argsort(scores)[-20:]] >= RELEVANT).all()  # a cluster has about 67
        assert np.count_nonzero(found >= RELEVANT) <= 140
    fooled = []
    for query in unit(np.random.default_rng(5).normal(size=(200, dim))):
        found = background.relevance(query, (items @ query).max(keepdims=True))
        assert found is not None
        fooled.append(found[0] >= RELEVANT)
    assert np.mean(fooled) < 2 * CHANCE


def test_relevance_ascends_with_the_score_and_is_finite_to_the_ends() -> None:
    scores = np.linspace(-1, 1, 2_001)
    for name, draw in BACKGROUNDS.items():
        found = relevance(draw(np.random.default_rng(4), 1_000), scores)
        assert np.isfinite(found).all(), name
        assert (np.diff(found) >= 0).all(), name
        assert found[0] == pytest.approx(-3, abs=1e-6), name  # all of the thousand score as high


@pytest.mark.parametrize(
    "cosines",
    [
        np.full(30, 1.0),
        np.full(30, -1.0),
        np.zeros(30),
        np.repeat([0.0, 1.0], [16, 14]),
        np.repeat([0.0, 1.0], [14, 16]),
        np.repeat([0.1, 0.2, 0.3], [1, 28, 1]),
    ],
)
def test_equal_items_do_not_divide_by_zero(cosines: Doubles) -> None:
    found = relevance(cosines, np.array([-1.0, 0.0, 0.5, 1.0]))
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()


def test_too_few_items_say_nothing() -> None:
    items = clustered(MIN_ITEMS, 8)
    for count in (0, 1, MIN_ITEMS - 1):
        assert Background(count, items[:count]).relevance(items[0], np.ones(1, np.float32)) is None
    assert Background(MIN_ITEMS, items).relevance(items[0], np.ones(1, np.float32)) is not None
    nothing = Background(MIN_ITEMS, items).relevance(items[0], np.empty(0, np.float32))
    assert nothing is not None
    assert len(nothing) == 0


def test_ten_times_the_items_take_one_from_the_relevance() -> None:
    items = clustered(100, 8)
    scores = np.array([0.2, 0.9], np.float32)
    few = Background(100, items).relevance(items[0], scores)
    many = Background(1_000, items).relevance(items[0], scores)
    assert few is not None
    assert many is not None
    np.testing.assert_allclose(few - many, 1)


def test_same_sample_gives_the_same_relevance_in_any_order() -> None:
    cosines = BACKGROUNDS["in two clusters"](np.random.default_rng(6), 1_000)
    scores = np.array([0.1, 0.3])
    first = relevance(cosines, scores)
    np.testing.assert_array_equal(first, relevance(cosines, scores))
    np.testing.assert_array_equal(first, relevance(cosines[::-1], scores))
