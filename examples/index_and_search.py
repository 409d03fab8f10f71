"""Index a corpus and search it by text, by image and with a filter.

    python examples/index_and_search.py MODEL photos ~/Pictures "a dog on the beach" "year>=2020"

Run it again and the collection is brought up to date: unchanged files are not read again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipsys
from clipsys.retrieval import Collection


def main(model: str, collection: str, source: str, query: str, *where: str) -> None:
    """Prints the hits of a text, and what looks most like the first of them."""
    encoder = clipsys.load(model)
    if Path(collection).exists():
        photos = Collection.open(collection, encoder)
    else:
        photos = Collection.create(collection, encoder)
    with photos:
        print(photos.add(source).summary())
        hits = photos.search(query, k=5, where=list(where))
        for hit in hits:
            print(f"{hit.rank}  {hit.score:.3f}  {hit.uri}  {hit.caption or ''}")
        if hits:
            like_it = photos.search(f"item:{hits[0].id}", k=3)
            print(f"most like {hits[0].uri}:", *(hit.uri for hit in like_it))


if __name__ == "__main__":
    main(*sys.argv[1:])
