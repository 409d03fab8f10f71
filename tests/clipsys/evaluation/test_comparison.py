from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clipsys.errors import DataError
from clipsys.evaluation.comparison import compare
from clipsys.evaluation.results import ClassificationDetails, Result
from clipsys.evaluation.tasks.zeroshot import zeroshot_result


def _result(model: str, seed: int, width: int, signal: float, uris: list[str]) -> Result:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, len(uris))
    classes = np.linalg.qr(rng.normal(size=(width, 3)))[0].T.astype(np.float32)
    noise = np.random.default_rng(seed).normal(size=(len(uris), width))
    images = (classes[targets] * signal + noise / width**0.5).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    names = ["a", "b", "c"]
    labels = [names[target] for target in targets]
    return zeroshot_result(images, classes, names, labels, uris=uris, model=model, data="d")


URIS = [str(number) for number in range(120)]


def test_the_difference_is_that_of_the_figures_and_changes_are_named() -> None:
    first, second = _result("A", 1, 8, 0.5, URIS), _result("B", 2, 16, 1.0, URIS)
    found = compare(first, second)  # of different widths: outcomes are compared, not vectors
    one = found.differences["accuracy@1"]
    assert one.value == pytest.approx(
        second.figures["accuracy@1"].value - first.figures["accuracy@1"].value
    )
    assert one.interval is not None
    assert one.interval[0] < one.value < one.interval[1]
    assert len(found.changes) == one.only_first + one.only_second
    assert one.test.name.startswith("McNemar")
    changed = found.changes[0]
    assert (changed.first_label == changed.expected) == (changed.first == 1.0)
    assert found.document()["metrics"]["accuracy@1"]["samples"] == 120


def test_a_model_does_not_differ_from_itself() -> None:
    first = _result("A", 1, 8, 0.5, URIS)
    found = compare(first, first).differences["accuracy@1"]
    assert (found.value, found.interval, found.test.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_samples_are_paired_by_their_names() -> None:
    first = _result("A", 1, 8, 0.5, URIS)
    order = np.random.default_rng(0).permutation(120)
    ours = first.outcomes[""]
    values = {name: one[order] for name, one in ours.values.items()}
    turned = replace(ours, keys=[ours.keys[place] for place in order], values=values)
    second = replace(first, model="B", outcomes={"": turned}, details=None)
    assert compare(first, second).differences["accuracy@1"].value == 0.0
    assert compare(first, second).changes == []


def test_other_samples_protocols_and_tasks_are_refused() -> None:
    first = _result("A", 1, 8, 0.5, URIS)
    fewer = _result("B", 1, 8, 0.5, URIS[:100])
    with pytest.raises(DataError, match="has 120 samples, and B lacks 20 of them and has 0 others"):
        compare(first, fewer)
    with pytest.raises(DataError, match="measured differently: protocol"):
        compare(first, replace(first, protocol="another"))
    with pytest.raises(DataError, match="no outcomes of single samples"):
        compare(replace(first, outcomes={}), replace(first, outcomes={}))


def test_a_key_that_occurs_twice_is_paired_in_order() -> None:
    twice = [*URIS, *URIS]
    first = _result("A", 1, 8, 0.5, twice)
    found = compare(first, replace(first, model="B"))
    assert found.differences["accuracy@1"].samples == 240
    ours = first.outcomes[""]
    other = replace(ours, keys=[*URIS[:-1], "x", *URIS])
    with pytest.raises(DataError, match=r"B lacks 1 of them and has 1 others \('119' for example"):
        compare(first, replace(first, model="B", outcomes={"": other}))


def test_figures_over_classes_have_paired_intervals_and_tests() -> None:
    first, second = _result("A", 1, 8, 0.5, URIS), _result("B", 2, 16, 1.0, URIS)
    found = compare(first, second).differences
    for name in ("mean_class_accuracy", "macro_f1", "weighted_precision"):
        one = found[name]
        assert one.first == first.figures[name].value
        assert one.second == second.figures[name].value
        assert one.interval is not None
        assert one.interval[0] < one.value < one.interval[1]
    # Weighted recall is accuracy: the two ways to an interval, and two tests of one difference.
    ours, mean = found["weighted_recall"], found["accuracy@1"]
    assert ours.interval == pytest.approx(mean.interval, abs=1e-12)
    assert ours.test.p_value == pytest.approx(mean.test.p_value, abs=0.02)
    same = compare(first, first).differences["macro_f1"]
    assert (same.value, same.interval, same.test.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_interval_of_macro_f1_equals_a_direct_paired_bootstrap() -> None:
    from sklearn.metrics import f1_score

    first, second = _result("A", 1, 8, 0.5, URIS), _result("B", 2, 16, 1.0, URIS)
    ours, theirs = first.details, second.details
    assert isinstance(ours, ClassificationDetails)
    assert isinstance(theirs, ClassificationDetails)
    rng, direct = np.random.default_rng(5), []
    for _ in range(400):
        rows = rng.integers(0, 120, 120)
        scores = [
            f1_score(one.targets_N[rows], one.predicted_N[rows], average="macro")
            for one in (ours, theirs)
        ]
        direct.append(scores[1] - scores[0])
    interval = compare(first, second).differences["macro_f1"].interval
    assert interval == pytest.approx(tuple(np.percentile(direct, (2.5, 97.5))), abs=0.025)


def test_other_classes_and_other_right_classes_are_refused() -> None:
    first = _result("A", 1, 8, 0.5, URIS)
    details = first.details
    assert isinstance(details, ClassificationDetails)
    renamed = replace(first, model="B", details=replace(details, classes=["a", "b"]))
    with pytest.raises(DataError, match="differently: class 3 'c' and None"):
        compare(first, renamed)
    moved = replace(details, targets_N=(details.targets_N + 1) % 3)
    with pytest.raises(DataError, match="differently: right class of 0"):
        compare(first, replace(first, model="B", details=moved))
