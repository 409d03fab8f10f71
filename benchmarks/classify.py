"""Classifying a collection by its stored vectors, and writing the labels into its metadata.

    python benchmarks/classify.py --items 1000000 --prepare     makes the collection, once
    python benchmarks/classify.py --items 1000000

Items have random vectors of 512 numbers and metadata of two keys; no image exists. Each command
runs in a process of its own, loading the model for the names of the classes included. Writes
``benchmarks/results/classify.json``. The files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NUM_CLASSES = 1_000
DIM = 512
_SEGMENT_ROWS = 32_768
#: The towers are small: what is measured does not depend on them.
_MODEL: dict[str, Any] = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("classify-benchmark"))
    parser.add_argument("--prepare", action="store_true", help="make the collection and end")
    options = parser.parse_args()
    folder = options.folder / str(options.items)
    if options.prepare:
        prepare(folder, options.items)
    else:
        measure(folder, options.items)


def prepare(folder: Path, num_items: int) -> None:
    """Makes a model, a file of classes and a collection of random vectors."""
    import torch

    import clipsys
    from clipsys.models.open_clip_models import build_model, save_model
    from clipsys.retrieval import Collection
    from clipsys.retrieval.storage.creation import SEGMENTS
    from clipsys.retrieval.storage.items import Batch, NewItem
    from clipsys.retrieval.storage.segments import write_segment

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_model(build_model(_MODEL, for_training=True), folder / "model")
    names = "\n".join(f"class {number}" for number in range(NUM_CLASSES))
    (folder / "classes.txt").write_text(names, encoding="utf-8")
    generator = np.random.default_rng(0)
    with Collection.create(
        folder / "photos", clipsys.load(folder / "model"), model=str(folder / "model")
    ) as photos:
        for start in range(0, num_items, _SEGMENT_ROWS):
            numbers = range(start, min(num_items, start + _SEGMENT_ROWS))
            vectors_ND = generator.standard_normal((len(numbers), DIM), np.float32)
            vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
            items = [
                NewItem(
                    f"/photographs/{number // 1000}/{number}.jpg",
                    f"{number:040x}",
                    10**5,
                    10**18,
                    (),
                    {"year": 2000 + number % 25, "split": ("train", "test")[number % 2]},
                )
                for number in numbers
            ]
            batch = Batch(new=items, origins=[("/photographs", item.uri) for item in items])
            photos._store.commit(batch, write_segment(photos.path / SEGMENTS, vectors_ND))


def measure(folder: Path, num_items: int) -> None:
    """Runs the commands and writes their seconds."""
    photos = str(folder / "photos")
    classify = ["classify", "--collection", photos, "--labels-file", str(folder / "classes.txt")]
    commands = {
        "classify_s": classify,
        "classify_and_write_s": [*classify, "--write", "kind"],
        "write_again_other_labels_s": [*classify, "--template", "another {}", "--write", "kind"],
        "search_by_label_s": ["search", photos, "--where", "kind=class 17", "-k", "10"],
        "forget_s": ["classify", "--collection", photos, "--forget", "kind"],
    }
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "items": num_items,
        "classes": NUM_CLASSES,
        "dim": DIM,
    }
    for name, words in commands.items():
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "clipsys", "--quiet", *words],
            check=True,
            capture_output=True,
            text=True,
        )
        report[name] = time.perf_counter() - started
        print(f"{name} {report[name]:.1f}; {done.stdout.count(chr(10))} lines", flush=True)
    out = Path(__file__).parent / "results" / "classify.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
