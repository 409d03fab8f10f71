"""A writer to be killed: adds, changes, removes and rebuilds at random, and says what it did.

Usage: python -m tests.retrieval.crasher COLLECTION PICTURES SEED

Each operation is announced before it starts and acknowledged after it returned, as JSON lines:
``{"begin": {"add": [...]}}``, ``{"done": ...}``. Every batch is committed on its own, so that a
kill often falls between two commits of one operation.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from clipsys.retrieval import Collection, embedding
from tests.retrieval.colours import ColourEncoder, paint


def say(**words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def main(collection: Path, pictures: Path, seed: int) -> None:
    embedding.COMMIT_INTERVAL_S = 0.0
    generator = random.Random(seed)
    encoder = ColourEncoder()
    is_new = not collection.exists()
    with (Collection.create if is_new else Collection.open)(collection, encoder) as photos:
        say(ready=True)
        for number in range(10_000):
            operation = generator.choice(["add", "add", "change", "remove", "rebuild"])
            live = [item.uri for item in photos.items()]
            if operation == "add":
                folder = pictures / f"{seed}-{number}"
                paths = [folder / f"{n}.png" for n in range(generator.randint(1, 12))]
                source = folder
            elif operation == "change" and live:
                paths = [Path(uri) for uri in generator.sample(live, min(4, len(live)))]
                source = pictures.with_suffix(".csv")
                source.write_text("\n".join(["path", *map(str, paths)]), encoding="utf-8")
            elif operation == "remove" and live:
                items = list(photos.items())
                chosen = generator.sample(items, min(3, len(items)))
                say(begin={"remove": [item.uri for item in chosen]})
                for item in chosen:
                    Path(item.uri).unlink(missing_ok=True)  # a killed removal may have
                photos.remove([item.id for item in chosen])
                say(done={"remove": [item.uri for item in chosen]})
                continue
            else:
                say(begin={"rebuild": []})
                photos.build_index()
                say(done={"rebuild": []})
                continue
            say(begin={operation: [str(path) for path in paths]})
            for path in paths:
                colour = tuple(generator.randrange(256) for _ in range(3))
                paint(path, colour, mark=generator.randrange(97))  # type: ignore[arg-type]
            photos.add(source, batch_size=3, show_progress=False)
            say(done={operation: [str(path) for path in paths]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
