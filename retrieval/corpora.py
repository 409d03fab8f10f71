"""Several sources as one stream of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from clipsys.errors import DataError
from clipsys.sources import Record, iterate_source, source_kind


def count_records(sources: Sequence[str | Path]) -> int | None:
    """How many records the sources have; None where only reading them through would tell.

    Folders and tables are gone through without opening an image. It is done before anything is
    written, so that a mistyped second source does not surface after an hour with the first.

    Raises:
        DataError: none is named, or one of them is missing or empty.
    """
    if not sources:
        raise DataError("nothing to add; name a folder, a table or shards")
    total: int | None = 0
    for source in sources:
        if source_kind(source) == "shards":
            next(iterate_source(source))
            total = None
        else:
            number = sum(1 for _ in iterate_source(source))
            total = None if total is None else total + number
    return total


def iterate_once(sources: Sequence[str | Path]) -> Iterator[Record]:
    """The records of all sources; where several have the same uri, the first one's.

    Raises:
        DataError: a source cannot be read, or not to its end.
    """
    seen: set[str] = set()
    for source in sources:
        for record in iterate_source(source):
            if record.uri not in seen:
                seen.add(record.uri)
                yield record
