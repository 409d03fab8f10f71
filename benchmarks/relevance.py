"""What `relevant_only` keeps, and what else it could be: calibrations of a query's cosines.

    python benchmarks/relevance.py --collection COLLECTION KEY [--collection ...]

Items match that share a value of the metadata KEY; a value may list several, apart by ";". Queries
are captions (the collection's own, item by item) and images (items, which are then not hits
themselves). Each is asked of the collection, and of the collection without what matches; random
letters are texts that have nothing to do with any. Queries without a match among their first ten
hits are left out: relevance cannot mend a ranking.

Calibrations: ``normal``: robust z-score, normal law. ``tail``: extreme values, the excesses over
the 90 % quantile as an exponential, without the highest percent. ``s-norm``: the mean of ``normal``
and the item's own z-score over the captions, as in speaker verification. ``clipsys``: what the
package does where the captions that the model was trained with are not known, and for images
(`relevance_texts.py` measures text queries where they are known). All cut where 0.05 unrelated
items are expected. ``cosine`` has no cut, and orders queries only. Without collections only
synthetic backgrounds are measured, whose truth is known.
Writes ``benchmarks/results/relevance.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.retrieval import Collection
from clipsys.retrieval.search.calibration import RELEVANT, SAMPLE_ITEMS, Background

NUM_QUERIES = 150
NUM_LETTERS = 60
HITS = 10

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
#: (cosines of all items, places of the hits, item means and deviations) to relevance.
Calibration = Callable[[Doubles, npt.NDArray[np.int64], Doubles, Doubles], Doubles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collection", nargs=2, action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    results = Path(__file__).parent / "results" / "relevance.json"
    report: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    report["machine"] = platform.processor() or platform.machine()
    report["false_alarms_on_synthetic_backgrounds"] = _synthetic(rng)
    report["collections"] = report.get("collections", {}) | {
        Path(folder).name: _measure(Path(folder), key, rng) for folder, key in options.collection
    }
    text = json.dumps(report, indent=2)
    results.write_text(text + "\n")
    print(text)


# ---- calibrations ------------------------------------------------------------------------------


def _sample(cosines_N: Doubles) -> Doubles:
    count = min(SAMPLE_ITEMS, len(cosines_N))
    sample: Doubles = cosines_N[np.linspace(0, len(cosines_N) - 1, count).astype(np.int64)]
    return sample


def _expected(scores_K: Doubles, num_items: int) -> Doubles:
    """Minus the logarithm of the expected number, of normal scores."""
    tails = [max(NormalDist().cdf(-score), 1e-300) for score in scores_K]
    return -np.log10(tails) - np.log10(num_items)


def _robust(cosines_N: Doubles) -> Doubles:
    sample = _sample(cosines_N)
    middle = np.median(sample)
    deviation = 1.4826 * np.median(np.abs(sample - middle))
    robust: Doubles = (cosines_N - middle) / max(float(deviation), 1e-6)
    return robust


def _normal(cosines_N: Doubles, hits: npt.NDArray[np.int64], *_: Doubles) -> Doubles:
    return _expected(_robust(cosines_N)[hits], len(cosines_N))


def _tail(cosines_N: Doubles, hits: npt.NDArray[np.int64], *_: Doubles) -> Doubles:
    sample = np.sort(_sample(cosines_N))[::-1]
    first, last = max(len(sample) // 100, 1), max(len(sample) // 10, 5)
    over = sample[:last] - sample[last]
    # Maximum likelihood of an exponential of which the highest are known to be high only.
    mean = max((over[first:].sum() + first * over[first]) / (last - first), 1e-6)
    excess: Doubles = (cosines_N[hits] - sample[last]) / mean
    return excess / np.log(10) - np.log10(len(cosines_N) * last / len(sample))


def _s_norm(
    cosines_N: Doubles, hits: npt.NDArray[np.int64], means_N: Doubles, deviations_N: Doubles
) -> Doubles:
    both = (_robust(cosines_N) + (cosines_N - means_N) / deviations_N) / 2
    return _expected(_robust(both)[hits], len(cosines_N))


def _clipsys(cosines_N: Doubles, hits: npt.NDArray[np.int64], *_: Doubles) -> Doubles:
    # A query that is the first axis has an item's first coordinate for its cosine.
    background = Background(len(cosines_N), _sample(cosines_N)[:, None].astype(np.float32))
    relevance = background.relevance(np.ones(1, np.float32), cosines_N[hits].astype(np.float32))
    assert relevance is not None
    return relevance


CALIBRATIONS: dict[str, Calibration] = {
    "cosine": lambda cosines_N, hits, *_: cosines_N[hits],
    "normal": _normal,
    "tail": _tail,
    "s-norm": _s_norm,
    "clipsys": _clipsys,
}


# ---- synthetic ---------------------------------------------------------------------------------


def _synthetic(rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Share of the queries for which something passes although nothing matches."""
    laws: dict[str, Callable[[int], Doubles]] = {
        "normal": lambda n: rng.normal(0.2, 0.03, n),
        "sphere of 12 dimensions": lambda n: 2 * rng.beta(5.5, 5.5, n) - 1,
        "gamma, shape 9": lambda n: 0.15 + 0.01 * rng.gamma(9, size=n),
        "gamma, shape 3": lambda n: 0.15 + 0.02 * rng.gamma(3, size=n),
        "gumbel": lambda n: 0.18 + 0.02 * rng.gumbel(size=n),
        "two clusters": lambda n: rng.normal(np.where(rng.random(n) < 0.2, 0.24, 0.18), 0.025),
    }
    rates: dict[str, dict[str, float]] = {}
    for num_items, rounds in ((2_000, 400), (100_000, 100)):
        for name, law in laws.items():
            passed: dict[str, list[bool]] = {"normal": [], "tail": [], "clipsys": []}
            for _ in range(rounds):
                cosines = np.minimum(law(num_items), 1)
                best = np.array([cosines.argmax()])
                for method, found in passed.items():
                    relevance = CALIBRATIONS[method](cosines, best, cosines, cosines)
                    found.append(bool(relevance[0] >= RELEVANT))
            rates[f"{name}, {num_items} items"] = {
                method: round(float(np.mean(found)), 3) for method, found in passed.items()
            }
    return rates


