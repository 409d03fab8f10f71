"""Times pieces of a tower's products in each precision, and in each arrangement of threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.inference.int8 import Int8Linear
from clipsys.inference.threads import single_threads
from clipsys.probe.figures import Arrangement, Figures, choose_arrangement, choose_precision
from clipsys.probe.products import Product, largest
from clipsys.probe.timing import Clock, time_in_turn

#: Seconds that a probe may take in all.
BUDGET_S = 0.5
#: Share of it for the precision; the rest is for the threads.
_PRECISION_SHARE = 0.6
#: Rounds that pieces are cut for: one warms up, and three have a median.
_ROUNDS = 4
#: Takes 0.2 ms or so, and says how large pieces may be and which precisions are hopeless: a
#: processor without instructions for one may be a hundred times slower in it.
_SMALL = Product((128, 256), (256, 256))
_SMALL_BUDGET_S = 0.02
_HOPELESS = 3.0
#: A backward pass takes two products for the one of the forward pass.
_TRAINING_COST = 3


@dataclass(frozen=True)
class Conditions:
    """How products are computed in the run.

    Attributes:
        precisions: that may be chosen, ``fp32`` among them.
        arrangements: of threads that may be chosen, the usual one first.
        trains: forward and backward passes, or forward passes alone.
        channels_last: the layout of images that convolutions take.
    """

    precisions: tuple[str, ...]
    arrangements: tuple[Arrangement, ...]
    trains: bool = False
    channels_last: bool = False

    def flops(self, product: Product) -> int:
        """Of one such product, its gradients included where there are any."""
        return product.flops * (_TRAINING_COST if self.trains else 1)


def measure(
    products: Sequence[Product],
    conditions: Conditions,
    *,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
) -> Figures:
    """Times these products within a budget, and chooses.

    Args:
        products: of the whole tower; not empty.
        conditions: how they are computed.
        budget_s: seconds for everything.
        clock: seconds; another one in tests.
    """
    started = clock()
    products = largest(products)
    with _threads_restored():
        torch.set_num_threads(conditions.arrangements[0].threads)
        rates = _rates([_SMALL], [_SMALL], conditions.precisions, conditions, _SMALL_BUDGET_S, clock)
        fastest = max(rates.values())
        hopeful = [one for one in rates if one == "fp32" or rates[one] * _HOPELESS > fastest]
        left_s = (budget_s - (clock() - started)) * _PRECISION_SHARE
        each_s = left_s / (_ROUNDS * len(products) * len(hopeful))
        share = each_s * rates["fp32"] * 1e9
        pieces = [one.cut(share * one.flops / conditions.flops(one)) for one in products]
        rates |= _rates(products, pieces, hopeful, conditions, left_s, clock)
        precision = choose_precision(rates)
        tried = [(conditions.arrangements[0], rates[precision])]
        if len(conditions.arrangements) > 1:
            left_s = budget_s - (clock() - started)
            tried = _arrangement_rates(products, pieces, precision, conditions, left_s, clock)
    return Figures(
        gflops={name: round(rate, 1) for name, rate in rates.items()},
        precision=precision,
        arrangements=tuple((one, round(rate, 1)) for one, rate in tried),
        arrangement=choose_arrangement(tried),
    )


def _rates(
    products: Sequence[Product],
    pieces: Sequence[Product],
    precisions: Sequence[str],
    conditions: Conditions,
    budget_s: float,
    clock: Clock,
) -> dict[str, float]:
    """GFLOP/s of each precision over the whole tower."""
    operations = [
        {name: computation(piece, name, conditions) for name in precisions} for piece in pieces
    ]
    seconds = time_in_turn(operations, budget_s=budget_s, clock=clock)
    return {
        name: _overall(products, pieces, [one[name] for one in seconds], conditions)
        for name in precisions
    }


def _arrangement_rates(
    products: Sequence[Product],
    pieces: Sequence[Product],
    precision: str,
    conditions: Conditions,
    budget_s: float,
    clock: Clock,
) -> list[tuple[Arrangement, float]]:
    """GFLOP/s of each arrangement of threads over the whole tower."""
    pools = {
        one: single_threads(one.threads)
        for one in conditions.arrangements
        if one.apart and one.threads > 1
    }
    try:
        calls = [computation(piece, precision, conditions) for piece in pieces]
        operations = [
            {
                str(one): _arranged(call, one, pools.get(one))
                for one in conditions.arrangements
            }
            for call in calls
        ]
        seconds = time_in_turn(operations, budget_s=budget_s, clock=clock)
    finally:
        for pool in pools.values():
            pool.shutdown()
    tried = []
    for one in conditions.arrangements:
        # Threads that work apart have done the piece as many times as there are of them.
        times = one.threads if one.apart else 1
        own = [second[str(one)] / times for second in seconds]
        tried.append((one, _overall(products, pieces, own, conditions)))
    return tried


def _overall(
    products: Sequence[Product],
    pieces: Sequence[Product],
    seconds: Sequence[float],
    conditions: Conditions,
) -> float:
    """The rate at which all these products are computed, by the seconds of a piece of each."""
    total_flops = total_s = 0.0
    for product, piece, piece_s in zip(products, pieces, seconds, strict=False):
        share = product.count * product.flops / piece.flops
        total_flops += share * conditions.flops(piece)
        total_s += share * piece_s
    return total_flops / max(total_s, 1e-12) / 1e9


def computation(
    product: Product, precision: str, conditions: Conditions
) -> Callable[[], object]:
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
        with torch.inference_mode(), torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=precision == "bf16"
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
        torch.set_num_threads(arrangement.threads)
        call()

    return run


@contextmanager
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
