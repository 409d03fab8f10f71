"""Figures of a retrieval in tiles, beside the whole matrix of scores: seconds and peak memory.

    python benchmarks/retrieval_metrics.py                  5,000 images, and 20,000 in tiles
    python benchmarks/retrieval_metrics.py --images 10000   another size of the first

Five texts an image, vectors of 512 numbers. ``whole`` is what is written without care: one
product, its whole rows and columns sorted, ranks and average precision read from the order. Each
side runs in a process of its own, in turn. Peak memory is what it held beyond the vectors. The
figures of both sides have to agree. Writes ``benchmarks/results/retrieval_metrics.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipsys.evaluation.metrics.relation import Relation
from clipsys.evaluation.metrics.two_way import rank_both

WIDTH = 512
TEXTS_PER_IMAGE = 5
#: Of the tiles alone: the whole matrix would take 8 GB, and sorting it minutes.
LARGE = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("tiles", "whole"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.images)))
        return
    runs = [
        {side: _run(side, options.images) for side in ("tiles", "whole")}
        for _ in range(options.rounds)
    ]
    for one in runs:
        if one["tiles"]["figures"] != one["whole"]["figures"]:
            raise SystemExit(f"the figures differ: {one}")
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "width": WIDTH,
        "images": options.images,
        "texts": TEXTS_PER_IMAGE * options.images,
        "rounds": options.rounds,
    }
    for name in ("seconds", "peak_mb"):
        for side in ("tiles", "whole"):
            report[f"{side}_{name}"] = round(statistics.median(one[side][name] for one in runs), 2)
        ratios = [one["whole"][name] / one["tiles"][name] for one in runs]
        report[f"ratio_{name}"] = round(statistics.median(ratios), 1)
    large = _run("tiles", LARGE)
    report["large"] = {
        "images": LARGE,
        "texts": TEXTS_PER_IMAGE * LARGE,
        "tiles_seconds": round(large["seconds"], 2),
        "tiles_peak_mb": round(large["peak_mb"], 2),
        "matrix_mb": round(4 * TEXTS_PER_IMAGE * LARGE**2 / 1e6),
    }
    print(json.dumps(report, indent=2))
    out = Path(__file__).parent / "results" / "retrieval_metrics.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(side: str, num_images: int) -> dict[str, Any]:
    """Seconds, peak memory and figures of one side, in this process."""
    images, texts, image_of = _vectors(num_images)
    small = _vectors(20)
    run = _tiles if side == "tiles" else _whole
    run(*small)  # warms the libraries up
    _forget_peak()
    before = _peak_mb()
    started = time.perf_counter()
    figures = run(images, texts, image_of)
    return {
        "seconds": time.perf_counter() - started,
        "peak_mb": _peak_mb() - before,
        "figures": figures,
    }


def _tiles(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> list[float]:
    relation = Relation.of_groups(image_of, np.arange(len(images)))
    found = rank_both(texts, images, relation)
    return [
        round(float(value), 6)
        for one in found
        for value in ((one.first_Q < 10).mean(), one.precision_Q.mean())
    ]


def _whole(images: np.ndarray, texts: np.ndarray, image_of: np.ndarray) -> list[float]:
    scores = texts @ images.T
    correct = image_of[:, None] == np.arange(len(images))
    figures = []
    for one, own in ((scores, correct), (scores.T, correct.T)):
        order = np.argsort(-one, axis=1)
        hits = np.take_along_axis(own, order, axis=1)
        ranks = np.arange(1, hits.shape[1] + 1)
        precision = (np.cumsum(hits, axis=1) / ranks * hits).sum(axis=1) / hits.sum(axis=1)
        figures += [float((hits.argmax(axis=1) < 10).mean()), float(precision.mean())]
    return [round(value, 6) for value in figures]


def _vectors(num_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((num_images, WIDTH), np.float32)
    image_of = np.repeat(np.arange(num_images), TEXTS_PER_IMAGE)
    texts = images[image_of] + 8 * rng.standard_normal((len(image_of), WIDTH), np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return images, texts, image_of


def _run(side: str, num_images: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", side, "--images", str(num_images)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    print(side, num_images, f"{result['seconds']:.1f} s, {result['peak_mb']:.0f} MB", flush=True)
    return result


def _forget_peak() -> None:
    """Lets the peak of resident memory begin again (Linux; proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


if __name__ == "__main__":
    main()
