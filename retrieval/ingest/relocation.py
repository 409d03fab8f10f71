"""Sources that were renamed, and sources that are gone for good.

A source that was renamed takes its images along: each keeps its id, its vector and what is known of
it, and nothing is read. One that is forgotten takes away the items that no other source gives.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from clipsys.corpora.real_paths import real_source
from clipsys.corpora.sources import source_kind
from clipsys.errors import DataError, PruningRefusedError
from clipsys.retrieval.ingest.healing import join_items
from clipsys.retrieval.ingest.moving import is_gone
from clipsys.retrieval.ingest.pruning import PRUNE_LIMIT, given_uris, prune
from clipsys.retrieval.storage.schema import sql_text
from clipsys.retrieval.storage.sources import (
    forget_source,
    known_sources,
    origins_of,
    rename_source,
    rename_uri,
)
from clipsys.retrieval.storage.store import Store

_PAGE = 1_000


def rename(store: Store, old: str, new: str) -> int:
    """Gives a source, and the images that lie in it, another place. Returns how many images.

    Call with the writer lock held. Killed, it is completed by the same call.

    Args:
        store: the collection's items.
        old: the source as it is known.
        new: where it is now.

    Raises:
        DataError: there is no such source, nothing usable at the new place, or it is the old
            one.
    """
    name, target = find_name(store, old), real_source(new)
    if target == name:
        raise DataError(f"{name}: is the source's name already; name the place where it is now")
    if "://" not in target:
        source_kind(target)
    rebase = _rebasing(name, target)
    pairs = [(uri, moved) for uri in given_uris(store, name) if (moved := rebase(uri)) is not None]
    if pairs and "://" not in target and all(is_gone(moved) for _, moved in pairs):
        raise DataError(
            f"{target}: none of the {len(pairs):,} images of {name} lies there, such as "
            f"{pairs[0][1]}; name the place where they are now"
        )
    for start in range(0, len(pairs), _PAGE):
        with store.changing() as (connection, change):
            for uri, moved in pairs[start : start + _PAGE]:
                item = store.find(uri)
                if item is None:
                    rename_uri(connection, uri, moved)
                else:
                    join_items(store, connection, change, moved, [(item.id, uri)])
    with store.changing() as (connection, _):
        rename_source(connection, name, target)
    return len(pairs)


def forget(store: Store, name: str, *, limit: float = PRUNE_LIMIT) -> int:
    """Forgets a source, and removes what no other one gives. Returns how many items went.

    Call with the writer lock held.

    Raises:
        DataError: there is no such source.
        PruningRefusedError: more than ``limit`` of the collection's items would go.
    """
    name = find_name(store, name)
    uris = list(given_uris(store, name))
    lost = sum(len(origins_of(store, uri)) == 1 and store.find(uri) is not None for uri in uris)
    total = store.count_items()
    if lost > limit * total:
        raise PruningRefusedError(
            f"{name}: {lost:,} of {total:,} items come from this source alone, more than "
            f"{limit:.0%}; nothing is removed. If they are meant to go, say so with --yes"
        )
    num_removed = prune(store, {name: uris})
    with store.changing() as (connection, _):
        (number,) = connection.execute(
            "SELECT id FROM sources WHERE name = ?", (sql_text(name),)
        ).fetchone()
        forget_source(connection, number)
    return num_removed


def find_name(store: Store, named: str) -> str:
    """The name under which a source is known, by that name or by any path to it.

    Raises:
        DataError: there is none.
    """
    names = [one.name for one in known_sources(store)]
    for name in (named, real_source(named)):
        if name in names:
            return name
    near = difflib.get_close_matches(real_source(named), names, 1, cutoff=0.0)
    hint = f"did you mean {near[0]}?" if near else "the collection has no sources"
    raise DataError(f"{named}: is not a source of the collection; {hint}")


def _rebasing(old: str, new: str) -> Callable[[str], str | None]:
    """A function that gives an image's uri its new place; None where it does not move along."""
    parents = (os.path.dirname(old), os.path.dirname(new))  # noqa: PTH120

    def rebase(uri: str) -> str | None:
        if uri == old:
            return new
        if uri.startswith((f"{old}/", f"{old}#")):
            return new + uri[len(old) :]
        # What a table names lies beside it as a rule, and was moved with it.
        if Path(old).suffix and uri.startswith(f"{parents[0]}/") and is_gone(uri):
            moved = parents[1] + uri[len(parents[0]) :]
            return None if is_gone(moved) else moved
        return None

    return rebase
