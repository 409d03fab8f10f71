"""Which precision and threads a tower is computed in: by measurement, stored for the machine.

A processor's flags do not say it. Of three machines with two cores each, one with AMX computed
ViT-B/32 2.8 times as fast in bf16 as in fp32, one with VNNI alone half as fast, and one with
AVX512-BF16 and without AMX 3.6 times as fast. So the tower's own products are timed::

    shapes of the tower -> pieces of them in each precision, in turn -> rates over the whole tower
    (products.py)          (measuring.py, timing.py)                    -> a choice (figures.py),
                                                                        stored (cache.py)

All of it takes half a second at most, unless a single piece takes longer. The environment variable
CLIPSYS_PROBE says ``off`` to measure nothing (then ``auto`` is fp32 on a CPU) and ``renew`` to
measure again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clipsys.errors import ConfigError
from clipsys.inference.threads import Arrangement
from clipsys.probe import cache, machine
from clipsys.probe.figures import Figures
from clipsys.probe.measuring import BUDGET_S, Conditions, measure
from clipsys.probe.products import Product

_logger = logging.getLogger(__name__)

_MODES = ("", "off", "renew")
#: Smaller numbers of threads that are tried: this many halvings, and one.
_HALVINGS = 2


@dataclass(frozen=True)
class Work:
    """What is computed over and over in a run.

    Attributes:
        name: what the log calls it.
        signature: what decides the products: shapes of weights, images and batches.
        products: gives them; called only where no figures are stored.
        precisions: precisions that may be chosen, ``fp32`` among them.
        trains: forward and backward passes, or forward passes alone.
        channels_last: the layout of images that convolutions take.
    """

    name: str
    signature: str
    products: Callable[[], Sequence[Product]]
    precisions: tuple[str, ...] = ("fp32", "bf16")
    trains: bool = False
    channels_last: bool = False


def signature(model: torch.nn.Module, *sizes: object) -> str:
    """A short text, equal for models whose weights have the same names and shapes."""
    digest = hashlib.sha256(repr(sizes).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    return digest.hexdigest()[:16]


def probe(work: Work) -> Figures | None:
    """Figures for this work, stored ones where there are any; says them in one line.

    None: measuring is switched off, or the model's products cannot be recorded.

    Raises:
        ConfigError: CLIPSYS_PROBE says something unknown.
    """
    mode = _mode()
    if mode == "off":
        _logger.info("precision: fp32 (CLIPSYS_PROBE=off: nothing is measured)")
        return None
    conditions = Conditions(
        work.precisions, arrangements(trains=work.trains), work.trains, work.channels_last
    )
    measured = {
        **machine.describe(),
        "work": work.signature,
        "precisions": list(work.precisions),
        "arrangements": [str(one) for one in conditions.arrangements],
        "trains": work.trains,
        "channels_last": work.channels_last,
    }
    figures = None if mode == "renew" else cache.read(measured)
    if figures is not None:
        _logger.info("%s: %s (measured before)", work.name, figures)
        return figures
    started = time.perf_counter()
    products = work.products()
    if not products:
        _logger.info("precision: fp32 (the products of %s cannot be recorded)", work.name)
        return None
    figures = measure(products, conditions, budget_s=BUDGET_S - (time.perf_counter() - started))
    took_s = time.perf_counter() - started
    if figures.busy:
        note = "; the machine is busy, so threads are as usual and nothing is stored"
    else:
        note = ""
        cache.write(measured, figures)
    _logger.info("%s: %s (measured in %.1f s%s)", work.name, figures, took_s, note)
    return figures


def arrangements(*, trains: bool) -> tuple[Arrangement, ...]:
    """The arrangements of threads that are tried, the usual one first.

    Where OMP_NUM_THREADS is set there is one number of threads. In training all threads share each
    operation, since a gradient needs the whole batch.
    """
    threads = usual_threads()
    usual = Arrangement(threads)
    others: list[Arrangement] = []
    if threads > 1 and not trains:
        usual, others = Arrangement(threads, apart=True), [usual]
    if threads > 1 and not machine.threads_are_set():
        fewer = {threads >> halving for halving in range(1, _HALVINGS + 1)} | {1}
        others += [Arrangement(count) for count in sorted(fewer - {0}, reverse=True)]
    return (usual, *others)


def usual_threads() -> int:
    """As many threads as torch would take, but no more than there are cores for them."""
    threads = torch.get_num_threads()
    return threads if machine.threads_are_set() else min(threads, machine.available_cores())


def _mode() -> str:
    mode = os.environ.get("CLIPSYS_PROBE", "").strip().lower()
    if mode not in _MODES:
        raise ConfigError(
            f"CLIPSYS_PROBE is {mode!r}; expected off (measure nothing), renew (measure again), or "
            "no value"
        )
    return mode
