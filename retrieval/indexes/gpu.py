"""Index generations on GPUs: a copy that is searched where it can answer, under one lock.

    fits on each GPU         a copy on each, queries divided among them
    fits on all together     vectors divided among them, every query goes to each
    otherwise, no GPU, other kinds      the CPU searches

FAISS's GPU code is not thread-safe, not even two searches, so one lock goes around every call. What
a copy cannot answer, the index on the CPU does: more than 2,048 neighbours or lists, and a filter
that leaves too little of what was fetched. No filter is ever given to a GPU: `IVFFlat::search` of
FAISS 1.15 takes an `IDSelector` and ignores it. Numbers stay float32, flat vectors and centroids
too, so the same lists are visited and candidates differ only where scores tie; what is returned is
scored again from the stored vectors anyway.

``CLIPSYS_INDEX_DEVICE=cpu`` keeps indexes off the GPUs, ``CUDA_VISIBLE_DEVICES`` chooses them.

Shapes: Q queries, K found, N vectors, L lists, D embedding width.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from clipsys.errors import ConfigError
from clipsys.retrieval.indexes.faiss_library import faiss_library
from clipsys.retrieval.indexes.id_set import IdSet
from clipsys.retrieval.storage.manifest import IndexGeneration
from clipsys.retrieval.storage.segments import Floats, Ints

if TYPE_CHECKING:
    from clipsys.retrieval.indexes.clustering import Halves

_logger = logging.getLogger(__name__)

#: Around every call into FAISS's GPU code.
lock = threading.Lock()

VARIABLE = "CLIPSYS_INDEX_DEVICE"
#: Kinds that FAISS has on GPUs.
GPU_KINDS = ("flat", "ivf-flat", "ivf-sq8")
#: The most neighbours and the most lists of a search on a GPU (GPU_MAX_SELECTION_K in FAISS).
MAX_SELECTION = 2_048
#: FAISS's scratch memory on a large GPU is 1.5 GiB; the rest is CUDA's own.
_SCRATCH_BYTES = 2 * 2**30
#: Lists are padded to groups of 32 vectors on a GPU.
_PADDING = 1.25


def num_gpus() -> int:
    """GPUs that FAISS sees and may use.

    Raises:
        ConfigError: the environment asks for a device that is not known.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", "cpu"):
        raise ConfigError(f"{VARIABLE} is {asked!r}; expected auto or cpu")
    counts = getattr(faiss_library(), "get_num_gpus", None)  # the CPU's wheel has none
    return 0 if asked == "cpu" or counts is None else int(counts())


# ---- where ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Where an index is searched.

    Attributes:
        num_gpus: 0: on the CPU.
        sharded: each GPU has a part; else each has all.
        reason: why, in words.
    """

    num_gpus: int
    sharded: bool
    reason: str

    def __str__(self) -> str:
        if self.num_gpus == 0:
            return f"CPU ({self.reason})"
        return f"{self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''} ({self.reason})"


def choose_placement(kind: str, index_bytes: int, free_bytes: Sequence[int]) -> Placement:
    """Decides where an index is searched; pure.

    Args:
        kind: of the index.
        index_bytes: its size in a file.
        free_bytes: free memory of each GPU.
    """
    if not free_bytes:
        return Placement(0, False, "no GPU that FAISS and torch see and may use")
    if kind not in GPU_KINDS:
        return Placement(0, False, f"FAISS has no {kind} on GPUs")
    needed = math.ceil(_PADDING * index_bytes)
    room = [max(0, free - _SCRATCH_BYTES) for free in free_bytes]
    size = f"{needed / 1e9:,.1f} GB"
    if needed <= min(room):
        return Placement(len(room), False, f"{size} fit on each")
    if needed <= len(room) * min(room):
        return Placement(len(room), True, f"{size} fit on all together, a part on each")
    return Placement(0, False, f"{size} do not fit into the GPUs' free {sum(room) / 1e9:,.1f} GB")


def placement_of(kind: str, index_bytes: int) -> Placement:
    """`choose_placement` on this machine, as its GPUs are now."""
    return choose_placement(kind, index_bytes, _free_bytes(num_gpus()) if num_gpus() else [])


def _free_bytes(count: int) -> list[int]:
    import torch  # FAISS's Python layer does not tell; torch may have been built without CUDA

    seen = min(count, torch.cuda.device_count())
    return [torch.cuda.mem_get_info(device)[0] for device in range(seen)]


# ---- searching -----------------------------------------------------------------------------------


class Searchable(Protocol):
    """What a copy asks of an index on GPUs."""

    def search(self, query_QD: Floats, k: int) -> tuple[Floats, Ints]:
        """The k nearest of each query: (scores, ids), (Q, k) each, padded with id -1."""

    def set_num_probes(self, num_probes: int) -> None:
        """How many lists the searches that follow visit."""


class GpuCopy:
    """A copy of an index. Thread-safe: searches wait for one another."""

    def __init__(self, on_gpus: Searchable, num_items: int) -> None:
        self._on_gpus: Searchable | None = on_gpus
        self._num_items = num_items

    def release(self) -> None:
        """Gives the GPUs' memory back; searches that still come are the CPU's."""
        with lock:
            self._on_gpus = None

    def search(
        self, query_QD: Floats, k: int, *, allowed: IdSet | None, num_probes: int | None
    ) -> tuple[Floats, Ints] | None:
        """As `LoadedIndex.search_batch`; None where the CPU has to answer.

        More are fetched where not all are allowed. What remains of them is what a filter inside the
        search would have found, unless fewer than k remain and there were more to fetch.
        """
        fetch = k
        if allowed is not None:
            fetch = math.ceil(1.25 * k * self._num_items / max(1, len(allowed))) + 16
        fetch = min(fetch, self._num_items)
        if max(fetch, k, num_probes or 0) > MAX_SELECTION:
            return None
        found = self._ask(query_QD, max(fetch, k), num_probes)
        return found if found is None or allowed is None else _only(allowed, *found, k)

    def _ask(self, query_QD: Floats, k: int, num_probes: int | None) -> tuple[Floats, Ints] | None:
        with lock:
            if self._on_gpus is None:
                return None
            try:
                if num_probes is not None:
                    self._on_gpus.set_num_probes(num_probes)
                return self._on_gpus.search(np.ascontiguousarray(query_QD, np.float32), k)
            except RuntimeError as error:  # FAISS's: out of memory, or the device is gone
                self._on_gpus = None
                _logger.warning(
                    "searching on the CPU from here on: %s", " ".join(str(error).split())
                )
                return None


def _only(allowed: IdSet, scores_QF: Floats, ids_QF: Ints, k: int) -> tuple[Floats, Ints] | None:
    """The first k allowed ones of each row; None where a row has too few and there may be more."""
    kept_QF = allowed.contains(ids_QF)
    if ((kept_QF.sum(axis=1) < k) & (ids_QF[:, -1] >= 0)).any():
        return None
    first_QK = np.argsort(~kept_QF, axis=1, kind="stable")[:, :k]
    kept_QK = np.take_along_axis(kept_QF, first_QK, axis=1)
    scores_QK = np.where(kept_QK, np.take_along_axis(scores_QF, first_QK, axis=1), -np.inf)
    return (
        scores_QK.astype(np.float32),
        np.where(kept_QK, np.take_along_axis(ids_QF, first_QK, axis=1), -1),
    )


class _FaissOnGpus:
    """FAISS's copy of an index on GPUs."""

    def __init__(self, index: Any, placement: Placement) -> None:
        faiss = faiss_library()
        self._ids_N: Ints | None = None
        if hasattr(index, "id_map"):  # FAISS divides a bare flat index among GPUs, not one with ids
            self._ids_N = faiss.vector_to_array(index.id_map)
            index = faiss.downcast_index(index.index)
        options = faiss.GpuMultipleClonerOptions()
        options.shard = placement.sharded
        options.useFloat16 = options.useFloat16CoarseQuantizer = False
        devices = list(range(placement.num_gpus))
        self._index = faiss.index_cpu_to_gpus_list(index, co=options, gpus=devices)
        self._parameters = faiss.GpuParameterSpace()

    def search(self, query_QD: Floats, k: int) -> tuple[Floats, Ints]:
        scores_QK, places_QK = self._index.search(query_QD, k)
        if self._ids_N is None:
            return scores_QK, places_QK
        return scores_QK, np.where(places_QK >= 0, self._ids_N[places_QK], -1)

    def set_num_probes(self, num_probes: int) -> None:
        # Replicas take no search parameters; the lock makes setting it on all of them safe.
        self._parameters.set_index_parameter(self._index, "nprobe", num_probes)


