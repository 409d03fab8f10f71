"""Building index generations: trained on a sample, filled block by block, tuned, written.

    segments --(sample)--> centroids, codes          in memory, as float16
    segments --(block by block)--> list of each      4 bytes an item
    segments --(block by block)--> codes, sorted by list as far as memory goes --> the file
    the file, mapped --> tuned --> hashed, fsynced, renamed

So inverted files are never in memory as a whole; flat indexes and graphs are. An inverted file can
also be extended: its lists are copied without what was deleted, and new vectors go behind, which
costs reading and writing the file but no training and no tuning.

Shapes: N indexed items, L lists, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from clipsys.errors import RecallError
from clipsys.retrieval.indexes import fastscan, gpu
from clipsys.retrieval.indexes.clustering import draw_sample, nearest, spherical_kmeans
from clipsys.retrieval.indexes.generation import read_file, searchable
from clipsys.retrieval.indexes.inverted_file import InvertedFile, MappedLists, fill
from clipsys.retrieval.indexes.memory import default_memory_bytes
from clipsys.retrieval.indexes.new_file import new_file
from clipsys.retrieval.indexes.planning import (
    CODE_SAMPLE,
    DEFAULT_RECALL,
    HNSW_LINKS,
    MIN_BUFFER_BYTES,
    STREAMED_KINDS,
    IndexPlan,
    plan_index,
    plan_of_kind,
)
from clipsys.retrieval.indexes.tuning import TuningQueries, tune
from clipsys.retrieval.storage.manifest import IndexGeneration, Kind
from clipsys.retrieval.storage.segments import Ints
from clipsys.retrieval.storage.snapshot import Snapshot, unit_rows

_faiss: Any = faiss
_logger = logging.getLogger(__name__)

_KMEANS_ROUNDS = 8
_HNSW_BUILD_EFFORT = 120


def build_index(
    folder: Path,
    snapshot: Snapshot,
    *,
    generation: int,
    plan: IndexPlan | None = None,
    queries: TuningQueries | None = None,
    memory_bytes: int | None = None,
) -> IndexGeneration:
    """Builds, tunes and writes an index of a snapshot.

    Args:
        folder: the collection's indexes folder.
        snapshot: what is indexed.
        generation: the number that it gets.
        plan: the kind of index; None: flat.
        queries: what it is tuned and measured with; None: image queries alone.
        memory_bytes: what building may take, if that is more than the plan's least; None: half of
            the machine's.

    Raises:
        CollectionError: the index cannot be written, or does not reach the plan's recall.
    """
    plan = plan or plan_of_kind("flat", len(snapshot), snapshot.vectors.dim)
    index = _empty_index(plan)
    if plan.num_training:
        _train(index, plan, snapshot)
    effort = None
    with new_file(folder, generation) as file:
        if plan.kind in STREAMED_KINDS:
            allowed = default_memory_bytes() if memory_bytes is None else memory_bytes
            _stream(file.beside, index, snapshot, buffer_bytes=plan.buffer_bytes(allowed))
            index = read_file(file.beside, mapped=True)
        else:
            for ids_N, vectors_ND in snapshot.blocks():
                index.add_with_ids(vectors_ND, ids_N)
            _faiss.write_index(index, str(file.beside))
        if not plan.is_exact and len(snapshot):
            effort = tune(searchable(index, plan.kind), plan, snapshot, queries)
    return IndexGeneration(
        generation=generation,
        kind=plan.kind,
        file=file.name,
        sha256=file.sha256,
        num_items=len(snapshot),
        last_id=int(snapshot.ids_N[-1]) if len(snapshot) else 0,
        num_trained=len(snapshot),
        num_lists=plan.num_lists,
        effort=effort,
    )


def build_planned(
    folder: Path,
    snapshot: Snapshot,
    *,
    generation: int,
    memory_bytes: int | None = None,
    recall: float = DEFAULT_RECALL,
    queries: Callable[[], TuningQueries] | None = None,
) -> tuple[IndexPlan, IndexGeneration]:
    """Plans an index of a snapshot and builds it.

    Args:
        folder: the collection's indexes folder.
        snapshot: what is indexed.
        generation: the number that it gets.
        memory_bytes: what building and holding it may take; None: half of the machine's.
        recall: recall@10 to be reached on held-out queries.
        queries: asked only where there is something to tune.

    Raises:
        CollectionError: the memory does not suffice, the recall is not reached, or the index
            cannot be written.
    """
    allowed_bytes = default_memory_bytes() if memory_bytes is None else memory_bytes
    asked: TuningQueries | None = None
    tried: list[Kind] = []
    while True:
        plan = plan_index(
            len(snapshot), snapshot.vectors.dim, allowed_bytes, recall,
            on_gpus=gpu.num_gpus() > 0, without=tried,
        )  # fmt: skip
        _logger.log(logging.DEBUG if plan.is_exact else logging.INFO, "%s: index %s", folder, plan)
        if queries is not None and asked is None and not plan.is_exact:
            asked = queries()
        try:
            return plan, build_index(
                folder,
                snapshot,
                generation=generation,
                plan=plan,
                queries=asked,
                memory_bytes=allowed_bytes,
            )
        except RecallError as error:
            # Codes of few bits may lose too much of some embeddings; a byte a number seldom does.
            if plan.kind != "ivf-pq":
                raise
            _logger.warning("%s: %s; another kind is tried", folder, error)
            tried.append(plan.kind)


def extend_index(
    folder: Path,
    snapshot: Snapshot,
    previous: IndexGeneration,
    *,
    memory_bytes: int | None = None,
) -> IndexGeneration:
    """Writes the successor of an inverted file: without deleted items, with the new ones.

    Args:
        folder: the collection's indexes folder.
        snapshot: what is indexed.
        previous: of a kind that is written list by list.
        memory_bytes: what it may take; None: half of the machine's.

    Raises:
        CollectionError: the index cannot be written.
    """
    allowed_bytes = default_memory_bytes() if memory_bytes is None else memory_bytes
    with new_file(folder, previous.generation + 1) as file:
        index = read_file(folder / previous.file, mapped=True)
        _stream(
            file.beside,
            index,
            snapshot,
            older=MappedLists(index),
            last_id=previous.last_id,
            buffer_bytes=max(MIN_BUFFER_BYTES, allowed_bytes // 2),
        )
    return previous.model_copy(
        update={
            "generation": previous.generation + 1,
            "file": file.name,
            "sha256": file.sha256,
            "num_items": len(snapshot),
            "last_id": int(snapshot.ids_N[-1]) if len(snapshot) else 0,
        }
    )


def _empty_index(plan: IndexPlan) -> Any:
    dim, metric = plan.dim, _faiss.METRIC_INNER_PRODUCT
    if plan.kind == "ivf-pq":
        return fastscan.empty_lists(dim, plan.num_lists)
    if plan.kind == "flat":
        return _faiss.IndexIDMap(_faiss.IndexFlatIP(dim))
    if plan.kind == "hnsw":
        graph = _faiss.IndexHNSWFlat(dim, HNSW_LINKS, metric)
        graph.hnsw.efConstruction = _HNSW_BUILD_EFFORT
        return _faiss.IndexIDMap(graph)
    factory = {"ivf-flat": "Flat", "ivf-sq8": "SQ8", "ivf-rabitq": "RaBitQ"}[plan.kind]
    return _faiss.index_factory(dim, f"IVF{plan.num_lists},{factory}", metric)


def _stream(
    path: Path,
    trained: Any,
    snapshot: Snapshot,
    *,
    buffer_bytes: int,
    older: MappedLists | None = None,
    last_id: int = 0,
) -> None:
    """Writes an inverted file of a snapshot: what is live in older lists, then the newer items.

    Args:
        path: of the file.
        trained: an index without vectors.
        snapshot: what is indexed.
        buffer_bytes: for vectors that are sorted by list at once.
        older: lists of items up to ``last_id``; none if None.
        last_id: items with greater ids are encoded.
    """
    inverted = _faiss.extract_index_ivf(trained)
    num_covered = int(np.searchsorted(snapshot.ids_N, last_id, side="right"))
    newer = np.arange(num_covered, len(snapshot))
    list_N = _assign(trained, snapshot, newer)
    sizes_L = np.bincount(list_N, minlength=inverted.nlist)
    live = np.zeros(last_id + 1, bool)
    live[snapshot.ids_N[:num_covered]] = True
    if older is not None:
        sizes_L += [np.count_nonzero(live[older[one][1]]) for one in range(len(older))]
    with InvertedFile(path, trained, sizes_L) as file:
        if older is not None:
            for one in range(len(older)):
                codes_NC, ids_N = older[one]
                kept_N = live[ids_N]
                file.append(one, codes_NC[kept_N], ids_N[kept_N])
        fill(file, trained, snapshot, newer, list_N, buffer_bytes=buffer_bytes)


def _assign(trained: Any, snapshot: Snapshot, positions: Ints) -> npt.NDArray[np.int32]:
    """The list of each of some vectors, (N,); found on GPUs where FAISS sees any."""
    quantizer = _faiss.extract_index_ivf(trained).quantizer
    centroids_LD = quantizer.reconstruct_n(0, quantizer.ntotal)
    rotation_DD = fastscan.rotation_of(trained)
    if rotation_DD is not None:  # the centroids are turned back once, instead of every vector
        centroids_LD = np.ascontiguousarray(centroids_LD @ rotation_DD.T)
    on_gpus = gpu.NearestCentroid(centroids_LD) if gpu.num_gpus() > 0 else None
    list_N = np.empty(len(positions), np.int32)
    done = 0
    for ids_N, vectors_ND in snapshot.blocks(positions):
        list_N[done : done + len(ids_N)] = (
            nearest(vectors_ND, centroids_LD)[0] if on_gpus is None else on_gpus(vectors_ND)
        )
        done += len(ids_N)
    return list_N


def _train(index: Any, plan: IndexPlan, snapshot: Snapshot) -> None:
    """Finds the centroids, then whatever the codes need; on GPUs where FAISS sees any."""
    inverted = _faiss.extract_index_ivf(index)
    sample_ND = draw_sample(snapshot, plan.num_training)
    code_sample_ND = sample_ND[:: max(1, len(sample_ND) // CODE_SAMPLE)].copy()
    if gpu.num_gpus() > 0:
        centroids_LD = unit_rows(
            gpu.kmeans(sample_ND, inverted.nlist, rounds=_KMEANS_ROUNDS, flat=gpu.flat_on_gpus)
        )
    else:
        centroids_LD = spherical_kmeans(sample_ND, inverted.nlist, rounds=_KMEANS_ROUNDS)
    del sample_ND
    # The codes are trained alone, the centroids being in place: a few vectors are enough for them.
    code_sample_ND = code_sample_ND.astype(np.float32)
    if plan.kind == "ivf-pq":
        # FAISS refuses to find 16 points among fewer.
        enough = max(len(code_sample_ND), 1 << fastscan.BITS)
        code_sample_ND = np.resize(code_sample_ND, (enough, code_sample_ND.shape[1]))
        near_ND = centroids_LD[nearest(code_sample_ND, centroids_LD)[0]]
        rotation_DD = fastscan.balanced_rotation(code_sample_ND - near_ND)
        fastscan.set_rotation(index, rotation_DD)
        centroids_LD = centroids_LD @ rotation_DD
    inverted.quantizer.add(centroids_LD)
    index.train(code_sample_ND)
