"""An item's captions and metadata, following the sources that give them.

    what the item has  -  what this source gave before  +  what it gives now

An emptied cell, a removed column and a deleted ``.txt`` empty the item's text as well, while what
another source gave stays: indexing a table of a folder's images and then the folder itself strips
nothing. `clipsys.retrieval.storage.sources` says whose a text is. Annotations are of no source
(`clipsys.retrieval.storage.annotations`): they stay as they are, except where a source gives their
key for the item.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from clipsys.corpora.records import Record
from clipsys.retrieval.storage.items import Item, plain_text, to_json
from clipsys.retrieval.storage.sources import Claim

_NOTHING = Claim()


@dataclass(frozen=True)
class Texts:
    """Captions and metadata, in the form in which they are read back."""

    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_record(cls, record: Record) -> Texts:
        """What a source gives; a label is metadata like any other."""
        metadata = dict(record.metadata)
        if record.label is not None:
            metadata.setdefault("label", record.label)
        captions = tuple(plain_text(caption) for caption in record.captions)
        return cls(captions, json.loads(to_json(metadata)))

    @classmethod
    def of_item(cls, item: Item) -> Texts:
        """What an item has."""
        return cls(item.captions, item.metadata)

    def without(self, claim: Claim) -> Texts:
        """These texts less those that are claimed."""
        kept = {key: value for key, value in self.metadata.items() if key not in claim.keys}
        return Texts(() if claim.captions else self.captions, kept)

    def over(self, other: Texts) -> Texts:
        """These texts, and what the other has besides."""
        return Texts(self.captions or other.captions, {**other.metadata, **self.metadata})

    def claim(self) -> Claim:
        """These texts as a claim."""
        return Claim(bool(self.captions), frozenset(self.metadata))


def merge(
    given: Texts,
    known: Texts,
    source: str | None,
    origins: Mapping[str, Claim | None],
    *,
    fills: bool = False,
    annotated: AbstractSet[str] = frozenset(),
) -> tuple[Texts, dict[str, Claim]]:
    """What an item has after a source gave it again, and the claims that change by that.

    Args:
        given: what the source gives now.
        known: what the item has.
        source: its name; None: no source, what is given comes over what is known.
        origins: every source that gave the item, with its claim or None.
        fills: an earlier source of the same run comes first; only what it left open is filled.
        annotated: keys that are annotations; a source has claimed one that it gives.
    """
    kept = annotations_of(known, origins, annotated)
    if source is None:
        return Texts(metadata=kept).over(given.over(known)), {}
    bare = known.without(_keys(kept))
    merged, gives, changed = _merge(given, bare, source, origins, fills=fills)
    if gives.keys & annotated and origins.get(source) != gives:
        changed[source] = gives  # else the key would count as an annotation
    return merged.over(Texts(metadata=kept)), changed


def _merge(
    given: Texts,
    known: Texts,
    source: str,
    origins: Mapping[str, Claim | None],
    *,
    fills: bool,
) -> tuple[Texts, Claim, dict[str, Claim]]:
    """`merge` for a source, of an item without annotations; besides, what it gives now."""
    others = {name: claim for name, claim in origins.items() if name != source}
    if not others:
        gives = given.claim()
        return given, gives, {} if origins.get(source) in (None, gives) else {source: gives}
    mine = _claim_of(source, known, origins)
    rest = known.without(mine)
    merged = rest.over(given) if fills else given.over(rest)
    gives = given.without(rest.claim()).claim() if fills else given.claim()
    changed = {
        name: _less(claim, gives)
        for name, claim in others.items()
        if claim is not None and _less(claim, gives) != claim
    }
    is_rowless = source in origins and origins[source] is None
    if not (is_rowless and None not in others.values()) and origins.get(source) != gives:
        changed[source] = gives
    return merged, gives, changed


def annotations_of(
    known: Texts, origins: Mapping[str, Claim | None], annotated: AbstractSet[str]
) -> dict[str, Any]:
    """The annotations of an item: what it has of the annotated keys that no source has claimed."""
    claimed = {key for claim in origins.values() if claim is not None for key in claim.keys}
    return {
        key: value
        for key, value in known.metadata.items()
        if key in annotated and key not in claimed
    }


def _keys(metadata: Mapping[str, Any]) -> Claim:
    return Claim(keys=frozenset(metadata))


def without_source(
    known: Texts,
    source: str,
    origins: Mapping[str, Claim | None],
    annotated: AbstractSet[str] = frozenset(),
) -> Texts:
    """What an item has left when one of several sources no longer gives it."""
    kept = annotations_of(known, origins, annotated)
    bare = known.without(_keys(kept))
    return bare.without(_claim_of(source, bare, origins)).over(Texts(metadata=kept))


def claims_of_all(
    known: Texts, origins: Mapping[str, Claim | None], annotated: AbstractSet[str] = frozenset()
) -> dict[str, Claim]:
    """The claim of each source, those without a row worked out."""
    bare = known.without(_keys(annotations_of(known, origins, annotated)))
    return {source: _claim_of(source, bare, origins) for source in origins}


def _claim_of(source: str, known: Texts, origins: Mapping[str, Claim | None]) -> Claim:
    if source not in origins:
        return _NOTHING
    claim = origins[source]
    if claim is not None:
        return claim
    if sum(one is None for one in origins.values()) > 1:
        return _NOTHING  # older than claims: the origin of the text is unknown
    rest = known
    for other in origins.values():
        rest = rest.without(other or _NOTHING)
    return rest.claim()


def _less(claim: Claim, taken: Claim) -> Claim:
    return Claim(claim.captions and not taken.captions, claim.keys - taken.keys)
