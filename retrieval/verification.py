"""Every invariant of a collection, checked against the files themselves.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval import durable
from clipsys.retrieval.index import load_index
from clipsys.retrieval.manifest import read_manifest
from clipsys.retrieval.segments import SegmentFile, open_segment
from clipsys.retrieval.store import FILE_NAME as DATABASE_NAME
from clipsys.retrieval.store import Changes, Store


def verify(folder: Path) -> list[str]:
    """Checks a collection's files. Returns one line for each fault; empty when it is sound.

    A segment or index file that no commit names is not a fault: an interrupted writer leaves it,
    and the next one deletes it.
    """
    try:
        manifest = read_manifest(folder)
        store = Store(folder / DATABASE_NAME)
    except CollectionError as error:
        return [str(error)]
    try:
        faults = store.check_integrity()
        if faults:
            return faults
        changes = store.changes_since(-1)
        segments = changes.segments
        faults += _segment_faults(folder / "segments", segments, manifest.encoder.dim)
        faults += _row_faults(changes, segments)
        faults += _uri_faults(store, changes)
    finally:
        store.close()
    if manifest.index is not None:
        try:
            load_index(folder / "indexes", manifest.index, manifest.encoder.dim)
        except FileNotFoundError:
            faults.append(f"{folder / 'indexes' / manifest.index.file}: the index file is missing")
        except CollectionError as error:
            faults.append(str(error))
    return faults


def _segment_faults(folder: Path, segments: dict[int, SegmentFile], dim: int) -> Iterator[str]:
    for segment in segments.values():
        path = folder / segment.name
        try:
            rows_ND = open_segment(folder, segment, dim)
        except CollectionError as error:
            yield str(error)
            continue
        if durable.sha256_of(path) != segment.sha256:
            yield f"{path}: its content is not what was committed (SHA-256 differs)"
            continue
        norms_N = np.linalg.norm(rows_ND.astype(np.float32), axis=1)
        for row in np.flatnonzero(~np.isclose(norms_N, 1.0, atol=1e-2)):
            yield f"{path}: row {row} has norm {norms_N[row]:.4g}, expected 1"


def _row_faults(changes: Changes, segments: dict[int, SegmentFile]) -> Iterator[str]:
    """No item without its vector, no vector without its item."""
    used: dict[int, set[int]] = {segment_id: set() for segment_id in segments}
    for item_id, segment_id, row in zip(
        changes.ids_N.tolist(), changes.segments_N.tolist(), changes.rows_N.tolist(), strict=True
    ):
        segment = segments.get(segment_id)
        if segment is None or row >= segment.num_rows:
            yield f"item {item_id}: its vector (segment {segment_id}, row {row}) does not exist"
        else:
            used[segment_id].add(row)
    for segment_id, rows in used.items():
        num_unused = segments[segment_id].num_rows - len(rows)
        if num_unused:
            yield f"segments/{segments[segment_id].name}: {num_unused} rows belong to no item"


def _uri_faults(store: Store, changes: Changes) -> Iterator[str]:
    live = changes.ids_N[changes.live_N.astype(bool)].tolist()
    seen: dict[str, int] = {}
    for start in range(0, len(live), 1_000):
        for item in store.items(live[start : start + 1_000]).values():
            if item.uri in seen:
                yield f"{item.uri}: is both item {seen[item.uri]} and item {item.id}"
            seen[item.uri] = item.id
