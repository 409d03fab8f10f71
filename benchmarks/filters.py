"""Filters on metadata: their first use in a fresh process, and what their index takes.

    python benchmarks/filters.py --items 1000000

Makes a database of items with five keys in ``--folder`` (no vectors), once; then measures and
writes ``benchmarks/results/filters_ITEMS.json``. Each filter runs in processes of its own, beside
the statement that reads all items, which is how filters worked before there was an index of
metadata. The files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clipsys.retrieval.storage import metadata_index
from clipsys.retrieval.storage.filters import parse_where
from clipsys.retrieval.storage.items import Batch, NewItem
from clipsys.retrieval.storage.segments import SegmentFile
from clipsys.retrieval.storage.store import Store

ROUNDS = 3
NUM_ADDED = 1_000

#: Filter -> the same by reading all items.
FILTERS = {
    "class=17": "json_extract(metadata, '$.class') = 17",
    "number<{percent}": "json_extract(metadata, '$.number') < {percent}",
    "split=train": "json_extract(metadata, '$.split') = 'train'",
    "number<{half}": "json_extract(metadata, '$.number') < {half}",
    "split!=train": "json_extract(metadata, '$.split') IS NOT 'train'",
    "tags contains harbour 7": "EXISTS (SELECT 1 FROM json_each(metadata, '$.tags') "
    "WHERE lower(value) = 'harbour 7')",
    "title contains 4711": "instr(lower(json_extract(metadata, '$.title')), '4711')",
    "title={title}": "json_extract(metadata, '$.title') = '{title}'",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("filters-benchmark"))
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FILTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.folder / f"{options.items}.sqlite"
    if options.one:
        print(_seconds(path, *options.one))
    else:
        measure(path, options.items)


def measure(path: Path, num_items: int) -> None:
    report: dict[str, Any] = {
        "items": num_items,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "sqlite": sqlite3.sqlite_version,
    }
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        report["build"] = _prepare(path, num_items)
    names = {"percent": num_items // 100, "half": num_items // 2, "title": title(num_items // 3)}
    report["first_use_ms"] = {}
    for pattern, reading in FILTERS.items():
        where, condition = pattern.format(**names), reading.format(**names)
        seconds: dict[str, list[float]] = {"index": [], "all_items": []}
        for _ in range(ROUNDS):
            for kind, text in (("index", where), ("all_items", condition)):
                seconds[kind].append(_in_a_process(path, num_items, kind, text))
        store = Store(path)
        result = {kind: 1e3 * statistics.median(some) for kind, some in seconds.items()}
        report["first_use_ms"][where] = result | {
            "items": len(store.select_ids(parse_where(where)))
        }
        store.close()
        print(where, report["first_use_ms"][where], flush=True)
    keys_s = [_in_a_process(path, num_items, "keys", "") for _ in range(ROUNDS)]
    report["metadata_keys_ms"] = 1e3 * statistics.median(keys_s)
    report["adding_1000_ms"] = _adding(path, num_items)
    out = Path(__file__).parent / "results" / f"filters_{num_items}.json"
    if "build" not in report and out.exists():
        report["build"] = json.loads(out.read_text(encoding="utf-8"))["build"]
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def title(number: int) -> str:
    return f"Photograph no. {number}, from the archive"


def item(number: int) -> NewItem:
    generator = random.Random(number)
    metadata = {
        "number": number,
        "title": title(number),
        "class": number % 100,
        "split": ("train", "train", "val", "test")[number % 4],
        "tags": [f"harbour {tag}" for tag in generator.sample(range(50), 3)],
    }
    uri = f"/photographs/{number // 1000}/{number}.jpg"
    return NewItem(uri, f"{generator.getrandbits(256):064x}", 10**5, 10**18, (), metadata)


def _prepare(path: Path, num_items: int) -> dict[str, float]:
    """Commits the items without the index, then makes it, as an upgrade does."""
    building = path.with_suffix(".building")
    building.unlink(missing_ok=True)
    store = Store.create(building)
    with store.changing() as (connection, _):
        metadata_index.drop_index(connection)
    for start in range(0, num_items, 10_000):
        stop = min(num_items, start + 10_000)
        batch = Batch(new=[item(number) for number in range(start, stop)])
        store.commit(batch, SegmentFile(f"{start}.npy", stop - start, ""))
    store.close()
    without = building.stat().st_size
    store = Store(building)
    started = time.perf_counter()
    with store.changing() as (connection, _):
        metadata_index.rebuild_index(connection)
    rebuild_s = time.perf_counter() - started
    store.close()
    sizes = {"mb_without": without / 1e6, "mb_with": building.stat().st_size / 1e6}
    building.rename(path)
    return sizes | {"rebuild_s": rebuild_s}


def _in_a_process(path: Path, num_items: int, kind: str, text: str) -> float:
    command = [sys.executable, __file__, "--folder", str(path.parent), "--items", str(num_items)]
    done = subprocess.run(
        [*command, "--one", kind, text], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _seconds(path: Path, kind: str, text: str) -> float:
    store = Store(path)
    started = time.perf_counter()
    if kind == "index":
        store.select_ids(parse_where(text))
    elif kind == "keys":
        store.metadata_keys()
    else:
        store.read(f"SELECT id FROM items WHERE state = 'live' AND {text}")
    return time.perf_counter() - started


def _adding(path: Path, num_items: int) -> dict[str, float]:
    """Commits of 1,000 items to copies of the database with and without the index, in turn."""
    stores = {}
    for kind in ("with", "without"):
        copy = path.with_name(f"{kind}.sqlite")
        shutil.copy(path, copy)
        stores[kind] = Store(copy)
    with stores["without"].changing() as (connection, _):
        metadata_index.drop_index(connection)
    milliseconds: dict[str, list[float]] = {kind: [] for kind in stores}
    for number in range(ROUNDS):
        first = num_items + number * NUM_ADDED
        batch = Batch(new=[item(first + place) for place in range(NUM_ADDED)])
        for kind, store in stores.items():
            started = time.perf_counter()
            store.commit(batch, SegmentFile(f"more-{number}.npy", NUM_ADDED, ""))
            milliseconds[kind].append(1e3 * (time.perf_counter() - started))
    for kind, store in stores.items():
        store.close()
        path.with_name(f"{kind}.sqlite").unlink()
    return {kind: statistics.median(some) for kind, some in milliseconds.items()}


if __name__ == "__main__":
    main()
