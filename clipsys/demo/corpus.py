"""The sample corpus as items, and on disk: training shards, test shards, a gallery of files."""

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

from PIL import Image

from clipsys.demo.drawing import draw
from clipsys.demo.scenes import (
    Scene,
    Split,
    captions,
    generator,
    held_out_combinations,
    make_scene,
)
from clipsys.progress import progress
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards

_CHUNK = 100


@dataclass(frozen=True)
class CorpusSize:
    """Number of images in each part."""

    train: int = 12_000
    retrieval: int = 500
    seen: int = 1_200
    held_out: int = 480


@dataclass(frozen=True)
class SceneItem:
    """One item of the corpus; `label` is the combination of a single shape, else None."""

    key: str
    image: Image.Image
    captions: list[str]
    label: str | None
    metadata: dict[str, object]


def make_item(scene: Scene, *, seed: int = 0, size_px: int = 64) -> SceneItem:
    """The drawn and captioned item of a scene.

    Its metadata holds `objects` (a list of colour, shape, size and label), `content` (the
    combinations, alphabetically: equal for scenes that show the same things), `background`,
    `combination` ("seen" or "held_out") and `split`.
    """
    held_out = any(shape.combination in held_out_combinations() for shape in scene.shapes)
    return SceneItem(
        key=scene.key,
        image=draw(scene, size_px=size_px),
        captions=captions(scene, generator("captions", seed, scene.key)),
        label=scene.shapes[0].label if len(scene.shapes) == 1 else None,
        metadata={
            "objects": [
                {"colour": s.colour, "shape": s.kind, "size": s.size, "label": s.label}
                for s in scene.shapes
            ],
            "content": scene.content,
            "background": scene.background.texture,
            "combination": "held_out" if held_out else "seen",
            "split": scene.split,
        },
    )


def make_items(
    split: Split, count: int, *, seed: int = 0, size_px: int = 64
) -> Iterator[SceneItem]:
    """The first `count` items of a split, one at a time."""
    for index in range(count):
        yield make_item(make_scene(index, split, seed=seed), seed=seed, size_px=size_px)


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
    from clipsys.shards.reading import expand_shards, iterate_samples

    gallery.mkdir()
    for sample in iterate_samples(expand_shards(str(shards / "val-*.tar"))):
        (gallery / f"{sample.key}.{sample.suffix}").write_bytes(sample.image)
        text = "\n".join(sample.captions) + "\n"
        (gallery / f"{sample.key}.txt").write_text(text, encoding="utf-8")
