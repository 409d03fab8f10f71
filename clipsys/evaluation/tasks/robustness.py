"""Robustness: a task measured again on corrupted images, or with wrong training labels.

    measure(None) ----------> clean --.
    measure(jpeg, severity 1) -> point -+--> mean over the points, drop from clean, curves
    measure(jpeg, severity 2) -> point -'

Means and drops are paired: the interval is that of the difference image by image.

Legend of shapes: N images or queries of the task, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corruptions_of
from clipsys.evaluation.resampling import mean_intervals, statistic_intervals
from clipsys.evaluation.results import (
    CurveDetails,
    Doubles,
    Figure,
    Integers,
    Outcomes,
    Result,
)
from clipsys.evaluation.tasks.probes import (
    ProbeSettings,
    count_images,
    fit_probe,
    score_probe,
    train_and_test,
)
from clipsys.evaluation.tasks.splitting import LabelledVectors, class_targets

#: Shares of wrong training labels.
LABEL_NOISE = (0.0, 0.1, 0.2, 0.4)
#: Figures that stand for a task, the first that it has.
_MAIN = ("accuracy@1", "text_to_image/recall@1", "image_to_text/recall@1")


@dataclass(frozen=True)
class _Point:
    """One figure of one result, and what it is the mean of (None: it is no mean)."""

    figure: Figure
    outcomes: Outcomes | None


def robustness_result(
    measure: Callable[[Corruption | None], Result],
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    *,
    figure: str | None = None,
) -> Result:
    """Measures a task on clean and on corrupted images.

    Figures, where ``figure`` is ``accuracy@1``: ``clean/accuracy@1``, ``mean/accuracy@1`` (over all
    corruptions and severities), ``drop/accuracy@1`` (clean minus mean), ``relative_drop/…`` (the
    drop as a share of clean), ``jpeg/accuracy@1`` (mean over the severities) and
    ``jpeg/3/accuracy@1``.

    Args:
        measure: measures the task with the images corrupted; None: as they are.
        corruptions: names of `clipsys.evaluation.corruptions.CORRUPTIONS`.
        severities: of 1 to 5.
        figure: which figure of the task; default its accuracy, or its recall@1.

    Raises:
        ConfigError: there is no such corruption, severity or figure.
    """
    chosen = [one for one in corruptions_of(corruptions, severities) if one.severity]
    clean = measure(None)
    name = figure or _main_figure(clean)
    first = _point(clean, name)
    lines: dict[str, dict[float, _Point]] = {}
    for corruption in chosen:
        point = _point(measure(corruption), name)
        lines.setdefault(corruption.name, {})[float(corruption.severity)] = point
    levels = sorted({one.severity for one in chosen})
    return _curves(
        clean,
        name,
        first,
        lines,
        axis="severity",
        protocol=f"corruptions as ImageNet-C defines them (rotation is not one of its own): "
        f"{', '.join(lines)}; severity {', '.join(map(str, levels))}, after resize and crop; "
        f"{clean.protocol}",
    )


def label_noise_result(
    train: LabelledVectors,
    test: LabelledVectors | None = None,
    settings: ProbeSettings = ProbeSettings(),
    *,
    shares: Sequence[float] = LABEL_NOISE,
    model: str = "",
    data: str = "",
) -> Result:
    """Trains a probe with a share of wrong labels, and tests it with the right ones.

    Figures are named as in `robustness_result`, with the line ``label_noise`` and the share for
    the severity: ``label_noise/0.2/accuracy@1``. The images whose labels are wrong at one share are
    among those at a larger one.

    Raises:
        ConfigError: a share is not between 0 and 1, or there is none above 0.
        DataError: as `clipsys.evaluation.tasks.probes.probe_result`.
    """
    wrong = sorted({share for share in shares if share != 0})
    if not wrong or wrong[0] < 0 or wrong[-1] > 1:
        raise ConfigError(
            f"label noise {', '.join(f'{share:g}' for share in shares)}: shares of wrong labels "
            "lie above 0, up to 1"
        )
    name = data or "the data"
    train, test, described = train_and_test(train, test, seed=settings.seed, name=name)
    classes, train_N, test_M = class_targets(train, test, name)

    def measured(share: float) -> Result:
        noisy_N = wrong_labels(train_N, len(classes), share, seed=settings.seed)
        fitted = fit_probe(train, noisy_N, len(classes), settings)
        scored = score_probe(fitted, train_N, test, test_M, classes, settings.kind)
        return Result(
            task="probe",
            variant=f"{settings.kind}, label noise",
            model=model,
            data=data,
            protocol=f"{fitted.described}; {described}",
            figures=scored.figures,
            counts=count_images(len(classes), len(train), len(test)),
            outcomes={"": scored.outcomes},
        )

    clean = measured(0.0)
    line = {share: _point(measured(share), "accuracy@1") for share in wrong}
    return _curves(
        clean,
        "accuracy@1",
        _point(clean, "accuracy@1"),
        {"label_noise": line},
        axis="share of wrong training labels",
        protocol=f"training labels replaced by other classes at random (seed {settings.seed}); "
        f"{clean.protocol}",
    )


def wrong_labels(targets_N: Integers, num_classes: int, share: float, *, seed: int) -> Integers:
    """Labels of which ``share`` (rounded) are wrong: each another class, all equally likely."""
    random = np.random.default_rng(seed)
    order_N = random.permutation(len(targets_N))
    shift_N = random.integers(1, num_classes, len(targets_N))
    chosen = order_N[: round(share * len(targets_N))]
    noisy_N = targets_N.copy()
    noisy_N[chosen] = (noisy_N[chosen] + shift_N[chosen]) % num_classes
    return noisy_N


def _curves(
    clean: Result,
    name: str,
    first: _Point,
    lines: Mapping[str, Mapping[float, _Point]],
    *,
    axis: str,
    protocol: str,
) -> Result:
    figures: dict[str, Figure] = {f"clean/{name}": first.figure}
    outcomes: dict[str, Outcomes] = {}
    every = [point for line in lines.values() for point in line.values()]
    means = {"mean": every} | {line: list(points.values()) for line, points in lines.items()}
    _keep(outcomes, f"clean/{name}", first.outcomes)
    for line, points in means.items():
        value = float(np.mean([point.figure.value for point in points]))
        interval = None
        averaged = _averaged(points, first)
        if averaged is not None:
            interval = mean_intervals(averaged.values, averaged.units_N)[name]
        figures[f"{line}/{name}"] = Figure(
            value, first.figure.samples, interval, first.figure.chance
        )
        _keep(outcomes, f"{line}/{name}", averaged)
        if line == "mean":
            figures |= _drops(name, first, value, averaged)
    for line, curve in lines.items():
        figures |= {f"{line}/{place:g}/{name}": point.figure for place, point in curve.items()}
    return Result(
        task="robustness",
        variant=clean.variant if clean.task == "probe" and clean.variant else clean.task,
        model=clean.model,
        data=clean.data,
        protocol=protocol,
        figures=figures,
        counts=clean.counts,
        outcomes=outcomes,
        details=CurveDetails(
            axis,
            name,
            {
                line: [(0.0, first.figure), *((at, curve[at].figure) for at in sorted(curve))]
                for line, curve in lines.items()
            },
        ),
    )


def _drops(
    name: str,
    first: _Point,
    mean: float,
    averaged: Outcomes | None,
) -> dict[str, Figure]:
    clean, samples = first.figure.value, first.figure.samples
    drop, relative = clean - mean, (clean - mean) / clean if clean else 0.0
    own_interval: tuple[float, float] | None = None
    share_interval: tuple[float, float] | None = None
    if first.outcomes is not None and averaged is not None:
        clean_N, units_N = first.outcomes.values[name], first.outcomes.units_N
        lost_N = clean_N - averaged.values[name]
        own_interval = mean_intervals({name: lost_N}, units_N)[name]
        lost_U, clean_U = np.bincount(units_N, lost_N), np.bincount(units_N, clean_N)

        def share(weights_U: npt.NDArray[np.int32]) -> dict[str, float]:
            whole = float(weights_U @ clean_U)
            return {name: float(weights_U @ lost_U) / whole if whole else 0.0}

        share_interval = statistic_intervals(share, len(lost_U))[name]
    return {
        f"drop/{name}": Figure(drop, samples, own_interval),
        f"relative_drop/{name}": Figure(relative, samples, share_interval),
    }


def _averaged(points: Iterable[_Point], first: _Point) -> Outcomes | None:
    """The mean outcome of each sample over the points."""
    if first.outcomes is None:
        return None
    (name,) = first.outcomes.values
    values: list[Doubles] = []
    for point in points:
        if point.outcomes is None or point.outcomes.keys != first.outcomes.keys:
            raise DataError(
                "the clean and the corrupted measurement are of different images, so they cannot "
                "be paired"
            )
        values.append(point.outcomes.values[name])
    mean_N: Doubles = np.mean(values, axis=0)
    return Outcomes(first.outcomes.keys, first.outcomes.units_N, {name: mean_N})


def _keep(outcomes: dict[str, Outcomes], name: str, own: Outcomes | None) -> None:
    """Files outcomes under the prefix of their figure, named as the rest of it."""
    if own is not None:
        prefix, _, last = name.rpartition("/")
        (value_N,) = own.values.values()
        outcomes[prefix] = Outcomes(own.keys, own.units_N, {last: value_N})


def _main_figure(result: Result) -> str:
    return next((name for name in _MAIN if name in result.figures), next(iter(result.figures)))


def _point(result: Result, name: str) -> _Point:
    """One figure with its outcomes; the rest of the result can go.

    Raises:
        ConfigError: the task has no such figure.
    """
    if name not in result.figures:
        raise ConfigError(
            f"{name!r} is not a figure of {result.task}; choose from {', '.join(result.figures)}"
        )
    prefix, _, last = name.rpartition("/")
    held = result.outcomes.get(prefix)
    if held is None or not {last, name} & set(held.values):
        return _Point(result.figures[name], None)
    value_N = held.values[last if last in held.values else name]
    return _Point(result.figures[name], Outcomes(held.keys, held.units_N, {name: value_N}))
