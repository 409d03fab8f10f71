"""Search several collections at once: one ranking over all of them.

    python examples/several_collections.py "a dog on the beach" photos scans catalogue

Scores are exact cosines, whatever index a collection has, so those of one model compare across
collections. The model is loaded once and given to each; a collection of another model refuses it.
"""

from __future__ import annotations

import heapq
import sys
from contextlib import ExitStack

import clipsys
from clipsys.retrieval import Collection

K = 10


def main(query: str, *folders: str) -> None:
    """Prints the best hits of all collections, each with the collection that it is from."""
    with ExitStack() as opened:
        collections = {
            folder: opened.enter_context(Collection.open(folder, _encoder(folder)))
            for folder in folders
        }
        # The best K of all are among the best K of each.
        hits = [
            (hit, folder)
            for folder, collection in collections.items()
            for hit in collection.search(query, k=K)
        ]
    for hit, folder in heapq.nlargest(K, hits, key=lambda found: found[0].score):
        print(f"{hit.score:.3f}  {folder}  {hit.uri}")


_encoders: dict[str, clipsys.Encoder] = {}


def _encoder(folder: str) -> clipsys.Encoder:
    """The encoder that a collection was made with, loaded once for all that share it."""
    with Collection.open(folder) as collection:
        model = collection.info().model
    if model not in _encoders:
        _encoders[model] = clipsys.load(model)
    return _encoders[model]


if __name__ == "__main__":
    main(*sys.argv[1:])
