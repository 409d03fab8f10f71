"""The verbs `shards`, `classify`, `evaluate`, `models` and `doctor`.

Heavy imports wait until one of them runs.
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "ViT-B-32/laion2b_s34b_b79k"
#: Of each kind of fault.
_SHOWN = 3


def shards(
    source: Annotated[
        str, typer.Argument(help="A folder, a table (.csv .tsv .jsonl .parquet) or shards.")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to write shards into.", show_default=False)
    ] = None,
    prefix: Annotated[str, typer.Option(help="Shards are named PREFIX-00000.tar.")] = "shard",
    shard_mb: Annotated[float, typer.Option(min=0.01, help="Size of a shard, in MB.")] = 100.0,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="Shuffle with this seed; default: in order.")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(min=16, metavar="PIXELS", help="Reduce the shorter side; default: as it is."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and decode.")] = 1,
    path_column: Annotated[
        str, typer.Option(help="Column with the image's path, or the image itself (Parquet).")
    ] = "",
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Column with captions; may be repeated.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column with the class label.")] = "",
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the shards SOURCE instead; no OUT.")
    ] = False,
    manifest: Annotated[
        bool,
        typer.Option(
            "--manifest", help="Write shards.json beside the shards SOURCE instead; no OUT."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --verify: print JSON.")] = False,
) -> None:
    """Pack images and captions into WebDataset shards; or check, or list, existing ones.

    A pack that was interrupted goes on when the same command is repeated.
    """
    if (verify or manifest) and out is not None:
        raise typer.BadParameter("is not written with --verify or --manifest", param_hint="OUT")
    if manifest:
        _write_manifests(source, workers)
        if not verify:
            return
    if verify:
        _verify_shards(source, workers, as_json)
        return
    if out is None:
        raise typer.BadParameter("name the folder to write into", param_hint="OUT")
    from clipsys.corpora.packing import pack
    from clipsys.corpora.tables import Columns

    report = pack(
        source,
        out,
        prefix=prefix,
        shard_bytes=int(shard_mb * 1e6),
        shuffle_seed=shuffle,
        columns=Columns(path_column, tuple(caption_column or ()), label_column),
        resize=resize,
        workers=workers,
    )
    for info in report.shards:
        print(out / info.name)
    total = sum(info.num_samples for info in report.shards)
    size = sum(info.size_bytes for info in report.shards)
    resumed = f", {report.resumed} of them written before" if report.resumed else ""
    print(
        f"{total:,} samples in {len(report.shards)} shards{resumed}, {size / 1e6:.1f} MB",
        file=sys.stderr,
    )
    if report.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
        total = sum(report.skipped.values())
        print(f"skipped {total:,} ({reasons}); see {report.skipped_path}", file=sys.stderr)


def _write_manifests(source: str, workers: int) -> None:
    from clipsys.errors import DataError
    from clipsys.shards.counting import write_manifests
    from clipsys.shards.remote import default_cache

    report = write_manifests(source, default_cache(), workers=workers)
    for path in report.paths:
        print(path)
    print(
        f"{report.num_samples:,} samples in {report.num_shards:,} shards, "
        f"{report.num_kept:,} of them listed before",
        file=sys.stderr,
    )
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if report.faults:
        more = f" (and {len(report.faults) - 1} more)" if len(report.faults) > 1 else ""
        raise DataError(f"not listed: {report.faults[0]}{more}")


def _verify_shards(source: str, workers: int, as_json: bool) -> None:
    from clipsys.errors import DataError
    from clipsys.shards.checking import check_shards

    report = check_shards(source, workers=workers)
    if as_json:
        print(json.dumps({"sound": report.sound, **vars(report)}, indent=2, ensure_ascii=False))
    else:
        print(f"{report.num_samples:,} samples in {report.num_shards} shards")
        for fault in report.shard_faults:
            print(fault)
        for reason, places in report.unusable.items():
            print(f"{len(places)} unusable, {reason}: {_first_few(places)}")
        if report.without_text:
            count = len(report.without_text)
            print(f"{count} with neither caption nor label: {_first_few(report.without_text)}")
        if report.repeated:
            print(f"{len(report.repeated)} images occur several times with the same text:")
        for group in report.repeated[:_SHOWN]:
            print(f"  {_first_few(group)}")
        if len(report.repeated) > _SHOWN:
            print(f"  and {len(report.repeated) - _SHOWN} more; --json lists all")
        if report.same_image:
            print(f"{len(report.same_image)} images occur with several texts (no fault)")
        if report.sound:
            print("all images decode, all samples have a text, none occurs twice")
    if not report.sound:
        raise DataError(f"{source}: the shards are not sound")


def _first_few(places: list[str]) -> str:
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(places[:_SHOWN]) + more


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
    from clipsys.models.encoder import load
    from clipsys.models.zeroshot import DEFAULT_TEMPLATES, ZeroShotClassifier

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
    classnames: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="zeroshot: names of numbered classes, one a line; default classnames.txt "
            "beside the data.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on labelled or captioned images."""
    from clipsys.evaluation.tasks import measure

    result = measure(
        model,
        task.value,
        data,
        captions=captions.value,
        match=match,
        templates=template,
        classnames=classnames,
    )
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['task']} of {result['model']} on {result['data']}")
    for name, value in result["metrics"].items():
        print(f"  {name:36} {value:>10,.4g}")


def models(
    pattern: Annotated[
        str, typer.Argument(help="Text that NAME/TAG contains (siglip, openai); default: all.")
    ] = "",
    max_mb: Annotated[
        float | None, typer.Option(min=1, help="Largest size of the weights in float32, in MB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List open_clip's pretrained models, the smallest first."""
    from clipsys.errors import ModelError
    from clipsys.models.catalogue import PretrainedModel, pretrained_models, pretrained_names
    from clipsys.progress import progress

    names = pretrained_names(pattern)
    found: list[PretrainedModel] = []
    with progress("Counting parameters", len(names), unit="models") as advance:
        for model in pretrained_models(names):
            advance(1)
            if max_mb is None or (model.size_mb is not None and model.size_mb <= max_mb):
                found.append(model)
    if not found:
        fitting = f" of {max_mb:g} MB or less" if max_mb is not None else ""
        raise ModelError(f"open_clip has no pretrained model {pattern!r}{fitting}")
    found.sort(key=lambda model: (model.size_mb is None, model.size_mb or 0, model.name))
    if as_json:
        print(json.dumps([vars(model) for model in found], indent=2))
        return
    width = max(len(model.name) for model in found)
    print(f"{'NAME/TAG':{width}}  {'MB':>6}  {'million':>7}  {'dim':>4}  {'pixels':>6}")
    for model in found:
        size = f"{model.size_mb:.0f}" if model.size_mb is not None else "?"
        count = f"{model.parameters / 1e6:.0f}" if model.parameters is not None else "?"
        print(f"{model.name:{width}}  {size:>6}  {count:>7}  {model.dim:>4}  {model.image_size:>6}")


def doctor() -> None:
    """Say what this machine has, and what would go wrong."""
    from clipsys.commands.doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = {"ok": "ok  ", "note": "note", "problem": "FAIL"}[finding.grade]
        print(f"{mark}  {finding.subject:{width}}  {finding.text}")
    problems = [finding for finding in findings if finding.grade == "problem"]
    if problems:
        from clipsys.errors import ClipsysError

        raise ClipsysError(f"{len(problems)} problem(s) found; see the lines marked FAIL")
