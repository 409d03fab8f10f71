"""The verbs that maintain a collection: remove, compact, verify, repair.

Heavy imports stand inside the functions: this module is loaded to print their help.
"""

from __future__ import annotations

from typing import Annotated

import typer

from clipsys.commands import options
from clipsys.printing import counted, json_text, printable

#: The largest share of a collection that a filter removes without ``--yes``.
_REMOVE_LIMIT = 0.1


def remove(
    collection: options.CollectionFolder,
    ids: Annotated[
        list[int] | None,
        typer.Argument(help="Ids of the items, as a search gives them.", metavar="[ID]..."),
    ] = None,
    *,
    where: options.Where = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove even more than a tenth of the collection.")
    ] = False,
) -> None:
    """Remove items from a collection; their files stay where they are."""
    from clipsys.errors import CollectionError, QueryError
    from clipsys.retrieval.collection import Collection

    if bool(ids) == bool(where):
        raise QueryError("name what to remove: either ids or --where, such as --where 'year<2020'")
    with Collection.open(collection) as photos:
        chosen = photos.select(where) if where else ids or []
        if where and len(chosen) > _REMOVE_LIMIT * len(photos) and not yes:
            raise CollectionError(
                f"{photos.path}: {len(chosen):,} of {len(photos):,} items match, more than "
                f"{_REMOVE_LIMIT:.0%}; if they are meant to go, say so with --yes"
            )
        removed = photos.remove(chosen)
        typer.echo(f"{counted(removed, 'item')} removed, {len(photos):,} left")
    if ids and removed < len(set(ids)):
        typer.echo(f"{counted(len(set(ids)) - removed, 'id')} of no item", err=True)


def compact(collection: options.CollectionFolder) -> None:
    """Drop the vectors of deleted items, join small segments, renew the index."""
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.writing.compaction import GRACE_S

    with Collection.open(collection) as photos:
        report = photos.compact()
    typer.echo(
        f"{report.vectors_dropped:,} vectors dropped, {report.segments_before:,} segments became "
        f"{report.segments_after:,}, {report.items_forgotten:,} deleted items forgotten"
    )
    if report.segments_before != report.segments_after or report.vectors_dropped:
        typer.echo(
            f"the replaced files go with the next command that writes, {GRACE_S:.0f} s from now at "
            "the earliest: searches may still be reading them",
            err=True,
        )


def verify(collection: options.CollectionFolder, *, as_json: options.Json = False) -> None:
    """Check every invariant of a collection against its files; exit status 1 if one is broken."""
    from clipsys.retrieval.maintenance.verification import verify as find_faults
    from clipsys.retrieval.storage.manifest import read_manifest

    folder = collection.expanduser().absolute()
    if not folder.is_dir():
        read_manifest(folder)  # there is none: an error, not a fault of it
    faults = find_faults(folder)
    if as_json:
        document = {
            "collection": str(folder),
            "sound": not faults,
            "faults": [fault.to_dict() for fault in faults],
        }
        typer.echo(json_text(document))
    else:
        for fault in faults:
            typer.echo(printable(str(fault)))
        message = (
            f"{counted(len(faults), 'fault')}; `clipsys repair` mends what can be"
            if faults
            else "sound"
        )
        typer.echo(printable(f"{folder}: {message}"), err=bool(faults))
    if faults:
        raise typer.Exit(1)


def repair(collection: options.CollectionFolder, *, as_json: options.Json = False) -> None:
    """Mend what `verify` finds; exit status 1 if something remains."""
    from clipsys.retrieval.collection import Collection

    with Collection.open(collection, to_repair=True) as photos:
        report = photos.repair()
    if as_json:
        typer.echo(json_text(report.to_dict()))
    else:
        done = {
            "damaged segments dropped": report.segments_dropped,
            "items sent to the failure ledger, to be encoded again": report.requeued,
            "items removed that shared a uri": report.duplicates_removed,
            "vectors dropped that belonged to no item": report.vectors_dropped,
            "table of words rebuilt": int(report.words_rebuilt),
            "index of metadata rebuilt": int(report.metadata_rebuilt),
            "counters set right": int(report.counters_set),
            "index built again": int(report.index_rebuilt),
        }
        words = [f"{count:,} {what}" for what, count in done.items() if count]
        typer.echo("\n".join(words) or "there was nothing to mend")
        for fault in report.remaining:
            typer.echo(f"remains: {printable(fault)}")
        if report.requeued:
            typer.echo(printable(f"next: clipsys failures {collection} --retry"), err=True)
    if report.remaining:
        raise typer.Exit(1)
