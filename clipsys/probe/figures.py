"""What one probe measured, and what follows from it. Nothing here touches the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipsys.inference.threads import Arrangement

#: How many times as fast as fp32 bf16 must be, and int8 as the faster of both. What is measured are
#: products; norms, activations and sums between them gain less, and each step down in precision is
#: to be worth its error.
MARGIN = 1.15
#: How many times as fast another number of threads must be than all, and shared operations than
#: threads that work apart. What threads that share an operation wait for one another between
#: products is not measured; threads that work apart wait once.
THREADS_MARGIN = 1.1


@dataclass(frozen=True)
class Figures:
    """What a probe measured, and what it chose.

    Attributes:
        gflops: rate of each precision over the tower's products, in GFLOP/s, on one core.
        precision: the one that is chosen.
        arrangements: rates of the arrangements that were tried, in that precision; none where the
            machine was busy.
        arrangement: the one that is chosen.
        busy: whether something else took the cores meanwhile.
    """

    gflops: dict[str, float]
    precision: str
    arrangements: tuple[tuple[Arrangement, float], ...]
    arrangement: Arrangement
    busy: bool = False

    def __str__(self) -> str:
        rates = ", ".join(f"{name}: {_rate(rate)}" for name, rate in self.gflops.items())
        text = f"{rates} GFLOP/s a core; {self.precision} is used"
        if self.arrangements:
            tried = ", ".join(f"{one}: {_rate(rate)}" for one, rate in self.arrangements)
            verb = "is" if self.arrangement.threads == 1 else "are"
            text += f"; {tried}; {self.arrangement} {verb} used"
        return text

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Figures:
        """Reads what `to_json` gave.

        Raises:
            ValueError: it is something else; also TypeError, KeyError or AttributeError.
        """
        figures = cls(
            gflops={str(name): float(rate) for name, rate in document["gflops"].items()},
            precision=str(document["precision"]),
            arrangements=tuple(
                (_arrangement(one), float(rate)) for one, rate in document["arrangements"]
            ),
            arrangement=_arrangement(document["arrangement"]),
        )
        if figures.precision not in figures.gflops:
            raise ValueError(f"precision {figures.precision!r} was not measured")
        return figures


def _arrangement(document: Mapping[str, Any]) -> Arrangement:
    threads, apart = document["threads"], document["apart"]
    if type(threads) is not int or threads < 1 or type(apart) is not bool:
        raise ValueError(f"not an arrangement of threads: {document!r}")
    return Arrangement(threads, apart)


def _rate(gflops: float) -> str:
    return f"{gflops:,.0f}" if gflops >= 10 else f"{gflops:.1f}"


def choose_precision(gflops: Mapping[str, float]) -> str:
    """The precision to compute in, by the rate of each that may be used; ``fp32`` is among them."""
    chosen = "fp32"
    for name in ("bf16", "int8"):
        if gflops.get(name, 0.0) >= MARGIN * gflops[chosen]:
            chosen = name
    return chosen


def acceptable(gflops: Mapping[str, float]) -> tuple[str, ...]:
    """The precision to compute in, and what is to take its place where its results are refused."""
    chosen = choose_precision(gflops)
    without = {name: rate for name, rate in gflops.items() if name != chosen}
    return (chosen,) if chosen == "fp32" else (chosen, *acceptable(without))


def choose_arrangement(tried: Sequence[tuple[Arrangement, float]]) -> Arrangement:
    """The first one, unless another is faster by more than a margin."""
    first, rate = tried[0]
    best, best_rate = max(tried, key=lambda one: one[1])
    return best if best_rate > THREADS_MARGIN * rate else first
