"""The verbs `shards`, `classify`, `evaluate` and `doctor`; heavy imports wait until one runs."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "ViT-B-32/laion2b_s34b_b79k"


def shards(
    source: Annotated[str, typer.Argument(help="A folder, a table (.csv …) or shards.")],
    out: Annotated[Path, typer.Argument(help="The folder to write shards into.")],
    prefix: Annotated[str, typer.Option(help="Shards are named PREFIX-00000.tar.")] = "shard",
    shard_mb: Annotated[float, typer.Option(min=0.01, help="Size of a shard, in MB.")] = 100.0,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="Shuffle with this seed; default: in order.")
    ] = None,
    path_column: Annotated[str, typer.Option(help="Column with the image's path.")] = "",
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Column with captions; may be repeated.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column with the class label.")] = "",
) -> None:
    """Pack images and captions into WebDataset shards."""
    from clipsys.packing import pack
    from clipsys.sources import Columns

    columns = Columns(path_column, tuple(caption_column or ()), label_column)
    report = pack(
        source,
        out,
        prefix=prefix,
        shard_bytes=int(shard_mb * 1e6),
        shuffle_seed=shuffle,
        columns=columns,
    )
    for info in report.shards:
        print(out / info.name)
    total = sum(info.num_samples for info in report.shards)
    size = sum(info.size_bytes for info in report.shards)
    print(f"{total:,} samples in {len(report.shards)} shards, {size / 1e6:.1f} MB", file=sys.stderr)
    for reason, count in sorted(report.skipped.items()):
        print(f"skipped {count}: {reason}", file=sys.stderr)


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    labels: Annotated[str, typer.Option(help='Classes, separated by commas: "cat,dog".')],
    model: Annotated[
        str, typer.Option(help="NAME/TAG, hf-hub:ORG/REPO, model folder or run folder.")
    ] = DEFAULT_MODEL,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with {} for the class; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Zero-shot classification of images."""
    from clipsys.encoder import load
    from clipsys.zeroshot import DEFAULT_TEMPLATES, ZeroShotClassifier

    encoder = load(model)
    classifier = ZeroShotClassifier(encoder, labels.split(","), template or DEFAULT_TEMPLATES)
    predictions = classifier.predict(images)
    if as_json:
        rows = [
            {"uri": str(path), **vars(prediction)}
            for path, prediction in zip(images, predictions, strict=True)
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    width = max(len(str(path)) for path in images)
    for path, prediction in zip(images, predictions, strict=True):
        print(f"{path!s:{width}}  {prediction.label}  {prediction.probability:.3f}")


class Task(str, Enum):
    """What `evaluate` measures."""

    zeroshot = "zeroshot"
    retrieval = "retrieval"
    probe = "probe"


class QueryCaptions(str, Enum):
    """Which captions of an item are queries."""

    first = "first"
    all = "all"


def evaluate(
    model: Annotated[str, typer.Argument(help="NAME/TAG, hf-hub:…, model folder or run folder.")],
    task: Annotated[Task, typer.Option(help="What to measure.")],
    data: Annotated[str, typer.Option(help="A folder, a table or shards.")],
    captions: Annotated[
        QueryCaptions, typer.Option(help="retrieval: which captions are queries.")
    ] = QueryCaptions.all,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="retrieval: any item with the same metadata KEY is a hit."
        ),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="zeroshot: prompt with {} for the class.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on labelled or captioned images."""
    from clipsys.benchmarking import measure

    result = measure(
        model,
        task.value,
        data,
        captions=captions.value,
        match=match,
        templates=template,
    )
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['task']} of {result['model']} on {result['data']}")
    for name, value in result["metrics"].items():
        print(f"  {name:36} {value:>10,.4g}")


def doctor() -> None:
    """Say what this machine has, and what would go wrong."""
    from clipsys.doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = {"ok": "ok  ", "note": "note", "problem": "FAIL"}[finding.grade]
        print(f"{mark}  {finding.subject:{width}}  {finding.text}")
    problems = [finding for finding in findings if finding.grade == "problem"]
    if problems:
        from clipsys.errors import ClipsysError

        raise ClipsysError(f"{len(problems)} problem(s) found; see the lines marked FAIL")
