"""Random access to the samples of tar shards, without extracting or streaming them.

    index_shard    one pass over the headers of a tar: where each sample begins and ends
    ShardReader    reads sample N of a shard: one read of its bytes, a parse of its headers

A shard streams well from its beginning, but an order of samples that is a function of the seed
alone needs any sample at any time, and so do a resume inside an epoch and workers that read just
their own rows. Members of a sample lie side by side in a tar, so one byte range per sample (8 bytes
in memory) is all the index there is; what lies in the range is itself a tar, which webdataset's
grouping reads as it reads a whole shard. What counts as a sample is webdataset's decision, here and
in `clipsys.shards.iterate_raw`.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clipsys.errors import DataError
from clipsys.remote import ShardCache
from clipsys.shards import raw_samples, shard_failure

_BLOCK = tarfile.BLOCKSIZE
#: Members that webdataset passes over (`skip_meta` of its `tar_file_iterator`).
_META = re.compile(r"__[^/]*__($|/)")
#: Shards that a reader keeps open.
MAX_OPEN = 128


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one local tar lie.

    Attributes:
        bounds: sample i is the bytes ``bounds[2 * i]`` to ``bounds[2 * i + 1]``.
        fault: why the shard ends early, or None; the sample that broke off is not in the index.
        broken_key: the key of that sample, where it is known.
    """

    bounds: array[int]
    fault: str | None = None
    broken_key: str | None = None

    def __len__(self) -> int:
        return len(self.bounds) // 2


def index_shard(shard: str, cache: ShardCache | None = None) -> ShardIndex:
    """Reads the headers of a tar.

    Args:
        shard: a path; a url too where there is a cache to read it from.
        cache: for the copies of remote shards.

    Raises:
        DataError: it is not a tar file at all, or holds no whole sample.
    """
    bounds: array[int] = array("q")
    fault: str | None = None
    last: str | None = None
    try:
        opened = cache.open(shard) if cache else io.FileIO(shard)
        with io.BufferedReader(opened) as file:
            try:
                for key, start, end in _members(file):
                    if key == last:
                        bounds[-1] = end
                    else:
                        bounds.extend((start, end))
                        last = key
            except tarfile.TarError as error:
                fault = shard_failure(shard, error)
                del bounds[-2:]  # more of this sample may have come
    except OSError as error:
        raise DataError(shard_failure(shard, error)) from error
    if not bounds:
        raise DataError(fault or f"{shard}: the shard has no samples")
    return ShardIndex(bounds, fault, last if fault else None)


def _members(file: io.BufferedReader[io.FileIO]) -> Iterator[tuple[str, int, int]]:
    """The key, start and end of each member that belongs to a sample."""
    from webdataset.tariterators import base_plus_ext

    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            key, _ = base_plus_ext(member.name)
            if member.isreg() and key is not None and not _META.match(member.name):
                yield key, member.offset, member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        # Every writer closes a tar with blocks of zeros. tarfile takes anything that is not a
        # header for the end: a break between two members, or damage.
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("unexpected end of data")


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
            counts: how many samples each is said to have.
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
            data = os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise DataError(shard_failure(name, error)) from error
        if len(data) < end - start:
            raise DataError(f"{name}: the shard became shorter while it was read")
        return parse_range(data, name)

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
                        "delete that file"
                    )
            except DataError as error:
                found = error
            self._indexes[shard] = found
        if isinstance(found, DataError):  # kept, so that a bad shard is not read for each sample
            raise found
        return found

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()


def parse_range(data: bytes, url: str) -> dict[str, Any]:
    """The one sample whose tar members are ``data``.

    Raises:
        DataError: two of its members have the same name, or there are none.
    """
    plain = _plain_members(data, url)
    failures: list[Exception] = []

    def stop(error: Exception) -> bool:
        failures.append(error)
        return False

    if plain is None:  # long names, extended headers: left to tarfile, ten times slower
        found = list(raw_samples(url, io.BytesIO(data), stop))
    else:
        from webdataset.tariterators import group_by_keys

        found = list(group_by_keys(plain, handler=stop))
    if failures:
        raise DataError(shard_failure(url, failures[0])) from failures[0]
    if len(found) != 1:
        raise DataError(f"{url}: the shard has changed since it was indexed; start again")
    sample: dict[str, Any] = found[0]
    return sample


def _plain_members(data: bytes, url: str) -> list[dict[str, Any]] | None:
    """The members of a tar range, or None where a header is not of the plain kind.

    Reads just the fields that matter, twenty times faster than tarfile, which has checked these
    headers for the index.
    """
    members = []
    offset = 0
    while offset < len(data):
        header = data[offset : offset + _BLOCK]
        size_field = header[124:136].rstrip(b" \0")
        if header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not size_field.isdigit():
            return None
        size = int(size_field, 8)
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345] != 0:
            name = f"{_text(header[345:500])}/{name}"
        start = offset + _BLOCK
        if not _META.match(name):
            members.append({"fname": name, "data": data[start : start + size], "__url__": url})
        offset = start + -(-size // _BLOCK) * _BLOCK
    return members


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")
