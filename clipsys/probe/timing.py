"""Medians of alternating rounds within a budget of time.

Candidates take turns, so that whatever else the machine does meets all of them alike; the median
leaves out the rounds that it disturbed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Clock = Callable[[], float]
#: More rounds than this tell nothing new.
_MAX_ROUNDS = 9
#: Share of the budget that may have been used when another operation is begun in the first round.
_FIRST_ROUND_SHARE = 1 / 3


def time_in_turn(
    operations: Sequence[Mapping[str, Callable[[], object]]],
    *,
    until: float,
    clock: Clock = time.perf_counter,
    stopwatch: Clock | None = None,
) -> list[dict[str, float]]:
    """Median seconds of every candidate for the operations that the budget has room for.

    The first round warms up and is not counted: kernels are compiled and memory is touched in it.
    It ends early rather than taking more than a third of the budget; operations come in the order
    of their importance, and those that it did not reach have no figure. Later rounds are begun only
    while one as long as the longest before would still end in time. One always is.

    Args:
        operations: for each, what is to be timed, by the name of the candidate.
        until: the time by the clock when everything is to be finished.
        clock: seconds; another one in tests.
        stopwatch: times operations; default the clock. ``time.thread_time`` does not
            count what other processes took from one that works on this thread alone.
    """
    stopwatch = stopwatch or clock
    first_round_until = clock() + (until - clock()) * _FIRST_ROUND_SHARE
    reached: list[Mapping[str, Callable[[], object]]] = []
    for operation in operations:
        if reached and clock() > first_round_until:
            break
        for call in operation.values():
            call()
        reached.append(operation)
    seconds: list[dict[str, list[float]]] = [{name: [] for name in one} for one in reached]
    longest = 0.0
    for number in range(_MAX_ROUNDS):
        began = clock()
        if number and began + longest > until:
            break
        for operation, own in zip(reached, seconds, strict=True):
            for name, call in operation.items():
                before = stopwatch()
                call()
                own[name].append(stopwatch() - before)
        longest = max(longest, clock() - began)
    return [{name: statistics.median(own) for name, own in one.items()} for one in seconds]
