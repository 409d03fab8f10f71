"""Retrieval figures in blocks beside the whole score matrix: time and peak memory.

    python benchmarks/retrieval_metrics.py [--images 10000] [--rounds 3]

Writes benchmarks/results/retrieval_metrics.json. Vectors are drawn, five texts an image, as of
Flickr and COCO. The naive way is that of clip_benchmark: the whole matrix of scores, and a sort of
each row and each column (recall alone). Ours measures recall, median rank and mean average
precision, with intervals, chance and the worst queries. Each runs in a process of its own, in turn.
The rate says what 1 million images and 5 million texts would take, which no matrix holds (20 TB).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.probe import machine

TEXTS = 5
DIM = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["blocks", "matrix"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_measure(arguments.side, arguments.images)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"matrix": [], "blocks": []}
    for _ in range(arguments.rounds):
        for side, own in runs.items():
            command = [sys.executable, __file__, f"--images={arguments.images}", f"--side={side}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            own.append(json.loads(done.stdout))
            print(side, own[-1], file=sys.stderr)
    sides = {
        side: {name: statistics.median(run[name] for run in own) for name in own[0]}
        for side, own in runs.items()
    }
    pairs = arguments.images**2 * TEXTS
    rate = pairs / sides["blocks"]["seconds"]
    report = {
        "images": arguments.images,
        "texts": arguments.images * TEXTS,
        "dim": DIM,
        **sides,
        "speed_ratio": sides["matrix"]["seconds"] / sides["blocks"]["seconds"],
        "memory_ratio": sides["matrix"]["peak_memory_mb"] / sides["blocks"]["peak_memory_mb"],
        "pairs_per_s": rate,
        "hours_of_1m_images_5m_texts": 5e12 / rate / 3600,
        "machine": {
            "processor": machine.processor(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "python": platform.python_version(),
        },
    }
    out = Path(__file__).parent / "results" / "retrieval_metrics.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _measure(side: str, num_images: int) -> dict[str, float]:
    # Both before the clock starts.
    import torch

    from clipsys.evaluation.tasks.retrieval import retrieval_result, retrieval_targets

    rng = np.random.default_rng(0)
    images = rng.normal(size=(num_images, DIM)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = images.repeat(TEXTS, axis=0)
    texts += rng.normal(0, 0.15, texts.shape).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    uris = [f"{number}" for number in range(num_images)]
    items = [(tuple(f"{n} {i}" for i in range(TEXTS)), {}) for n in range(num_images)]
    started = time.perf_counter()
    if side == "blocks":
        targets = retrieval_targets(items, contents=uris)
        result = retrieval_result(images, texts, targets, uris=uris, model="", data="")
        recall = result.figures["text_to_image/recall@5"].value
    else:
        scores = torch.from_numpy(texts) @ torch.from_numpy(images).T
        owner = torch.arange(num_images).repeat_interleave(TEXTS)
        recall = float((scores.topk(5, dim=1).indices == owner[:, None]).any(dim=1).float().mean())
        (owner[scores.T.topk(5, dim=1).indices] == torch.arange(num_images)[:, None]).any(dim=1)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"seconds": round(seconds, 2), "peak_memory_mb": round(peak), "recall@5": recall}


if __name__ == "__main__":
    main()
