"""Several sources as one stream of records, each with the source that gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clipsys.corpora.folders import count_images
from clipsys.corpora.real_paths import real_source
from clipsys.corpora.records import Record, check_regular
from clipsys.corpora.sources import iterate_source, source_kind
from clipsys.corpora.tables import Columns
from clipsys.errors import DataError
from clipsys.progress import progress
from clipsys.retrieval.storage.sources import KnownSource
from clipsys.shards.random_access import index_shard
from clipsys.shards.reading import expand_shards, shard_failure


@dataclass(frozen=True)
class Entry:
    """A record on its way into a collection.

    Attributes:
        source: name of the source that gave it; None if no source claims it.
        repeated: another source of the same run gave its uri before.
        item_id: the id that a new item takes; None: the next one.
    """

    record: Record
    source: str | None = None
    repeated: bool = False
    item_id: int | None = None


@dataclass(frozen=True)
class Source:
    """A source, under the one name that a collection remembers it by, and how it is read.

    Attributes:
        name: its real path, or its address.
        exclude: patterns of what a folder leaves out besides what it leaves out anyway.
        columns: what the columns of a table mean.
    """

    name: str
    exclude: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)

    @classmethod
    def of(cls, source: str | Path, exclude: Sequence[str], columns: Columns) -> Source:
        """What a user named, by any path.

        Raises:
            DataError: the name is empty, as an unset variable of a script is.
        """
        if not str(source):
            raise DataError("a source is an empty text; name a folder, a table, shards or an image")
        return cls(real_source(source), tuple(exclude), columns)

    @classmethod
    def of_known(cls, known: KnownSource) -> Source:
        """One that a collection knows, with the settings with which it was indexed last."""
        columns = dict(known.settings.get("columns", {}))
        if "captions" in columns:
            columns["captions"] = tuple(columns["captions"])
        return cls(
            real_source(known.name), tuple(known.settings.get("exclude", ())), Columns(**columns)
        )

    def settings(self) -> dict[str, Any]:
        """What `of_known` reads; empty where everything is as it is by default."""
        columns = {key: value for key, value in asdict(self.columns).items() if value}
        given = {"exclude": list(self.exclude), "columns": columns}
        return {key: value for key, value in given.items() if value}

    def records(self, on_error: Callable[[str, Exception], None] | None = None) -> Iterator[Record]:
        """Its records; see `clipsys.corpora.sources.iterate_source`."""
        return iterate_source(
            self.name, columns=self.columns, exclude=self.exclude, on_error=on_error
        )


def check_sources(sources: Sequence[Source]) -> None:
    """Looks at the first record of each source, which is quick.

    Raises:
        DataError: none is named, or one of them is missing or empty.
    """
    if not sources:
        raise DataError("nothing to add; name a folder, a table, shards or an image")
    for source in sources:
        broken = _Broken()
        try:
            next(source.records(broken))
        except DataError:
            broken.raise_first()
            raise


def count_records(sources: Sequence[Source], *, show_progress: bool = False) -> int | None:
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
        kind = source_kind(source.name)
        if kind == "shards":
            number = _count_samples(source.name, show_progress=show_progress)
        elif kind == "folder":
            number = count_images(source.name, source.exclude)
        else:
            number = sum(1 for _ in source.records())
        total = None if total is None or number is None else total + number
    return total


def _count_samples(source: str, *, show_progress: bool) -> int | None:
    """Samples of local shards, as far as they are whole; None where a shard is remote."""
    shards = expand_shards(source)
    if any("://" in shard for shard in shards):
        return None
    total = 0
    shown = progress("counting samples", len(shards), unit="shards") if show_progress else None
    with shown or nullcontext(lambda _: None) as advance:
        for shard in shards:
            with suppress(DataError):  # said when its turn comes
                check_regular(shard)
                total += len(index_shard(shard))
            advance(1)
    return total


class Corpus:
    """The records of several sources, and after the walk which uris each of them gave."""

    def __init__(self, sources: Sequence[Source], place: Callable[[str], str]) -> None:
        """``place`` gives the one uri of an image whose folder is mounted in several places."""
        self._sources = list({source.name: source for source in sources}.values())
        self._place = place
        #: Uris by source, filled while iterating.
        self.seen: dict[str, set[str]] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Where several sources have the same uri, later ones only fill what the first left open.

        Raises:
            DataError: a source cannot be read; or, after all of them, a shard broke off.
        """
        broken = _Broken()
        for source in self._sources:
            mine = self.seen.setdefault(source.name, set())
            for found in source.records(broken):
                uri = self._place(found.uri)
                record = found if uri == found.uri else replace(found, uri=uri)
                if uri in mine:
                    continue
                repeated = any(uri in others for others in self.seen.values())
                mine.add(uri)
                yield Entry(record, source.name, repeated=repeated)
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
