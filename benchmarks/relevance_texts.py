"""What `relevant_only` keeps of a model's text queries, and what it lets pass.

    python benchmarks/relevance_texts.py MODEL PAIRS --train SHARDS --foreign NAME TABLE COLUMN

PAIRS are images with captions that the model was not trained with (shards, a table or a folder).
Half of the images, drawn anew for each seed, are a collection. The captions of these images are
asked: those whose own image is among the first ten hits, which is right. Nothing is right for
random letters, for texts of another subject (a column of each --foreign), and, as far as scenes do
not recur, for the captions of the images that were left out.

The model is judged by the captions of its folder (``background.json``); --train takes them from its
training shards where it has none. Neither these nor the generated texts that the cut is made with
are asked. Besides `relevant_only`, calibrations without a training caption are measured: ``cosine``
has no cut of its own; ``z-score`` within the query, and ``collection``, what the package does where
there are no captions. Merges its figures into ``benchmarks/results/relevance.json``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import clipsys
from clipsys.background.captions import TrainingCaptions, captions_of, words_of
from clipsys.background.foreign import foreign_texts
from clipsys.corpora.sources import iterate_source
from clipsys.retrieval.search.calibration import RELEVANT, Background
from clipsys.retrieval.search.text_relevance import (
    Cuts,
    TextRelevance,
    nearness,
    unknown_share,
)
from clipsys.retrieval.writing.relevance import NUM_FOREIGN, find_cuts

RESULTS = Path(__file__).parent / "results" / "relevance.json"
HITS = 10
NUM_SEEDS = 5
CAPTIONS_AN_IMAGE = 2
NUM_LETTERS = 400
_AT_ONCE = 128

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Texts(NamedTuple):
    """Texts with their vectors (N, D)."""

    texts: list[str]
    vectors_ND: Floats

    def take(self, chosen: npt.NDArray[np.int64]) -> Texts:
        """The texts at these places."""
        return Texts([self.texts[place] for place in chosen], self.vectors_ND[chosen])


#: (texts, cosines (N, K) of hits, cosines (N, I) with all items) to relevance (N, K).
Judge = Callable[[Texts, Doubles, Doubles], Doubles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("--train", help="training shards, for a model without its captions")
    parser.add_argument("--foreign", nargs=3, action="append", default=[])
    parser.add_argument("--name", help="of the figures; the model folder's unless given")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    options = parser.parse_args()
    captions = captions_of(options.model) or _captions_of_shards(options.train)
    encoder = clipsys.load(options.model)
    images_ID, asked = _pairs(encoder, options.pairs)
    foreign = {"letters": _letters()} | {
        name: _column(Path(table), column) for name, table, column in options.foreign
    }
    encoded = {name: Texts(texts, _encode(encoder, texts)) for name, texts in foreign.items()}
    judged_by = _judge_of(encoder, captions)
    runs = [
        _measure(images_ID, asked, encoded, judged_by, np.random.default_rng(seed))
        for seed in range(options.seeds)
    ]
    report: dict[str, Any] = {
        "images": len(images_ID) // 2,
        "seeds": options.seeds,
        **{name: _mean([run[name] for run in runs]) for name in runs[0]},
    }
    document = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    document.setdefault("texts", {})[options.name or Path(options.model).name] = report
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(report, indent=2))


# ---- data --------------------------------------------------------------------------------------


def _captions_of_shards(shards: str | None) -> TrainingCaptions:
    from clipsys.training.data.captions import sample_training_captions
    from clipsys.training.data.config import DataConfig
    from clipsys.training.data.shard_set import open_shards

    if shards is None:
        raise SystemExit(
            "the model's folder has no captions; name its training shards with --train"
        )
    config = DataConfig(train=shards)
    found = sample_training_captions(config, open_shards(config))
    assert found is not None
    return found


def _pairs(encoder: clipsys.Encoder, source: str) -> tuple[Floats, Texts]:
    """Images (I, D), and captions, `CAPTIONS_AN_IMAGE` in a row for each."""
    images, texts = [], []
    records = (one for one in iterate_source(source) if len(one.captions) >= CAPTIONS_AN_IMAGE)
    while batch := list(itertools.islice(records, _AT_ONCE)):
        pixels = np.stack([encoder.read_pixels(one.read(), uri=one.uri) for one in batch])
        images.append(encoder.encode_pixels(pixels))
        texts += [text for one in batch for text in one.captions[:CAPTIONS_AN_IMAGE]]
    return np.concatenate(images), Texts(texts, _encode(encoder, texts))


def _letters() -> list[str]:
    rng = np.random.default_rng(0)
    alphabet = list("abcdefghijklmnopqrstuvwxyz ")
    return ["x" + "".join(rng.choice(alphabet, 12)) for _ in range(NUM_LETTERS)]


def _column(table: Path, column: str) -> list[str]:
    with table.open(encoding="utf-8", newline="") as file:
        return [row[column] for row in csv.DictReader(file) if row[column].strip()]


def _encode(encoder: clipsys.Encoder, texts: list[str]) -> Floats:
    starts = range(0, len(texts), _AT_ONCE)
    return np.concatenate([encoder.encode_text(texts[at : at + _AT_ONCE]) for at in starts])


# ---- judges ------------------------------------------------------------------------------------


def _judge_of(
    encoder: clipsys.Encoder, captions: TrainingCaptions
) -> Callable[[Floats], TextRelevance]:
    """A function that makes the calibration of a collection of images."""
    words = dict(captions.words)
    captions_MD = _encode(encoder, list(captions.captions))
    foreign = foreign_texts(NUM_FOREIGN)
    foreign_SD = _encode(encoder, foreign)
    unknown_M = np.array([unknown_share(words_of(one), words, own=1) for one in captions.captions])
    known: dict[str, Doubles] = {
        "near_M": nearness(captions_MD, captions_MD, are_captions=True),
        "unknown_M": unknown_M,
        "near_S": nearness(foreign_SD, captions_MD),
        "unknown_S": np.array([unknown_share(words_of(one), words) for one in foreign]),
    }

    def make(images_ID: Floats) -> TextRelevance:
        best_M, best_S = (
            (vectors @ images_ID.T).max(axis=1).astype(np.float64)
            for vectors in (captions_MD, foreign_SD)
        )
        cuts: Cuts = find_cuts(best_M=best_M, best_S=best_S, **known)
        return TextRelevance(
            captions_MD, foreign_SD, words, unknown_M, "model", len(images_ID), cuts
        )

    return make


def _judges(calibration: TextRelevance, images_ID: Floats) -> dict[str, Judge]:
    background = Background(len(images_ID), images_ID)

    def clipsys_of(texts: Texts, hits_NK: Doubles, _: Doubles) -> Doubles:
        found = []
        for text, vector_D, hits_K in zip(*texts, hits_NK, strict=True):
            relevance = calibration.relevance([text], vector_D, hits_K.astype(np.float32))
            # Where scores do not tell, nothing is left out.
            found.append(np.full(len(hits_K), np.inf) if relevance is None else relevance)
        return np.stack(found)

    def collection(texts: Texts, hits_NK: Doubles, _: Doubles) -> Doubles:
        found = [
            background.relevance(vector_D, hits_K.astype(np.float32))
            for vector_D, hits_K in zip(texts.vectors_ND, hits_NK, strict=True)
        ]
        return np.stack([one for one in found if one is not None])

    def z_score(_: Texts, hits_NK: Doubles, all_NI: Doubles) -> Doubles:
        scores: Doubles = (hits_NK - all_NI.mean(1)[:, None]) / all_NI.std(1)[:, None]
        return scores

    return {
        "cosine": lambda _, hits_NK, __: hits_NK,
        "z-score": z_score,
        "collection": collection,
        "clipsys": clipsys_of,
    }


# ---- measuring ---------------------------------------------------------------------------------


def _measure(
    images_ID: Floats,
    asked: Texts,
    foreign: dict[str, Texts],
    judge_of: Callable[[Floats], TextRelevance],
    rng: np.random.Generator,
) -> dict[str, Any]:
    inside, outside = np.array_split(rng.permutation(len(images_ID)), 2)
    collection_ID = images_ID[inside]
    calibration = judge_of(collection_ID)
    queries = asked.take(_captions_at(inside))
    own = np.repeat(np.arange(len(inside)), CAPTIONS_AN_IMAGE)
    cosines = (queries.vectors_ND @ collection_ID.T).astype(np.float64)
    of_own = cosines[np.arange(len(own)), own]
    is_right = (cosines > of_own[:, None]).sum(axis=1) < HITS
    right, places = queries.take(np.flatnonzero(is_right)), own[is_right]
    wrong = {**foreign, "left out": asked.take(_captions_at(outside))}
    report: dict[str, Any] = {
        "right_among_ten": float(is_right.mean()),
        "captions_kept": calibration.cuts.captions_kept,
        "foreign_kept": calibration.cuts.foreign_kept,
        "area": calibration.cuts.area,
    }
    for name, judge in _judges(calibration, collection_ID).items():
        all_NI = (right.vectors_ND @ collection_ID.T).astype(np.float64)
        kept_N = judge(right, all_NI[np.arange(len(places)), places][:, None], all_NI)[:, 0]
        best_N = judge(right, all_NI.max(axis=1)[:, None], all_NI)[:, 0]
        has_cut = name in ("collection", "clipsys")
        figures: dict[str, Any] = {}
        if has_cut:
            every_NI = judge(right, all_NI, all_NI)
            figures["kept"] = float((kept_N >= RELEVANT).mean())
            figures["hits_kept_a_query"] = float((every_NI >= RELEVANT).sum(axis=1).mean())
        for kind, texts in wrong.items():
            others_NI = (texts.vectors_ND @ collection_ID.T).astype(np.float64)
            alarm_N = judge(texts, others_NI.max(axis=1)[:, None], others_NI)[:, 0]
            figures[kind] = {
                **({"alarms": float((alarm_N >= RELEVANT).mean())} if has_cut else {}),
                "kept_at_5_percent_alarms": float((kept_N > np.quantile(alarm_N, 0.95)).mean()),
                "auc": _auc(best_N, alarm_N),
            }
        report[name] = figures
    return report


def _captions_at(images: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return (images[:, None] * CAPTIONS_AN_IMAGE + np.arange(CAPTIONS_AN_IMAGE)).reshape(-1)


def _auc(positive: Doubles, negative: Doubles) -> float:
    above = (positive[:, None] > negative).mean()
    return float(above + (positive[:, None] == negative).mean() / 2)


def _mean(values: list[Any]) -> Any:
    """The mean of each figure over the seeds, with the lowest and the highest one."""
    if isinstance(values[0], dict):
        return {name: _mean([one[name] for one in values]) for name in values[0]}
    return [round(float(one), 3) for one in (np.mean(values), np.min(values), np.max(values))]


if __name__ == "__main__":
    main()
