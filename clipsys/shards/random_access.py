"""Random access to the samples of tar shards, without extracting or streaming them.

    index_shard    one pass over the headers of a tar: where each sample begins and ends; stored
                   with the cache, so that one process of a machine makes it, once
    ShardReader    reads sample N of a shard: one read of its bytes, a parse of its headers

A shard streams well from its beginning, but an order of samples that is a function of the seed
alone needs any sample at any time, and so do a resume inside an epoch and workers that read just
their own rows. Members of a sample lie side by side in a tar, so one byte range per sample (16
bytes) is all the index there is; what lies in the range is itself a tar, whose members
`clipsys.shards.samples.group_members` groups as it groups those of a whole shard.
"""

from __future__ import annotations

import io
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipsys.errors import DataError
from clipsys.shards.reading import TAR_FAULTS, raw_samples, shard_failure
from clipsys.shards.remote import ShardCache
from clipsys.shards.samples import (
    NUMBER,
    REPEATED,
    group_members,
    is_image,
    printable,
    split_name,
)
from clipsys.shards.stored_index import ShardIndex, load_index, save_index
from clipsys.shards.tar_headers import plain_member, walk_members

_BLOCK = tarfile.BLOCKSIZE
#: Shards that a reader keeps open.
MAX_OPEN = 128


