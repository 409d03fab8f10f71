"""What `relevant_only` tells about short phrases, where captions say which items have them.

    clipsys demo --no-ui --out demo-output
    python benchmarks/relevance_phrases.py demo-output/collection

Asks for "a COLOUR SHAPE" with every colour and shape that occur in the captions of the drawings of
`clipsys demo`. An item matches if one of its captions has the phrase. Each query is asked of the
collection, and of the collection without what matches. Writes
``benchmarks/results/relevance_phrases.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.demo.scenes import COLOURS, SHAPES
from clipsys.retrieval import Collection
from clipsys.retrieval.search.calibration import RELEVANT, Background

Flags = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating]


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
    relevance_QN = np.stack([_relevance(vectors_ND, query_D) for query_D in queries_QD])
    alarms = [
        bool((_relevance(vectors_ND[~match_N], query_D) >= RELEVANT).any())
        for match_N, query_D in zip(match_QN, queries_QD, strict=True)
    ]
    has_match_Q = match_QN.any(axis=1)
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
        "alarms_without_a_match": round(float(np.mean(alarms)), 3),
        "relevant_only": _cut(relevance_QN >= RELEVANT, match_QN),
        "min_score": {
            str(cut): _cut(scores_QN >= cut, match_QN) for cut in (0.5, 0.6, 0.7, 0.75, 0.8)
        },
    }


def _relevance(vectors_ND: Scores, query_D: Scores) -> Scores:
    found = Background(len(vectors_ND), vectors_ND).relevance(query_D, vectors_ND @ query_D)
    assert found is not None
    return found


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
