"""What `relevant_only` tells about short phrases, where captions say which items have them.

    clipsys demo --no-ui --out demo-output
    python benchmarks/relevance_phrases.py demo-output/collection

Asks for "a COLOUR SHAPE" with every colour and shape that occur in the captions of the drawings of
`clipsys demo`. An item matches if one of its captions has the phrase. Each query is asked of the
collection, and of the collection without what matches. ``relevant_only`` is what the package does;
``by_collection`` what it does where the model's captions are not known. Writes
``benchmarks/results/relevance_phrases.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.demo.scenes import COLOURS, SHAPES
from clipsys.retrieval import Collection
from clipsys.retrieval.search.calibration import RELEVANT, Background
from clipsys.retrieval.search.text_relevance import read_text_relevance
from clipsys.retrieval.storage.manifest import read_manifest

Flags = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float32]
#: (phrase, items, query) to the relevance of the items.
Judge = Callable[[str, Scores, Scores], npt.NDArray[np.float64] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", type=Path)
    report = measure(parser.parse_args().collection)
    text = json.dumps(report, indent=2)
    (Path(__file__).parent / "results" / "relevance_phrases.json").write_text(text + "\n")
    print(text)


def measure(folder: Path) -> dict[str, Any]:
    with Collection.open(folder) as collection:
        items = list(collection.items())
        vectors_ND = np.stack([collection.vector(item.id) for item in items])
        captions = [" ".join(item.captions) for item in items]
        phrases = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        queries_QD = collection.encoder.encode_text([f"a {phrase}" for phrase in phrases])
    match_QN = np.array(
        [[bool(re.search(rf"\b{phrase}\b", one)) for one in captions] for phrase in phrases]
    )
    scores_QN = queries_QD @ vectors_ND.T
    has_match_Q = match_QN.any(axis=1)
    manifest = read_manifest(folder)
    calibration = read_text_relevance(folder / manifest.edition, manifest.encoder)
    if calibration is None:
        raise SystemExit(f"{folder}: `clipsys index` has found no captions of its model; export it")
    of_text = calibration.relevance
    judges: dict[str, Judge] = {
        "relevant_only": lambda phrase, vectors_ND, query_D: of_text(
            [f"a {phrase}"], query_D, vectors_ND @ query_D
        ),
        "by_collection": lambda _, vectors_ND, query_D: Background(
            len(vectors_ND), vectors_ND
        ).relevance(query_D, vectors_ND @ query_D),
    }
    return {
        "items": len(items),
        "queries": len(phrases),
        "queries_with_a_match": int(has_match_Q.sum()),
        "matches_of_such_a_query": round(float(match_QN[has_match_Q].sum(axis=1).mean()), 1),
        "mean_average_precision": round(
            float(
                np.mean([*map(_average_precision, scores_QN[has_match_Q], match_QN[has_match_Q])])
            ),
            3,
        ),
        **{
            name: _judged(judge, phrases, vectors_ND, queries_QD, match_QN)
            for name, judge in judges.items()
        },
        "min_score": {
            str(cut): _cut(scores_QN >= cut, match_QN) for cut in (0.5, 0.6, 0.7, 0.75, 0.8)
        },
    }


def _judged(
    judge: Judge, phrases: list[str], vectors_ND: Scores, queries_QD: Scores, match_QN: Flags
) -> dict[str, float]:
    kept, alarms = [], []
    for phrase, query_D, match_N in zip(phrases, queries_QD, match_QN, strict=True):
        for found, items_ND in ((kept, vectors_ND), (alarms, vectors_ND[~match_N])):
            relevance_N = judge(phrase, items_ND, query_D)
            assert relevance_N is not None, "the scores of this model do not tell"
            found.append(relevance_N >= RELEVANT)
    passed = [bool(kept_N.any()) for kept_N in alarms]
    return {
        **_cut(np.stack(kept), match_QN),
        "alarms_without_a_match": round(float(np.mean(passed)), 3),
    }


def _average_precision(scores_N: Scores, match_N: Flags) -> float:
    ordered_N = match_N[np.argsort(-scores_N)]
    return float((np.cumsum(ordered_N) / np.arange(1, len(ordered_N) + 1))[ordered_N].mean())


def _cut(kept_QN: Flags, match_QN: Flags) -> dict[str, float]:
    has_match_Q = match_QN.any(axis=1)
    right_QN = kept_QN & match_QN
    shares = right_QN[has_match_Q].sum(axis=1) / match_QN[has_match_Q].sum(axis=1)
    return {
        "queries_that_keep_a_right_hit": round(float(right_QN[has_match_Q].any(axis=1).mean()), 3),
        "right_hits_kept": round(float(shares.mean()), 3),
        "of_what_is_kept_right": round(float(right_QN.sum() / max(kept_QN.sum(), 1)), 3),
    }


if __name__ == "__main__":
    main()
