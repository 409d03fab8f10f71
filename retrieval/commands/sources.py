"""The verb ``clipsys sources``.

Heavy imports stand inside the function: this module is loaded to print its help.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from clipsys.commands import options
from clipsys.printing import counted, json_text, printable


def sources(
    collection: options.CollectionFolder,
    *,
    rename: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="OLD NEW",
            help="Record where a source is now; its images keep their ids and are not read.",
        ),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Forget a source that is gone for good, and remove what no other source gives.",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove even more than a tenth of the collection.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the sources of a collection, say that one was renamed, or forget one."""
    from clipsys.corpora.real_paths import real_source
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.ingest.moving import is_gone
    from clipsys.retrieval.ingest.pruning import PRUNE_LIMIT

    if rename is not None and forget is not None:
        raise typer.BadParameter("give one of --rename and --forget")
    with Collection.open(collection) as photos:
        if rename is not None:
            moved = photos.rename_source(*rename)
            images = counted(moved, "image")
            said = f"{rename[0]} is now {real_source(rename[1])}; {images} moved along"
            typer.echo(printable(said), err=True)
        if forget is not None:
            removed = photos.forget_source(forget, limit=1.0 if yes else PRUNE_LIMIT)
            said = f"{forget} is forgotten; {counted(removed, 'item')} removed"
            typer.echo(printable(said), err=True)
        known = photos.sources()
    rows = [
        {
            "source": one.name,
            "images": one.num_uris,
            "present": not is_gone(one.name) or any(sign in one.name for sign in "{*?"),
            "settings": dict(one.settings),
        }
        for one in known
    ]
    if as_json:
        typer.echo(json_text(rows))
        return
    for row in rows:
        notes = "" if row["present"] else "  (not there)"
        settings = f"  {json.dumps(row['settings'])}" if row["settings"] else ""
        typer.echo(printable(f"{row['images']:>9,}  {row['source']}{notes}{settings}"))
    typer.echo(counted(len(rows), "source"), err=True)
