"""FAISS index generations: immutable files derived from the vector segments.

A generation covers every item with an id up to ``last_id`` that was live when it was built. It is
written beside, fsynced, renamed and then published by the manifest swap, so a reader never meets a
half-written one. Index files are hostile input to FAISS: a file is read only if its SHA-256 is the
one that the manifest states.

Shapes: N indexed items, D embedding width.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval import durable
from clipsys.retrieval.manifest import IndexGeneration
from clipsys.retrieval.segments import Floats, Ints
from clipsys.retrieval.snapshot import Snapshot

SUFFIX = ".faiss"

# The wheel's stubs describe the C++ constructors, not those that its Python layer puts over them.
_faiss: Any = faiss


@dataclass(frozen=True, eq=False)
class LoadedIndex:
    """A generation in memory. Searches may run concurrently; nothing changes it."""

    generation: IndexGeneration
    faiss_index: Any

    def search(
        self, query_D: Floats, k: int, *, allowed: Ints | None = None
    ) -> tuple[Ints, Floats]:
        """The k nearest by inner product, best first: (ids, approximate scores).

        Args:
            query_D: unit norm.
            k: at most the number of vectors that may be found.
            allowed: only these ids may be found; all if None.
        """
        parameters = None
        if allowed is not None:
            selector, _bitmap = _id_selector(allowed)
            parameters = _faiss.SearchParameters(sel=selector)
        scores_1K, ids_1K = self.faiss_index.search(query_D[None, :], k, params=parameters)
        found = ids_1K[0] >= 0  # FAISS pads with -1 where fewer than k are allowed
        return ids_1K[0][found], scores_1K[0][found]


def _id_selector(allowed: Ints) -> tuple[Any, Any]:
    # A bitmap over ids: one bit an id ever given, constant time a test. The selector does not own
    # the bytes, so the caller keeps both alive during the search.
    bits = np.zeros(int(allowed.max(initial=0)) + 1, bool)
    bits[allowed] = True
    bitmap = np.packbits(bits, bitorder="little")
    return _faiss.IDSelectorBitmap(bitmap), bitmap


def build_index(folder: Path, snapshot: Snapshot, *, generation: int) -> IndexGeneration:
    """Writes a flat inner-product index of a snapshot. Streams the segments block by block.

    Raises:
        CollectionError: the index cannot be written.
    """
    index = _faiss.IndexIDMap(_faiss.IndexFlatIP(snapshot.vectors.dim))
    for ids_N, vectors_ND in snapshot.blocks():
        index.add_with_ids(vectors_ND, ids_N)
    name = f"{generation:06d}-{secrets.token_hex(4)}{SUFFIX}"
    beside = folder / f".{name}.new"
    try:
        _faiss.write_index(index, str(beside))
        sha256 = durable.sha256_of(beside)
        durable.publish(beside, folder / name)
    except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError where it cannot write
        beside.unlink(missing_ok=True)
        raise CollectionError(
            f"{folder / name}: the index cannot be written ({' '.join(str(error).split())}); "
            "the collection works without it, more slowly"
        ) from error
    return IndexGeneration(
        generation=generation,
        kind="flat",
        file=name,
        sha256=sha256,
        num_items=len(snapshot),
        last_id=int(snapshot.ids_N[-1]) if len(snapshot) else 0,
    )


def load_index(folder: Path, generation: IndexGeneration, dim: int) -> LoadedIndex:
    """Reads a generation after checking its hash.

    Raises:
        FileNotFoundError: the file is gone (a writer may have published a newer one meanwhile).
        CollectionError: the file is not the one that the manifest states.
    """
    path = folder / generation.file
    if durable.sha256_of(path) != generation.sha256:
        raise CollectionError(
            f"{path}: the index file is damaged (its SHA-256 is not the manifest's); "
            "`clipsys index` on this collection builds it again"
        )
    index = _faiss.read_index(str(path))
    if index.d != dim or index.ntotal != generation.num_items:
        raise CollectionError(
            f"{path}: holds {index.ntotal} vectors of width {index.d}, the manifest says "
            f"{generation.num_items} of width {dim}"
        )
    return LoadedIndex(generation, index)


def is_sound(folder: Path, generation: IndexGeneration) -> bool:
    """Whether a generation's file is there and unaltered."""
    try:
        return durable.sha256_of(folder / generation.file) == generation.sha256
    except OSError:
        return False


def delete_stale(folder: Path, keep: IndexGeneration | None) -> None:
    """Deletes index files that are not published. Call with the writer lock held.

    Readers keep what they loaded; one that was about to load the old file reads the manifest again.
    """
    for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.new")]:
        if keep is None or path.name != keep.file:
            path.unlink(missing_ok=True)
