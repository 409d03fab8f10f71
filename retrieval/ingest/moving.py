"""Files that were moved: their items keep their ids.

A record whose uri is new and whose content is known is a moved file if no file lies any more where
an item with that content had its own, and a copy otherwise. A renamed
folder is many moved files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Set as AbstractSet
from pathlib import PurePath

from clipsys.retrieval.ingest.texts import Texts, claims_of_all
from clipsys.retrieval.storage.items import Item
from clipsys.retrieval.storage.sources import Claim, origins_of
from clipsys.retrieval.storage.store import Store


class MovedFiles:
    """Finds the item of a moved file, each item once."""

    def __init__(self, store: Store, annotated: AbstractSet[str] = frozenset()) -> None:
        """``annotated``: metadata keys that no source gave."""
        self._store = store
        self._annotated = annotated
        #: By content: items whose files are gone, by the names that these had, the oldest first.
        self._gone: dict[str, dict[str, deque[Item]]] = {}

    def find(self, uri: str, content_hash: str) -> Item | None:
        """The item of a file that lay elsewhere before; one of the same name if there are several.

        Of a file that was replaced meanwhile nothing is known: only what is gone has moved.
        """
        if content_hash not in self._gone:
            self._gone[content_hash] = self._look(content_hash)
        by_name = self._gone[content_hash]
        name = os.path.basename(uri)  # noqa: PTH119
        if name not in by_name:
            if not by_name:
                return None
            name = min(by_name, key=lambda other: by_name[other][0].id)
        found = by_name[name].popleft()
        if not by_name[name]:
            del by_name[name]
        return found

    def _look(self, content_hash: str) -> dict[str, deque[Item]]:
        by_name: dict[str, deque[Item]] = {}
        for item in self._store.items_of_content(content_hash):
            if is_gone(item.uri):
                by_name.setdefault(os.path.basename(item.uri), deque()).append(item)  # noqa: PTH119
        return by_name

    def kept_claims(self, item: Item, source: str) -> dict[str, Claim]:
        """What other sources gave of a moved item, which it keeps: captions of a table mostly.

        Not those of its folder, which cannot give it any more, or of a source of the same kind that
        is gone: that one has moved as well.
        """
        origins = origins_of(self._store, item.uri)
        claims = claims_of_all(Texts.of_item(item), origins, self._annotated)
        return {
            name: claim for name, claim in claims.items() if not _gave_way(name, source, item.uri)
        }


def is_gone(uri: str) -> bool:
    """Whether there is certainly no file any more; one that may not be looked at may be there."""
    if "://" in uri:
        return False
    container, _, _ = uri.rpartition("#")
    places = [uri, container] if container.endswith((".tar", ".parquet")) else [uri]
    return not any(_may_exist(place) for place in places)


def _may_exist(path: str) -> bool:
    try:
        os.stat(path)  # noqa: PTH116  (Path.exists takes a refusal for an absence in newer Pythons)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _gave_way(name: str, source: str, old_uri: str) -> bool:
    if name == source or old_uri.startswith((f"{name}/", f"{name}#")):
        return True
    return PurePath(name).suffix == PurePath(source).suffix and is_gone(name)
