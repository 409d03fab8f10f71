"""Data sets of an evaluation: published layouts and people's own files as records.

    open_data(spec) --splits--> sources --> records --label key, captions, limit--> DataSet

Kinds: an image folder (with or without folders for train, validation and test), tables, shards,
CLIP benchmark's shards, Hugging Face's Parquet, and any records that the caller has, such as those
of a collection. `clipsys.evaluation.splits` says how splits are found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipsys.corpora.columns import Columns
from clipsys.corpora.records import Record
from clipsys.corpora.sources import iterate_source, source_kind
from clipsys.corpora.tables import class_label_names
from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.clip_benchmark import (
    MULTILABEL,
    RETRIEVAL,
    dataset_type,
    multilabel_records,
    with_caption_lines,
)
from clipsys.evaluation.sampling import sampled_shards, spread
from clipsys.evaluation.splits import find_sources
from clipsys.files.expansion import expand_path
from clipsys.shards.reading import expand_shards
from clipsys.shards.remote import is_remote

_SPLIT_KEY = "split"


@dataclass(frozen=True)
class DataSet:
    """The images of an evaluation, not yet read.

    Attributes:
        name: what messages and results call it, as it was named.
        places: folders that it lies in, where class names and templates may lie beside it.
        class_names: names of its classes in their order, where the data bring them themselves
            (Hugging Face's ``ClassLabel``); labels are these names. Else empty.
        split: name of the split that it is; None where it has none.
    """

    name: str
    places: tuple[Path, ...]
    class_names: tuple[str, ...]
    split: str | None
    _open: Callable[[], Iterable[Record]] = field(repr=False, compare=False)

    def records(self) -> Iterator[Record]:
        """The images, in a stable order; each call begins anew.

        Raises:
            DataError: the data cannot be read, or lack the metadata key that is asked for.
        """
        return iter(self._open())


def open_data(
    spec: str | Path,
    *,
    columns: Columns = Columns(),
    split: str | None = None,
    limit: int | None = None,
    label_key: str | None = None,
    records: Iterable[Record] | None = None,
) -> DataSet:
    """Opens a data set by its folder, its table or its shards.

    Args:
        spec: what `clipsys.corpora.sources.iterate_source` reads, or a folder with splits.
        columns: what the columns of a table mean.
        split: the folder, the beginning of the files' names, or the value of a metadata key
            ``split``. Where several splits exist and none is named, ``test`` is taken, and without
            one the validation split; the log says so.
        limit: this many images, those whose names have the smallest SHA-256: spread over the whole
            data, the same at each run and on each machine, and part of those of a larger limit.
            They stay in the order of the data.
        label_key: metadata key whose value is the label, in place of a folder's or a column's.
        records: the images, where ``spec`` only names what they come from.

    Raises:
        DataError: there are no such data, or no such split.
        ConfigError: the limit is not positive.
    """
    name = str(spec)
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit}; expected 1 image or more")
    if records is not None:
        given = list(records) if not isinstance(records, Sequence) else records
        chosen = _with_split(given, name, split) if split is not None else given
        opened = _finished(lambda: chosen, name, limit=limit, label_key=label_key)
        return DataSet(name, (Path(expand_path(name)).absolute(),), (), split, opened)
    sources, found, by_key = find_sources(name, split)
    root = Path(expand_path(name)).absolute()
    beside = [root] if root.is_dir() else []
    places = tuple(dict.fromkeys([*(place for one in sources for place in _places(one)), *beside]))
    kind = dataset_type(places)
    labels = _label_names(sources, columns, label_key)

    def read() -> Iterable[Record]:
        if kind == MULTILABEL:
            shards = [shard for source in sources for shard in expand_shards(source)]
            read_records: Iterable[Record] = multilabel_records(shards)
        elif limit is not None and not by_key and (local := _local_shards(sources)) is not None:
            read_records = sampled_shards(local, limit, name)
        else:
            read_records = itertools.chain.from_iterable(
                iterate_source(source, columns=columns) for source in sources
            )
        if kind == RETRIEVAL:
            read_records = map(with_caption_lines, read_records)
        return _with_split(read_records, name, str(split)) if by_key else read_records

    opened = _finished(read, name, limit=limit, label_key=label_key)
    return DataSet(name, places, labels, found, opened)


def _finished(
    read: Callable[[], Iterable[Record]], name: str, *, limit: int | None, label_key: str | None
) -> Callable[[], Iterable[Record]]:
    def records() -> Iterable[Record]:
        found = read()
        if limit is not None:
            found = spread(found, limit, name)
        return found if label_key is None else _labelled(found, name, label_key)

    return records


def _with_split(records: Iterable[Record], name: str, split: str) -> Iterator[Record]:
    """The records whose metadata key ``split`` has this value."""
    known: dict[str, None] = {}
    num_found = 0
    for record in records:
        value = record.metadata.get(_SPLIT_KEY)
        if value is not None and str(value) == split:
            num_found += 1
            yield record
        elif value is not None:
            known.setdefault(str(value))
    if not num_found:
        there = f"the splits are {', '.join(list(known)[:8])}" if known else "it has no splits"
        raise DataError(
            f"{name}: there is no split {split!r}; {there} (folders, beginnings of the files' "
            f"names, or a metadata key {_SPLIT_KEY!r})"
        )


def _labelled(records: Iterable[Record], name: str, key: str) -> Iterator[Record]:
    """The records with a metadata value as their label."""
    keys: dict[str, None] = {}
    num_found = num_records = 0
    for record in records:
        value = record.metadata.get(key)
        keys.update(dict.fromkeys(record.metadata))
        num_found += value is not None
        num_records += 1
        yield replace(record, label=None if value is None else str(value).strip() or None)
    if num_records and not num_found:
        raise DataError(
            f"{name}: no image has the metadata key {key!r} (--label-key); the keys are "
            f"{', '.join(sorted(keys)) or 'none'}"
        )


def _label_names(
    sources: Sequence[str], columns: Columns, label_key: str | None
) -> tuple[str, ...]:
    """The class names that the schema of Parquet tables gives."""
    for source in sources:
        if source.endswith(".parquet"):
            return tuple(class_label_names(Path(expand_path(source)), columns, label_key))
    return ()


def _local_shards(sources: Sequence[str]) -> list[str] | None:
    """The shards that the sources are, if these are local shards and nothing else."""
    if any(source_kind(source) != "shards" for source in sources):
        return None
    shards = [shard for source in sources for shard in expand_shards(source)]
    return None if any(map(is_remote, shards)) else shards


def _places(source: str) -> list[Path]:
    """The folders that a source lies in, local ones."""
    text = expand_path(source)
    if "://" in text:
        return []
    if Path(text).is_dir():
        return [Path(text).absolute()]
    if source_kind(text) == "shards":
        shards = [Path(shard).absolute() for shard in expand_shards(text)]
        return list(dict.fromkeys(shard.parent for shard in shards))
    return [Path(text).absolute().parent]
