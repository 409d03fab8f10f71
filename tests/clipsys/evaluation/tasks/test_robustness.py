from __future__ import annotations

import numpy as np
import pytest

from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.corruptions import Corruption
from clipsys.evaluation.results import CurveDetails, Figure, Outcomes, Result
from clipsys.evaluation.tasks.probes import ProbeSettings, probe_result
from clipsys.evaluation.tasks.robustness import (
    label_noise_result,
    robustness_result,
    wrong_labels,
)
from tests.clipsys.evaluation.tasks.data import clusters

KEYS = [f"{number}.png" for number in range(200)]
RANDOM = np.random.default_rng(0)
DIFFICULTY = RANDOM.random(200)


def measured(corruption: Corruption | None, prefix: str = "") -> Result:
    """A task that fails the more images, the higher the severity; jpeg is the easier one."""
    lost = 0.1
    if corruption is not None:
        lost += 0.1 * corruption.severity / (2 if corruption.name == "jpeg" else 1)
    right = (lost <= DIFFICULTY).astype(float)
    name = f"{prefix}/recall@1" if prefix else "accuracy@1"
    values = {name.rpartition("/")[2]: right}
    return Result(
        task="zeroshot",
        model="m",
        data="d",
        protocol="p",
        figures={name: Figure(float(right.mean()), 200, (0.0, 1.0), 0.1)},
        counts={"images": 200},
        outcomes={prefix: Outcomes(KEYS, np.arange(200), values)},
    )


def test_figures_are_means_and_drops_of_the_points() -> None:
    result = robustness_result(measured, ["jpeg", "contrast"], [1, 5])
    value = {name: figure.value for name, figure in result.figures.items()}
    points = {
        (name, severity): measured(Corruption(name, severity)).figures["accuracy@1"]
        for name in ("jpeg", "contrast")
        for severity in (1, 5)
    }
    clean = measured(None).figures["accuracy@1"].value
    mean = float(np.mean([figure.value for figure in points.values()]))
    assert value["clean/accuracy@1"] == clean
    assert value["mean/accuracy@1"] == pytest.approx(mean)
    assert value["drop/accuracy@1"] == pytest.approx(clean - mean)
    assert value["relative_drop/accuracy@1"] == pytest.approx((clean - mean) / clean)
    jpeg = (points["jpeg", 1].value + points["jpeg", 5].value) / 2
    assert value["jpeg/accuracy@1"] == pytest.approx(jpeg)
    assert result.figures["jpeg/5/accuracy@1"] == points["jpeg", 5]
    assert isinstance(result.details, CurveDetails)
    assert [place for place, _ in result.details.lines["contrast"]] == [0, 1, 5]
    assert result.metrics()["mean/chance_accuracy@1"] == 0.1
    assert (result.task, result.model, result.data) == ("robustness", "m", "d")
    # What two models' figures are compared by: each is the mean of its outcomes.
    for name in ("clean", "mean", "jpeg"):
        held = result.outcomes[name].values["accuracy@1"].mean()
        assert held == pytest.approx(value[f"{name}/accuracy@1"])


def test_the_interval_of_the_drop_is_paired() -> None:
    result = robustness_result(measured, ["contrast"], [3])
    clean = measured(None).outcomes[""].values["accuracy@1"]
    worse = measured(Corruption("contrast", 3)).outcomes[""].values["accuracy@1"]
    random = np.random.default_rng(5)
    rows = random.integers(200, size=(2000, 200))
    paired = np.percentile((clean - worse)[rows].mean(axis=1), (2.5, 97.5))
    assert result.figures["drop/accuracy@1"].interval == pytest.approx(paired, abs=0.012)
    share = np.percentile((clean - worse)[rows].sum(axis=1) / clean[rows].sum(axis=1), (2.5, 97.5))
    assert result.figures["relative_drop/accuracy@1"].interval == pytest.approx(share, abs=0.012)


def test_any_task_can_be_measured_by_any_of_its_figures() -> None:
    def retrieval(corruption: Corruption | None) -> Result:
        return measured(corruption, "text_to_image")

    result = robustness_result(retrieval, ["jpeg"], [2])
    assert "drop/text_to_image/recall@1" in result.figures
    assert result.figures["drop/text_to_image/recall@1"].interval is not None
    assert "mean/text_to_image" in result.outcomes
    with pytest.raises(ConfigError, match="'recall@3' is not a figure of zeroshot; choose from a"):
        robustness_result(measured, ["jpeg"], [1], figure="recall@3")
    with pytest.raises(ConfigError, match="'fog' is not a corruption"):
        robustness_result(measured, ["fog"], [1])


def test_a_figure_that_is_no_mean_has_no_paired_interval() -> None:
    def macro(corruption: Corruption | None) -> Result:
        return Result("zeroshot", "m", "d", "p", {"macro_f1": Figure(0.5, 10, (0.4, 0.6))})

    result = robustness_result(macro, ["jpeg"], [1, 2])
    assert result.figures["mean/macro_f1"] == Figure(0.5, 10)
    assert result.figures["jpeg/2/macro_f1"].interval == (0.4, 0.6)
    assert not result.outcomes


def test_measurements_of_different_images_are_not_paired() -> None:
    def other(corruption: Corruption | None) -> Result:
        return measured(None) if corruption is None else _renamed(measured(corruption))

    with pytest.raises(DataError, match="of different images"):
        robustness_result(other, ["jpeg"], [1])


def _renamed(result: Result) -> Result:
    held = result.outcomes[""]
    return Result(
        result.task,
        result.model,
        result.data,
        result.protocol,
        result.figures,
        outcomes={"": Outcomes([*held.keys[:-1], "other.png"], held.units_N, held.values)},
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_each_wrong_label_is_really_wrong_and_there_are_as_many_as_said(share: float) -> None:
    targets = np.arange(1000) % 5
    noisy = wrong_labels(targets, 5, share, seed=3)
    assert (noisy != targets).sum() == round(share * 1000)
    assert set(noisy) <= set(range(5))
    assert np.array_equal(noisy, wrong_labels(targets, 5, share, seed=3))
    if share == 1.0:
        pairs = np.zeros((5, 5), int)
        np.add.at(pairs, (targets, noisy), 1)
        assert pairs[~np.eye(5, dtype=bool)].min() > 25
        less = wrong_labels(targets, 5, 0.1, seed=3)
        assert np.array_equal(less[less != targets], noisy[less != targets])


def test_label_noise_is_a_curve_whose_clean_end_is_the_probe() -> None:
    train, test = clusters(120, noise=0.8), clusters(90, noise=0.8, seed=1)
    settings = ProbeSettings("knn", neighbours=3)
    result = label_noise_result(train, test, settings, shares=(0, 0.1, 0.6), data="d")
    clean = probe_result(train, test, settings)
    assert result.figures["clean/accuracy@1"] == clean.figures["accuracy@1"]
    assert result.figures["label_noise/0.6/accuracy@1"].value < clean.figures["accuracy@1"].value
    assert result.figures["drop/accuracy@1"].interval is not None
    assert isinstance(result.details, CurveDetails)
    assert [place for place, _ in result.details.lines["label_noise"]] == [0, 0.1, 0.6]
    assert "by other classes at random (seed 0)" in result.protocol
    for shares in ((0.0,), (-0.1,), (1.5,)):
        with pytest.raises(ConfigError, match="shares of wrong labels lie above 0, up to 1"):
            label_noise_result(train, test, settings, shares=shares)
