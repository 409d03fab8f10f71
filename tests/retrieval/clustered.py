"""Clustered vectors, as embeddings are, and snapshots of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipsys.retrieval.storage.segments import Floats, SegmentReader, write_segment
from clipsys.retrieval.storage.snapshot import Snapshot


def clustered(num_rows: int, dim: int, *, seed: int = 0, num_clusters: int = 60) -> Floats:
    """Unit vectors about centres that do not depend on the seed."""
    centres = np.random.default_rng(99).normal(size=(num_clusters, dim))
    generator = np.random.default_rng(seed)
    chosen = centres[generator.integers(0, num_clusters, num_rows)]
    vectors = chosen + 0.7 * generator.normal(size=(num_rows, dim))
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def snapshot_of(folder: Path, vectors_ND: Floats, *, change: int = 1) -> Snapshot:
    """All vectors in one segment; ids count from 1."""
    folder.mkdir(exist_ok=True, parents=True)
    reader = SegmentReader(folder, vectors_ND.shape[1])
    reader.register({1: write_segment(folder, vectors_ND)})
    count = len(vectors_ND)
    rows_N = np.arange(count)
    return Snapshot(change, rows_N + 1, np.ones(count, np.int64), rows_N, reader)


def keep(snapshot: Snapshot, keep_N: np.ndarray) -> Snapshot:
    """The snapshot after everything else was deleted."""
    return Snapshot(
        snapshot.change + 1,
        snapshot.ids_N[keep_N],
        snapshot.segments_N[keep_N],
        snapshot.rows_N[keep_N],
        snapshot.vectors,
    )