# ---- collections -------------------------------------------------------------------------------


def _measure(folder: Path, key: str, rng: np.random.Generator) -> dict[str, Any]:
    with Collection.open(folder) as collection:
        items = [item for item in collection.items() if item.metadata.get(key)]
        vectors_ND = np.stack([collection.vector(item.id) for item in items])
        values = [set(str(item.metadata[key]).split(";")) for item in items]
        chosen = rng.permutation(len(items))
        captioned = [place for place in chosen if items[place].caption]
        alphabet = list("abcdefghijklmnopqrstuvwxyz ")
        letters = ["x" + "".join(rng.choice(alphabet, 12)) for _ in range(NUM_LETTERS)]
        encoder = collection.encoder
        captions_QD = encoder.encode_text([str(items[place].caption) for place in captioned[:400]])
        letters_QD = encoder.encode_text(letters)
    bank = vectors_ND @ captions_QD.T
    item_statistics = bank.mean(1).astype(np.float64), bank.std(1).astype(np.float64)
    kinds = {
        "text": list(zip(captioned, captions_QD, strict=False))[:NUM_QUERIES],
        "image": [(place, vectors_ND[place]) for place in chosen[:NUM_QUERIES]],
    }
    report: dict[str, Any] = {"items": len(items), "key": key}
    for kind, queries in kinds.items():
        found, lost, wrong = _ask(kind, queries, vectors_ND, values, item_statistics)
        foreign = _foreign(letters_QD, vectors_ND, item_statistics) if kind == "text" else {}
        report[kind] = {"queries": len(found["cosine"])} | {
            name: _figures(found[name], lost[name], wrong[name], foreign.get(name, []))
            for name in CALIBRATIONS
        }
        for unfit in ("kept", "wrong_hits_kept", "false_alarms", "false_alarms_letters"):
            report[kind]["cosine"].pop(unfit, None)  # a cosine has no cut of its own
    return report


