"""Few-shot probes: a classifier trained on 1, 2, 4, … images of each class.

Legend of shapes: N training images, M test images, S seeds, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clipsys.errors import DataError
from clipsys.evaluation.metrics.classification import predictions
from clipsys.evaluation.resampling import mean_intervals
from clipsys.evaluation.results import CurveDetails, Figure, Integers, Outcomes, Result
from clipsys.evaluation.tasks.probes import (
    ProbeSettings,
    count_images,
    fit_probe,
    majority_chance,
    train_and_test,
)
from clipsys.evaluation.tasks.splitting import LabelledVectors, class_targets, listed

_logger = logging.getLogger(__name__)


def few_shot_result(
    train: LabelledVectors,
    test: LabelledVectors | None = None,
    settings: ProbeSettings = ProbeSettings(),
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: int = 5,
    model: str = "",
    data: str = "",
) -> Result:
    """Trains on a few images of each class, several times, and tests on the same test data.

    ``4_shots/accuracy@1`` is the mean over the seeds, with the bootstrap interval over test images;
    ``4_shots/seed_std_accuracy@1`` the standard deviation over the seeds.

    Raises:
        DataError: as `probe_result`; or a class has fewer images than the smallest of ``shots``.
            Larger shots that a class has too few images for are left out, with a warning.
    """
    name = data or "the data"
    train, test, described = train_and_test(train, test, seed=settings.seed, name=name)
    classes, train_N, test_M = class_targets(train, test, name)
    groups_N, units_M = train.groups(), test.groups()
    usable = _usable_shots(shots, train_N, groups_N, classes, name)
    chance = majority_chance(train_N, test_M)
    figures: dict[str, Figure] = {}
    outcomes: dict[str, Outcomes] = {}
    line: list[tuple[float, Figure]] = []
    for count in usable:
        right_SM = np.empty((seeds, len(test)))
        for seed in range(seeds):
            own = replace(settings, seed=settings.seed + seed)
            chosen = draw_shots(train_N, groups_N, count, seed=own.seed)
            fitted = fit_probe(train.take(chosen), train_N[chosen], len(classes), own)
            found = predictions(fitted.score(test.vectors_ND), test_M, classes)
            right_SM[seed] = found.ranks_N == 0
        value_M = right_SM.mean(axis=0)
        interval = mean_intervals({"": value_M}, units_M)[""]
        figure = Figure(float(value_M.mean()), len(test), interval, chance)
        prefix = f"{count}_shot" + "s" * (count > 1)
        figures[f"{prefix}/accuracy@1"] = figure
        spread = float(right_SM.mean(axis=1).std(ddof=1)) if seeds > 1 else 0.0
        figures[f"{prefix}/seed_std_accuracy@1"] = Figure(spread, seeds)
        outcomes[prefix] = Outcomes(list(test.uris), units_M, {"accuracy@1": value_M})
        line.append((float(count), figure))
    return Result(
        task="probe",
        variant=f"{settings.kind}, few shots",
        model=model,
        data=data,
        protocol=f"{settings.kind} on a few images of each class, mean over {seeds} seeds from "
        f"{settings.seed}; {described}",
        figures=figures,
        counts=count_images(len(classes), len(train), len(test)) | {"seeds": seeds},
        outcomes=outcomes,
        details=CurveDetails("shots", "accuracy@1", {settings.kind: line}),
    )


def draw_shots(targets_N: Integers, groups_N: Integers, count: int, *, seed: int) -> Integers:
    """Positions of ``count`` images of each class, one of a group, ascending.

    The images of fewer shots are among those of more, at one seed.
    """
    order_N = np.random.default_rng(seed).permutation(len(targets_N))
    taken: dict[int, set[int]] = {}
    chosen = []
    for position in order_N:
        own = taken.setdefault(int(targets_N[position]), set())
        if len(own) < count and int(groups_N[position]) not in own:
            own.add(int(groups_N[position]))
            chosen.append(position)
    return np.sort(np.array(chosen, np.int64))


def _usable_shots(
    shots: Sequence[int],
    train_N: Integers,
    groups_N: Integers,
    classes: Sequence[str],
    name: str,
) -> list[int]:
    """The shots that every class has enough training images for, ascending."""
    pairs = np.unique(np.stack([train_N, groups_N]), axis=1)
    available_C = np.bincount(pairs[0], minlength=len(classes))
    wanted = sorted(set(shots))
    usable = [count for count in wanted if count <= available_C.min()]
    if len(usable) == len(wanted):
        return usable
    first = wanted[len(usable)]
    short = [classes[int(number)] for number in np.flatnonzero(available_C < first)]
    said = f"{name}: {listed(short)}: fewer than {first} different training images"
    if not usable:
        raise DataError(f"{said}, the smallest of the shots; add images or leave the class out")
    _logger.warning("%s; %s shots are left out", said, ", ".join(map(str, wanted[len(usable) :])))
    return usable
