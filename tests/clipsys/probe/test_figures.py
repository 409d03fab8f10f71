"""What follows from figures, for each kind of machine that was met."""

from __future__ import annotations

import json

import pytest

from clipsys.inference.threads import Arrangement
from clipsys.probe.figures import (
    Figures,
    acceptable,
    choose_arrangement,
    choose_precision,
)

#: GFLOP/s a core: an Intel Xeon with AMX, one with VNNI alone, an AMD EPYC with AVX512-BF16 and
#: without AMX, and a processor with none of them.
AMX = {"fp32": 90.0, "bf16": 700.0, "int8": 600.0}
VNNI = {"fp32": 100.0, "bf16": 50.0, "int8": 290.0}
AVX512_BF16 = {"fp32": 88.0, "bf16": 378.0, "int8": 640.0}
PLAIN = {"fp32": 40.0, "bf16": 0.5}


@pytest.mark.parametrize(
    ("gflops", "auto", "fast"),
    [
        (AMX, "bf16", "bf16"),
        (VNNI, "fp32", "int8"),
        (AVX512_BF16, "bf16", "int8"),
        (PLAIN, "fp32", "fp32"),
    ],
)
def test_each_kind_of_machine_gets_what_it_is_fast_at(
    gflops: dict[str, float], auto: str, fast: str
) -> None:
    floats = {name: rate for name, rate in gflops.items() if name != "int8"}
    assert choose_precision(floats) == auto
    assert choose_precision(gflops) == fast


@pytest.mark.parametrize(
    ("gflops", "expected"),
    [
        ({"fp32": 100.0, "bf16": 110.0}, "fp32"),
        ({"fp32": 100.0, "bf16": 120.0}, "bf16"),
        ({"fp32": 100.0, "bf16": 300.0, "int8": 330.0}, "bf16"),
        ({"fp32": 100.0, "bf16": 300.0, "int8": 360.0}, "int8"),
        ({"fp32": 100.0}, "fp32"),
    ],
)
def test_fewer_bits_must_be_faster_by_more_than_the_noise(
    gflops: dict[str, float], expected: str
) -> None:
    assert choose_precision(gflops) == expected


def test_what_takes_the_place_of_a_refused_precision_is_the_next_one_that_pays() -> None:
    assert acceptable(AVX512_BF16) == ("int8", "bf16", "fp32")
    assert acceptable(VNNI) == ("int8", "fp32")
    assert acceptable(AMX) == ("bf16", "int8", "fp32")
    assert acceptable(PLAIN) == ("fp32",)


def test_threads_are_as_usual_unless_others_are_clearly_faster() -> None:
    apart, shared, one = Arrangement(4, apart=True), Arrangement(4), Arrangement(1)
    assert choose_arrangement([(apart, 100.0), (shared, 108.0), (one, 30.0)]) == apart
    assert choose_arrangement([(apart, 100.0), (shared, 130.0), (one, 30.0)]) == shared
    assert choose_arrangement([(shared, 10.0), (one, 90.0)]) == one
    assert choose_arrangement([(one, 1.0)]) == one


def _figures(**changes: object) -> Figures:
    values: dict[str, object] = {
        "gflops": {"fp32": 87.5, "bf16": 378.5},
        "precision": "bf16",
        "arrangements": ((Arrangement(2), 7.25), (Arrangement(1), 3.0)),
        "arrangement": Arrangement(2),
    }
    return Figures(**{**values, **changes})  # type: ignore[arg-type]


def test_figures_are_said_in_one_line() -> None:
    text = "fp32: 88, bf16: 378 GFLOP/s a core; bf16 is used"
    assert str(_figures(arrangements=())) == text
    threads = "2 threads: 7.2, 1 thread: 3.0; 2 threads are used"
    assert str(_figures()) == f"{text}; {threads}"
    alone = _figures(arrangement=Arrangement(1))
    assert str(alone).endswith("; 1 thread is used")


def test_figures_are_read_back_as_they_were_written() -> None:
    figures = _figures()
    assert Figures.from_json(json.loads(json.dumps(figures.to_json()))) == figures


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int4"},
        {"gflops": {"fp32": "fast"}},
        {"arrangement": {"threads": 0, "apart": False}},
        {"arrangement": {"threads": "2", "apart": False}},
        {"arrangements": 3},
    ],
)
def test_what_is_not_figures_is_refused(change: dict[str, object]) -> None:
    document = {**json.loads(json.dumps(_figures().to_json())), **change}
    with pytest.raises((ValueError, TypeError, KeyError)):
        Figures.from_json(document)
