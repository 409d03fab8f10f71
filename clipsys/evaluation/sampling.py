"""A part of a data set that is spread over the whole of it, by a hash of the images' names."""

from __future__ import annotations

import hashlib
import heapq
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from clipsys.corpora.real_paths import real_path
from clipsys.corpora.records import Record, check_regular
from clipsys.corpora.sources import sample_record
from clipsys.errors import DataError
from clipsys.files.expansion import expand_path
from clipsys.shards.random_access import parse_range
from clipsys.shards.reading import TAR_FAULTS, shard_failure
from clipsys.shards.remote import is_remote
from clipsys.shards.samples import REPEATED
from clipsys.shards.tar_headers import walk_members


class _Range(NamedTuple):
    """Where a sample lies; sorts by the hash of its name."""

    rank: bytes
    number: int
    shard: str
    name: str
    start: int
    end: int


def spread(records: Iterable[Record], limit: int, name: str) -> list[Record]:
    """At most ``limit`` records, those whose names have the smallest hashes, in their order.

    Args:
        records: all of them.
        limit: how many are taken.
        name: the data set, as it was named: what lies in its folder is named from there, so that a
            folder that was moved gives the same part.
    """
    root = _real_root(name)
    ranked = ((_rank(record.uri, root), place, record) for place, record in enumerate(records))
    chosen = heapq.nsmallest(limit, ranked, key=lambda one: one[:2])
    return [record for _, _, record in sorted(chosen, key=lambda one: one[1])]


def sampled_shards(shards: Sequence[str], limit: int, name: str) -> Iterator[Record]:
    """`spread` of the samples of local shards, of which nothing but the headers is read.

    Raises:
        DataError: a shard cannot be read to its end.
    """
    chosen = heapq.nsmallest(limit, _ranges(shards, _real_root(name)))
    chosen.sort(key=lambda one: one.number)
    for shard, ranges in groupby(chosen, key=lambda one: one.shard):
        try:
            with Path(shard).open("rb") as file:
                for one in ranges:
                    file.seek(one.start)
                    raw = parse_range(file.read(one.end - one.start), shard)
                    if one.name.endswith("\0"):
                        raw[REPEATED] = True
                    yield sample_record(str(real_path(shard)), raw)
        except OSError as error:
            raise DataError(shard_failure(shard, error)) from error


def _ranges(shards: Sequence[str], root: str) -> Iterator[_Range]:
    number = 0
    for shard in shards:
        check_regular(shard)
        real = str(real_path(shard))
        found: dict[str, tuple[int, int]] = {}
        repeated: set[str] = set()
        last: str | None = None
        try:
            with io.BufferedReader(io.FileIO(shard)) as file:
                for key, _, start, end in walk_members(file):
                    if key == last:
                        found[key] = (found[key][0], end) if key not in repeated else found[key]
                    elif key in found:
                        repeated.add(key)
                    else:
                        found[key] = (start, end)
                    last = key
        except TAR_FAULTS as error:
            raise DataError(shard_failure(shard, error)) from error
        for key, (start, end) in found.items():
            mark = "\0" if key in repeated else ""
            uri = f"{real}#{key}"
            yield _Range(_rank(uri, root), number, shard, uri + mark, start, end)
            number += 1


def _rank(uri: str, root: str) -> bytes:
    """Where an image stands in the order of a limited data set."""
    return hashlib.sha256(uri.removeprefix(root).encode("utf-8", "surrogateescape")).digest()


def _real_root(name: str) -> str:
    """What the uris of local data begin with."""
    if is_remote(name):
        return ""
    path = Path(expand_path(name)).absolute()
    folder = path if path.is_dir() else path.parent
    return str(real_path(folder / "x").parent) + os.sep
