from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import CollectionError
from clipsys.retrieval.storage.segments import (
    Floats,
    SegmentReader,
    delete_orphans,
    open_segment,
    widen,
    write_segment,
)


def unit_vectors(num_rows: int, dim: int = 8, seed: int = 0) -> Floats:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)
    unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def test_segment_is_a_plain_npy_file_of_float16_rows(tmp_path: Path) -> None:
    vectors = unit_vectors(5)
    segment = write_segment(tmp_path, vectors)
    stored = np.load(tmp_path / segment.name, allow_pickle=False)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, vectors.astype(np.float16))
    assert segment.num_rows == 5
    assert segment.sha256 == hashlib.sha256((tmp_path / segment.name).read_bytes()).hexdigest()


def test_take_returns_rows_of_several_segments_in_the_order_asked(tmp_path: Path) -> None:
    parts = [unit_vectors(4, seed=1), unit_vectors(3, seed=2), unit_vectors(5, seed=3)]
    reader = SegmentReader(tmp_path, 8)
    reader.register({number: write_segment(tmp_path, part) for number, part in enumerate(parts)})
    generator = np.random.default_rng(0)
    segments = generator.integers(0, 3, 40)
    rows = np.array([generator.integers(0, len(parts[segment])) for segment in segments])
    naive = [parts[s].astype(np.float16)[r] for s, r in zip(segments, rows, strict=True)]
    np.testing.assert_array_equal(reader.take(segments, rows), np.array(naive, np.float32))


def test_take_of_nothing_is_empty(tmp_path: Path) -> None:
    nothing = np.empty(0, np.int64)
    assert SegmentReader(tmp_path, 8).take(nothing, nothing).shape == (0, 8)


@pytest.mark.parametrize("bad", [np.nan, 0.0, 7.0])
def test_rows_that_are_not_unit_vectors_are_refused(tmp_path: Path, bad: float) -> None:
    vectors = unit_vectors(3)
    vectors[1] *= bad
    with pytest.raises(CollectionError, match=r"row 1 .* invalid embeddings"):
        write_segment(tmp_path, vectors)
    assert list(tmp_path.iterdir()) == []


def test_truncated_or_missing_segment_is_named(tmp_path: Path) -> None:
    segment = write_segment(tmp_path, unit_vectors(100))
    path = tmp_path / segment.name
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CollectionError, match=segment.name):
        open_segment(tmp_path, segment, 8)
    path.unlink()
    with pytest.raises(CollectionError, match=segment.name):
        open_segment(tmp_path, segment, 8)


def test_segment_of_another_shape_is_refused(tmp_path: Path) -> None:
    segment = write_segment(tmp_path, unit_vectors(4, dim=6))
    with pytest.raises(CollectionError, match=r"\(4, 6\), the database says float16 \(4, 8\)"):
        open_segment(tmp_path, segment, 8)


def test_orphans_are_deleted_and_committed_segments_stay(tmp_path: Path) -> None:
    kept, orphan = (write_segment(tmp_path, unit_vectors(2, seed=s)) for s in (1, 2))
    assert delete_orphans(tmp_path, [kept.name]) == 1
    assert (tmp_path / kept.name).exists()
    assert not (tmp_path / orphan.name).exists()


def test_every_finite_float16_becomes_the_same_float32() -> None:
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = half[np.isfinite(half)].reshape(-1, 16)
    widened = widen(finite)
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened.view(np.uint32), finite.astype(np.float32).view("u4"))
    assert widen(finite[:0]).shape == (0, 16)
