"""Builds an index in a process whose memory is limited: the `main` of a test.

    python -m tests.retrieval.limited_build FOLDER streamed|in-memory

The limit is on private writable memory (RLIMIT_DATA): what the process has before it begins, and
what the plan says that building takes. Mapped files do not count, which is their purpose.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from clipsys.retrieval.indexes import building, planning
from clipsys.retrieval.indexes.planning import IndexPlan
from clipsys.retrieval.storage.segments import Floats, SegmentFile, SegmentReader, write_segment
from clipsys.retrieval.storage.snapshot import Snapshot

DIM, PARTS, ROWS = 128, 6, 50_000


def plan() -> IndexPlan:
    """IVF-Flat, whose codes are the largest; few lists, since it is not k-means that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "num_lists_for", lambda _: 64)
        return planning.plan_of_kind("ivf-flat", PARTS * ROWS, DIM, recall=0.5)


def write_vectors(folder: Path) -> list[SegmentFile]:
    folder.mkdir()
    centres_CD = np.random.default_rng(0).standard_normal((64, DIM), np.float32)

    def part(number: int) -> Floats:
        generator = np.random.default_rng((1, number))
        noise_ND = generator.standard_normal((ROWS, DIM), np.float32)
        vectors_ND = centres_CD[generator.integers(0, 64, ROWS)] + 0.5 * noise_ND
        unit_ND: Floats = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return unit_ND

    return [write_segment(folder, part(number)) for number in range(PARTS)]


def snapshot_of(folder: Path) -> Snapshot:
    paths = sorted(folder.glob("*.npy"))
    reader = SegmentReader(folder, DIM)
    files = (SegmentFile(path.name, ROWS, "", path.stat().st_mtime_ns) for path in paths)
    reader.register(dict(enumerate(files)))
    count = ROWS * len(paths)
    segments_N = np.repeat(np.arange(len(paths)), ROWS)
    return Snapshot(
        1, np.arange(1, count + 1), segments_N, np.tile(np.arange(ROWS), len(paths)), reader
    )


def data_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return (
        next(int(line.split()[1]) for line in status.splitlines() if line[:7] == "VmData:") * 1024
    )


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    snapshot, planned = snapshot_of(folder / "segments"), plan()
    warm = np.ones((4_096, DIM), np.float32)
    warm @ warm.T  # what BLAS keeps for itself is no part of building
    limit = data_bytes() + planned.build_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if way == "streamed":
        built = building.build_index(
            folder, snapshot, generation=1, plan=planned, memory_bytes=planned.build_bytes
        )
        sys.stdout.write(built.model_dump_json())
    else:
        index = building._empty_index(planned)
        building._train(index, snapshot, planned.num_training)
        for ids_N, vectors_ND in snapshot.blocks():
            index.add_with_ids(vectors_ND, ids_N)


if __name__ == "__main__":
    main()
