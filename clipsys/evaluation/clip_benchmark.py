"""What is particular to the shards that CLIP benchmark writes; ``dataset_type.txt`` tells it.

    (none)          classification: ``KEY.cls``, a number, named by ``classnames.txt``
    retrieval       ``KEY.txt`` has a caption a line
    multilabel      ``KEY.npy`` has a 1 at the number of each class of the image

Written from LAION-AI/CLIP_benchmark, ``webdataset_builder.py`` and ``build_wds_dataset``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.corpora.real_paths import real_path
from clipsys.corpora.records import Record, check_regular
from clipsys.corpora.sources import sample_record
from clipsys.errors import DataError
from clipsys.files.regular import read_regular
from clipsys.shards.reading import iterate_raw
from clipsys.shards.remote import is_remote

TYPE_NAME, RETRIEVAL, MULTILABEL = "dataset_type.txt", "retrieval", "multilabel"
#: Metadata key of the numbers of an image's classes.
LABELS_KEY = "labels"


def dataset_type(places: Iterable[Path]) -> str:
    """What `TYPE_NAME` in one of the folders, or in its parent, says; empty where there is none.

    Raises:
        DataError: it cannot be read.
    """
    for place in places:
        for path in (place / TYPE_NAME, place.parent / TYPE_NAME):
            if path.is_file():
                try:
                    return read_regular(path).decode("utf-8", "replace").strip().lower()
                except OSError as error:
                    raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return ""


def with_caption_lines(record: Record) -> Record:
    """The record of a retrieval set: each line of its text is a caption, repeated ones too."""
    lines = (line.strip() for text in record.captions for line in text.splitlines())
    return replace(record, captions=tuple(line for line in lines if line))


def multilabel_records(shards: Sequence[str]) -> Iterator[Record]:
    """The records of a multi-label set; `LABELS_KEY` of the metadata has the classes' numbers.

    Raises:
        DataError: a shard cannot be read to its end.
    """
    for shard in shards:
        check_regular(shard)
        name = shard if is_remote(shard) else str(real_path(shard))
        for raw in iterate_raw([shard]):
            record = sample_record(name, raw)
            yield replace(record, metadata=record.metadata | _labels(raw.get("npy"), record.uri))


def _labels(content: Any, uri: str) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise ValueError(f"{values.dtype} of shape {values.shape}")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{uri}: its .npy cannot be read as labels ({error}); expected one number for each "
            "class, as CLIP benchmark writes it"
        ) from error
    return {LABELS_KEY: np.flatnonzero(values > 0).tolist()}
