"""Building index generations: trained on a sample, filled block by block, tuned, written.

Vectors stream from the memory-mapped segments; only the training sample and the index itself are
in memory. An index can also be extended: new vectors go into the lists that its predecessor has,
which costs reading and writing the file but no training and no tuning.

Shapes: N indexed items, D embedding width.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval import durable, fastscan
from clipsys.retrieval.clustering import nearest, spherical_kmeans
from clipsys.retrieval.index import SUFFIX, IdSet, read_file, searchable
from clipsys.retrieval.manifest import IndexGeneration
from clipsys.retrieval.planning import (
    DEFAULT_RECALL,
    HNSW_LINKS,
    IndexPlan,
    plan_index,
    plan_of_kind,
)
from clipsys.retrieval.segments import Floats, Ints
from clipsys.retrieval.snapshot import Snapshot, unit_rows
from clipsys.retrieval.tuning import TuningQueries, tune

_faiss: Any = faiss
_logger = logging.getLogger(__name__)

_KMEANS_ROUNDS = 8
#: Vectors that the codes of compressed lists are trained with.
_CODE_SAMPLE = 16_384
_HNSW_BUILD_EFFORT = 120
#: GPU searches, even two of them, must not run at the same time.
_gpu_lock = threading.Lock()


def default_memory_bytes() -> int:
    """Half of this machine's memory: the other half is the encoder's and everybody else's."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def build_index(
    folder: Path,
    snapshot: Snapshot,
    *,
    generation: int,
    plan: IndexPlan | None = None,
    queries: TuningQueries | None = None,
) -> IndexGeneration:
    """Builds, tunes and writes an index of a snapshot.

    Args:
        folder: the collection's indexes folder.
        snapshot: what is indexed.
        generation: the number that it gets.
        plan: the kind of index; None: flat.
        queries: what it is tuned and measured with; None: image queries alone.

    Raises:
        CollectionError: the index cannot be written, or does not reach the plan's recall.
    """
    plan = plan or plan_of_kind("flat", len(snapshot), snapshot.vectors.dim)
    index = _empty_index(plan)
    if plan.num_training:
        _train(index, _sample(snapshot, plan.num_training))
    _fill(index, plan.kind, snapshot, np.arange(len(snapshot)))
    effort = None
    if not plan.is_exact and len(snapshot):
        effort = tune(searchable(index, plan.kind), plan, snapshot, queries)
    name, sha256 = _write(folder, index, generation)
    return IndexGeneration(
        generation=generation,
        kind=plan.kind,
        file=name,
        sha256=sha256,
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
    plan = plan_index(len(snapshot), snapshot.vectors.dim, allowed_bytes, recall)
    _logger.log(logging.DEBUG if plan.is_exact else logging.INFO, "%s: index %s", folder, plan)
    return plan, build_index(
        folder,
        snapshot,
        generation=generation,
        plan=plan,
        queries=None if plan.is_exact or queries is None else queries(),
    )


def extend_index(folder: Path, snapshot: Snapshot, previous: IndexGeneration) -> IndexGeneration:
    """Writes the successor of an inverted file: without deleted items, with the new ones.

    Raises:
        CollectionError: the index cannot be written.
    """
    index = read_file(folder / previous.file, mapped=False)
    covered = snapshot.ids_N <= previous.last_id
    _forget_all_but(index, snapshot.ids_N[covered])
    _fill(index, previous.kind, snapshot, np.flatnonzero(~covered))
    name, sha256 = _write(folder, index, previous.generation + 1)
    return previous.model_copy(
        update={
            "generation": previous.generation + 1,
            "file": name,
            "sha256": sha256,
            "num_items": len(snapshot),
            "last_id": int(snapshot.ids_N[-1]) if len(snapshot) else 0,
        }
    )


def _forget_all_but(index: Any, live_ids: Ints) -> None:
    if index.ntotal == len(live_ids):
        return
    live = IdSet(live_ids)
    index.remove_ids(_faiss.IDSelectorNot(live.selector))


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


def _fill(index: Any, kind: str, snapshot: Snapshot, positions: Ints) -> None:
    """Adds the vectors at positions, block by block."""
    centroids_LD, inverted, rotation_DD = None, index, fastscan.rotation_of(index)
    if kind.startswith("ivf"):
        inverted = _faiss.extract_index_ivf(index)
        centroids_LD = inverted.quantizer.reconstruct_n(0, inverted.nlist)
    for ids_N, vectors_ND in snapshot.blocks(positions):
        if centroids_LD is None:
            index.add_with_ids(vectors_ND, ids_N)
            continue
        listed_ND = vectors_ND if rotation_DD is None else vectors_ND @ rotation_DD
        list_N, _ = nearest(listed_ND, centroids_LD)
        arrays = [np.ascontiguousarray(one) for one in (listed_ND, ids_N, list_N)]
        inverted.add_core(len(ids_N), *map(_faiss.swig_ptr, arrays))
    index.ntotal = inverted.ntotal


def _sample(snapshot: Snapshot, count: int) -> Floats:
    """Vectors drawn without replacement, in the order of the segments: (count, D), unit norm."""
    chosen = np.random.default_rng(0).choice(len(snapshot), count, replace=False)
    chosen.sort()
    sample_ND = np.empty((count, snapshot.vectors.dim), np.float32)
    start = 0
    for ids_N, vectors_ND in snapshot.blocks(chosen):
        sample_ND[start : start + len(ids_N)] = vectors_ND
        start += len(ids_N)
    return sample_ND


def _train(index: Any, sample_ND: Floats) -> None:
    """Finds the centroids, then whatever the codes need; on GPUs where FAISS sees any."""
    inverted = _faiss.extract_index_ivf(index)
    if _faiss.get_num_gpus() > 0:
        centroids_LD = _kmeans_on_gpus(sample_ND, inverted.nlist)
    else:
        centroids_LD = spherical_kmeans(sample_ND, inverted.nlist, rounds=_KMEANS_ROUNDS)
    # The codes are trained alone, the centroids being in place: a few vectors are enough for them.
    some_ND = sample_ND[:: max(1, len(sample_ND) // _CODE_SAMPLE)]
    if isinstance(index, _faiss.IndexPreTransform):
        # FAISS refuses to find 16 points among fewer.
        some_ND = np.resize(some_ND, (max(len(some_ND), 1 << fastscan.BITS), some_ND.shape[1]))
        rotation_DD = fastscan.balanced_rotation(
            some_ND - centroids_LD[nearest(some_ND, centroids_LD)[0]]
        )
        fastscan.set_rotation(index, rotation_DD)
        centroids_LD = centroids_LD @ rotation_DD
    inverted.quantizer.add(centroids_LD)
    index.train(some_ND)


def _kmeans_on_gpus(sample_ND: Floats, num_lists: int) -> Floats:
    kmeans = _faiss.Clustering(sample_ND.shape[1], num_lists)
    kmeans.niter, kmeans.seed, kmeans.spherical = _KMEANS_ROUNDS, 1, True
    kmeans.min_points_per_centroid = 1
    kmeans.max_points_per_centroid = len(sample_ND)  # the sample is of the planned size already
    with _gpu_lock:
        on_gpus = _faiss.index_cpu_to_all_gpus(_faiss.IndexFlatIP(sample_ND.shape[1]))
        kmeans.train(sample_ND, on_gpus)
    return unit_rows(_faiss.vector_to_array(kmeans.centroids).reshape(num_lists, -1))


def _write(folder: Path, index: Any, generation: int) -> tuple[str, str]:
    """Writes an index durably. Returns its file's name and SHA-256."""
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
    return name, sha256
