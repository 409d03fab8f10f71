"""Items and failures as values: what the store holds, and what a commit brings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One item as stored, without its vector."""

    id: int
    uri: str
    content_hash: str
    size_bytes: int | None
    mtime_ns: int | None
    captions: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def caption(self) -> str | None:
        """The first caption, if there is any."""
        return self.captions[0] if self.captions else None


@dataclass(frozen=True)
class Failure:
    """One file that could not be used, why, and what is known of it for another attempt."""

    uri: str
    reason: str
    message: str
    size_bytes: int | None = None
    mtime_ns: int | None = None
    attempts: int = 1
    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Location:
    """Where a vector lies: a segment's database id and the row inside it."""

    segment: int
    row: int


@dataclass(frozen=True)
class NewItem:
    """An item to insert. ``location`` None: its vector is the next row of the batch's segment.

    ``id`` None: it gets the next one; a migration carries ids over.
    """

    uri: str
    content_hash: str
    size_bytes: int | None
    mtime_ns: int | None
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]
    location: Location | None = None
    replaces: int | None = None
    id: int | None = None


@dataclass(frozen=True)
class ItemUpdate:
    """New file facts, captions and metadata for an item whose image stays the same.

    ``moved_from``, ``moved_to``: its file was moved; None: it was not.
    """

    id: int
    size_bytes: int | None
    mtime_ns: int | None
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]
    moved_from: str | None = None
    moved_to: str | None = None


@dataclass
class Batch:
    """What one transaction commits.

    ``origins``: (source, uri), which source gave which uri. ``claims``: (source, uri, captions,
    metadata keys), which texts of it; see `clipsys.retrieval.storage.sources`.
    """

    new: list[NewItem] = field(default_factory=list)
    updates: list[ItemUpdate] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    origins: list[tuple[str, str]] = field(default_factory=list)
    claims: list[tuple[str, str, bool, frozenset[str]]] = field(default_factory=list)

    def __len__(self) -> int:
        notes = len(self.origins) + len(self.claims)
        return len(self.new) + len(self.updates) + len(self.failures) + notes


def plain_text(text: str) -> str:
    """Text without lone surrogates, which SQLite cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def to_json(value: object) -> str:
    """JSON text that SQLite's JSON functions accept, with sorted keys.

    NaN and infinities, which JSON lacks, become null; other foreign values (dates) their text.
    """
    return json.dumps(_finite(value), sort_keys=True, ensure_ascii=False, default=str)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, Mapping):
        return {plain_text(str(key)): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
