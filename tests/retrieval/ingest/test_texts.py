"""Captions and metadata follow the sources that give them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from clipsys.retrieval import Collection
from clipsys.retrieval.ingest.texts import Texts, merge
from clipsys.retrieval.storage.sources import Claim
from tests.retrieval.colours import paint


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return paint(tmp_path / "img" / "dog" / "a.png", "red")


def write_table(folder: Path, text: str) -> Path:
    (folder / "t.csv").write_text(text, encoding="utf-8")
    return folder / "t.csv"


def texts(collection: Collection) -> tuple[tuple[str, ...], dict[str, object]]:
    (item,) = collection.items()
    return item.captions, item.metadata


def test_emptied_cells_and_removed_columns_empty_the_item(
    collection: Collection, photo: Path
) -> None:
    row = f"{photo},a red thing,wool,3"
    table = write_table(photo.parent, f"path,caption,tag,size\n{row}\n")
    collection.add(table, show_progress=False)
    assert texts(collection) == (("a red thing",), {"tag": "wool", "size": 3})
    write_table(photo.parent, f"path,caption,tag,size\n{photo},,,large\n")
    assert collection.add(table, show_progress=False).updated == 1
    assert texts(collection) == ((), {"size": "large"})
    write_table(photo.parent, f"path\n{photo}\n")
    collection.add(table, show_progress=False)
    assert texts(collection) == ((), {})
    assert collection.add(table, show_progress=False).unchanged == 1
    assert collection.search(words="red") == []


def test_texts_beside_an_image_that_are_emptied_or_deleted_go(
    collection: Collection, photo: Path
) -> None:
    photo.with_suffix(".txt").write_text("a red thing", encoding="utf-8")
    photo.with_suffix(".json").write_text('{"year": 2001}', encoding="utf-8")
    root = photo.parents[1]
    collection.add(root, show_progress=False)
    assert texts(collection) == (("a red thing",), {"label": "dog", "year": 2001})
    photo.with_suffix(".txt").write_text("", encoding="utf-8")
    photo.with_suffix(".json").unlink()
    collection.add(root, show_progress=False)
    assert texts(collection) == ((), {"label": "dog"})


@pytest.mark.parametrize("together", [True, False], ids=["one run", "two runs"])
def test_what_another_source_gave_stays(
    collection: Collection, photo: Path, together: bool
) -> None:
    root = photo.parents[1]
    table = write_table(photo.parent, f"path,caption,tag\n{photo},a red thing,wool\n")
    photo.with_suffix(".json").write_text('{"year": 2001}', encoding="utf-8")
    runs = [[table, root]] if together else [[table], [root]]
    for run in [*runs, *runs]:
        collection.add(*run, show_progress=False)
    everything = {"label": "dog", "year": 2001, "tag": "wool"}
    assert texts(collection) == (("a red thing",), everything)
    write_table(photo.parent, f"path,caption,tag\n{photo},,\n")
    for run in runs:
        collection.add(*run, show_progress=False)
    assert texts(collection) == ((), {"label": "dog", "year": 2001})
    photo.with_suffix(".json").unlink()
    for run in runs:
        collection.add(*run, show_progress=False)
    assert texts(collection) == ((), {"label": "dog"})
    assert collection.verify() == []


def test_removed_row_takes_its_values_from_an_image_that_its_folder_still_gives(
    collection: Collection, photo: Path
) -> None:
    other = paint(photo.with_name("b.png"), "blue")
    rows = [f"{photo},a red thing,wool", f"{other},a blue thing,silk"]
    table = write_table(photo.parent, "\n".join(["path,caption,tag", *rows]))
    collection.add(table, photo.parents[1], show_progress=False)
    write_table(photo.parent, "\n".join(["path,caption,tag", rows[1]]))
    collection.add(show_progress=False)
    red, blue = collection.items()
    assert (red.captions, red.metadata) == ((), {"label": "dog"})
    assert (blue.captions, blue.metadata) == (("a blue thing",), {"label": "dog", "tag": "silk"})


def test_caption_falls_to_whichever_source_gives_it_again(
    collection: Collection, photo: Path
) -> None:
    table = write_table(photo.parent, f"path,caption\n{photo},of the table\n")
    collection.add(table, show_progress=False)
    photo.with_suffix(".txt").write_text("of the file", encoding="utf-8")
    collection.add(photo.parent, show_progress=False)
    assert texts(collection)[0] == ("of the file",)
    write_table(photo.parent, f"path,caption\n{photo},\n")
    collection.add(table, show_progress=False)
    assert texts(collection)[0] == ("of the file",), "the table's caption was replaced long ago"
    photo.with_suffix(".txt").unlink()
    collection.add(photo.parent, show_progress=False)
    assert texts(collection)[0] == ()


def test_nothing_is_left_of_what_no_source_gives_any_more() -> None:
    """Random changes of three sources, against the sources themselves."""
    generator = random.Random(0)
    for _ in range(200):
        current: dict[str, Texts] = {}
        origins: dict[str, Claim | None] = {}
        item = Texts()
        for _ in range(12):
            source = generator.choice("abc")
            keys = {key: source for key in "xyz" if generator.random() < 0.5}
            given = Texts((source,) if generator.random() < 0.5 else (), keys)
            item, claims = merge(given, item, source, origins, fills=generator.random() < 0.3)
            if source not in origins:
                origins[source] = None
            origins.update(claims)
            current[source] = given
            assert all(name in current for name in origins)
            pairs = itertools.chain.from_iterable(one.metadata.items() for one in current.values())
            assert set(item.metadata.items()) <= set(pairs)
            assert item.captions in {one.captions for one in current.values()} | {()}


def test_migration_carries_over_whose_the_texts_are(collection: Collection, photo: Path) -> None:
    from tests.retrieval.colours import ColourEncoder

    table = write_table(photo.parent, f"path,caption,tag\n{photo},a red thing,wool\n")
    collection.add(table, photo.parents[1], show_progress=False, exclude=["raw"])
    collection.migrate(ColourEncoder(seed=1), show_progress=False)
    write_table(photo.parent, f"path,caption,tag\n{photo},,\n")
    with Collection.open(collection.path, ColourEncoder(seed=1)) as migrated:
        assert migrated.sources()[1].settings == {"exclude": ["raw"]}
        migrated.add(show_progress=False)
        assert texts(migrated) == ((), {"label": "dog"})
