"""Counting the samples of shards, several at a time, and writing ``shards.json`` for them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipsys.errors import DataError
from clipsys.processes.pool import ordered_map
from clipsys.progress import Advance, progress
from clipsys.shards.manifest import (
    MANIFEST_NAME,
    ShardInfo,
    read_manifest,
    remote_manifest,
    write_manifest,
)
from clipsys.shards.random_access import index_shard, stored_index
from clipsys.shards.reading import expand_shards
from clipsys.shards.remote import ShardCache, is_remote
from clipsys.shards.stored_index import ShardIndex
from clipsys.shards.writing import hash_file

#: Remote shards that are fetched at the same time.
_FETCHERS = 4
#: Local shards for which starting another process pays: it takes about a second, a shard of 10,000
#: samples two.
_SHARDS_PER_PROCESS = 4
_MAX_PROCESSES = 16
#: How often the manifest is written while shards are still being read, so that an interrupted call
#: goes on.
_SAVE_INTERVAL_S = 30.0


@dataclass(frozen=True)
class ShardSummary:
    """What the headers of a shard say.

    Attributes:
        num_samples: whole samples.
        fault: why the shard ends early, or None.
        broken_key: the sample at which it does, where that is known.
        warnings: what looks wrong with the names in it.
    """

    num_samples: int
    fault: str | None = None
    broken_key: str | None = None
    warnings: tuple[str, ...] = ()


def count_shards(shards: Sequence[str], cache: ShardCache) -> dict[str, ShardSummary]:
    """Reads the headers of shards: local ones in processes, remote ones as they are fetched.

    Raises:
        DataError: one of them is no tar, or holds no sample.
    """
    local = [shard for shard in shards if not is_remote(shard)]
    remote = [shard for shard in shards if is_remote(shard)]
    found: dict[str, ShardSummary] = {}
    with progress("Counting samples", len(shards), unit="shards") as advance:
        unknown = []
        for shard in local:
            if (index := stored_index(shard, cache)) is None:
                unknown.append(shard)
                continue
            found[shard] = _summary(index, shard)
            advance()
        for shard, summary in _indexed(unknown, cache):
            if isinstance(summary, DataError):
                raise summary
            found[shard] = summary
            advance()
        for shard, summary in _fetched(remote, cache, advance):
            found[shard] = summary
            advance(note="")
    cache.forget_old_indexes()
    return found


def _indexed(
    shards: Sequence[str], cache: ShardCache
) -> Iterator[tuple[str, ShardSummary | DataError]]:
    summarise = partial(_try_summary, cache=cache)
    processes = min(os.cpu_count() or 1, _MAX_PROCESSES, len(shards) // _SHARDS_PER_PROCESS)
    done = 0
    try:
        for shard, summary in zip(shards, ordered_map(summarise, shards, processes), strict=True):
            yield shard, summary
            done += 1
    except BrokenProcessPool:  # a script that does not guard its main program cannot start any
        for shard in shards[done:]:
            yield shard, summarise(shard)


def _fetched(
    shards: Sequence[str], cache: ShardCache, advance: Advance
) -> Iterator[tuple[str, ShardSummary]]:
    lock = threading.Lock()

    def fetch(shard: str) -> ShardSummary:
        def fetched(size_bytes: int) -> None:
            with lock:
                name = shard.rpartition("/")[2]
                advance(0, note=f"fetching {name}: {size_bytes / 1e6:,.0f} MB")

        return _summary(index_shard(shard, cache, on_block=fetched), shard)

    with ThreadPoolExecutor(_FETCHERS) as pool:
        try:
            yield from zip(shards, pool.map(fetch, shards), strict=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _try_summary(shard: str, cache: ShardCache) -> ShardSummary | DataError:
    try:
        return _summary(index_shard(shard, cache), shard)
    except DataError as error:
        return error


def _summary(index: ShardIndex, shard: str) -> ShardSummary:
    return ShardSummary(len(index), index.fault, index.broken_key, tuple(index.warnings(shard)))


def stated_counts(shards: Sequence[str]) -> dict[str, int]:
    """What the manifests beside shards say of them; a shard that was written again is left out."""
    stated: dict[str, int] = {}
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
        if is_remote(folder):
            stated |= {f"{folder}/{one.name}": one.num_samples for one in remote_manifest(folder)}
            continue
        for info in read_manifest(folder or "."):
            path = Path(folder, info.name)
            if path.is_file() and path.stat().st_size == info.size_bytes:
                stated[str(path)] = info.num_samples
    return {shard: stated[shard] for shard in shards if shard in stated}


@dataclass(frozen=True)
class ManifestReport:
    """What was written into manifests.

    Attributes:
        paths: paths of the manifests.
        num_shards, num_samples: counts of the requested shards that they list.
        num_kept: shards that were listed before and have not changed.
        faults: shards that cannot be listed, and why.
        warnings: what looks wrong with the names in the shards.
    """

    paths: tuple[Path, ...]
    num_shards: int
    num_samples: int
    num_kept: int
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


def write_manifests(
    source: str | Path | Sequence[str | Path], cache: ShardCache, *, workers: int = 1
) -> ManifestReport:
    """Writes ``shards.json`` beside existing shards: whole or not at all, and the same each time.

    A shard that is listed and has not been written to since is left as it is listed. Entries of
    shards that are gone are left out. A truncated shard is not listed.

    Args:
        source: what `expand_shards` takes; local shards.
        cache: for the indexes of the shards, which training reads too.
        workers: processes that read.

    Raises:
        DataError: there are no shards, one is remote, or a manifest cannot be read or written.
    """
    shards = expand_shards(source)
    if remote := next((shard for shard in shards if is_remote(shard)), None):
        raise DataError(f"{remote}: is remote; write {MANIFEST_NAME} where the shards lie")
    folders: dict[Path, dict[str, ShardInfo]] = {}
    unknown: list[str] = []
    for shard in dict.fromkeys(str(Path(shard).absolute()) for shard in shards):
        path = Path(shard)
        if path.parent not in folders:
            folders[path.parent] = _unchanged(path.parent)
        if path.name not in folders[path.parent]:
            unknown.append(shard)
    asked = {Path(shard).absolute() for shard in shards}
    num_kept = len(asked) - len(unknown)
    faults: list[str] = []
    warnings: list[str] = []
    saved = time.monotonic()
    with progress("Reading shards", len(unknown), unit="shards") as advance:
        describe = partial(_describe, cache=cache)
        for shard, found in zip(unknown, ordered_map(describe, unknown, workers), strict=True):
            if isinstance(found, str):
                faults.append(found)
            else:
                info, names = found
                folders[Path(shard).parent][info.name] = info
                warnings += names
            advance()
            if time.monotonic() - saved > _SAVE_INTERVAL_S:
                write_manifest(Path(shard).parent, folders[Path(shard).parent].values())
                saved = time.monotonic()
    for folder, infos in folders.items():
        write_manifest(folder, infos.values())
    listed = [
        folders[path.parent][path.name] for path in asked if path.name in folders[path.parent]
    ]
    return ManifestReport(
        tuple(folder / MANIFEST_NAME for folder in folders),
        len(listed),
        sum(info.num_samples for info in listed),
        num_kept,
        tuple(faults),
        tuple(warnings),
    )


def _unchanged(folder: Path) -> dict[str, ShardInfo]:
    """What a manifest says of shards that have not been written to since."""
    manifest = folder / MANIFEST_NAME
    known = {}
    for info in read_manifest(folder):
        path = folder / info.name
        if path.is_file():
            status = path.stat()
            if (
                status.st_size == info.size_bytes
                and status.st_mtime_ns <= manifest.stat().st_mtime_ns
            ):
                known[info.name] = info
    return known


def _describe(shard: str, cache: ShardCache) -> tuple[ShardInfo, tuple[str, ...]] | str:
    """What the manifest says of a shard, or why it cannot be listed; runs in a worker."""
    path = Path(shard)
    try:
        summary = _summary(index_shard(shard, cache), shard)
        if summary.fault:
            return summary.fault
        size_bytes = path.stat().st_size
        info = ShardInfo(path.name, summary.num_samples, size_bytes, hash_file(path))
    except OSError as error:
        return f"{shard}: cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
    return info, summary.warnings
