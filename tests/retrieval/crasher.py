"""A writer to be killed: adds, copies, changes, removes, compacts, rebuilds at random, and says so.

Usage: python -m tests.retrieval.crasher COLLECTION PICTURES SEED

It begins with what it finds: the faults, the items, and those whose vector is not that of their
image. Then each operation is announced before it starts and acknowledged after it returned, as JSON
lines: ``{"begin": {"add": [...]}}``, ``{"done": ...}``. Every batch is committed on its own and
replaced files go at once, so that a kill often falls between two steps of one operation. From
twelve items on the index is an inverted file, tuned, and extended by compaction.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np

from clipsys.images.decoding import decode_image
from clipsys.retrieval import Collection
from clipsys.retrieval.indexes import planning
from clipsys.retrieval.ingest import pending
from clipsys.retrieval.writing import compaction, writer
from tests.retrieval.colours import ColourEncoder, paint


def say(**words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def describe(photos: Collection, encoder: ColourEncoder) -> dict[str, object]:
    """What a fresh process finds in a collection."""
    items = list(photos.items())
    wrong = []
    for item in items:
        data = Path(item.uri).read_bytes() if Path(item.uri).exists() else b""
        if hashlib.blake2b(data, digest_size=20).hexdigest() == item.content_hash:
            vector = encoder.encode_image([decode_image(data)])[0]
            if photos.vector(item.id) @ vector < 0.999:
                wrong.append(item.uri)
    hits = photos.search_vector(np.ones(encoder.dim, np.float32), k=100_000)
    return {
        "faults": [str(fault) for fault in photos.verify()],
        "uris": [item.uri for item in items],
        "wrong": wrong,
        "found": len(hits) == len(items) and {h.id for h in hits} == {i.id for i in items},
    }


def main(collection: Path, pictures: Path, seed: int) -> None:
    pending.COMMIT_INTERVAL_S = 0.0
    compaction.GRACE_S = writer.GRACE_S = 0.0
    compaction.SEGMENTS_PER_TIER = writer.SEGMENTS_PER_TIER = 8
    planning.EXACT_ITEMS = 12
    generator = random.Random(seed)
    encoder = ColourEncoder()
    is_new = not collection.exists()
    with (Collection.create if is_new else Collection.open)(collection, encoder) as photos:
        say(state=describe(photos, encoder))
        operations = ["add", "add", "copy", "change", "remove", "compact", "rebuild"]
        for number in range(10_000):
            operation = generator.choice(operations)
            live = [item.uri for item in photos.items()]
            if operation == "add":
                folder = pictures / f"{seed}-{number}"
                paths = [folder / f"{n}.png" for n in range(generator.randint(1, 12))]
                source = folder
            elif operation == "copy" and (there := [uri for uri in live if Path(uri).exists()]):
                folder = pictures / f"{seed}-{number}"
                folder.mkdir(parents=True)
                copied = [Path(uri) for uri in generator.choices(there, k=8)]
                paths = [folder / f"{n}.png" for n in range(len(copied))]
                say(begin={"add": [str(path) for path in paths]})
                for original, path in zip(copied, paths, strict=True):
                    shutil.copy(original, path)
                photos.add(folder, batch_size=3, show_progress=False)
                say(done={"add": [str(path) for path in paths]})
                continue
            elif operation == "change" and live:
                paths = [Path(uri) for uri in generator.sample(live, min(4, len(live)))]
                source = pictures.with_suffix(".csv")
                source.write_text("\n".join(["path", *map(str, paths)]), encoding="utf-8")
            elif operation == "remove" and live:
                items = list(photos.items())
                chosen = generator.sample(items, min(6, len(items)))
                say(begin={"remove": [item.uri for item in chosen]})
                for item in chosen:
                    Path(item.uri).unlink(missing_ok=True)  # a killed removal may have
                photos.remove([item.id for item in chosen])
                say(done={"remove": [item.uri for item in chosen]})
                continue
            else:
                say(begin={operation: []})
                photos.compact() if operation == "compact" else photos.build_index()
                say(done={operation: []})
                continue
            say(begin={operation: [str(path) for path in paths]})
            for path in paths:
                colour = tuple(generator.randrange(256) for _ in range(3))
                # Whole or not at all: what a kill leaves half painted cannot be added again.
                painted = pictures.with_suffix(".png")
                paint(painted, colour, mark=generator.randrange(97))  # type: ignore[arg-type]
                path.parent.mkdir(parents=True, exist_ok=True)
                painted.replace(path)
            photos.add(source, batch_size=3, show_progress=False)
            say(done={operation: [str(path) for path in paths]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
