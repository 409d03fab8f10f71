"""Vector segments: immutable files of float16 rows, one per commit.

A segment is a plain ``.npy`` file of shape (rows, dim), little-endian float16, so that numpy alone
can read a collection's vectors. It is fsynced before the SQLite transaction that names it; a file
that no transaction names is an orphan of an interrupted commit, and the next writer deletes it.

Shapes: N rows, D embedding width.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipsys.errors import CollectionError
from clipsys.retrieval.storage import durable

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SUFFIX = ".npy"
#: Segments mapped at once: each map keeps a file descriptor, of which 1,024 is a usual limit.
MAX_MAPPED = 256
_DTYPE = np.dtype("<f2")
_WIDEN_ROWS = 64
#: Without the three bits into which the sign spreads when 16 bits with a sign become 32.
_SIGN_EXPONENT_FRACTION = np.int32(0x8FFFE000 - 2**32)


@dataclass(frozen=True)
class SegmentFile:
    """A segment on disk: its name inside the segments folder, its rows, its SHA-256.

    ``mtime_ns``: when it was written. A file that has another time is hashed before it is used.
    """

    name: str
    num_rows: int
    sha256: str
    mtime_ns: int | None = None


def write_segment(folder: Path, vectors_ND: Floats) -> SegmentFile:
    """Writes unit-norm rows as a new segment; on return the file is durable.

    Raises:
        CollectionError: a row is not finite or not of unit norm (a broken model), or the disk
            refuses the file.
    """
    norms_N = np.linalg.norm(vectors_ND, axis=1)
    if not np.allclose(norms_N, 1.0, atol=1e-2):
        row = int(np.argmax(~np.isclose(norms_N, 1.0, atol=1e-2)))
        raise CollectionError(
            f"{folder}: row {row} to be stored has norm {norms_N[row]:.4g}, expected 1; "
            "the model gives invalid embeddings"
        )
    buffer = io.BytesIO()
    np.save(buffer, vectors_ND.astype(_DTYPE), allow_pickle=False)
    data = buffer.getbuffer()
    # Random names: an orphan left by a crash can never collide with the segment written next.
    name = f"{secrets.token_hex(8)}{SUFFIX}"
    try:
        durable.write_new(folder / name, data)
    except OSError as error:
        (folder / name).unlink(missing_ok=True)
        raise CollectionError(
            f"{folder / name}: cannot write {len(data):,} bytes of vectors ({error.strerror}); "
            "free some space and run the same command again"
        ) from error
    mtime_ns = (folder / name).stat().st_mtime_ns
    return SegmentFile(name, len(vectors_ND), hashlib.sha256(data).hexdigest(), mtime_ns)


def delete_orphans(folder: Path, known: Iterable[str]) -> int:
    """Deletes segment files that no commit names. Call with the writer lock held."""
    keep = set(known)
    orphans = [path for path in folder.glob(f"*{SUFFIX}") if path.name not in keep]
    for path in orphans:
        path.unlink(missing_ok=True)
    return len(orphans)


class SegmentReader:
    """Memory-mapped access to the rows of all segments, opened when first needed. Thread-safe."""

    def __init__(self, folder: Path, dim: int) -> None:
        self._folder = folder
        self._dim = dim
        self._names: dict[int, SegmentFile] = {}
        self._open: dict[int, npt.NDArray[np.float16]] = {}
        self._hashed: dict[int, int] = {}  # found to be right, with the time that they have
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        """Embedding width D."""
        return self._dim

    def register(self, segments: dict[int, SegmentFile]) -> None:
        """Makes segments known by their database id; registering one again changes nothing."""
        with self._lock:
            self._names.update(segments)

    def check(self) -> None:
        """Looks at the size and the time of every segment, and at the content where they differ.

        Raises:
            CollectionError: a segment is missing, cut off or altered.
        """
        with self._lock:
            for segment_id in self._names:
                self._check(segment_id)

    def hashed(self) -> dict[int, int]:
        """Segments that had another time than was recorded and are right, with that time in ns."""
        with self._lock:
            return dict(self._hashed)

    def _check(self, segment_id: int) -> None:
        mtime_ns = check_segment(
            self._folder,
            self._names[segment_id],
            self._dim,
            trusted_ns=self._hashed.get(segment_id),
        )
        if mtime_ns != self._names[segment_id].mtime_ns:
            self._hashed[segment_id] = mtime_ns

    def take(self, segments_N: Ints, rows_N: Ints) -> Floats:
        """Returns the stored vectors at (segment, row), (N, D) float32, in the order asked.

        Raises:
            CollectionError: a segment is missing, cut off or altered.
        """
        vectors_ND = np.empty((len(rows_N), self._dim), np.float32)
        if len(rows_N) == 0:
            return vectors_ND
        order = np.argsort(segments_N, kind="stable")
        starts = np.flatnonzero(np.diff(segments_N[order], prepend=segments_N[order[0]] - 1))
        for part in np.split(order, starts[1:]):
            segment = self._segment(int(segments_N[part[0]]))
            if len(part) == len(rows_N):  # in the order asked already
                return widen(np.take(segment, rows_N, axis=0))
            vectors_ND[part] = widen(np.take(segment, rows_N[part], axis=0))
        return vectors_ND

    def _segment(self, segment_id: int) -> npt.NDArray[np.float16]:
        with self._lock:
            rows = self._open.pop(segment_id, None)
            if rows is None:
                self._check(segment_id)
                rows = open_segment(self._folder, self._names[segment_id], self._dim)
                if len(self._open) >= MAX_MAPPED:
                    del self._open[next(iter(self._open))]  # the one that was used longest ago
            self._open[segment_id] = rows
            return rows


def widen(half_ND: npt.NDArray[np.float16]) -> Floats:
    """float16 to float32, exactly, for finite numbers; twice as fast as ``astype``.

    The sixteen bits are moved to where float32 has sign, exponent and fraction. What is wrong then
    is the exponent's bias, by 112; multiplying by a power of two is exact, for subnormals too.
    """
    wide_ND = np.empty(half_ND.shape, np.int32)
    for start in range(0, len(half_ND), _WIDEN_ROWS):  # passes over what stays in the cache
        bits = wide_ND[start : start + _WIDEN_ROWS]
        np.copyto(bits, half_ND[start : start + _WIDEN_ROWS].view(np.int16))
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, _SIGN_EXPONENT_FRACTION, out=bits)
        values = bits.view(np.float32)
        np.multiply(values, np.float32(2.0**112), out=values)
    return wide_ND.view(np.float32)


def open_segment(folder: Path, segment: SegmentFile, dim: int) -> npt.NDArray[np.float16]:
    """Maps a segment's rows into memory, (N, D) float16, read-only.

    Raises:
        CollectionError: the file is missing, truncated or not of the stated shape.
    """
    path = folder / segment.name
    expected = (segment.num_rows, dim)
    try:
        rows: npt.NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CollectionError(
            f"{path}: this vector segment cannot be read ({error}); restore it from a backup, or "
            "index the sources into a new collection"
        ) from error
    if rows.shape != expected or rows.dtype != _DTYPE:
        raise CollectionError(
            f"{path}: holds {rows.dtype} {rows.shape}, the database says float16 {expected}; "
            "restore it from a backup, or index the sources into a new collection"
        )
    return rows


def check_segment(
    folder: Path, segment: SegmentFile, dim: int, *, trusted_ns: int | None = None
) -> int:
    """Looks at a segment's size and time, and hashes it if the time is not the one recorded.

    Args:
        folder: the segments.
        segment: what the database says of it.
        dim: embedding width D.
        trusted_ns: another time at which it was found to be right.

    Returns:
        The time that the file has, in nanoseconds.

    Raises:
        CollectionError: it is missing, cut off or altered.
    """
    path = folder / segment.name
    try:
        status = path.stat()
        least_bytes = segment.num_rows * dim * _DTYPE.itemsize
        if status.st_size < least_bytes:
            problem = f"has {status.st_size:,} bytes, its rows alone take {least_bytes:,}"
        elif (
            status.st_mtime_ns not in (segment.mtime_ns, trusted_ns)
            and durable.sha256_of(path) != segment.sha256
        ):
            problem = "is not what was committed (its time and its SHA-256 differ)"
        else:
            return status.st_mtime_ns
    except PermissionError as error:
        raise CollectionError(
            f"{path}: this vector segment cannot be read ({error.strerror}); this user needs read "
            "permission there"
        ) from error
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise CollectionError(
        f"{path}: this vector segment {problem}; restore it from a backup, or run `clipsys repair` "
        "and encode its images again"
    )
