"""`clipsys evaluate`: figures of a model on a corpus."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipsys.corpora.columns import Columns
from clipsys.corpora.records import Record
from clipsys.corpora.sources import iterate_source, source_kind
from clipsys.errors import DataError
from clipsys.evaluation.class_names import class_names, prompt_templates
from clipsys.evaluation.tasks.probes import probe_figures
from clipsys.evaluation.tasks.retrieval import (
    Captions,
    Floats,
    retrieval_figures,
    retrieval_targets,
)
from clipsys.evaluation.tasks.zeroshot import zeroshot_figures
from clipsys.files.expansion import expand_path
from clipsys.images.decoding import decode_image
from clipsys.models.encoder import Encoder, load
from clipsys.progress import progress
from clipsys.shards.reading import expand_shards
from clipsys.zeroshot.classifier import ZeroShotClassifier
from clipsys.zeroshot.templates import DEFAULT_TEMPLATES

_logger = logging.getLogger(__name__)

#: Share of the images that a linear probe is tested on.
PROBE_TEST_SHARE = 0.3


def measure(
    model: str | Path | Encoder,
    task: str,
    data: str | Path,
    *,
    captions: Captions = "all",
    match: str | None = None,
    templates: Sequence[str] | None = None,
    columns: Columns = Columns(),
    classnames: str | None = None,
    records: Iterable[Record] | None = None,
) -> dict[str, Any]:
    """Measures a model.

    Args:
        model: what `clipsys.load` takes, or an encoder.
        task: ``zeroshot`` or ``probe`` (labelled images) or ``retrieval`` (captioned images).
        data: what `clipsys.corpora.sources.iterate_source` reads.
        captions: retrieval: which captions are queries.
        match: retrieval: metadata key; items with the same value are hits of each other.
        templates: zero-shot: prompts with ``{}`` for the class; default
            ``zeroshot_classification_templates.txt`` beside the data, or "a photo of a {}.".
        columns: what the columns of a table mean.
        records: the images, where ``data`` only names what they come from.
        classnames: zero-shot, where labels are numbers: a file with one class name a line; default
            ``classnames.txt`` beside the data.

    Returns:
        ``task``, ``model``, ``data`` and ``metrics``, as ``clipsys evaluate --json`` prints them.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the data cannot be read, or have no captions or labels.
    """
    encoder = model if isinstance(model, Encoder) else load(model)
    image_ND, kept = encode_records(encoder, data, columns=columns, records=records)
    if task == "retrieval":
        targets = retrieval_targets(
            ((record.captions, record.metadata) for record in kept),
            captions=captions,
            match=match,
        )
        metrics = retrieval_figures(image_ND, encoder.encode_text(targets.texts), targets)
    else:
        labels = _labels(kept, data)
        if task == "zeroshot":
            places = _places(data)
            names = class_names(labels, places, file=classnames, setting="--classnames")
            classes = sorted(names)
            prompts = templates or prompt_templates(places) or DEFAULT_TEMPLATES
            # Two classes may have one name, as two of ImageNet's do; then they have one vector.
            single = {label: " ".join(name.split()) for label, name in names.items()}
            classifier = ZeroShotClassifier(encoder, list(dict.fromkeys(single.values())), prompts)
            rows = [classifier.classes.index(single[label]) for label in classes]
            metrics = zeroshot_figures(image_ND, classifier.class_CD[rows], classes, labels)
        else:
            metrics = _probe(image_ND, labels)
    return {"task": task, "model": encoder.name, "data": str(data), "metrics": metrics}


def encode_records(
    encoder: Encoder,
    data: str | Path,
    *,
    columns: Columns = Columns(),
    records: Iterable[Record] | None = None,
    batch_size: int = 64,
) -> tuple[Floats, list[Record]]:
    """Encodes every usable image of a source: (N, D) unit vectors and their records, in order.

    Raises:
        DataError: the source cannot be read, or none of its images can be used.
    """
    kept: list[Record] = []
    vectors: list[Floats] = []
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    skipped: Counter[str] = Counter()
    with progress("Encoding images") as advance:
        for record in iterate_source(data, columns=columns) if records is None else records:
            try:
                image = decode_image(record.read(), uri=record.uri)
            except DataError as error:
                skipped[getattr(error, "reason", "unreadable")] += 1
                continue
            # Only what the figures need is kept: the image's bytes can go.
            kept.append(record)
            pixels.append(encoder.preprocess(image))
            if len(pixels) == batch_size:
                vectors.append(encoder.encode_pixels(np.stack(pixels)))
                advance(len(pixels))
                pixels = []
        if pixels:
            vectors.append(encoder.encode_pixels(np.stack(pixels)))
            advance(len(pixels))
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        _logger.warning("%d images cannot be used: %s", sum(skipped.values()), reasons)
    if not kept:
        raise DataError(f"{data}: none of the images can be used")
    return np.concatenate(vectors), kept


def _places(data: str | Path) -> list[Path]:
    """The folders that the data lie in, local ones."""
    text = expand_path(str(data))
    if "://" in text:
        return []
    if Path(text).is_dir():
        return [Path(text).absolute()]
    if source_kind(text) == "shards":
        shards = [Path(shard).absolute() for shard in expand_shards(text)]
        return list(dict.fromkeys(shard.parent for shard in shards))
    return [Path(text).absolute().parent]


def _labels(records: Sequence[Record], data: str | Path) -> list[str]:
    unlabelled = next((record.uri for record in records if record.label is None), None)
    if unlabelled:
        raise DataError(
            f"{data}: {unlabelled} has no label; expected one folder per class, a label column or "
            ".cls members"
        )
    return [str(record.label) for record in records]


def _probe(image_ND: Floats, labels: Sequence[str]) -> dict[str, float]:
    from sklearn.model_selection import train_test_split

    names = np.asarray(labels)
    if min(np.unique(names, return_counts=True)[1]) < 4:
        raise DataError("a linear probe needs four images or more of each class")
    train, test = train_test_split(
        np.arange(len(names)), test_size=PROBE_TEST_SHARE, random_state=0, stratify=names
    )
    return probe_figures(
        image_ND[train], names[train].tolist(), image_ND[test], names[test].tolist()
    )
