"""The verbs that look after a collection: info, duplicates, failures, remove, compact and so on.

Heavy imports stand inside the functions: this module is loaded to print their help.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from clipsys.retrieval.maintenance.info import CollectionInfo

_Folder = Annotated[Path, typer.Argument(help="Folder of the collection.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

#: The largest share of a collection that a filter removes without being told twice.
_REMOVE_LIMIT = 0.1


def info(collection: _Folder, *, as_json: _Json = False) -> None:
    """Says what a collection holds: items, model, sizes, index and failures."""
    from clipsys.retrieval.collection import Collection

    with Collection.open(collection) as photos:
        found = photos.info()
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else _described(found))


def _described(found: CollectionInfo) -> str:
    lines = [
        ("collection", str(found.path)),
        ("created", found.created_at),
        ("model", f"{found.model_name} ({found.fingerprint[:12]}), from {found.model}"),
        ("items", f"{found.num_items:,}, each a vector of {found.dim}"),
        ("deleted", f"{found.num_deleted:,} not yet compacted or forgotten"),
        ("segments", f"{found.num_segments:,}"),
        ("size", f"{found.size_bytes / 1e6:,.1f} MB"),
    ]
    if found.index is None:
        lines.append(("index", "none; every search scans the vectors"))
    else:
        lines += [*_described_index(found.index), ("searched on", str(found.searched_on))]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.failures.items())
    lines.append(("failures", f"{found.num_failures:,}" + (f" ({reasons})" if reasons else "")))
    lines += [("source", source) for source in found.sources]
    return "\n".join(f"{name:<11} {_printable(value)}" for name, value in lines)


def _described_index(index: dict[str, Any]) -> list[tuple[str, str]]:
    lists = f", {index['num_lists']:,} lists" if index["num_lists"] else ""
    line = f"{index['kind']}{lists}, {index['num_items']:,} vectors"
    lines = [("index", f"{line}, generation {index['generation']}")]
    effort = index["effort"]
    if effort is None:
        return [*lines, ("recall@10", "1, the index is exact")]
    reached = ", ".join(f"{kind} {recall:.3f}" for kind, recall in effort["recall"].items())
    how = f"{effort['num_probes']:,} probes, {effort['num_candidates']:,} candidates"
    measured = f"measured with {effort['num_queries']:,} held-out queries of each kind, {how}"
    return [*lines, ("recall@10", f"{reached}; {measured}")]


def failures(
    collection: _Folder,
    *,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try each of them again, changed or not.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Lists the files that could not be used, with their reasons."""
    from clipsys.processes.interruption import ending_in_order
    from clipsys.retrieval.collection import Collection

    with Collection.open(collection) as photos:
        if retry and photos.failures(limit=1):
            with ending_in_order(lambda: "what was tried is kept; the same command tries the rest"):
                report = photos.retry_failures()
            typer.echo(f"{photos.path}: {report.summary()}", err=True)
        ledger = photos.failures()
    if as_json:
        keys = ("uri", "reason", "message", "attempts", "captions", "metadata")
        typer.echo(
            json.dumps([{key: getattr(one, key) for key in keys} for one in ledger], indent=2)
        )
        return
    for failure in ledger:
        typer.echo(f"{failure.reason}: {_printable(failure.message)}")
    typer.echo(f"{_count(len(ledger), 'file')} cannot be used", err=True)


def duplicates(
    collection: _Folder,
    *,
    threshold: Annotated[
        float, typer.Option(help="Cosine from which two images are nearly the same.")
    ] = 0.95,
    as_json: _Json = False,
) -> None:
    """Lists groups of images that are nearly the same, in the whole collection."""
    from clipsys.retrieval.collection import Collection

    with Collection.open(collection) as photos:
        groups = photos.duplicates(threshold)
    if as_json:
        document = {"threshold": threshold, "groups": [group.to_dict() for group in groups]}
        typer.echo(json.dumps(document, indent=2))
        return
    for number, group in enumerate(groups, 1):
        typer.echo(f"group {number}: {len(group.items)} images")
        for item, score in zip(group.items, group.scores, strict=True):
            typer.echo(f"  {score:.3f}  {item.id:>8}  {_printable(item.uri)}")
    copies = sum(len(group.items) - 1 for group in groups)
    found = f"{_count(len(groups), 'group')}, {_count(copies, 'image')} more than one of each"
    typer.echo(found, err=True)


def remove(
    collection: _Folder,
    ids: Annotated[
        Optional[list[int]],  # noqa: UP045  (typer evaluates annotations on Python 3.10 as well)
        typer.Argument(help="Ids of the items, as a search gives them.", metavar="[ID]..."),
    ] = None,
    *,
    where: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Remove all items whose metadata match: K=V, K!=V, K<V, K<=V, K>V, K>=V, "
            "'K in A,B', 'K contains V'. May be repeated; all must hold."
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove even more than a tenth of the collection.")
    ] = False,
) -> None:
    """Removes items from a collection; their files stay where they are."""
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
        typer.echo(f"{_count(removed, 'item')} removed, {len(photos):,} left")
    if ids and removed < len(set(ids)):
        typer.echo(f"{_count(len(set(ids)) - removed, 'id')} of no item", err=True)


def compact(collection: _Folder) -> None:
    """Drops the vectors of deleted items, joins small segments, renews the index."""
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


def verify(collection: _Folder, *, as_json: _Json = False) -> None:
    """Checks every invariant of a collection against its files; exit status 1 if one is broken."""
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
        typer.echo(json.dumps(document, indent=2))
    else:
        for fault in faults:
            typer.echo(_printable(str(fault)))
        message = (
            f"{_count(len(faults), 'fault')}; `clipsys repair` mends what can be"
            if faults
            else "sound"
        )
        typer.echo(f"{folder}: {message}", err=bool(faults))
    if faults:
        raise typer.Exit(1)


def repair(collection: _Folder, *, as_json: _Json = False) -> None:
    """Mends what `verify` finds; exit status 1 if something remains."""
    from clipsys.retrieval.collection import Collection

    with Collection.open(collection, to_repair=True) as photos:
        report = photos.repair()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        done = {
            "damaged segments dropped": report.segments_dropped,
            "items sent to the failure ledger, to be encoded again": report.requeued,
            "items removed that shared a uri": report.duplicates_removed,
            "vectors dropped that belonged to no item": report.vectors_dropped,
            "table of words made anew": int(report.words_rebuilt),
            "index of metadata made anew": int(report.metadata_rebuilt),
            "counters set right": int(report.counters_set),
            "index built again": int(report.index_rebuilt),
        }
        words = [f"{count:,} {what}" for what, count in done.items() if count]
        typer.echo("\n".join(words) or "there was nothing to mend")
        for fault in report.remaining:
            typer.echo(f"remains: {_printable(fault)}")
        if report.requeued:
            typer.echo(f"next: clipsys failures {collection} --retry", err=True)
    if report.remaining:
        raise typer.Exit(1)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _printable(text: str) -> str:
    """File names that are not UTF-8 must not end the output."""
    return text.encode("utf-8", "replace").decode()
