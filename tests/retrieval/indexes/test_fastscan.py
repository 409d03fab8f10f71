"""Lists of 4-bit codes against the same codes decoded and compared in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from clipsys.retrieval.indexes.building import build_index
from clipsys.retrieval.indexes.fastscan import FastScan, balanced_rotation, num_planes
from clipsys.retrieval.indexes.generation import read_file, search_parameters
from clipsys.retrieval.indexes.planning import plan_of_kind
from clipsys.retrieval.storage.segments import Floats
from tests.retrieval.clustered import clustered, snapshot_of

_faiss: Any = faiss
COUNT = 3_000


def decoded(stored: Any) -> Floats:
    """What the codes stand for, unrotated, by id: (COUNT + 1, D)."""
    inverted = _faiss.downcast_index(_faiss.extract_index_ivf(stored))
    rotation = _faiss.vector_to_array(
        _faiss.downcast_VectorTransform(stored.chain.at(0)).A
    ).reshape(stored.d, stored.d)
    rows = np.zeros((COUNT + 1, stored.d), np.float32)
    for number in range(inverted.nlist):
        size = inverted.invlists.list_size(number)
        if size == 0:
            continue
        ids = _faiss.rev_swig_ptr(inverted.invlists.get_ids(number), size)
        codes = _faiss.rev_swig_ptr(inverted.invlists.get_codes(number), size * inverted.code_size)
        residual = inverted.pq.decode(codes.reshape(size, -1).copy())
        rows[ids] = (inverted.quantizer.reconstruct(number) + residual) @ rotation
    return rows


@pytest.mark.parametrize("dim", [7, 16, 32])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_scores_are_the_inner_products_with_what_the_codes_stand_for(
    tmp_path: Path, dim: int, num_queries: int
) -> None:
    snapshot = snapshot_of(tmp_path / "s", clustered(COUNT, dim))
    generation = build_index(
        tmp_path, snapshot, generation=1, plan=plan_of_kind("ivf-pq", COUNT, dim, recall=0.5)
    )
    stored = read_file(tmp_path / generation.file, mapped=True)
    rows = decoded(stored)
    vectors = snapshot.take(np.arange(COUNT))
    assert np.square(rows[1:] - vectors).sum(axis=1).mean() < 0.2  # they stand for the vectors
    index = FastScan(stored)
    assert (index.d, index.ntotal) == (dim, COUNT)
    queries = clustered(num_queries, dim, seed=3)
    params = search_parameters("ivf-pq", 10**6)  # all lists, of which there are fewer
    scores, ids = index.search(queries, COUNT, params=params)
    assert np.array_equal(np.sort(ids), np.tile(np.arange(1, COUNT + 1), (num_queries, 1)))
    naive = np.take_along_axis(queries @ rows.T, ids, axis=1)
    # Entries of the tables have eight bits: each is off by up to 1/510 of the greatest span.
    np.testing.assert_allclose(scores, naive, atol=0.01 * num_planes(dim) ** 0.5)
    assert np.abs(scores - naive).mean() < 0.005


def test_only_the_lists_of_the_nearest_centroids_are_scanned(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "s", clustered(COUNT, 16))
    plan = plan_of_kind("ivf-pq", COUNT, 16, recall=0.5)
    generation = build_index(tmp_path, snapshot, generation=1, plan=plan)
    stored = read_file(tmp_path / generation.file, mapped=False)
    queries = clustered(12, 16, seed=3)
    few, one = search_parameters("ivf-pq", 3), search_parameters("ivf-pq", 3)
    _, ids_QC = FastScan(stored).search(queries, COUNT, params=few)
    _, naive_QC = stored.search(queries, COUNT, params=one)  # FAISS's own scan of the same lists
    for ids, naive in zip(ids_QC, naive_QC, strict=True):
        assert set(ids.tolist()) == set(naive.tolist())


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_rotation_is_orthogonal_and_evens_out_the_planes(rank: int) -> None:
    generator = np.random.default_rng(0)
    spread = np.where(np.arange(24) < rank, 0.8 ** np.arange(24), 0)
    mixed = np.linalg.qr(generator.normal(size=(24, 24)))[0]
    rows = ((generator.normal(size=(4_000, 24)) * spread) @ mixed).astype(np.float32)
    rotation = balanced_rotation(rows)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(24), atol=1e-5)
    if rank == 24:
        products = (rows @ rotation).var(axis=0).reshape(12, 2).prod(axis=1)
        assert products.max() < 1.5 * products.min()  # paired by order: a factor of 6,900


def test_equal_vectors_have_a_rotation() -> None:
    rotation = balanced_rotation(np.zeros((20, 6), np.float32))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(6), atol=1e-6)
