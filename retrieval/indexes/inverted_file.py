"""Inverted files that are written list by list and never held in memory.

    trained, empty index --> header        the sizes of all lists are known before a list is filled,
    sizes of the lists   --> table         so each has its place in the file from the beginning
    codes and ids        --> list 0, list 1, ... filled in any order, each from its beginning

The file is the one that `faiss.write_index` makes of the same index, byte for byte where ids are
added in the same order: a single file, whose lists `read_file` maps. (FAISS's own ways to an index
larger than memory, ``OnDiskInvertedLists`` and ``contrib.ondisk``, merge indexes that were written
before, and leave a second file beside the first, named in it by its path.)

Shapes: N vectors, L lists, D embedding width, C bytes of a code.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes.fastscan import rotation_of
from clipsys.retrieval.storage.segments import Floats, Ints
from clipsys.retrieval.storage.snapshot import Snapshot

Codes = npt.NDArray[np.uint8]

_faiss: Any = faiss
_ID_BYTES = 8
#: Beside its code and its id, a buffered vector has its place in the buffer and in the sorting.
_PLACE_BYTES = 24


class InvertedFile:
    """A new file of an inverted file index, while its lists are being filled. A context manager."""

    def __init__(self, path: Path, trained: Any, sizes_L: Ints) -> None:
        """Writes the header; the lists follow by `append`.

        Args:
            path: must not exist yet.
            trained: an inverted file index that holds no vectors, with or without a rotation.
            sizes_L: how many vectors each list is going to have.

        Raises:
            CollectionError: its lists are not arrays of codes of one size (FAISS's fast-scan packs
                them in blocks), or FAISS writes them otherwise than it did.
        """
        header = _header(trained, sizes_L)
        self.code_size = int(_faiss.extract_index_ivf(trained).code_size)
        self._sizes_L, self._filled_L = sizes_L, np.zeros_like(sizes_L)
        ends_L = len(header) + np.cumsum(sizes_L) * (self.code_size + _ID_BYTES)
        self._starts_L = ends_L - sizes_L * (self.code_size + _ID_BYTES)
        self._file = path.open("xb", buffering=0)
        try:
            self._write(np.frombuffer(header, np.uint8), 0)
        except BaseException:
            self._file.close()
            raise

    def append(self, list_number: int, codes_NC: Codes, ids_N: Ints) -> None:
        """Writes vectors behind those that the list has; both arrays are contiguous."""
        size, filled = int(self._sizes_L[list_number]), int(self._filled_L[list_number])
        assert filled + len(ids_N) <= size
        start = int(self._starts_L[list_number])
        self._write(codes_NC, start + filled * self.code_size)
        self._write(ids_N, start + size * self.code_size + filled * _ID_BYTES)
        self._filled_L[list_number] = filled + len(ids_N)

    def _write(self, array: npt.NDArray[Any], offset: int) -> None:
        data = array.reshape(-1).view(np.uint8).data
        while len(data):  # one call writes 2 GB at most
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def __enter__(self) -> InvertedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        assert error is not None or (self._filled_L == self._sizes_L).all()


def _header(trained: Any, sizes_L: Ints) -> bytes:
    """What FAISS writes before the lists, for an index that has lists of these sizes."""
    inverted = _faiss.extract_index_ivf(trained)
    trained.ntotal = inverted.ntotal = int(sizes_L.sum())
    data: bytes = _faiss.serialize_index(trained).tobytes()
    trained.ntotal = inverted.ntotal = 0
    empty = struct.pack("<4sQQ4sQ", b"ilar", inverted.nlist, inverted.code_size, b"sprs", 0)
    if not data.endswith(empty):
        raise CollectionError(
            f"lists of {type(trained).__name__} in FAISS {_faiss.__version__} are not arrays of "
            "codes of one size: such an index cannot be written list by list"
        )
    filled = np.flatnonzero(sizes_L)
    if len(filled) > len(sizes_L) // 2:
        kind, table = b"full", sizes_L
    else:
        kind, table = b"sprs", np.stack([filled, sizes_L[filled]], axis=1).ravel()
    return data[:-12] + struct.pack("<4sQ", kind, len(table)) + table.astype("<u8").tobytes()


def fill(
    file: InvertedFile,
    trained: Any,
    snapshot: Snapshot,
    positions: Ints,
    list_N: npt.NDArray[np.int32],
    *,
    buffer_bytes: int,
) -> None:
    """Encodes vectors and writes them to their lists.

    As many as the buffer holds are sorted by list before they are written: the larger it is, the
    longer the pieces. Where it holds all, the file is written from its beginning to its end.

    Args:
        file: whose lists have room for them.
        trained: the index whose codes they get.
        snapshot: where the vectors are.
        positions: which of them.
        list_N: the list of each.
        buffer_bytes: for codes, ids and their order.
    """
    inverted, rotation_DD = _faiss.extract_index_ivf(trained), rotation_of(trained)
    each_bytes = file.code_size + _ID_BYTES + _PLACE_BYTES
    rows = min(max(1, buffer_bytes // each_bytes), max(1, len(positions)))
    codes_NC = np.empty((rows, file.code_size), np.uint8)
    ids_N = np.empty(rows, np.int64)
    for start in range(0, len(positions), rows):
        part, part_list = positions[start : start + rows], list_N[start : start + rows]
        order = np.argsort(part_list, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        done = 0
        for block_ids, vectors_ND in snapshot.blocks(part):
            block = slice(done, done + len(block_ids))
            if rotation_DD is not None:
                vectors_ND = vectors_ND @ rotation_DD  # noqa: PLW2901
            codes_NC[place[block]] = _encode(inverted, vectors_ND, part_list[block], file.code_size)
            ids_N[place[block]] = block_ids
            done += len(block_ids)
        end = 0
        for list_number, count in zip(*np.unique(part_list, return_counts=True), strict=True):
            begin, end = end, end + int(count)
            file.append(int(list_number), codes_NC[begin:end], ids_N[begin:end])


def _encode(
    inverted: Any, vectors_ND: Floats, list_N: npt.NDArray[np.int32], code_size: int
) -> Codes:
    codes_NC = np.empty((len(vectors_ND), code_size), np.uint8)
    # No list means to FAISS that a vector is left out; 64 bit are what it takes.
    arrays = (np.ascontiguousarray(vectors_ND), list_N.astype(np.int64), codes_NC)
    inverted.encode_vectors(len(vectors_ND), *map(_faiss.swig_ptr, arrays), False)
    return codes_NC


class MappedLists:
    """The lists of a mapped index, which is left with empty ones: quantizers alone."""

    def __init__(self, index: Any) -> None:
        inverted = _faiss.extract_index_ivf(index)
        self._lists = _faiss.downcast_InvertedLists(inverted.invlists)
        inverted.own_invlists = False
        self._lists.this.own(True)  # unmapped when this object goes
        empty = _faiss.ArrayInvertedLists(inverted.nlist, inverted.code_size)
        empty.this.disown()
        inverted.replace_invlists(empty, True)
        index.ntotal = inverted.ntotal = 0

    def __len__(self) -> int:
        return int(self._lists.nlist)

    def __getitem__(self, number: int) -> tuple[Codes, Ints]:
        """Codes (N, C) and ids (N,) of a list: views of the file, valid while this object lives."""
        count, size = self._lists.list_size(number), int(self._lists.code_size)
        if count == 0:
            return np.empty((0, size), np.uint8), np.empty(0, np.int64)
        codes = _faiss.rev_swig_ptr(self._lists.get_codes(number), count * size)
        return codes.reshape(count, size), _faiss.rev_swig_ptr(self._lists.get_ids(number), count)
