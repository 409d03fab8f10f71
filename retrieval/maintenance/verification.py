"""Every invariant of a collection, checked against the files themselves.

    manifest     is of this version, names a model and an edition
    database     SQLite's own check; counters never behind what they count
    segments     are there, whole, unaltered; rows are finite and of unit norm
    items        each live one has a vector, each vector an item, no uri twice
    words        are those of the live items' captions
    metadata     the index that filters use has what the live items have, and nothing else
    ledger       every entry has its reason
    index        is the published file, over every item that it claims and none that never was

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.generation import load_index
from clipsys.retrieval.storage import durable, words
from clipsys.retrieval.storage.creation import INDEXES, SEGMENTS
from clipsys.retrieval.storage.manifest import FILE_NAME as MANIFEST_NAME
from clipsys.retrieval.storage.manifest import Manifest, read_manifest
from clipsys.retrieval.storage.schema import python_text
from clipsys.retrieval.storage.segments import SegmentFile, open_segment
from clipsys.retrieval.storage.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.storage.store import Changes, Store


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        kind: ``manifest``, ``database``, ``segment``, ``item``, ``words``,
            ``metadata``, ``ledger`` or ``index``.
        place: the file, or the item.
        problem: what is wrong there.
    """

    kind: str
    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"

    def to_dict(self) -> dict[str, str]:
        """As ``clipsys verify --json`` prints it."""
        return asdict(self)


def verify(folder: Path) -> list[Fault]:
    """Checks a collection's files. Returns every fault; empty when it is sound.

    It may run beside a writer. A segment or index file that no commit names is not a fault: an
    interrupted writer leaves it, and the next one deletes it.
    """
    try:
        manifest = read_manifest(folder)
    except CollectionError as error:
        return [_fault("manifest", error, folder / MANIFEST_NAME)]
    data = folder / manifest.edition
    database = data / DATABASE_NAME
    try:
        store = Store(database)
    except CollectionError as error:
        return [_fault("database", error, database)]
    try:
        faults = [_fault("database", problem, database) for problem in store.check_integrity()]
        if faults:
            return faults
        changes = store.changes_since(-1)
        faults += counter_faults(store)
        faults += _segment_faults(data / SEGMENTS, changes.segments, manifest.encoder.dim)
        faults += _row_faults(changes)
        faults += _text_faults(store)
        faults += word_faults(store)
        faults += metadata_faults(store)
        faults += index_faults(folder, manifest, store)
    except CollectionError as error:
        faults.append(_fault("database", error, database))
    finally:
        store.close()
    return faults


def _fault(kind: str, problem: object, place: Path) -> Fault:
    return Fault(kind, str(place), str(problem).removeprefix(f"{place}: "))


def counter_faults(store: Store) -> list[Fault]:
    """Counters that would give an id or a change number twice."""
    faults = []
    ((last_id, last_change),) = store.read("SELECT max(id), max(change) FROM items")
    given = store.read("SELECT seq FROM sqlite_sequence WHERE name = 'items'")
    if (last_id or 0) > (given[0][0] if given else 0):
        problem = f"the id counter is behind item {last_id}; ids would be given twice"
        faults.append(Fault("database", str(store.path), problem))
    if (last_change or 0) > store.change():
        problem = f"the change counter is behind change {last_change}; readers would miss changes"
        faults.append(Fault("database", str(store.path), problem))
    return faults


