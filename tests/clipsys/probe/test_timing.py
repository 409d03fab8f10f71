"""The budget, by a clock that only the timed calls move."""

from __future__ import annotations

import pytest

from clipsys.probe.timing import time_in_turn


class _Clock:
    """Seconds that pass while operations run, and no others."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float):
        """An operation whose calls take these seconds; the last one for ever."""
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_candidates_take_turns_and_the_first_round_does_not_count() -> None:
    clock = _Clock()
    operations = [{"a": clock.takes("a", 0.5, 0.01), "b": clock.takes("b", 0.3, 0.02)}]
    (seconds,) = time_in_turn(operations, until=clock.now + 10, clock=clock)
    assert seconds == pytest.approx({"a": 0.01, "b": 0.02})
    assert clock.order == ["a", "b"] * 10


def test_the_median_leaves_out_rounds_that_were_disturbed() -> None:
    clock = _Clock()
    operations = [{"a": clock.takes("a", 0.01, 0.01, 0.2, 0.01)}]
    (seconds,) = time_in_turn(operations, until=clock.now + 10, clock=clock)
    assert seconds == pytest.approx({"a": 0.01})


@pytest.mark.parametrize("each_s", [0.001, 0.01, 0.03])
def test_the_budget_is_kept(each_s: float) -> None:
    clock = _Clock()
    operations = [{"a": clock.takes("a", each_s), "b": clock.takes("b", each_s)} for _ in range(8)]
    seconds = time_in_turn(operations, until=100.3, clock=clock)
    # At worst one operation is begun when a third has passed, and one more round is taken.
    assert clock.now <= max(100.3, 100 + 2 * (0.1 + 2 * each_s)) + 1e-9
    assert 1 <= len(seconds) <= 8


def test_a_machine_that_is_too_slow_measures_the_most_important_once() -> None:
    clock = _Clock()
    operations = [{"a": clock.takes(f"{number}", 5.0)} for number in range(8)]
    assert time_in_turn(operations, until=clock.now + 0.3, clock=clock) == [{"a": 5.0}]
    assert clock.order == ["0", "0"]


def test_what_others_took_counts_for_the_budget_and_not_for_the_operation() -> None:
    clock = _Clock()
    call = clock.takes("a", 0.2)
    (seconds,) = time_in_turn(
        [{"a": call}], until=clock.now + 1.05, clock=clock, stopwatch=lambda: clock.now / 10
    )
    assert seconds == pytest.approx({"a": 0.02})
    assert len(clock.order) == 5
