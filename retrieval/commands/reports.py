"""The verbs that report on a collection: info, failures (and their retry), duplicates.

Heavy imports stand inside the functions: this module is loaded to print their help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipsys.commands import options
from clipsys.printing import counted, json_text, print_paths, printable

if TYPE_CHECKING:
    from clipsys.retrieval.maintenance.info import CollectionInfo


def info(collection: options.CollectionFolder, *, as_json: options.Json = False) -> None:
    """Say what a collection holds: items, model, sizes, index and failures."""
    from clipsys.retrieval.collection import Collection

    with Collection.open(collection) as photos:
        found = photos.info()
    typer.echo(json_text(found.to_dict()) if as_json else _described(found))


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
    return "\n".join(f"{name:<11} {printable(value)}" for name, value in lines)


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
    collection: options.CollectionFolder,
    *,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try each of them again, changed or not.")
    ] = False,
    as_json: options.Json = False,
    paths: options.Paths = False,
    paths0: options.Paths0 = False,
) -> None:
    """List the files that could not be used, with their reasons."""
    from clipsys.processes.interruption import ending_in_order
    from clipsys.retrieval.collection import Collection

    options.one_of(json=as_json, paths=paths, paths0=paths0)
    with Collection.open(collection) as photos:
        if retry and photos.failures(limit=1):
            with ending_in_order(lambda: "what was tried is kept; the same command tries the rest"):
                report = photos.retry_failures()
            typer.echo(printable(f"{photos.path}: {report.summary()}"), err=True)
        ledger = photos.failures()
    if as_json:
        keys = ("uri", "reason", "message", "attempts", "captions", "metadata")
        typer.echo(json_text([{key: getattr(one, key) for key in keys} for one in ledger]))
        return
    if paths or paths0:
        print_paths((one.uri for one in ledger), separator="\0" if paths0 else "\n")
        return
    for failure in ledger:
        typer.echo(f"{failure.reason}: {printable(failure.message)}")
    typer.echo(f"{counted(len(ledger), 'file')} cannot be used", err=True)


def duplicates(
    collection: options.CollectionFolder,
    *,
    threshold: Annotated[
        float, typer.Option(help="Cosine from which two images are nearly the same.")
    ] = 0.95,
    as_json: options.Json = False,
    paths: options.Paths = False,
    paths0: options.Paths0 = False,
) -> None:
    """List groups of images that are nearly the same, in the whole collection.

    With --paths or --paths0 the copies alone: of each group all but the first.
    """
    from clipsys.retrieval.collection import Collection

    options.one_of(json=as_json, paths=paths, paths0=paths0)
    with Collection.open(collection) as photos:
        groups = photos.duplicates(threshold)
    if as_json:
        document = {"threshold": threshold, "groups": [group.to_dict() for group in groups]}
        typer.echo(json_text(document))
        return
    if paths or paths0:
        uris = (item.uri for group in groups for item in group.items[1:])
        print_paths(uris, separator="\0" if paths0 else "\n")
        return
    for number, group in enumerate(groups, 1):
        typer.echo(f"group {number}: {len(group.items)} images")
        for item, score in zip(group.items, group.scores, strict=True):
            typer.echo(f"  {score:.3f}  {item.id:>8}  {printable(item.uri)}")
    copies = sum(len(group.items) - 1 for group in groups)
    found = f"{counted(len(groups), 'group')}, {counted(copies, 'image')} more than one of each"
    typer.echo(found, err=True)
