"""Inverted lists of 4-bit product quantisation, scanned with lookup tables that fit into registers.

Two numbers of a vector become four bits: which of 16 points of the plane is nearest. A query makes
one table of 16 inner products for each plane, and SIMD shuffles look up 32 vectors at once (André
et al. 2015, "Cache locality is not enough"), which costs a fifth of scanning a byte a number.

Planes of equal variance lose least (Ge et al. 2013, "Optimized Product Quantization", 3.2.2), so
vectors are rotated into the axes of the residuals' covariance, and these dealt out to the planes.
Inner products do not change. Without it up to twice the candidates were needed, of a million.

On disk the lists are FAISS's ordinary ones, which can be mapped, extended and shrunk; the order
that the scan wants is made when an index is loaded (0.4 s and 140 MB for a million of width 512).

Shapes: Q queries, N vectors, L lists, P lists visited, K found, D embedding width.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from clipsys.retrieval.storage.segments import Floats, Ints

_faiss: Any = faiss

#: Bits of a code; FAISS's fast scan knows no other.
BITS = 4
#: Below so many queries BLAS is left alone: waking its threads can take longer than the product,
#: 8 ms at times where the product takes 0.2.
_FEW = 8


def num_planes(dim: int) -> int:
    """Codes of a vector: one for two numbers, or for each where their number is odd."""
    return dim // 2 if dim % 2 == 0 else dim


def balanced_rotation(residual_ND: Floats) -> Floats:
    """Orthogonal (D, D): ``x @ rotation`` has planes (dimensions 2i, 2i + 1) of like variance."""
    dim = residual_ND.shape[1]
    covariance_DD = residual_ND.T.astype(np.float64) @ residual_ND
    variance_D, axes_DD = np.linalg.eigh(covariance_DD)
    largest = variance_D[-1] if variance_D[-1] > 0 else 1.0
    logarithm_D = np.log(np.maximum(variance_D, 1e-9 * largest))
    size = dim // num_planes(dim)
    members: list[list[int]] = [[] for _ in range(num_planes(dim))]
    products = np.zeros(len(members))
    for axis in range(dim - 1, -1, -1):  # the greatest variance first
        plane = int(np.argmin(products))
        members[plane].append(axis)
        # Relative to the least, so that what joins a plane never makes it look emptier.
        products[plane] += logarithm_D[axis] - logarithm_D[0]
        if len(members[plane]) == size:
            products[plane] = np.inf
    rotation_DD: Floats = axes_DD[:, np.concatenate(members)].astype(np.float32)
    return rotation_DD


def empty_lists(dim: int, num_lists: int) -> Any:
    """FAISS's index of such lists, to be given a rotation, centroids, codebooks and vectors."""
    described = f"RR{dim},IVF{num_lists},PQ{num_planes(dim)}x{BITS}"
    index = _faiss.index_factory(dim, described, _faiss.METRIC_INNER_PRODUCT)
    _inverted(index).pq.cp.min_points_per_centroid = 1
    # It would number the points so that like codes have like bits, which only polysemous search
    # uses: 0.2 s of annealing a plane.
    _inverted(index).do_polysemous_training = False
    return index


def _inverted(index: Any) -> Any:
    return _faiss.downcast_index(_faiss.extract_index_ivf(index))


def set_rotation(index: Any, rotation_DD: Floats) -> None:
    """Replaces the rotation that vectors undergo before they are listed."""
    transform = _faiss.downcast_VectorTransform(index.chain.at(0))
    _faiss.copy_array_to_vector(np.ascontiguousarray(rotation_DD.T).ravel(), transform.A)
    transform.is_trained = True


def rotation_of(index: Any) -> Floats | None:
    """What vectors are multiplied with before they are listed, (D, D); None: nothing."""
    if not isinstance(index, _faiss.IndexPreTransform):
        return None
    transform = _faiss.downcast_VectorTransform(index.chain.at(0))
    rotation_DD: Floats = _faiss.vector_to_array(transform.A).reshape(index.d, index.d).T
    return np.ascontiguousarray(rotation_DD)


def copy_bytes(stored: Any) -> int:
    """What a `FastScan` of an index takes in memory, at most."""
    inverted = _inverted(stored)
    code_bytes, centroid_bytes = int(inverted.code_size), 4 * int(stored.d)
    # Blocks of 32 codes are half empty at a list's end, and centroids are kept twice.
    in_lists = int(inverted.ntotal) * (code_bytes + 8)
    return in_lists + int(inverted.nlist) * (16 * code_bytes + 2 * centroid_bytes)


class FastScan:
    """Searches lists of 4-bit codes; a copy in memory, in the order of the scan. Thread-safe."""

    def __init__(self, stored: Any) -> None:
        """``stored``: made by `empty_lists` and filled, in memory or mapped."""
        inverted = _inverted(stored)
        rotation_DD = rotation_of(stored)
        assert rotation_DD is not None
        self._stored = stored  # owns the quantizer
        self._axes_DD = np.ascontiguousarray(rotation_DD.T)
        self._centroids_LD: Floats = inverted.quantizer.reconstruct_n(0, inverted.nlist)
        self._lists = _faiss.IndexIVFPQFastScan(inverted)
        self.d: int = stored.d
        self.ntotal: int = inverted.ntotal

    def search(self, query_QD: Floats, k: int, *, params: Any) -> tuple[Floats, Ints]:
        """As FAISS's: approximate scores and ids, (Q, K) each, padded with id -1."""
        rotated_QD = _products(query_QD, self._axes_DD)
        scores_QL = _products(rotated_QD, self._centroids_LD)
        num_lists = scores_QL.shape[1]
        params.nprobe = min(params.nprobe, num_lists)
        # All of one list come before all of the next, so the order among the visited is no matter.
        list_QP = np.argpartition(scores_QL, num_lists - params.nprobe, axis=1)
        list_QP = np.ascontiguousarray(list_QP[:, num_lists - params.nprobe :])
        near_QP = np.take_along_axis(scores_QL, list_QP, axis=1)
        found_QK = np.empty((len(query_QD), k), np.float32)
        ids_QK = np.empty((len(query_QD), k), np.int64)
        pointer = _faiss.swig_ptr
        # search_preassigned() of FAISS's Python layer takes no parameters; this is what it calls.
        self._lists.search_preassigned_c(
            len(query_QD), pointer(rotated_QD), k, pointer(list_QP), pointer(near_QP),
            pointer(found_QK), pointer(ids_QK), False, params,
        )  # fmt: skip
        return found_QK, ids_QK


def _products(query_QD: Floats, rows_ND: Floats) -> Floats:
    """Inner products of all queries with all rows, (Q, N)."""
    if len(query_QD) >= _FEW:
        return np.ascontiguousarray(query_QD @ rows_ND.T)
    products_QN: Floats = np.stack([np.einsum("nd,d->n", rows_ND, query) for query in query_QD])
    return products_QN
