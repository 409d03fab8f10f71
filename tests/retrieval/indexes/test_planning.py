from __future__ import annotations

import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.planning import (
    EXACT_ITEMS,
    KINDS,
    num_lists_for,
    plan_index,
    plan_of_kind,
    plan_upkeep,
)

GB = 10**9


@pytest.mark.parametrize(
    ("num_items", "memory_bytes", "recall", "kind"),
    [
        (0, GB, 0.98, "flat"),
        (1, GB, 0.98, "flat"),
        (EXACT_ITEMS, GB, 0.98, "flat"),
        (EXACT_ITEMS + 1, GB, 0.98, "ivf-pq"),
        (1_000_000, 4 * GB, 0.98, "ivf-pq"),
        (1_000_000, 500_000_000, 0.98, "ivf-pq"),
        (1_000_000, 400_000_000, 0.98, "ivf-rabitq"),
        (100_000_000, 16 * GB, 0.98, "ivf-pq"),
        (100_000_000, 12 * GB, 0.98, "ivf-rabitq"),
        (100_000_000, 6 * GB, 0.98, "ivf-rabitq"),
        (1_000_000, 4 * GB, 1, "flat"),
    ],
)
def test_plan_is_the_fastest_kind_that_fits(
    num_items: int, memory_bytes: int, recall: float, kind: str
) -> None:
    plan = plan_index(num_items, 512, memory_bytes, recall)
    assert plan.kind == kind
    assert plan.build_bytes <= memory_bytes
    assert plan == plan_index(num_items, 512, memory_bytes, recall)  # pure
    assert kind in str(plan)
    assert plan.reason in str(plan)


def test_what_gpus_search_is_planned_where_it_fits() -> None:
    assert plan_index(1_000_000, 512, GB, on_gpus=True).kind == "ivf-sq8"
    assert plan_index(1_000_000, 512, 500_000_000, on_gpus=True).kind == "ivf-pq"
    assert plan_index(EXACT_ITEMS, 512, GB, on_gpus=True).kind == "flat"


def test_compressed_index_takes_at_most_a_third_of_the_float32_vectors() -> None:
    for kind in ("ivf-sq8", "ivf-pq", "ivf-rabitq"):
        plan = plan_of_kind(kind, 1_000_000, 512)
        assert plan.memory_bytes <= 0.35 * 1_000_000 * 512 * 4


def test_index_larger_than_the_memory_is_planned_where_it_can_be_built() -> None:
    plan = plan_index(100_000_000, 512, 6 * GB)
    assert plan.build_bytes <= 6 * GB < plan.memory_bytes
    assert "searched from the disk" in plan.reason
    with pytest.raises(CollectionError, match=r"to build even as ivf-rabitq"):
        plan_index(100_000_000, 512, plan.build_bytes - 1)


def test_streamed_building_takes_a_share_of_the_index_that_falls_with_its_size() -> None:
    plans = [plan_of_kind("ivf-sq8", count, 512) for count in (10**6, 10**7, 10**8)]
    shares = [plan.build_bytes / plan.memory_bytes for plan in plans]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] < 1
    assert shares[-1] < 0.1


@pytest.mark.parametrize("recall", [0.98, 1])
def test_too_little_memory_is_an_error_that_says_how_much_is_needed(recall: float) -> None:
    with pytest.raises(CollectionError, match=r"takes [\d,]+ MB .*, and 50 MB are allowed"):
        plan_index(1_000_000, 512, 50_000_000, recall)


@pytest.mark.parametrize("recall", [0, -1, 1.01, float("nan")])
def test_senseless_recall_is_an_error(recall: float) -> None:
    with pytest.raises(CollectionError, match="expected a share above 0"):
        plan_index(10, 512, GB, recall)


@pytest.mark.parametrize("num_items", [1, 31, 32, 1_000, 10**6, 10**9])
def test_lists_have_enough_vectors_to_be_trained(num_items: int) -> None:
    lists = num_lists_for(num_items)
    assert 1 <= lists <= max(1, num_items // 32)
    for kind in KINDS:
        assert plan_of_kind(kind, num_items, 8).num_training <= num_items


@pytest.mark.parametrize(
    ("kind", "covered", "new", "gone", "expected"),
    [
        ("flat", 6, 999, 0, "keep"),
        ("flat", 6, 1_000, 0, "build"),
        ("ivf-sq8", 1_000_000, 1_000, 0, "keep"),
        ("ivf-sq8", 1_000_000, 5_000, 5_000, "extend"),
        ("ivf-sq8", 1_000_000, 900_000, 0, "extend"),
        ("ivf-sq8", 1_000_000, 1_000_001, 0, "build"),
        ("ivf-sq8", 1_000_000, 0, 200_001, "build"),
        ("hnsw", 100_000, 1_000, 0, "build"),
    ],
)
def test_upkeep(kind: str, covered: int, new: int, gone: int, expected: str) -> None:
    decision = plan_upkeep(
        kind,  # type: ignore[arg-type]
        num_trained=covered,
        num_covered=covered,
        num_new=new,
        num_gone=gone,
    )
    assert decision == expected
