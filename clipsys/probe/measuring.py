"""Times pieces of a tower's products in each precision, and in each arrangement of threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.inference.int8 import Int8Linear
from clipsys.inference.threads import Arrangement, limited_threads, single_threads
from clipsys.probe import machine
from clipsys.probe.figures import Figures, choose_arrangement, choose_precision
from clipsys.probe.products import Product, largest
from clipsys.probe.timing import Clock, time_in_turn

#: Seconds that a probe may take in all.
BUDGET_S = 0.5
#: Share of it for the precision; the rest is for the threads.
_PRECISION_SHARE = 0.6
#: Rounds that pieces are cut for: one warms up, and three have a median.
_ROUNDS = 4
#: Takes 0.1 ms or so, and says how large pieces may be and which precisions are hopeless: a
#: processor without instructions for one may be a hundred times slower in it.
_SMALL = Product((64, 256), (256, 256))
_SMALL_BUDGET_S = 0.02
_HOPELESS = 3.0
#: Share of the time that threads may have waited for cores; with more, what they did says nothing.
_BUSY_SHARE = 0.1
#: A backward pass takes two products for the one of the forward pass.
_TRAINING_COST = 3


@dataclass(frozen=True)
class Conditions:
    """How products are computed in the run.

    Attributes:
        precisions: precisions that may be chosen, ``fp32`` among them.
        arrangements: arrangements of threads that may be chosen, the usual one first.
        trains: forward and backward passes, or forward passes alone.
        channels_last: the layout of images that convolutions take.
    """

    precisions: tuple[str, ...]
    arrangements: tuple[Arrangement, ...]
    trains: bool = False
    channels_last: bool = False

    def flops(self, product: Product) -> int:
        """Operations of one such product, its gradients included where there are any."""
        return product.flops * (_TRAINING_COST if self.trains else 1)


def measure(
    products: Sequence[Product],
    conditions: Conditions,
    *,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
    stopwatch: Clock = time.thread_time,
    waiting_s: Clock = machine.waiting_s,
) -> Figures:
    """Times these products within a budget, and chooses.

    Precisions are compared on one thread, by its processor time. That is how images are encoded,
    and it can be measured on a machine that does something else as well: threads that share an
    operation wait for the one whose core is taken, which was measured to cost them nine tenths of
    their rate.

    Args:
        products: matrix products of the whole tower; not empty.
        conditions: how they are computed.
        budget_s: seconds for everything.
        clock: seconds; another one in tests.
        stopwatch: seconds of this thread's processor time; another one in tests.
        waiting_s: seconds that this process has waited for cores; another one in tests.
    """
    started, timer = clock(), Timer(conditions, clock, stopwatch)
    products = largest(products)
    with limited_threads(1):
        rates = timer.precisions(
            [_SMALL], [_SMALL], conditions.precisions, until=started + _SMALL_BUDGET_S
        )
        fastest = max(rates.values())
        hopeful = [one for one in rates if one == "fp32" or rates[one] * _HOPELESS > fastest]
        until = clock() + (budget_s - (clock() - started)) * _PRECISION_SHARE
        each_s = (until - clock()) / (_ROUNDS * len(products) * len(hopeful))
        share = each_s * rates["fp32"] * 1e9
        pieces = [one.cut(share * one.flops / conditions.flops(one)) for one in products]
        rates |= timer.precisions(products, pieces, hopeful, until=until)
        precision = choose_precision(rates)
        began, waited_s = clock(), waiting_s()
        tried = timer.arrangements(products, pieces, precision, until=started + budget_s)
        waited_s = waiting_s() - waited_s
    busy = waited_s > _BUSY_SHARE * (clock() - began)
    return Figures(
        gflops={name: round(rate, 1) for name, rate in rates.items()},
        precision=precision,
        arrangements=() if busy else tuple((one, round(rate, 1)) for one, rate in tried),
        arrangement=choose_arrangement(tried) if tried and not busy else conditions.arrangements[0],
        busy=busy,
    )


@dataclass(frozen=True)
class Timer:
    """Times pieces of products under some conditions."""

    conditions: Conditions
    clock: Clock
    stopwatch: Clock

    def precisions(
        self,
        products: Sequence[Product],
        pieces: Sequence[Product],
        names: Sequence[str],
        *,
        until: float,
    ) -> dict[str, float]:
        """GFLOP/s of each precision over the whole tower, on this thread alone."""
        operations = [
            {name: computation(piece, name, self.conditions) for name in names} for piece in pieces
        ]
        seconds = time_in_turn(operations, until=until, clock=self.clock, stopwatch=self.stopwatch)
        return {
            name: self._overall(products, pieces, [one[name] for one in seconds]) for name in names
        }

    def arrangements(
        self,
        products: Sequence[Product],
        pieces: Sequence[Product],
        precision: str,
        *,
        until: float,
    ) -> list[tuple[Arrangement, float]]:
        """GFLOP/s of each arrangement of threads over the whole tower; none for a single one."""
        tried = self.conditions.arrangements
        if len(tried) == 1:
            return []
        pools = {one: single_threads(one.threads) for one in tried if one.apart}
        try:
            operations = []
            for piece in pieces:
                call = computation(piece, precision, self.conditions)
                operations.append({str(one): _arranged(call, one, pools.get(one)) for one in tried})
            seconds = time_in_turn(operations, until=until, clock=self.clock)
        finally:
            for pool in pools.values():
                pool.shutdown()
        rates = []
        for one in tried:
            # Threads that work apart have done the piece as many times as there are of them.
            times = one.threads if one.apart else 1
            own = [second[str(one)] / times for second in seconds]
            rates.append((one, self._overall(products, pieces, own)))
        return rates

    def _overall(
        self, products: Sequence[Product], pieces: Sequence[Product], seconds: Sequence[float]
    ) -> float:
        """The rate at which all these products are computed, by the seconds of a piece of each.

        There may be fewer seconds than products: the rest was not reached.
        """
        total_flops = total_s = 0.0
        for product, piece, piece_s in zip(products, pieces, seconds, strict=False):
            pieces_in_tower = product.count * product.flops / piece.flops
            total_flops += pieces_in_tower * self.conditions.flops(piece)
            total_s += pieces_in_tower * piece_s
        return total_flops / max(total_s, 1e-12) / 1e9


def computation(product: Product, precision: str, conditions: Conditions) -> Callable[[], object]:
    """Computes this product as the run does: with torch's kernels, under autocast in bf16."""
    trains = conditions.trains
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Values decide nothing about speed; drawing them would change the run's random numbers.
    left = _values(product.left).to(dtype)
    right = _values(product.right)
    if product.convolution and conditions.channels_last:
        left = left.contiguous(memory_format=torch.channels_last)
    if product.is_linear:
        right = right.T.contiguous()  # as weights are stored
    elif product.convolution is None:
        right = right.to(dtype)  # attention: both sides are activations
    if precision == "int8" and product.is_linear:
        int8 = Int8Linear(right, None)

        def compute() -> torch.Tensor:
            return int8(left)
    else:
        left, right = (side.requires_grad_(trains) for side in (left, right))

        def compute() -> torch.Tensor:
            return _multiply(left, right, product)

    def forward() -> None:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            compute()

    def forward_and_backward() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs = compute()
        torch.autograd.grad(outputs, (left, right), torch.ones_like(outputs))

    return forward_and_backward if trains else forward


def _multiply(left: torch.Tensor, right: torch.Tensor, product: Product) -> torch.Tensor:
    if product.convolution is not None:
        stride, padding, dilation, groups = product.convolution
        return F.conv2d(left, right, None, stride, padding, dilation, groups)
    return F.linear(left, right) if product.is_linear else torch.bmm(left, right)


def _values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def _arranged(
    call: Callable[[], object], arrangement: Arrangement, pool: ThreadPoolExecutor | None
) -> Callable[[], object]:
    if pool is not None:
        return lambda: [*pool.map(lambda _: call(), range(arrangement.threads))]

    def run() -> None:
        with limited_threads(arrangement.threads):
            call()

    return run
