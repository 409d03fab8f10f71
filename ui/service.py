"""What the page asks for, without a page: searches, classification and facts about a collection."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image

from clipsys.errors import QueryError
from clipsys.images.decoding import decode_image
from clipsys.retrieval import Collection, CollectionInfo, Failure, Hit, Item, Options, Part, Query
from clipsys.retrieval.search.grammar import parse_part, parse_query
from clipsys.retrieval.search.options import NEAR_DUPLICATE
from clipsys.retrieval.storage.conditions import parse_conditions
from clipsys.ui.thumbnails import ThumbnailCache
from clipsys.zeroshot.classifier import ZeroShotClassifier

#: Captions of this many words or fewer serve as examples of queries.
_EXAMPLE_WORDS = 8
_GENERAL_EXAMPLES = ("a dog on the beach", "something red", "people at a table", "a close-up")
_GENERAL_LABELS = "dog, cat, person, car, tree"
_LOOKED_AT = 1_000
#: The most hits that one question may ask for: each is a thumbnail to be made and sent.
MAX_HITS = 100
DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Card:
    """An item with its picture and, where it answers a query, the hit."""

    item: Item
    thumbnail: Path
    hit: Hit | None = None


@dataclass(frozen=True)
class Choices:
    """What stands under "Options", as it was filled in; blank texts count as not given.

    Attributes:
        k: hits of a page.
        negative: what the hits should be unlike, as in a query.
        where: conditions, separated by semicolons.
        words: of captions and file names.
        relevant_only: leaves out what chance explains.
        diverse: folds near-duplicates into one.
        sort: key by which the hits are put in order; empty: the best first.
        descending: turns that order round.
    """

    k: int = 24
    negative: str = ""
    where: str = ""
    words: str = ""
    relevant_only: bool = False
    diverse: bool = False
    sort: str = ""
    descending: bool = False


@dataclass(frozen=True)
class Answer:
    """Search results.

    Attributes:
        cards: the hits, best first or as sorted.
        seconds: how long it took.
        note: why there are none, or what is uncertain about those that there are.
    """

    cards: tuple[Card, ...]
    seconds: float
    note: str | None = None


class SearchService:
    """Answers the app's questions about one collection. Thread-safe."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.thumbnails = ThumbnailCache(collection.path / "thumbnails")
        self._classifier_lock = threading.Lock()
        self._classifier: tuple[tuple[str, str], ZeroShotClassifier] | None = None

    @cached_property
    def metadata_keys(self) -> list[str]:
        """Keys to filter and sort by, as of when the page was made."""
        return self.collection.metadata_keys()

    def search(
        self,
        *,
        text: str = "",
        image: Path | None = None,
        item: int | None = None,
        choices: Choices | None = None,
    ) -> Answer:
        """Searches; a blank text counts as not given. A filter or a sort alone lists what passes.

        Args:
            text: a query in one line; see `clipsys.retrieval.search.grammar`. It may not name
                files: they are this machine's, not the visitor's.
            image: an uploaded file.
            item: for more like this one.
            choices: the rest of the page.

        Raises:
            QueryError: nothing to look for, or a query or filter that is not understood.
            ImageDecodeError: the uploaded file is not a usable image.
        """
        started = time.perf_counter()
        choices = choices or Choices()
        words = choices.words.strip() or None
        conditions = parse_conditions(choices.where)
        sort = choices.sort.strip()
        nothing = not text.strip() and image is None and item is None and words is None
        if nothing and (choices.negative.strip() or not (conditions or sort)):
            raise QueryError("Say what to look for.")
        parts: list[Part] = []
        if text.strip():
            parts += parse_query(text, allow_files=False).parts
        if image is not None:
            parts.append(Part(image=decode_upload(image)))
        if item is not None:
            parts.append(Part(item=item))
        if choices.negative.strip():
            parts.append(parse_part(choices.negative, -1, allow_files=False))
        options = Options(
            min(int(choices.k), MAX_HITS),
            conditions=tuple(conditions),
            # Only images that are compared with something have a relevance.
            relevant_only=choices.relevant_only and bool(parts),
            diverse=NEAR_DUPLICATE if choices.diverse else None,
            sort=f"{'-' if choices.descending else ''}{sort}" if sort else None,
        )
        query = None if nothing else Query(tuple(parts), words)
        (hits,) = self.collection.search_batch([query], options)
        note = self.collection.doubt(query, hits, options)
        if not hits and conditions:
            note = self.collection.explain_filter(conditions) or note
        seconds = time.perf_counter() - started
        found = self.collection.items_of(hits)
        paths = self.thumbnails.paths([found[hit.id] for hit in hits])
        cards = tuple(Card(found[hit.id], path, hit) for hit, path in zip(hits, paths, strict=True))
        return Answer(cards, seconds, note)

    def browse(self, k: int = 24) -> tuple[Card, ...]:
        """Some images from all over the collection, to look at before the first query."""
        items = self.collection.sample(k)
        return tuple(map(Card, items, self.thumbnails.paths(items)))

    def classify(
        self, image: Path, labels: str, template: str = DEFAULT_TEMPLATE
    ) -> dict[str, float]:
        """Probability of each label for an uploaded image.

        Args:
            image: the uploaded file.
            labels: separated by commas, semicolons or line breaks.
            template: the sentence into which a label goes at ``{}``.

        Raises:
            ConfigError: fewer than two labels, or a template without ``{}``.
            ImageDecodeError: the uploaded file is not a usable image.
        """
        picture = decode_upload(image)
        given = (name.strip() for name in re.split(r"[,;\n]", labels))
        names = list(dict.fromkeys(name for name in given if name))
        encoder = cast(Any, self.collection.encoder)
        key = ("\n".join(names), template)
        with self._classifier_lock, self.collection.encoder_lock:
            if self._classifier is None or self._classifier[0] != key:
                classifier = ZeroShotClassifier(encoder, names, [template.strip()], cache=False)
                self._classifier = (key, classifier)
            return self._classifier[1].predict([picture])[0].probabilities

    def info(self) -> CollectionInfo:
        """Counts, model and index."""
        return self.collection.info()

    def failures(self, limit: int) -> list[Failure]:
        """Files that could not be used."""
        return self.collection.failures(limit)

    def examples(self, count: int = 4) -> list[str]:
        """Queries to try: short captions from all over the collection, or general ones."""
        items = self.collection.sample(_LOOKED_AT)
        captions = [min(item.captions, key=len, default="").strip(" .") for item in items]
        short = list(dict.fromkeys(c for c in captions if 0 < len(c.split()) <= _EXAMPLE_WORDS))
        return short[:: max(1, len(short) // count)][:count] or list(_GENERAL_EXAMPLES[:count])

    def label_examples(self) -> str:
        """Labels to begin with: those of the collection, or general ones."""
        found = {item.metadata.get("label") for item in self.collection.sample(_LOOKED_AT)}
        labels = sorted(str(label) for label in found - {None})
        return ", ".join(labels[:12]) if len(labels) > 1 else _GENERAL_LABELS


def decode_upload(path: Path) -> Image.Image:
    """Decodes an uploaded file through the same decoder as everything else.

    Raises:
        ImageDecodeError: it is not a usable image; the message does not show the server's path.
    """
    return decode_image(path, uri="The uploaded file")
