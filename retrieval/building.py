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
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipsys.errors import CollectionError
from clipsys.retrieval import durable
from clipsys.retrieval.index import SUFFIX, IdSet, read_file
from clipsys.retrieval.manifest import IndexGeneration
from clipsys.retrieval.planning import HNSW_LINKS, IndexPlan, plan_of_kind
from clipsys.retrieval.segments import Floats, Ints
from clipsys.retrieval.snapshot import Snapshot, unit_rows
from clipsys.retrieval.tuning import TuningQueries, tune

_faiss: Any = faiss
_logger = logging.getLogger(__name__)

_KMEANS_ROUNDS = 8
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
    for ids_N, vectors_ND in snapshot.blocks():
        index.add_with_ids(vectors_ND, ids_N)
    effort = None
    if not plan.is_exact and len(snapshot):
        effort = tune(index, plan, snapshot, queries)
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


def extend_index(folder: Path, snapshot: Snapshot, previous: IndexGeneration) -> IndexGeneration:
    """Writes the successor of an inverted file: without deleted items, with the new ones.

    Raises:
        CollectionError: the index cannot be written.
    """
    index = read_file(folder / previous.file, mapped=False)
    covered = snapshot.ids_N <= previous.last_id
    _forget_all_but(index, snapshot.ids_N[covered])
    for ids_N, vectors_ND in snapshot.blocks(np.flatnonzero(~covered)):
        index.add_with_ids(vectors_ND, ids_N)
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
    if plan.kind == "flat":
        return _faiss.IndexIDMap(_faiss.IndexFlatIP(dim))
    if plan.kind == "hnsw":
        graph = _faiss.IndexHNSWFlat(dim, HNSW_LINKS, metric)
        graph.hnsw.efConstruction = _HNSW_BUILD_EFFORT
        return _faiss.IndexIDMap(graph)
    factory = {"ivf-flat": "Flat", "ivf-sq8": "SQ8", "ivf-rabitq": "RaBitQ"}[plan.kind]
    return _faiss.index_factory(dim, f"IVF{plan.num_lists},{factory}", metric)


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
    kmeans = _faiss.Clustering(index.d, inverted.nlist)
    kmeans.niter, kmeans.seed = _KMEANS_ROUNDS, 1
    kmeans.spherical = True
    kmeans.min_points_per_centroid = 1
    kmeans.max_points_per_centroid = len(sample_ND)  # the sample is of the planned size already
    assigner = _faiss.IndexFlatIP(index.d)
    if _faiss.get_num_gpus() > 0:
        with _gpu_lock:
            kmeans.train(sample_ND, _faiss.index_cpu_to_all_gpus(assigner))
    else:
        kmeans.train(sample_ND, assigner)
    centroids_LD = _faiss.vector_to_array(kmeans.centroids).reshape(inverted.nlist, index.d)
    inverted.quantizer.add(unit_rows(centroids_LD))
    index.train(sample_ND)  # finds the centroids in place and trains the codes alone


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
