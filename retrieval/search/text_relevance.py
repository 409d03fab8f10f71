"""What a text query's scores mean, by the captions that the model was trained with.

Whether a text finds anything cannot be told from its cosines alone: texts that a model was never
taught score high somewhere. Captions of the kind that it was taught (`clipsys.background.captions`)
were searched for in the collection, and what nearly all of them reach is asked of a query too::

    nearness   mean cosine with the captions nearest to it
    unknown    share of its words that no such caption has
    score      cosine with the hit: as high as the best hit of such a caption

A caption is compared with the others, as if it were new. One share of captions is allowed to miss
each: the largest one with which nine in ten still pass all three, more where else one in twenty
foreign texts (`clipsys.background.foreign`) passed too. A score that half of these reach is noise.
`clipsys.retrieval.writing.relevance` makes all this.

The relevance of a hit counts from `RELEVANT` at the cut, one for the distance from there to what
the best hit of a typical caption has. A query that falls short itself has only hits below the cut.
For queries with images or items in them, `calibration` is used.

The file ``relevance.npz`` of a collection is derived: without it, `calibration` is used for all.

Shapes: M captions, S foreign texts, K hits, D embedding width.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipsys.background.captions import words_of
from clipsys.retrieval.search.calibration import CHANCE, RELEVANT, Doubles, Scores
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.manifest import EncoderPin
from clipsys.retrieval.storage.segments import Floats

FILE_NAME = "relevance.npz"
_VERSION = 1
#: Captions that a text's nearness is the mean of.
_NEAREST = 10
#: Area under ROC, best hits of captions against those of foreign texts, below which no cut on
#: scores means anything.
LEAST_AREA = 0.8
#: Share of captions below which a cut that keeps foreign texts out leaves out too much.
LEAST_KEPT = 0.5
#: Below this two cosines are equal: the distance of a cut may be nothing.
_LEAST = 1e-4

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cuts:
    """What a query and its hits have to reach.

    Attributes:
        nearness: least mean cosine with the nearest captions.
        typical_nearness: median of captions.
        unknown: largest share of unknown words; 1 where the words are not known.
        score: least cosine of a hit.
        typical_score: median of the best hits of captions.
        area: area under ROC of the best hits of captions against those of foreign texts.
        captions_kept: share of captions whose best hit passes.
        foreign_kept: share of foreign texts whose best hit passes.
    """

    nearness: float
    typical_nearness: float
    unknown: float
    score: float
    typical_score: float
    area: float
    captions_kept: float
    foreign_kept: float

    @property
    def can_tell(self) -> bool:
        """Whether scores of this model say anything about this collection."""
        return (
            self.area >= LEAST_AREA
            and self.captions_kept >= LEAST_KEPT
            and self.foreign_kept <= CHANCE
        )


@dataclass(frozen=True, eq=False)
class TextRelevance:
    """The calibration of one collection.

    Attributes:
        captions_MD: unit vectors.
        foreign_SD: unit vectors.
        words: how often words occur; empty where that is not known.
        unknown_M: share of words of each caption that no other one has.
        source: where the captions come from: ``model``, ``collection``, ``generic`` or ``given``.
        num_items: items of the collection when the cuts were made.
        cuts: what has to be reached.
    """

    captions_MD: Floats
    foreign_SD: Floats
    words: dict[str, int]
    unknown_M: Doubles
    source: str
    num_items: int
    cuts: Cuts

    def relevance(self, texts: Sequence[str], query_D: Floats, scores_K: Scores) -> Doubles | None:
        """The relevance of hits, never falling as the score rises; None if scores do not tell.

        Args:
            texts: those that the query is made of.
            query_D: its unit vector.
            scores_K: cosines of the hits.
        """
        cuts = self.cuts
        if not cuts.can_tell:
            return None
        width = max(cuts.typical_score - cuts.score, _LEAST)
        above_K: Doubles = (scores_K.astype(np.float64) - cuts.score) / width
        missing = self._missing(texts, query_D)
        if missing > 0:
            above_K = np.minimum(above_K, 0.0) - missing
        return RELEVANT + above_K

    def _missing(self, texts: Sequence[str], query_D: Floats) -> float:
        """How far a query itself falls short; 0 if it does not."""
        cuts = self.cuts
        (near,) = nearness(query_D[None, :], self.captions_MD)
        width = max(cuts.typical_nearness - cuts.nearness, _LEAST)
        too_far = max((cuts.nearness - float(near)) / width, 0.0)
        if not self.words:
            return too_far
        unknown = unknown_share(words_of(" ".join(texts)), self.words)
        return too_far + max(unknown - cuts.unknown, 0.0)

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """The words of a query that no caption has, each once."""
        words = dict.fromkeys(words_of(" ".join(texts)))
        return [word for word in words if self.words and word not in self.words]


def nearness(texts_ND: Floats, captions_MD: Floats, *, are_captions: bool = False) -> Doubles:
    """Mean cosine of each text with the captions nearest to it.

    Args:
        texts_ND: unit vectors.
        captions_MD: unit vectors, at least two.
        are_captions: the texts are these captions, each of which is compared with the others.
    """
    cosines_NM = (texts_ND @ captions_MD.T).astype(np.float64)
    if are_captions:
        np.fill_diagonal(cosines_NM, -1.0)
    count = min(_NEAREST, len(captions_MD) - 1)
    highest: Doubles = np.partition(cosines_NM, -count, axis=1)[:, -count:]
    means: Doubles = highest.mean(axis=1)
    return means


def unknown_share(words: Sequence[str], counts: dict[str, int], *, own: int = 0) -> float:
    """The share of words that occur no more often than ``own`` times; 1 of a text without any."""
    if not words:
        return 1.0
    return sum(counts.get(word, 0) <= own for word in words) / len(words)


def write_text_relevance(data: Path, pin: EncoderPin, made: TextRelevance) -> None:
    """Writes ``relevance.npz``, durably."""
    record = {
        "version": _VERSION,
        "fingerprint": pin.fingerprint,
        "source": made.source,
        "num_items": made.num_items,
        "cuts": asdict(made.cuts),
        "words": made.words,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        record=np.frombuffer(json.dumps(record).encode("utf-8"), np.uint8),
        captions=made.captions_MD.astype(np.float16),
        foreign=made.foreign_SD.astype(np.float16),
        unknown=made.unknown_M,
    )
    durable.replace(data / FILE_NAME, buffer.getvalue())


def read_text_relevance(data: Path, pin: EncoderPin) -> TextRelevance | None:
    """Reads ``relevance.npz``; None where there is none for this model, which is no error."""
    try:
        with np.load(data / FILE_NAME, allow_pickle=False) as file:
            record: dict[str, Any] = json.loads(bytes(file["record"]))
            if (record["version"], record["fingerprint"]) != (_VERSION, pin.fingerprint):
                return None
            return TextRelevance(
                _unit(file["captions"]),
                _unit(file["foreign"]),
                record["words"],
                file["unknown"],
                record["source"],
                record["num_items"],
                Cuts(**record["cuts"]),
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        _logger.debug("%s: no calibration of relevance (%r)", data, error)
        return None


def _unit(vectors_ND: npt.NDArray[Any]) -> Floats:
    """Vectors (N, D) of unit norm again, after float16."""
    wide_ND: Floats = vectors_ND.astype(np.float32)
    if wide_ND.ndim != 2:
        raise ValueError(f"vectors of shape {wide_ND.shape}")
    unit_ND: Floats = wide_ND / np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return unit_ND