def segment_problem(folder: Path, segment: SegmentFile, dim: int) -> str | None:
    """Why a segment's rows cannot be trusted; None if they can."""
    path = folder / segment.name
    try:
        rows_ND = open_segment(folder, segment, dim)
        if durable.sha256_of(path) != segment.sha256:
            return "its content is not what was committed (SHA-256 differs)"
    except (CollectionError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")
    norms_N = np.linalg.norm(rows_ND.astype(np.float32), axis=1)
    bad = np.flatnonzero(~np.isclose(norms_N, 1.0, atol=1e-2))
    if len(bad):
        return (
            f"{len(bad)} rows are not unit vectors, the first is row {bad[0]} "
            f"with norm {norms_N[bad[0]]:.4g}"
        )
    return None


def _segment_faults(folder: Path, segments: dict[int, SegmentFile], dim: int) -> Iterator[Fault]:
    for segment in segments.values():
        problem = segment_problem(folder, segment, dim)
        if problem is not None:
            yield Fault("segment", str(folder / segment.name), problem)


Bools: TypeAlias = npt.NDArray[np.bool_]


def rows_without_vector(changes: Changes) -> Bools:
    """Which of the items have a place where no vector is: live, or deleted and not yet emptied."""
    segment_ids = np.array(sorted(changes.segments), np.int64)
    if len(segment_ids) == 0:
        everything_N: Bools = changes.live_N.astype(bool) | (changes.segments_N >= 0)
        return everything_N
    num_rows = np.array([changes.segments[number].num_rows for number in segment_ids.tolist()])
    places_N = np.searchsorted(segment_ids, changes.segments_N).clip(max=len(segment_ids) - 1)
    known_N = segment_ids[places_N] == changes.segments_N
    inside_N = (changes.rows_N >= 0) & (changes.rows_N < num_rows[places_N])
    emptied_N = (changes.segments_N < 0) & (changes.live_N == 0)
    lost_N: Bools = ~(known_N & inside_N) & ~emptied_N
    return lost_N


def unused_rows(changes: Changes) -> dict[int, int]:
    """How many rows of each segment belong to no item, where there are any."""
    sound_N = ~rows_without_vector(changes) & (changes.segments_N >= 0)
    pairs_N2 = np.unique(
        np.stack([changes.segments_N[sound_N], changes.rows_N[sound_N]], axis=1), axis=0
    )
    segment_ids, used = np.unique(pairs_N2[:, 0], return_counts=True)
    counts = dict(zip(segment_ids.tolist(), used.tolist(), strict=True))
    unused = {n: s.num_rows - counts.get(n, 0) for n, s in changes.segments.items()}
    return {number: count for number, count in unused.items() if count}


def _row_faults(changes: Changes) -> Iterator[Fault]:
    """No item without its vector, no vector without its item."""
    for position in np.flatnonzero(rows_without_vector(changes)).tolist():
        segment, row = int(changes.segments_N[position]), int(changes.rows_N[position])
        problem = f"its vector (segment {segment}, row {row}) does not exist"
        yield Fault("item", f"item {changes.ids_N[position]}", problem)
    for segment_id, count in unused_rows(changes).items():
        place = f"{SEGMENTS}/{changes.segments[segment_id].name}"
        yield Fault("segment", place, f"{count} rows belong to no item")


def _text_faults(store: Store) -> Iterator[Fault]:
    twice = (
        "SELECT uri, min(id), max(id) FROM items NOT INDEXED WHERE state = 'live' "
        "GROUP BY uri HAVING count(*) > 1"
    )
    for uri, first, last in store.read(twice):
        yield Fault("item", python_text(uri), f"is both item {first} and item {last}")
    shapes = (
        "SELECT id FROM items WHERE json_type(captions) <> 'array' "
        "OR json_type(metadata) <> 'object' OR caption IS NOT json_extract(captions, '$[0]')"
    )
    for (item_id,) in store.read(shapes):
        yield Fault("item", f"item {item_id}", "its captions or metadata are not of their form")
    mute = "SELECT uri FROM failures WHERE reason = '' OR message = ''"
    for (uri,) in store.read(mute):
        yield Fault("ledger", python_text(uri), "is in the failure ledger without a reason")


def word_faults(store: Store) -> list[Fault]:
    """What is wrong with the words of captions; they can always be taken from the items again."""
    statements = dict(store.read("SELECT name, sql FROM sqlite_master"))
    names = set(statements)
    if statements.get(words.TABLE) != words.SCHEMA[0]:
        return []  # of an earlier version: the first search for words makes it
    place = f"{store.path}, {words.TABLE}"
    problems = [f"trigger {name} is missing" for name in words.TRIGGERS if name not in names]
    try:
        ((num_stray,),) = store.read(words.COUNT_STRAY)
        if num_stray:
            problems.append(f"{num_stray:,} rows are not the captions of the items")
    except CollectionError as error:
        problems.append(str(error).removeprefix(f"{store.path}: "))
    try:
        store.read(words.CHECK_INDEX)
    except CollectionError as error:
        # Busy or read-only: then SQLite's own check has to do.
        if not isinstance(error.__cause__, sqlite3.OperationalError):
            problems.append(f"its index is not that of its rows ({error.__cause__})")
    return [Fault("words", place, problem) for problem in problems]


def metadata_faults(store: Store) -> list[Fault]:
    """What is wrong with the index of metadata; it can always be made of the items again."""
    try:
        problems = store.find_metadata_problems()
    except CollectionError as error:
        problems = [str(error).removeprefix(f"{store.path}: ")]
    return [Fault("metadata", f"{store.path}, metadata index", problem) for problem in problems]


def index_faults(folder: Path, manifest: Manifest, store: Store) -> list[Fault]:
    """What is wrong with the published index; it can always be built again."""
    while manifest.index is not None:
        index, path = manifest.index, folder / manifest.edition / INDEXES / manifest.index.file
        try:
            load_index(path.parent, index, manifest.encoder.dim)
        except FileNotFoundError:
            latest = read_manifest(folder)
            if latest != manifest:  # a writer published the next one meanwhile
                manifest = latest
                continue
            return [Fault("index", str(path), "the index file is missing")]
        except CollectionError as error:
            return [_fault("index", error, path)]
        given = store.read("SELECT seq FROM sqlite_sequence WHERE name = 'items'")
        if index.last_id > (given[0][0] if given else 0):
            problem = f"covers items up to {index.last_id}, which the database never had"
            return [Fault("index", str(path), problem)]
        covered = "SELECT count(*) FROM items WHERE state = 'live' AND id <= ?"
        ((num_covered,),) = store.read(covered, (index.last_id,))
        if num_covered > index.num_items:
            problem = f"lacks {num_covered - index.num_items:,} of the items that it is to cover"
            return [Fault("index", str(path), problem)]
        break
    return []
