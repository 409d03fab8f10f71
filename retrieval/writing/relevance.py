"""Making a collection's calibration of text queries: what `search.text_relevance` goes by.

captions of the model's training --encoder--> vectors --.
foreign texts, generated ---------encoder--> vectors ---+--> best hits of each --> cuts --> a file

The texts are encoded once for a model. As the collection grows, best hits score higher: then the
cuts are made again from the same vectors.

Shapes: M captions, S foreign texts, N texts, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipsys.background.captions import (
    TrainingCaptions,
    captions_of,
    generic_captions,
    sample_captions,
    words_of,
)
from clipsys.background.foreign import foreign_texts
from clipsys.errors import ClipsysError, DataError
from clipsys.retrieval.encoders.encoding import ImageTextEncoder
from clipsys.retrieval.indexes.generation import LoadedIndex
from clipsys.retrieval.search.calibration import CHANCE, MIN_ITEMS, Doubles
from clipsys.retrieval.search.ranking import rank_batch
from clipsys.retrieval.search.text_relevance import (
    Cuts,
    TextRelevance,
    nearness,
    read_text_relevance,
    unknown_share,
    write_text_relevance,
)
from clipsys.retrieval.storage.manifest import EncoderPin
from clipsys.retrieval.storage.segments import Floats
from clipsys.retrieval.storage.snapshot import Snapshot
from clipsys.retrieval.storage.store import Store

#: The share of captions whose best hit passes.
KEPT = 0.9
#: The share of foreign texts whose best hits are noise, which no score of a hit lies below.
_NOISE = 0.5
#: Foreign texts: 5 % of them are 20.
NUM_FOREIGN = 400
#: With fewer captions nothing is known of what a caption reaches.
MIN_CAPTIONS = 50
#: Captions that are looked at of a collection; they are its own where half of the items have one.
_LOOKED_AT = 4_000
#: The cuts are made again when the number of items has changed by this much.
_GROWTH = 1.25
_ENCODED_AT_ONCE = 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibrator:
    """Makes and renews the calibration of one collection. Call with the writer's lock held.

    Attributes:
        data: folder of the edition.
        pin: what the manifest says of the model.
        current: the index, None where all vectors are compared, and the items.
    """

    data: Path
    pin: EncoderPin
    current: Callable[[], tuple[LoadedIndex | None, Snapshot]]

    def refresh(self, encoder: ImageTextEncoder) -> None:
        """Brings the calibration up to date with the collection, where its model has captions.

        The model is called only where there is no calibration yet. A model that cannot be loaded is
        no reason to fail: relevance is then that of `search.calibration`.
        """
        known = read_text_relevance(self.data, self.pin)
        captions = captions_of(self.pin.model) if known is None else None
        if known is None and captions is None:
            return  # before the index is loaded, or copied to a GPU
        num_items = len(self.current()[1])
        if num_items < MIN_ITEMS:
            return
        try:
            if captions is not None:
                self.make(encoder, captions, "model")
            elif known is not None and not 1 / _GROWTH <= num_items / known.num_items <= _GROWTH:
                self._write(known)
        except ClipsysError as error:
            _logger.warning("relevance is not calibrated: %s", error)

    def make(
        self, encoder: ImageTextEncoder, captions: TrainingCaptions, source: str
    ) -> TextRelevance:
        """Encodes captions and foreign texts, and makes the cuts.

        Args:
            encoder: the collection's.
            captions: what the model was trained with, or is asked for.
            source: where they come from.

        Raises:
            DataError: there are too few captions, or too few items.
        """
        if len(captions.captions) < MIN_CAPTIONS:
            raise DataError(
                f"{len(captions.captions)} captions are too few to calibrate relevance with; give "
                f"{MIN_CAPTIONS} or more different ones"
            )
        if len(self.current()[1]) < MIN_ITEMS:
            raise DataError(f"with fewer than {MIN_ITEMS} items relevance is not known; add images")
        _logger.info("calibrating relevance with %d captions", len(captions.captions))
        words = dict(captions.words)
        unknown_M = [unknown_share(words_of(text), words, own=1) for text in captions.captions]
        return self._write(
            TextRelevance(
                _encode(encoder, captions.captions),
                _encode(encoder, foreign_texts(NUM_FOREIGN)),
                words,
                np.array(unknown_M),
                source,
                0,
                Cuts(*([0.0] * 8)),
            )
        )

    def _write(self, made: TextRelevance) -> TextRelevance:
        cuts = self._cuts(made)
        made = replace(made, num_items=len(self.current()[1]), cuts=cuts)
        write_text_relevance(self.data, self.pin, made)
        _logger.info(
            "relevance: %.0f%% of captions and %.1f%% of foreign texts keep a hit%s",
            100 * cuts.captions_kept,
            100 * cuts.foreign_kept,
            "" if cuts.can_tell else "; the scores do not tell these apart, so nothing is left out",
        )
        return made

    def _cuts(self, made: TextRelevance) -> Cuts:
        foreign = made.foreign_SD
        unknown_S = [
            unknown_share(words_of(text), made.words) for text in foreign_texts(len(foreign))
        ]
        return find_cuts(
            best_M=self._best(made.captions_MD),
            near_M=nearness(made.captions_MD, made.captions_MD, are_captions=True),
            unknown_M=made.unknown_M,
            best_S=self._best(foreign),
            near_S=nearness(foreign, made.captions_MD),
            unknown_S=np.array(unknown_S),
            by_captions=made.source != "generic",
        )

    def _best(self, vectors_ND: Floats) -> Doubles:
        """The cosine of each text with the item nearest to it."""
        index, snapshot = self.current()
        found = rank_batch(snapshot, index, vectors_ND, 1)
        return np.array([scores[0] for _, scores in found], np.float64)


class _Cut(NamedTuple):
    """What a query and its best hit have to reach."""

    nearness: float
    unknown: float
    score: float

    def passed(self, near_N: Doubles, unknown_N: Doubles, best_N: Doubles) -> float:
        """The share of texts that do."""
        passes_N = (near_N >= self.nearness) & (unknown_N <= self.unknown) & (best_N >= self.score)
        return float(passes_N.mean())


def find_cuts(
    *,
    best_M: Doubles,
    near_M: Doubles,
    unknown_M: Doubles,
    best_S: Doubles,
    near_S: Doubles,
    unknown_S: Doubles,
    by_captions: bool = True,
) -> Cuts:
    """What a query has to reach, by captions and foreign texts; see `search.text_relevance`.

    Args:
        best_M: cosine of the best hit of each caption.
        near_M: its nearness to the others.
        unknown_M: share of its words that no other one has.
        best_S: cosine of the best hit of each foreign text; the next two as of captions.
        near_S: its nearness to captions.
        unknown_S: share of its words that no caption has.
        by_captions: whether the captions are such as the model was trained with. If not, only the
            score counts, and its cut is the one that `CHANCE` of the foreign texts pass.
    """
    area = float((best_M[:, None] > best_S).mean() + (best_M[:, None] == best_S).mean() / 2)
    floor = float(np.quantile(best_S, _NOISE))

    def cuts_at(share: float, floor: float) -> _Cut:
        return _Cut(
            float(np.quantile(near_M, share)),
            float(np.quantile(unknown_M, 1 - share)),
            max(float(np.quantile(best_M, share)), floor),
        )

    if by_captions:
        shares = np.linspace(0, 0.5, 251)
        enough = [
            share
            for share in shares
            if cuts_at(share, -np.inf).passed(near_M, unknown_M, best_M) >= KEPT
        ]
        for share in shares[shares >= max(enough)]:
            cut = cuts_at(share, floor)
            if cut.passed(near_S, unknown_S, best_S) <= CHANCE:
                break
    else:
        cut = _Cut(-1.0, 1.0, float(np.quantile(best_S, 1 - CHANCE)))
    return Cuts(
        nearness=cut.nearness,
        typical_nearness=float(np.median(near_M)),
        unknown=cut.unknown,
        score=cut.score,
        typical_score=float(np.median(best_M)),
        area=area,
        captions_kept=cut.passed(near_M, unknown_M, best_M),
        foreign_kept=cut.passed(near_S, unknown_S, best_S),
    )


def captions_of_collection(store: Store, snapshot: Snapshot) -> TrainingCaptions | None:
    """A collection's own captions, where at least half of its items have one and they suffice."""
    ids = snapshot.spread(_LOOKED_AT).tolist()
    captioned = [item.captions for item in store.items(ids).values() if item.captions]
    sample = sample_captions(captioned)
    if 2 * len(captioned) < len(ids) or len(sample.captions) < MIN_CAPTIONS:
        return None
    return sample


def best_known_captions(
    pin: EncoderPin, store: Store, snapshot: Snapshot
) -> tuple[TrainingCaptions, str]:
    """The model's captions, else the collection's own, else generic ones; and which."""
    if (found := captions_of(pin.model)) is not None:
        return found, "model"
    if (own := captions_of_collection(store, snapshot)) is not None:
        return own, "collection"
    return generic_captions(), "generic"


def _encode(encoder: ImageTextEncoder, texts: Sequence[str]) -> Floats:
    """Texts as unit vectors, (N, D) float32."""
    starts = range(0, len(texts), _ENCODED_AT_ONCE)
    return np.concatenate([encoder.encode_text(texts[at : at + _ENCODED_AT_ONCE]) for at in starts])
