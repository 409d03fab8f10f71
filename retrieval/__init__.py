"""Collections: a corpus of images, its vectors and its index, kept in one folder and searched.

    from clipsys.retrieval import Collection

    photos = Collection.create("photos", encoder)
    photos.add("~/Pictures")
    photos.search("a dog on the beach", k=10)

Modules, each group of which builds on those above it:

    files and tables, the truth
        durable          files that are whole or absent, the writer's lock
        segments         immutable vector files
        items            items and failures as values
        words            captions searched by their words
        metadata_index   the metadata of the items, value by value
        schema           the database's tables
        upgrading        a database of the version before, brought up to date
        database         a connection to the SQLite file, taken in turns
        row_writing      the statements of which commits are made
        store            items, failures and segments in the database
        manifest         which model, which index generation
        creation         a collection's folder, whole or not at all
        snapshot         live items and their vectors, as of one commit
    the index, derived from it
        memory           what this process may still take
        planning         which index, and when another one
        fastscan         4-bit codes in FAISS's layout for fast scan
        index            FAISS generations, opened and searched
        gpu              the same on GPUs
        tuning           measuring an index, and the effort that reaches a recall
        clustering       k-means by matrix products
        inverted_file    an index larger than memory, written list by list
        building         training, filling, extending and writing an index
    searching
        encoding         what is needed of an encoder, and which one is the right one
        light            the text tower without torch, for a cold process
        query            what is searched for, and what comes back
        grammar          a query in one line
        filters          conditions on metadata, and how they are decided
        ranking          the top k by exact cosine
        calibration      how many unrelated items would score as high
        view             a reader's snapshot and index, following the writer
        searching        filter, rank, fuse, fold, cut
    keeping
        corpora          several sources as one stream of records
        report           what became of the records
        embedding        records to committed batches, decoding ahead of the encoder
        pruning          removing what no source gives any more
        compaction       dropping deleted vectors, joining small segments
        writing          a writer's turn: commits and index generations
        info             what a collection holds, in numbers
        duplicates       near-duplicate groups
        verification     every invariant, checked against the files
        repairing        what can be mended of them
        migration        another model, built beside and swapped
        keeping          what changes and checks a collection
        collection       all of it behind one class
    the command line
        commands         ``clipsys index``
        search_command   ``clipsys search``
        keeping_commands ``clipsys info``, ``verify``, ``repair`` and so on

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
    from clipsys.retrieval.planning import IndexPlan, plan_index
    from clipsys.retrieval.query import Hit, Part, Query
    from clipsys.retrieval.report import AddReport
    from clipsys.retrieval.searching import Options

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
    "AddReport": "report",
    "Collection": "collection",
    "CollectionInfo": "info",
    "Condition": "filters",
    "DuplicateGroup": "duplicates",
    "Failure": "items",
    "Hit": "query",
    "IndexPlan": "planning",
    "Item": "items",
    "Options": "searching",
    "Part": "query",
    "Query": "query",
    "plan_index": "planning",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
