"""Writing the sample corpus to disk: training shards, test shards and a gallery of files."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from clipsys.demo.scenes import Split, make_item, make_scene
from clipsys.progress import progress
from clipsys.shards import Sample, write_shards

_CHUNK = 100


@dataclass(frozen=True)
class CorpusSize:
    """Number of images in each part."""

    train: int = 12_000
    retrieval: int = 500
    seen: int = 1_200
    held_out: int = 480


def write_corpus(folder: Path, *, seed: int, size: CorpusSize = CorpusSize()) -> None:
    """Draws the corpus: ``shards/train-*.tar``, ``shards/{val,seen,held-out}-*.tar``, ``gallery/``.

    The folder appears when it is complete. The bytes follow from seed and size.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shards = partial / "shards"
    parts: list[tuple[Split, str, int]] = [
        ("train", "train", size.train),
        ("retrieval", "val", size.retrieval),
        ("seen", "seen", size.seen),
        ("held_out", "held-out", size.held_out),
    ]
    total = sum(count for _, _, count in parts)
    # spawn: the drawing processes need Pillow only, and no copy of what this one has loaded.
    workers = ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn"))
    with workers as pool, progress("Drawing scenes", total) as advance:
        for split, prefix, count in parts:
            jobs = [
                (split, start, min(start + _CHUNK, count), seed)
                for start in range(0, count, _CHUNK)
            ]

            def samples(jobs: list[tuple[Split, int, int, int]] = jobs) -> Iterator[Sample]:
                for chunk in pool.map(_draw_chunk, jobs):
                    advance(len(chunk))
                    yield from chunk

            # Several shards even for this small corpus, so that shards are really shuffled.
            write_shards(samples(), shards, prefix=prefix, shard_bytes=8_000_000)
    _write_gallery(shards, partial / "gallery")
    (partial / "corpus.json").write_text(
        json.dumps({"seed": seed, **vars(size)}) + "\n", encoding="utf-8"
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _draw_chunk(job: tuple[Split, int, int, int]) -> list[Sample]:
    split, start, stop, seed = job
    chunk = []
    for index in range(start, stop):
        item = make_item(make_scene(index, split, seed=seed), seed=seed)
        buffer = io.BytesIO()
        item.image.save(buffer, "PNG")
        chunk.append(
            Sample(
                item.key,
                buffer.getvalue(),
                "png",
                tuple(item.captions),
                item.label,
                dict(item.metadata),
            )
        )
    return chunk


def _write_gallery(shards: Path, gallery: Path) -> None:
    """The retrieval images as a folder of files with captions beside them, as users have it."""
    from clipsys.shards import expand_shards, iterate_samples

    gallery.mkdir()
    for sample in iterate_samples(expand_shards(str(shards / "val-*.tar"))):
        (gallery / f"{sample.key}.{sample.suffix}").write_bytes(sample.image)
        text = "\n".join(sample.captions) + "\n"
        (gallery / f"{sample.key}.txt").write_text(text, encoding="utf-8")
