"""Collections: a corpus of images, its vectors and its index, kept in one folder and searched.

    from clipsys.retrieval import Collection

    photos = Collection.create("photos", encoder)
    photos.add("~/Pictures")
    photos.search("a dog on the beach", k=10)

Packages, each of which builds on those above it and on none below (a test holds them to it); each
one's docstring names its modules:

    storage      files and tables, the truth
    encoders     what is needed of an encoder, and the text tower without torch
    indexes      the FAISS index, derived from the vectors: planned, built, measured, opened
    search       from a query to its hits: filter, rank, fuse, fold, cut
    writing      the one writer: commits, index generations, compaction
    ingest       from sources to committed items
    maintenance  verification, repair, migration, duplicates, figures
    collection   all of it behind one class
    commands     the command line

Importing this package imports none of them: names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.indexes.planning import IndexPlan, plan_index
    from clipsys.retrieval.ingest.report import AddReport
    from clipsys.retrieval.maintenance.duplicates import DuplicateGroup
    from clipsys.retrieval.maintenance.info import CollectionInfo
    from clipsys.retrieval.search.options import Options
    from clipsys.retrieval.search.query import Hit, Part, Query
    from clipsys.retrieval.storage.conditions import Condition
    from clipsys.retrieval.storage.items import Failure, Item

__all__ = [
    "AddReport",
    "Collection",
    "CollectionInfo",
    "Condition",
    "DuplicateGroup",
    "Failure",
    "Hit",
    "IndexPlan",
    "Item",
    "Options",
    "Part",
    "Query",
    "plan_index",
]

_MODULE_OF = {
    "AddReport": "ingest.report",
    "Collection": "collection",
    "CollectionInfo": "maintenance.info",
    "Condition": "storage.conditions",
    "DuplicateGroup": "maintenance.duplicates",
    "Failure": "storage.items",
    "Hit": "search.query",
    "IndexPlan": "indexes.planning",
    "Item": "storage.items",
    "Options": "search.options",
    "Part": "search.query",
    "Query": "search.query",
    "plan_index": "indexes.planning",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
