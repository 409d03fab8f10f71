"""When a probe measures, and when it does not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from clipsys.errors import ConfigError
from clipsys.inference.threads import Arrangement
from clipsys.models.open_clip_models import build_model
from clipsys.probe import machine, probing
from clipsys.probe.figures import Figures
from clipsys.probe.probing import Work, arrangements, probe, signature, usual_threads
from clipsys.probe.products import Product
from tests.conftest import TINY_MODEL

FIGURES = Figures({"fp32": 88.0, "bf16": 378.0}, "bf16", (), Arrangement(1))


class _Probe:
    """A probe whose measurement is counted instead of taken."""

    def __init__(self) -> None:
        self.measured = 0
        self.recorded = 0
        self.figures = FIGURES
        self.products: tuple[Product, ...] = (Product((2, 2), (2, 2)),)

    def measure(self, *arguments: object, **options: object) -> Figures:
        self.measured += 1
        return self.figures

    def record(self) -> tuple[Product, ...]:
        self.recorded += 1
        return self.products

    def __call__(self, signature: str = "tower", **options: object) -> Figures | None:
        return probe(Work("a tower", signature, self.record, **options))  # type: ignore[arg-type]


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Probe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CLIPSYS_PROBE")
    made = _Probe()
    monkeypatch.setattr(probing, "measure", made.measure)
    return made


def test_the_second_time_nothing_is_measured(
    tried: _Probe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert tried() == tried() == FIGURES
    assert (tried.measured, tried.recorded) == (1, 1)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(
        "a tower: fp32: 88, bf16: 378 GFLOP/s a core; bf16 is used (measured in "
    )
    assert second == "a tower: fp32: 88, bf16: 378 GFLOP/s a core; bf16 is used (measured before)"


def test_another_tower_machine_or_version_is_measured_again(
    tried: _Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried()
    tried("another")
    tried(trains=True)
    tried(precisions=("fp32", "bf16", "int8"))
    tried(channels_last=True)
    assert tried.measured == 5
    monkeypatch.setattr(torch, "__version__", "2.16.0")
    tried()
    monkeypatch.setattr(machine, "processor", lambda: "another")
    tried()
    monkeypatch.setattr("clipsys.__version__", "9")
    tried()
    assert tried.measured == 8
    tried()
    assert tried.measured == 8


def test_renew_measures_again_and_stores(tried: _Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    tried()
    monkeypatch.setenv("CLIPSYS_PROBE", "renew")
    tried.figures = Figures({"fp32": 90.0}, "fp32", (), Arrangement(1))
    assert tried() == tried.figures
    monkeypatch.delenv("CLIPSYS_PROBE")
    assert tried() == tried.figures
    assert tried.measured == 2


def test_off_measures_nothing_and_a_word_that_is_not_known_is_refused(
    tried: _Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPSYS_PROBE", "off")
    assert tried() is None
    assert tried.recorded == 0
    monkeypatch.setenv("CLIPSYS_PROBE", "of")
    with pytest.raises(ConfigError, match="CLIPSYS_PROBE is 'of'; expected off"):
        tried()


def test_what_a_busy_machine_shows_is_used_and_not_stored(
    tried: _Probe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried.figures = Figures({"fp32": 1.0, "bf16": 3.0}, "bf16", (), Arrangement(1), busy=True)
    with caplog.at_level(logging.INFO):
        assert tried() == tried()
    assert tried.measured == 2
    assert not list(tmp_path.rglob("*.json"))
    assert "the machine is busy, so threads are as usual and nothing is stored" in caplog.text


def test_a_tower_that_cannot_be_recorded_is_not_measured(
    tried: _Probe, caplog: pytest.LogCaptureFixture
) -> None:
    tried.products = ()
    with caplog.at_level(logging.INFO):
        assert tried() is None
    assert "fp32 (the products of a tower cannot be recorded)" in caplog.text
    assert tried.measured == 0


def test_a_signature_depends_on_shapes_alone() -> None:
    first, second = (build_model(TINY_MODEL).model for _ in range(2))
    wider = build_model({**TINY_MODEL, "embed_dim": 64}).model
    assert signature(first, 8) == signature(second, 8)
    assert len({signature(first, 8), signature(first, 9), signature(wider, 8)}) == 3


def test_a_number_of_threads_that_the_user_set_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(machine, "available_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert usual_threads() == 8
    assert arrangements(trains=True) == (Arrangement(8),)
    assert arrangements(trains=False) == (Arrangement(8, apart=True), Arrangement(8))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert usual_threads() == 6
    fewer = (Arrangement(3), Arrangement(1))
    assert arrangements(trains=True) == (Arrangement(6), *fewer)
    assert arrangements(trains=False) == (Arrangement(6, apart=True), Arrangement(6), *fewer)
    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    assert arrangements(trains=False) == arrangements(trains=True) == (Arrangement(1),)
