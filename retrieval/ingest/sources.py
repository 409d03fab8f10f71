"""Several sources as one stream of records, each with the source that gave it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from clipsys.corpora.records import Record
from clipsys.corpora.sources import count_images, iterate_source, source_kind
from clipsys.errors import DataError
from clipsys.progress import progress
from clipsys.shards.random_access import index_shard
from clipsys.shards.reading import expand_shards, shard_failure


@dataclass(frozen=True)
class Entry:
    """A record on its way into a collection.

    Attributes:
        source: the source that gave it, by `source_name`; None if no source claims it.
        repeated: its uri came earlier in the same run; only the source's claim is news.
        item_id: the id that a new item takes; None: the next one.
    """

    record: Record
    source: str | None = None
    repeated: bool = False
    item_id: int | None = None


def check_sources(sources: Sequence[str | Path]) -> None:
    """Looks at the first record of each source, which is quick.

    Raises:
        DataError: none is named, or one of them is missing or empty.
    """
    if not sources:
        raise DataError("nothing to add; name a folder, a table or shards")
    for source in sources:
        broken = _Broken()
        try:
            next(iterate_source(source, on_error=broken))
        except DataError:
            broken.raise_first()
            raise


def count_records(sources: Sequence[str | Path], *, show_progress: bool = False) -> int | None:
    """How many records the sources have; None where only fetching them would tell.

    Folders are counted by names, tables gone through without an image, shards by their headers,
    which takes 0.1 ms a sample. It is done before anything is written, so that a mistyped second
    source does not surface after an hour with the first.

    Raises:
        DataError: none is named, or one of them is missing or empty.
    """
    check_sources(sources)
    total: int | None = 0
    for source in sources:
        kind = source_kind(source)
        if kind == "shards":
            number = _count_samples(source, show_progress=show_progress)
        elif kind == "folder":
            number = count_images(source)
        else:
            number = sum(1 for _ in iterate_source(source))
        total = None if total is None or number is None else total + number
    return total


def _count_samples(source: str | Path, *, show_progress: bool) -> int | None:
    """Samples of local shards, as far as they are whole; None where a shard is remote."""
    shards = expand_shards(source)
    if any("://" in shard for shard in shards):
        return None
    total = 0
    shown = progress("counting samples", len(shards), unit="shards") if show_progress else None
    with shown or nullcontext(lambda _: None) as advance:
        for shard in shards:
            with suppress(DataError):  # said when its turn comes
                total += len(index_shard(shard))
            advance(1)
    return total


def source_name(source: str | Path) -> str:
    """What a collection remembers a source by: its absolute path, or its address."""
    return str(source) if "://" in str(source) else str(Path(source).expanduser().absolute())


class Corpus:
    """The records of several sources, and after the walk which uris each of them gave."""

    def __init__(self, sources: Sequence[str | Path]) -> None:
        self._sources = list(dict.fromkeys(sources))
        #: Uris by source, filled while iterating.
        self.seen: dict[str, set[str]] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Where several sources have the same uri, the first one's captions and metadata count.

        Raises:
            DataError: a source cannot be read; or, after all of them, a shard broke off.
        """
        broken = _Broken()
        for source in self._sources:
            name = source_name(source)
            mine = self.seen.setdefault(name, set())
            for record in iterate_source(source, on_error=broken):
                if record.uri in mine:
                    continue
                repeated = any(record.uri in others for others in self.seen.values())
                mine.add(record.uri)
                yield Entry(record, name, repeated=repeated)
        broken.raise_first("; all that can be read is in the collection")


class _Broken:
    """Collects shards that break off, so that those that follow are read all the same."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def __call__(self, shard: str, error: Exception) -> None:
        self._messages.append(shard_failure(shard, error))

    def raise_first(self, circumstance: str = "") -> None:
        """Raises `DataError` if there is any."""
        if self._messages:
            more = len(self._messages) - 1
            others = f" (and {more} more)" if more else ""
            raise DataError(f"{self._messages[0]}{others}{circumstance}")
