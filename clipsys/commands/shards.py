"""The verb `shards`; heavy imports wait until it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from clipsys.commands import options
from clipsys.printing import json_text, printable

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
    frames: Annotated[
        bool,
        typer.Option(
            "--frames",
            help="SOURCE holds folders of numbered frames: write sequence (the folder) and frame "
            "(the last number of the name) into the metadata.",
        ),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and decode.")] = 1,
    path_column: options.PathColumn = "",
    caption_column: options.CaptionColumn = None,
    label_column: options.LabelColumn = "",
    encoding: options.Encoding = "",
    no_images: Annotated[
        bool, typer.Option("--no-images", help="The rows of the table are texts without images.")
    ] = False,
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

    With --no-images a table of texts and labels is packed, for training on texts alone.
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
    from clipsys.errors import DataError
    from clipsys.files.drive_faults import drive_errors_explained

    remedy = "make room and repeat the command, which goes on from here"
    if no_images and resize is not None:
        raise typer.BadParameter("does nothing with --no-images", param_hint="--resize")
    columns = options.columns_of(
        [source], path_column, caption_column, label_column, encoding, without_images=no_images
    )
    with drive_errors_explained(out, DataError, remedy):
        report = pack(
            source,
            out,
            prefix=prefix,
            shard_bytes=int(shard_mb * 1e6),
            shuffle_seed=shuffle,
            columns=columns,
            resize=resize,
            frames=frames,
            workers=workers,
        )
    for info in report.shards:
        print(printable(out / info.name))
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
        where = printable(str(report.skipped_path))
        print(f"skipped {total:,} ({reasons}); see {where}", file=sys.stderr)


def _write_manifests(source: str, workers: int) -> None:
    from clipsys.errors import DataError
    from clipsys.shards.counting import write_manifests
    from clipsys.shards.remote import default_cache

    report = write_manifests(source, default_cache(), workers=workers)
    for path in report.paths:
        print(printable(path))
    print(
        f"{report.num_samples:,} samples in {report.num_shards:,} shards, "
        f"{report.num_kept:,} of them listed before",
        file=sys.stderr,
    )
    for warning in report.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if report.faults:
        more = f" (and {len(report.faults) - 1} more)" if len(report.faults) > 1 else ""
        raise DataError(f"not listed: {report.faults[0]}{more}")


def _verify_shards(source: str, workers: int, as_json: bool) -> None:
    from clipsys.errors import DataError
    from clipsys.shards.checking import check_shards

    report = check_shards(source, workers=workers)
    if as_json:
        print(json_text({"sound": report.sound, **vars(report)}))
    else:
        print(f"{report.num_samples:,} samples in {report.num_shards} shards")
        for fault in report.shard_faults:
            print(printable(fault))
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
        if not report.sound and report.without_image:
            count = len(report.without_image)
            print(f"{count} without an image, unlike others: {_first_few(report.without_image)}")
        if report.same_image:
            print(f"{len(report.same_image)} images occur with several texts (no fault)")
        if report.sound:
            texts = "all samples are texts without images"
            images = "all images decode, all samples have a text, none occurs twice"
            print(texts if report.without_image else images)
    if not report.sound:
        raise DataError(f"{source}: the shards are not sound")


def _first_few(places: list[str]) -> str:
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return printable(", ".join(places[:_SHOWN]) + more)