def copy_to_gpus(generation: IndexGeneration, faiss_index: Any, index_bytes: int) -> GpuCopy | None:
    """Copies a loaded index to GPUs, if there are any, it fits, and they can search its kind.

    Mapped lists are read from the file on the way; dividing an index among GPUs takes its size in
    this machine's memory for a moment.

    Raises:
        ConfigError: the environment asks for a device that is not known.
    """
    if num_gpus() == 0 or generation.num_items == 0:
        return None
    placement = placement_of(generation.kind, index_bytes)
    _logger.info("%s is searched on: %s", generation.file, placement)
    if placement.num_gpus == 0:
        return None
    try:
        with lock:
            on_gpus = _FaissOnGpus(faiss_index, placement)
    except RuntimeError as error:
        _logger.warning("searching on the CPU: %s", " ".join(str(error).split()))
        return None
    return GpuCopy(on_gpus, generation.num_items)


# ---- building ------------------------------------------------------------------------------------


def flat_on_gpus(dim: int) -> Any:
    """An empty index by inner product, the same on each GPU. Call, and use it, under the lock."""
    return faiss_library().index_cpu_to_all_gpus(faiss_library().IndexFlatIP(dim))


def kmeans(sample_ND: Halves, num_lists: int, *, rounds: int, flat: Callable[[int], Any]) -> Floats:
    """Centroids (L, D) by FAISS's k-means, whose assignments are on what ``flat`` makes.

    The sample stays float16 in memory; FAISS decodes it block by block.
    """
    faiss = faiss_library()
    dim = sample_ND.shape[1]
    clustering = faiss.Clustering(dim, num_lists)
    clustering.niter, clustering.seed, clustering.spherical = rounds, 1, True
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = len(sample_ND)  # the sample is of the planned size already
    codec = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
    codes_NC = np.ascontiguousarray(sample_ND).view(np.uint8)
    with lock:
        clustering.train_encoded(codes_NC, codec, flat(dim))
    centroids_LD: Floats = faiss.vector_to_array(clustering.centroids).reshape(num_lists, dim)
    return centroids_LD


class NearestCentroid:
    """The list of each vector, by a flat index of the centroids on GPUs."""

    def __init__(self, centroids_LD: Floats, flat: Callable[[int], Any] = flat_on_gpus) -> None:
        with lock:
            self._index = flat(centroids_LD.shape[1])
            self._index.add(np.ascontiguousarray(centroids_LD))

    def __call__(self, vectors_ND: Floats) -> Ints:
        """Vectors (N, D) to lists (N,)."""
        with lock:
            _, list_N1 = self._index.search(np.ascontiguousarray(vectors_ND), 1)
        list_N: Ints = list_N1[:, 0]
        return list_N
