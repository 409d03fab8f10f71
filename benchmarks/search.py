"""Approximate search beside exact search: throughput, latency, memory and recall.

    python benchmarks/search.py prepare --items 1000000 --kinds ivf-sq8 ivf-pq
    python benchmarks/search.py measure --items 1000000 --kinds ivf-sq8 ivf-pq

``prepare`` makes vectors and builds indexes in ``--folder``, which takes minutes; ``measure`` times
them and writes ``benchmarks/results/search_ITEMS.json``. Exact search is FAISS's flat index on the
same threads, in the same run. Recall@10 is of other queries than the index was tuned with.

The vectors are a model of CLIP's: 10,000 clusters of very unequal size in 250 topics, with a
spectrum that falls as a power law, in a cone (two images have a cosine of 0.44 on average, nearest
ones 0.87). Text queries lie in a cone of their own (cosine to images about 0, to the nearest 0.32)
and point only half-way at a content. ``--vectors`` and ``--queries`` take real embeddings (.npy).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from clipsys.retrieval.indexes.building import build_index
from clipsys.retrieval.indexes.generation import LoadedIndex, load_index
from clipsys.retrieval.indexes.planning import KINDS, plan_of_kind
from clipsys.retrieval.indexes.tuning import TuningQueries, exact_neighbours
from clipsys.retrieval.search.ranking import cover, rank, rank_batch
from clipsys.retrieval.storage.manifest import IndexGeneration
from clipsys.retrieval.storage.segments import SegmentReader, write_segment
from clipsys.retrieval.storage.snapshot import Snapshot

Floats = npt.NDArray[np.float32]

DIM = 512
BLOCK = 65_536
NUM_QUERIES = 400
K = 10


class Corpus:
    """Where synthetic images and texts are drawn from."""

    def __init__(self, topics: int = 250, clusters_each: int = 40) -> None:
        generator = np.random.default_rng(0)
        spectrum = (1 + np.arange(DIM) / 24) ** -0.75
        self._spectrum = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)
        self._rotation = np.linalg.qr(generator.normal(size=(DIM, DIM)))[0].astype(np.float32)
        topic_TD = np.repeat(self._noise(topics, generator), clusters_each, axis=0)
        own_CD = self._noise(topics * clusters_each, generator)
        self._centres_CD = 0.62 * topic_TD + 0.42 * own_CD
        weights_C = generator.pareto(1.3, len(own_CD)) + 0.3
        self._shares_C = weights_C / weights_C.sum()
        self._image_cone, self._text_cone = self._noise(2, generator)

    def images(self, count: int, seed: int) -> Floats:
        """Unit vectors (count, DIM)."""
        generator = np.random.default_rng((1, seed))
        return self._unit(0.8 * _unit(self._image_cone) + self._content(count, generator))

    def texts(self, count: int, seed: int) -> Floats:
        """Unit vectors (count, DIM)."""
        generator = np.random.default_rng((2, seed))
        content_ND = 0.5 * self._content(count, generator) + 0.45 * self._noise(count, generator)
        return self._unit(0.8 * _unit(self._text_cone) + content_ND)

    def _content(self, count: int, generator: np.random.Generator) -> Floats:
        chosen = generator.choice(len(self._centres_CD), count, p=self._shares_C)
        content: Floats = self._centres_CD[chosen] + 0.5 * self._noise(count, generator)
        return content

    def _noise(self, count: int, generator: np.random.Generator) -> Floats:
        noise: Floats = generator.standard_normal((count, DIM), np.float32) * self._spectrum
        return noise

    def _unit(self, vectors_ND: Floats) -> Floats:
        return _unit(vectors_ND @ self._rotation)


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["prepare", "measure"])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["ivf-flat"])
    parser.add_argument("--folder", type=Path, default=Path("search-benchmark"))
    parser.add_argument("--vectors", type=Path, help="real image embeddings, .npy (N, D)")
    parser.add_argument("--queries", type=Path, help="real text embeddings, .npy (Q, D)")
    options = parser.parse_args()
    folder = options.folder / (options.vectors.stem if options.vectors else str(options.items))
    if options.stage == "prepare":
        prepare(folder, options)
    else:
        measure(folder, options)


# ---- prepare -------------------------------------------------------------------------------------


def prepare(folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "segments.json").exists():
        write_vectors(folder, options.items, options.vectors)
    snapshot, corpus = open_snapshot(folder), _queries(options)
    tuning = TuningQueries({"text": corpus("text", 0)})
    for kind in options.kinds:
        started = time.perf_counter()
        plan = plan_of_kind(kind, len(snapshot), snapshot.vectors.dim)
        print(plan, flush=True)
        built = build_index(folder, snapshot, generation=1, plan=plan, queries=tuning)
        report = {
            "build_s": time.perf_counter() - started,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": faiss.omp_get_max_threads(),
            "generation": built.model_dump(),
        }
        (folder / f"{kind}.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        print(json.dumps(report), flush=True)


def write_vectors(folder: Path, total: int, vectors: Path | None = None) -> None:
    """Writes ``total`` synthetic vectors, or those of a file, as segments."""
    if vectors:
        blocks: Iterator[Floats] = iter([_unit(np.load(vectors).astype(np.float32))])
    else:
        corpus = Corpus()
        starts = range(0, total, BLOCK)
        blocks = (
            corpus.images(min(BLOCK, total - start), number) for number, start in enumerate(starts)
        )
    segments = [vars(write_segment(folder, block)) for block in blocks]
    dim = vectors and int(np.load(vectors, mmap_mode="r").shape[1])
    document = {"dim": dim or DIM, "segments": segments}
    (folder / "segments.json").write_text(json.dumps(document), encoding="utf-8")


def open_snapshot(folder: Path) -> Snapshot:
    """All vectors that `write_vectors` wrote."""
    from clipsys.retrieval.storage.segments import SegmentFile

    document = json.loads((folder / "segments.json").read_text(encoding="utf-8"))
    files = [SegmentFile(**one) for one in document["segments"]]
    reader = SegmentReader(folder, document["dim"])
    reader.register(dict(enumerate(files)))
    lengths = [file.num_rows for file in files]
    return Snapshot(
        1,
        np.arange(1, sum(lengths) + 1),
        np.repeat(np.arange(len(files)), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        reader,
    )


def _queries(options: argparse.Namespace) -> Callable[[str, int], Floats]:
    """Queries of a kind; another number gives other ones."""
    if options.queries:
        texts_ND = _unit(np.load(options.queries).astype(np.float32))
        images_ND = _unit(np.load(options.vectors).astype(np.float32))
        return lambda kind, number: {"text": texts_ND, "image": images_ND}[kind][number::7][
            :NUM_QUERIES
        ]
    corpus = Corpus()
    draw = {"text": corpus.texts, "image": corpus.images}
    return lambda kind, number: draw[kind](NUM_QUERIES, 1_000_000 + number)


# ---- measure -------------------------------------------------------------------------------------


def measure(folder: Path, options: argparse.Namespace) -> None:
    snapshot, queries = open_snapshot(folder), _queries(options)
    kinds = {kind: queries(kind, 1) for kind in ("image", "text")}
    truth = {kind: exact_neighbours(snapshot, vectors_QD, K) for kind, vectors_QD in kinds.items()}
    report: dict[str, Any] = {
        "items": len(snapshot),
        "dim": snapshot.vectors.dim,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{faiss.omp_get_max_threads()} threads",
        "faiss": faiss.__version__,
        "indexes": {},
    }
    for name in options.kinds:
        facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        generation = IndexGeneration.model_validate(facts.pop("generation"))
        index = load_index(folder, generation, snapshot.vectors.dim)
        result: dict[str, Any] = {**facts, "effort": generation.effort.model_dump()}  # type: ignore[union-attr]
        memory = (folder / generation.file).stat().st_size
        result["memory_of_float32"] = memory / (len(snapshot) * snapshot.vectors.dim * 4)
        for kind, vectors_QD in kinds.items():
            result[kind] = _timed(snapshot, index, vectors_QD)
            result[kind]["recall@10"] = _recall(snapshot, index, vectors_QD, truth[kind])
        result["filtered_1_percent_p50_ms"] = _filtered(snapshot, index, kinds["text"], 100)
        result["filtered_10_percent_p50_ms"] = _filtered(snapshot, index, kinds["text"], 10)
        report["indexes"][name] = result
        print(name, json.dumps(result), flush=True)
    report["exact"] = _exact(snapshot, kinds["image"])
    for result in report["indexes"].values():
        for kind in kinds:
            one = result[kind]
            one["times_exact_one_by_one"] = report["exact"]["p50_ms"] / one["p50_ms"]
            one["times_exact_in_batch"] = one["batch_per_s"] / report["exact"]["batch_per_s"]
    out = Path(__file__).parent / "results" / f"search_{folder.name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _timed(snapshot: Snapshot, index: LoadedIndex, vectors_QD: Floats) -> dict[str, float]:
    coverage = cover(snapshot, index)
    single = _seconds(lambda q: rank(snapshot, index, q, K, coverage=coverage), vectors_QD[:200])
    batch_s = []
    for _ in range(3):
        started = time.perf_counter()
        rank_batch(snapshot, index, vectors_QD, K, coverage=coverage)
        batch_s.append(time.perf_counter() - started)
    return {**single, "batch_per_s": len(vectors_QD) / statistics.median(batch_s)}


def _seconds(search: Callable[[Floats], object], vectors_QD: Floats) -> dict[str, float]:
    for query_D in vectors_QD[:5]:
        search(query_D)
    seconds = []
    for query_D in vectors_QD:
        started = time.perf_counter()
        search(query_D)
        seconds.append(time.perf_counter() - started)
    return {
        "p50_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
    }


def _recall(
    snapshot: Snapshot, index: LoadedIndex, vectors_QD: Floats, truth_QK: npt.NDArray[np.int64]
) -> float:
    found = rank_batch(snapshot, index, vectors_QD, K)
    hits = [np.isin(ids, true).sum() for (ids, _), true in zip(found, truth_QK, strict=True)]
    return float(np.sum(hits) / truth_QK.size)


def _filtered(snapshot: Snapshot, index: LoadedIndex, vectors_QD: Floats, share: int) -> float:
    allowed = np.sort(
        np.random.default_rng(0).choice(snapshot.ids_N, len(snapshot) // share, replace=False)
    )
    coverage = cover(snapshot, index)
    timed = _seconds(
        lambda q: rank(snapshot, index, q, K, allowed=allowed, coverage=coverage), vectors_QD[:30]
    )
    return timed["p50_ms"]


def _exact(snapshot: Snapshot, vectors_QD: Floats) -> dict[str, float]:
    flat = faiss.IndexFlatIP(snapshot.vectors.dim)
    for _, vectors_ND in snapshot.blocks():
        flat.add(vectors_ND)
    single = _seconds(lambda q: flat.search(q[None], K), vectors_QD[:20])
    started = time.perf_counter()
    flat.search(vectors_QD, K)
    flat_s = time.perf_counter() - started
    # numpy's BLAS takes a fraction of the time that FAISS's wheel takes for the same product.
    stored_ND = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(-1, flat.d)
    started = time.perf_counter()
    for start in range(0, len(stored_ND), BLOCK):
        vectors_QD @ stored_ND[start : start + BLOCK].T  # without choosing the best of them
    product_s = time.perf_counter() - started
    return {
        **single,
        "batch_per_s": len(vectors_QD) / flat_s,
        "numpy_product_per_s": len(vectors_QD) / product_s,
    }


if __name__ == "__main__":
    main()
