"""What is timed, with real kernels on small shapes; how long it takes, by a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clipsys.inference import int8
from clipsys.inference.threads import Arrangement
from clipsys.probe import measuring
from clipsys.probe.figures import Figures
from clipsys.probe.measuring import Conditions, computation, measure
from clipsys.probe.products import Product

LINEAR = Product((64, 32), (32, 48), count=12)
ATTENTION = Product((6, 16, 8), (6, 8, 16), count=12)
CONVOLUTION = Product((4, 3, 16, 16), (8, 3, 3, 3), ((2, 2), (1, 1), (1, 1), 1))
ALONE = (Arrangement(1),)
BOTH = (Arrangement(2, apart=True), Arrangement(2), Arrangement(1))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("product", [LINEAR, ATTENTION, CONVOLUTION])
def test_every_kind_of_product_runs_in_every_precision(
    product: Product, precision: str, trains: bool
) -> None:
    conditions = Conditions(("fp32", "bf16"), ALONE, trains, channels_last=True)
    seen: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("mm", "bmm", "linear") or "conv" in name:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    call = computation(product, precision, conditions)
    with Watch():
        call()
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(seen) == {expected}


@pytest.mark.skipif(not int8.is_fast(), reason="this processor has no VNNI")
def test_int8_is_for_weights_and_the_rest_stays_in_float32() -> None:
    conditions = Conditions(("fp32", "int8"), ALONE)
    for product in (LINEAR, ATTENTION, CONVOLUTION):
        computation(product, "int8", conditions)()


def test_measuring_leaves_threads_and_random_numbers_as_they_were() -> None:
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    figures = measure(
        [LINEAR, ATTENTION, CONVOLUTION], Conditions(("fp32", "bf16"), BOTH), budget_s=0.05
    )
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert set(figures.gflops) == {"fp32", "bf16"}
    assert all(rate >= 0 for rate in figures.gflops.values())
    assert figures.arrangement in BOTH
    assert figures.busy or [one for one, _ in figures.arrangements] == list(BOTH)


class _Machine:
    """A machine whose time passes as its rates say, and not otherwise."""

    def __init__(self, gflops: dict[str, float], waiting_share: float = 0.0) -> None:
        self.gflops = gflops
        self.waiting_share = waiting_share
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def waiting_s(self) -> float:
        return self.now * self.waiting_share

    def computation(
        self, product: Product, precision: str, conditions: Conditions
    ) -> Callable[[], None]:
        def call() -> None:
            self.now += conditions.flops(product) / self.gflops[precision] / 1e9

        return call

    def measure(
        self, monkeypatch: pytest.MonkeyPatch, *, trains: bool = False, arrangements=ALONE
    ) -> Figures:
        monkeypatch.setattr(measuring, "computation", self.computation)
        products = [Product((3200, 768), (768, 768 * width)) for width in range(1, 13)]
        conditions = Conditions(tuple(self.gflops), arrangements, trains)
        return measure(
            products, conditions, clock=self.clock, stopwatch=self.clock, waiting_s=self.waiting_s
        )


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    ("gflops", "chosen"),
    [
        ({"fp32": 90.0, "bf16": 700.0, "int8": 600.0}, "bf16"),
        ({"fp32": 100.0, "bf16": 50.0, "int8": 290.0}, "int8"),
        ({"fp32": 88.0, "bf16": 378.0}, "bf16"),
        ({"fp32": 10.0, "bf16": 1.0}, "fp32"),
    ],
)
def test_rates_are_those_of_the_machine_and_the_budget_is_kept(
    gflops: dict[str, float], chosen: str, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = _Machine(gflops)
    figures = machine.measure(monkeypatch, trains=trains)
    assert figures.precision == chosen
    assert figures.gflops == pytest.approx(gflops, rel=1e-3)
    # Beside the budget: the small product in a precision that the machine hardly knows.
    assert machine.now <= 0.5 + 2 * (3 if trains else 1) * 0.0084 / min(gflops.values())


def test_what_threads_did_on_a_busy_machine_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arrangements = (Arrangement(2), Arrangement(1))
    rates = {"fp32": 80.0, "bf16": 300.0}
    quiet = _Machine(rates).measure(monkeypatch, arrangements=arrangements)
    assert [one for one, _ in quiet.arrangements] == list(arrangements)
    machine = _Machine(rates, waiting_share=0.4)
    figures = machine.measure(monkeypatch, arrangements=arrangements)
    assert figures.busy and not quiet.busy
    assert figures.precision == "bf16"
    assert figures.arrangements == ()
    assert figures.arrangement == arrangements[0]