def _ask(
    kind: str,
    queries: list[tuple[int, Floats]],
    vectors_ND: Floats,
    values: list[set[str]],
    item_statistics: tuple[Doubles, Doubles],
) -> tuple[dict[str, list[Doubles]], dict[str, list[Doubles]], dict[str, list[int]]]:
    """Relevance of the best hit and of the best that matches; of hits without a match; wrong hits.

    The last are how many hits pass beside those that match.
    """
    found: dict[str, list[Doubles]] = {name: [] for name in CALIBRATIONS}
    lost: dict[str, list[Doubles]] = {name: [] for name in CALIBRATIONS}
    wrong: dict[str, list[int]] = {name: [] for name in CALIBRATIONS}
    for place, query_D in queries:
        cosines_N = (vectors_ND @ query_D).astype(np.float64)
        match_N = np.array([bool(value & values[place]) for value in values])
        with_N = np.ones(len(match_N), bool)
        with_N[place] = kind == "text"
        if (match_N & with_N).sum() == 0 or (~match_N).sum() < HITS * 2:
            continue
        best = np.argsort(-cosines_N[with_N])[:HITS]
        right = match_N[with_N][best]
        if not right.any():
            continue
        without = np.argsort(-cosines_N[~match_N])[:HITS]
        for name, calibrate in CALIBRATIONS.items():
            statistics = [one[with_N] for one in item_statistics]
            relevance = calibrate(cosines_N[with_N], best, *statistics)
            found[name].append(np.array([relevance.max(), relevance[right].max()]))
            wrong[name].append(int((relevance[~right] >= RELEVANT).sum()))
            statistics = [one[~match_N] for one in item_statistics]
            lost[name].append(calibrate(cosines_N[~match_N], without, *statistics))
    return found, lost, wrong


def _foreign(
    letters_QD: Floats, vectors_ND: Floats, item_statistics: tuple[Doubles, Doubles]
) -> dict[str, list[Doubles]]:
    relevance: dict[str, list[Doubles]] = {name: [] for name in CALIBRATIONS}
    for query_D in letters_QD:
        cosines_N = (vectors_ND @ query_D).astype(np.float64)
        best = np.argsort(-cosines_N)[:HITS]
        for name, calibrate in CALIBRATIONS.items():
            relevance[name].append(calibrate(cosines_N, best, *item_statistics))
    return relevance


def _figures(
    found: list[Doubles], lost: list[Doubles], wrong: list[int], foreign: list[Doubles]
) -> dict[str, float]:
    best, best_right = np.array(found).T
    best_lost = np.array([one.max() for one in lost])
    figures = {
        "auc": _auc(best, best_lost),
        "kept": float(np.mean(best_right >= RELEVANT)),
        # With a cut that nobody can know beforehand: what the order alone is worth.
        "kept_at_5_percent_alarms": float(np.mean(best_right > np.quantile(best_lost, 0.95))),
        "wrong_hits_kept": float(np.mean(wrong)),
        "false_alarms": float(np.mean(best_lost >= RELEVANT)),
    }
    if foreign:
        best_foreign = np.array([one.max() for one in foreign])
        figures["auc_letters"] = _auc(best, best_foreign)
        figures["false_alarms_letters"] = float(np.mean(best_foreign >= RELEVANT))
    return {name: round(value, 3) for name, value in figures.items()}


def _auc(positive: Doubles, negative: Doubles) -> float:
    above = (positive[:, None] > negative).mean()
    return float(above + (positive[:, None] == negative).mean() / 2)


if __name__ == "__main__":
    main()
