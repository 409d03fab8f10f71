"""The verb ``clipsys index``.

Heavy imports stand inside the functions: this module is loaded to print its help.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipsys.commands import options
from clipsys.printing import printable

if TYPE_CHECKING:
    from clipsys.retrieval.collection import Collection


def index(
    collection: options.CollectionFolder,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, tables (.csv .tsv .jsonl .parquet), WebDataset shards (.tar) or images; "
            "without any, all that the collection was made of.",
            metavar="SOURCE...",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder, run folder, open_clip NAME/TAG or hf-hub:ORG/REPO; "
            "needed for a new collection, or where its model lies elsewhere by now."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    workers: options.Workers = None,
    precision: Annotated[
        str,
        typer.Option(
            help="In which images are encoded: fp32, bf16, int8; fast takes the fastest that this "
            "machine is good at, and fp32 where the first images show that int8 is not.",
        ),
    ] = "fast",
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what the sources gave once and no longer have.")
    ] = False,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Prune, or leave behind in a migration, even more than a tenth."
        ),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Files and folders that a folder leaves out, by name (thumb_*) or by path below "
            "the folder (raw/*.tif). May be repeated; remembered. What systems and network drives "
            "keep for themselves (@eaDir, #recycle, __MACOSX, ...) is always left out.",
        ),
    ] = None,
    path_column: options.PathColumn = "",
    caption_column: options.CaptionColumn = None,
    label_column: options.LabelColumn = "",
    encoding: options.Encoding = "",
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate", help="Encode the whole collection again with --model, then swap."
        ),
    ] = False,
) -> None:
    """Create a collection, or bring it up to date with its sources."""
    from clipsys.errors import DataError
    from clipsys.processes.interruption import ending_in_order
    from clipsys.retrieval.ingest.adding import Reading, choose_sources
    from clipsys.retrieval.ingest.pruning import PRUNE_LIMIT
    from clipsys.retrieval.ingest.sources import Source, check_sources
    from clipsys.retrieval.maintenance.migration import LOSS_LIMIT
    from clipsys.retrieval.storage.creation import destroy_folder
    from clipsys.retrieval.storage.manifest import FILE_NAME

    sources = sources or []
    columns = options.columns_of(sources, path_column, caption_column, label_column, encoding)
    if migrate:
        if sources:
            check_sources([Source.of(source, (), columns) for source in sources])
        _migrate(
            *(collection, model, precision, batch_size, workers),
            loss_limit=1.0 if yes else LOSS_LIMIT,
        )
        if not sources:
            return
    is_new = not (collection.expanduser() / FILE_NAME).exists()
    if is_new:  # a missing source is said before a model is loaded
        choose_sources(collection, None, sources, Reading(tuple(exclude or ()), columns))
    photos = (_create if is_new else _open)(collection, model, precision)
    with photos, ending_in_order(lambda: _kept(photos)):
        try:
            report = photos.add(
                *sources,
                batch_size=batch_size,
                num_workers=workers,
                prune_vanished=prune,
                prune_limit=1.0 if yes else PRUNE_LIMIT,
                columns=columns,
                exclude=tuple(exclude or ()),
            )
            if is_new and len(photos) == 0:
                first = report.first_failures[0].message
                raise DataError(
                    f"none of the {report.failed:,} images can be used; the first: {first}"
                )
        finally:
            if is_new and len(photos) == 0:
                destroy_folder(photos.path)
        typer.echo(f"{printable(photos.path)}: {report.summary()}")
        typer.echo(f"{len(photos):,} items; took {report.seconds:.1f} s")
    for failure in report.first_failures:
        typer.echo(f"skipped: {printable(failure.message)}", err=True)
    more = report.failed - len(report.first_failures)
    if more > 0:
        typer.echo(f"skipped: {more:,} more, all in the failure ledger", err=True)


def _migrate(
    path: Path,
    model: str | None,
    precision: str,
    batch_size: int,
    workers: int | None,
    *,
    loss_limit: float,
) -> None:
    import clipsys
    from clipsys.errors import ModelError
    from clipsys.processes.interruption import ending_in_order
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.encoders.encoding import place_of
    from clipsys.retrieval.maintenance.migration import MigrationOptions

    if model is None:
        raise ModelError(f"{path}: --migrate needs the new model; name it with --model")

    def kept() -> str:
        return f"{photos.path} is as it was; the same command goes on with the images that are left"

    with Collection.open(path) as photos, ending_in_order(kept):
        report = photos.migrate(
            clipsys.load(model, precision=precision),
            model=place_of(model),
            options=MigrationOptions(batch_size, workers, loss_limit),
        )
        typer.echo(printable(f"{photos.path}: now of model {model}; {report.summary()}"))


def _kept(photos: Collection) -> str:
    num_items = len(photos)
    if num_items == 0:
        return f"nothing was added to {photos.path}"
    return f"{photos.path} keeps {num_items:,} items; the same command goes on"


def _create(path: Path, model: str | None, precision: str) -> Collection:
    import clipsys
    from clipsys.errors import CollectionError
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.encoders.encoding import place_of

    if model is None:
        raise CollectionError(
            f"{path}: there is no collection here; name a --model to make one "
            "(a model folder, a run folder, or an open_clip NAME/TAG)"
        )
    encoder = clipsys.load(model, precision=precision)
    return Collection.create(path, encoder, model=place_of(model))


def _open(path: Path, model: str | None, precision: str) -> Collection:
    from clipsys.retrieval.collection import Collection

    photos = Collection.open(path, precision=precision, model=model)
    if model is not None:
        try:
            _ = photos.encoder  # a model that does not fit is refused before anything is read
            photos.record_model(model)
        except BaseException:
            photos.close()
            raise
    return photos
