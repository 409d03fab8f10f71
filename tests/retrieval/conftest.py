from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clipsys.retrieval import Collection
from tests.retrieval.colours import COLOURS, ColourEncoder, paint


@pytest.fixture
def encoder() -> ColourEncoder:
    return ColourEncoder()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with one image of each colour, each with a caption."""
    folder = tmp_path / "photos"
    for name in COLOURS:
        paint(folder / f"{name}.png", name)
        (folder / f"{name}.txt").write_text(f"a {name} square\n", encoding="utf-8")
    return folder


@pytest.fixture
def collection(tmp_path: Path, encoder: ColourEncoder) -> Iterator[Collection]:
    """An empty collection."""
    with Collection.create(tmp_path / "collection", encoder) as made:
        yield made
