"""Collections: a corpus of images, its vectors and its index, kept in one folder and searched.

    from clipsys.retrieval import Collection

    photos = Collection.create("photos", encoder)
    photos.add("~/Pictures")
    photos.search("a dog on the beach", k=10)

Modules, each of which builds on those above it:

    durable       files that are whole or absent, the writer's lock
    segments      immutable vector files
    items         items and failures as values
    schema        the database's tables
    store         items, failures and segments in SQLite: the truth
    manifest      which model, which index generation
    creation      a collection's folder, whole or not at all
    snapshot      live items and their vectors, as of one commit
    index         FAISS generations, derived from the snapshot
    view          a reader's snapshot and index, following the writer
    filters       conditions on metadata as SQL
    encoding      what is needed of an encoder, and which one is the right one
    query         what is searched for, and what comes back
    ranking       the exact top k
    corpora       several sources as one stream of records
    report        what became of the records
    embedding     records to committed batches, decoding ahead of the encoder
    pruning       removing what no source gives any more
    compaction    dropping deleted vectors, joining small segments
    writing       a writer's turn: commits and index generations
    info          what a collection holds, in numbers
    keeping       what changes and checks a collection
    collection    all of it behind one class
    verification  every invariant, checked against the files
    repairing     what can be mended of them
    migration     another model, built beside and swapped
    duplicates    near-duplicate groups
    commands      ``clipsys index`` and ``clipsys search``
    keeping_commands  ``clipsys info``, ``verify``, ``repair`` and so on

Importing this package imports none of them: names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.duplicates import DuplicateGroup
    from clipsys.retrieval.filters import Condition
    from clipsys.retrieval.info import CollectionInfo
    from clipsys.retrieval.items import Failure, Item
    from clipsys.retrieval.query import Hit, Part, Query
    from clipsys.retrieval.report import AddReport

__all__ = [
    "AddReport",
    "Collection",
    "CollectionInfo",
    "Condition",
    "DuplicateGroup",
    "Failure",
    "Hit",
    "Item",
    "Part",
    "Query",
]

_MODULE_OF = {
    "AddReport": "report",
    "Collection": "collection",
    "CollectionInfo": "info",
    "Condition": "filters",
    "DuplicateGroup": "duplicates",
    "Failure": "items",
    "Hit": "query",
    "Item": "items",
    "Part": "query",
    "Query": "query",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
