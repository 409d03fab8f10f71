"""FAISS index generations: immutable files derived from the vector segments.

A generation covers every item with an id up to ``last_id`` that was live when it was built. It is
written beside, fsynced, renamed and then published by the manifest swap, so a reader never meets a
half-written one. Index files are hostile input to FAISS: a file is read only if its SHA-256 is the
one that the manifest states.

Compressed lists are not read but mapped: several readers share one copy of them, and an index may
be larger than the memory.

Shapes: Q queries, N indexed items, K found, D embedding width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipsys.errors import CollectionError
from clipsys.retrieval.indexes import memory
from clipsys.retrieval.indexes.faiss_library import faiss_library
from clipsys.retrieval.indexes.gpu import GpuCopy
from clipsys.retrieval.indexes.id_set import IdSet
from clipsys.retrieval.storage import durable
from clipsys.retrieval.storage.manifest import IndexGeneration, SearchEffort
from clipsys.retrieval.storage.segments import Floats, Ints

SUFFIX = ".faiss"
#: The share of the free memory that an index leaves to everybody else.
_MEMORY_MARGIN = 0.2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedIndex:
    """A generation in memory. Searches may run concurrently; nothing changes it.

    Attributes:
        on_gpus: a copy that is asked first; what it cannot answer, ``faiss_index`` does.
    """

    generation: IndexGeneration
    faiss_index: Any
    on_gpus: GpuCopy | None = None

    @property
    def effort(self) -> SearchEffort | None:
        """How hard to look; None where the index is exact."""
        return self.generation.effort

    def max_probes(self) -> int:
        """Where looking harder ends: all lists, or HNSW's whole graph."""
        return max(1, self.generation.num_lists or self.generation.num_items)

    def search(
        self,
        query_D: Floats,
        k: int,
        *,
        allowed: IdSet | None = None,
        num_probes: int | None = None,
    ) -> tuple[Ints, Floats]:
        """The k nearest by inner product, best first: (ids, approximate scores).

        Args:
            query_D: unit norm.
            k: at most the number of vectors that may be found.
            allowed: only these ids may be found; all if None.
            num_probes: how hard to look where the index is not exact; None: as tuned.
        """
        scores_1K, ids_1K = self.search_batch(
            query_D[None, :], k, allowed=allowed, num_probes=num_probes
        )
        found = ids_1K[0] >= 0  # FAISS pads with -1 where fewer than k are found
        return ids_1K[0][found], scores_1K[0][found]

    def search_batch(
        self,
        query_QD: Floats,
        k: int,
        *,
        allowed: IdSet | None = None,
        num_probes: int | None = None,
    ) -> tuple[Floats, Ints]:
        """As `search` for several queries: (scores, ids), each (Q, k), padded with id -1."""
        if num_probes is None and self.effort is not None:
            num_probes = self.effort.num_probes
        if self.on_gpus is not None:
            found = self.on_gpus.search(query_QD, k, allowed=allowed, num_probes=num_probes)
            if found is not None:
                return found
        selector = None if allowed is None else allowed.selector
        parameters = search_parameters(self.generation.kind, num_probes, selector)
        scores_QK, ids_QK = self.faiss_index.search(query_QD, k, params=parameters)
        return scores_QK, ids_QK


def search_parameters(kind: str, num_probes: int | None, selector: Any = None) -> Any:
    """FAISS's parameters of one search; mutating the index instead would not be thread-safe."""
    chosen = {} if selector is None else {"sel": selector}
    if kind == "flat" or num_probes is None:
        return faiss_library().SearchParameters(**chosen) if chosen else None
    if kind == "hnsw":
        return faiss_library().SearchParametersHNSW(efSearch=num_probes, **chosen)
    if kind == "ivf-rabitq":
        # qb: bits of the query's own quantisation; 8 make it exact enough not to matter.
        return faiss_library().IVFRaBitQSearchParameters(nprobe=num_probes, qb=8, **chosen)
    return faiss_library().SearchParametersIVF(nprobe=num_probes, **chosen)


def load_index(folder: Path, generation: IndexGeneration, dim: int) -> LoadedIndex:
    """Reads a generation after checking its hash.

    Raises:
        FileNotFoundError: the file is gone (a writer may have published a newer one meanwhile).
        CollectionError: the file is not the one that the manifest states, or too large for the
            memory that is free.
    """
    path = folder / generation.file
    if durable.sha256_of(path) != generation.sha256:
        raise CollectionError(
            f"{path}: the index file is damaged (its SHA-256 is not the manifest's); "
            "`clipsys index` on this collection builds it again"
        )
    mapped = generation.kind.startswith("ivf")
    needed, free = path.stat().st_size, memory.available_bytes()
    if not mapped and needed > (1 - _MEMORY_MARGIN) * free:
        raise CollectionError(
            f"{path}: takes {needed / 1e6:,.0f} MB of memory and {free / 1e6:,.0f} MB are free; "
            "`Collection.build_index` makes a smaller one here"
        )
    index = read_file(path, mapped=mapped)
    if index.d != dim or index.ntotal != generation.num_items:
        raise CollectionError(
            f"{path}: holds {index.ntotal} vectors of width {index.d}, the manifest says "
            f"{generation.num_items} of width {dim}; `clipsys repair` builds it again"
        )
    return LoadedIndex(generation, searchable(index, generation.kind))


def read_file(path: Path, *, mapped: bool) -> Any:
    """FAISS's index of a file whose hash was checked; mapped: its lists stay on the disk."""
    faiss = faiss_library()
    if not mapped:
        return faiss.read_index(str(path))
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)
    # FAISS starts threads at every search to read ahead: measured, they cost more than they bring.
    lists.prefetch_nthread = 0
    return index


def searchable(index: Any, kind: str) -> Any:
    """What answers searches of an index as it is stored: itself, or a copy in another order.

    Where there is no memory for the copy (the index was built on a larger machine), the lists are
    searched as they are stored, mapped: as good, and slower.
    """
    if kind != "ivf-pq":
        return index
    from clipsys.retrieval.indexes import fastscan  # imports FAISS

    needed, free = fastscan.copy_bytes(index), memory.available_bytes()
    if needed <= (1 - _MEMORY_MARGIN) * free:
        return fastscan.FastScan(index)
    _logger.warning(
        "the index takes %.0f MB of memory and %.0f MB are free: it is searched from its file, "
        "more slowly",
        needed / 1e6,
        free / 1e6,
    )
    return index


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