def index_shard(
    shard: str,
    cache: ShardCache | None = None,
    *,
    on_block: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Reads the headers of a tar, or what an earlier call has stored of them with the cache.

    Args:
        shard: a path; a url too where there is a cache to read it from.
        cache: for the copies of remote shards, and for the index.
        on_block: called with the bytes that have come of a remote one while it is fetched.

    Raises:
        DataError: it is not a tar file at all, or holds no whole sample.
    """
    try:
        opened = cache.open(shard, on_block=on_block) if cache else io.FileIO(shard)
        with io.BufferedReader(opened) as file:
            if cache is None:
                return _make_index(shard, file)
            path, stamp = cache.index_path(shard), cache.stamp(shard, file.fileno())
            index = load_index(path, shard, stamp)
            if index is None:
                with cache.index_lock(shard):
                    index = load_index(path, shard, stamp)  # another process has stored it
                    if index is None:
                        index = _make_index(shard, file)
                        save_index(path, shard, stamp, index)
            return index
    except OSError as error:
        raise DataError(shard_failure(shard, error)) from error


def _make_index(shard: str, file: io.BufferedReader[io.FileIO]) -> ShardIndex:
    bounds: array[int] = array("q")
    fault: str | None = None
    last: str | None = None
    keys: set[str] = set()
    repeated: set[str] = set()
    crowded: list[str] = []
    images: list[str] = []  # endings, of the last sample
    try:
        for key, suffix, start, end in walk_members(file):
            if key == last:
                bounds[-1] = end
            else:
                bounds.extend((start, end))
                if _is_crowded(images):
                    crowded.append(str(last))
                if key in keys:
                    repeated.add(key)
                keys.add(key)
                last, images = key, []
            if is_image(suffix):
                images.append(suffix)
    except OSError:
        raise
    except TAR_FAULTS as error:
        fault = shard_failure(shard, error)
        del bounds[-2:]  # more of this sample may have come
        images = []
    if _is_crowded(images):
        crowded.append(str(last))
    if not bounds:
        raise DataError(fault or f"{shard}: the shard has no samples")
    return ShardIndex(
        bounds,
        fault,
        printable(last) if fault and last is not None else None,
        frozenset(printable(key) for key in repeated),
        tuple(printable(key) for key in crowded),
    )


def _is_crowded(images: list[str]) -> bool:
    """Whether a sample with images of these endings has several, none of them plain."""
    return len(images) > 1 and all("." in suffix for suffix in images)


class ShardReader:
    """Reads single samples of local shards; indexes them when they are first needed.

    Not for several threads at once. A pickled reader begins with nothing open.
    """

    def __init__(
        self,
        shards: Sequence[str],
        counts: Sequence[int],
        *,
        cache: ShardCache | None = None,
        max_open: int = MAX_OPEN,
    ) -> None:
        """
        Args:
            shards: paths; urls too where there is a cache.
            counts: number of samples of each shard.
            cache: for the copies of remote shards.
            max_open: files that stay open.
        """
        self._shards, self._counts = tuple(shards), tuple(counts)
        self._cache, self._max_open = cache, max_open
        self._indexes: dict[int, ShardIndex | DataError] = {}
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_indexes": {}, "_files": OrderedDict()}

    def read(self, shard: int, sample: int) -> dict[str, Any]:
        """One raw sample, as webdataset gives it: ``__key__``, ``__url__`` and members' bytes.

        Args:
            shard: number of the shard.
            sample: number of the sample within it.

        Raises:
            DataError: the shard cannot be read, or has changed since it was counted.
        """
        name = self._shards[shard]
        try:
            file = self._open(shard)
            index = self._index(shard)
            start, end = index.bounds[2 * sample], index.bounds[2 * sample + 1]
            data = _read_at(file, start, end - start)
        except OSError as error:
            raise DataError(shard_failure(name, error)) from error
        if len(data) < end - start:
            raise DataError(f"{name}: the shard became shorter while it was read")
        raw = parse_range(data, name)
        raw[NUMBER] = sample
        if raw["__key__"] in index.repeated:
            raw[REPEATED] = True
        return raw

    def member(self, shard: int, sample: int, suffix: str) -> bytes | None:
        """One member of a sample, the others not being read; None where it has none.

        Args:
            shard: number of the shard.
            sample: number of the sample within it.
            suffix: the member's ending in lower case, without the dot.

        Raises:
            DataError: as `read`.
        """
        name = self._shards[shard]
        try:
            file = self._open(shard)
            offset, end = self._index(shard).bounds[2 * sample : 2 * sample + 2]
            while offset < end:
                found = plain_member(partial(_read_at, file), offset)
                if found is None:  # left to tarfile
                    content: bytes | None = self.read(shard, sample).get(suffix)
                    return content
                parts = split_name(found.name)
                if parts is not None and parts[1].lower() == suffix:
                    return _read_at(file, found.start, found.size)
                offset = found.end
        except OSError as error:
            raise DataError(shard_failure(name, error)) from error
        return None

    def _open(self, shard: int) -> io.FileIO:
        file = self._files.get(shard)
        if file is None:
            name = self._shards[shard]
            file = self._cache.open(name) if self._cache else io.FileIO(name)
            self._files[shard] = file
            if len(self._files) > self._max_open:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return file

    def _index(self, shard: int) -> ShardIndex:
        found = self._indexes.get(shard)
        if found is None:
            try:
                found = index_shard(self._shards[shard], self._cache)
                if len(found) != self._counts[shard]:
                    found = DataError(
                        f"{self._shards[shard]}: holds {len(found)} samples, not the "
                        f"{self._counts[shard]} that its folder's shards.json states; "
                        "`clipsys shards FOLDER --manifest` writes that file again"
                    )
            except DataError as error:
                found = error
            self._indexes[shard] = found
        if isinstance(found, DataError):  # stored, so that a bad shard is not read for each sample
            raise found
        return found

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()


def _read_at(file: io.FileIO, offset: int, size_bytes: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size_bytes, offset)
    file.seek(offset)  # Windows
    return file.read(size_bytes)


def parse_range(data: bytes, url: str) -> dict[str, Any]:
    """The one sample whose tar members are ``data``.

    Raises:
        DataError: there is none, or the members cannot be read.
    """
    plain = _plain_members(data)
    failures: list[Exception] = []

    def stop(error: Exception) -> bool:
        failures.append(error)
        return False

    if plain is None:  # long names, extended headers: left to tarfile, ten times slower
        found = list(raw_samples(url, io.BytesIO(data), stop))
    else:
        found = list(group_members(plain, url))
    if failures:
        raise DataError(shard_failure(url, failures[0])) from failures[0]
    if len(found) != 1:
        raise DataError(f"{url}: the shard has changed since it was indexed; start again")
    return found[0]


def _plain_members(data: bytes) -> list[tuple[str, bytes]] | None:
    """The members of a tar range, or None where one is not of the plain kind."""
    members = []
    offset = 0
    while offset < len(data):
        member = plain_member(lambda at, length: data[at : at + length], offset)
        if member is None:
            return None
        members.append((member.name, data[member.start : member.start + member.size]))
        offset = member.end
    return members


def stored_index(shard: str, cache: ShardCache) -> ShardIndex | None:
    """What an earlier call has stored of a local shard as it is now, or None."""
    try:
        with Path(shard).open("rb") as file:
            return load_index(cache.index_path(shard), shard, cache.stamp(shard, file.fileno()))
    except OSError:
        return None


def repeated_keys(shard: str) -> frozenset[str]:
    """The keys of a local shard whose members lie in several places; none if it is no tar."""
    try:
        return index_shard(shard).repeated
    except DataError:
        return frozenset()
