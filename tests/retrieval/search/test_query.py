from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipsys.errors import ImageDecodeError, QueryError
from clipsys.retrieval.search.query import NEGATIVE_WEIGHT, Hit, Part, Query, embed_query
from clipsys.retrieval.storage.segments import Floats
from tests.retrieval.colours import COLOURS, ColourEncoder, paint


def no_items(item_id: int) -> Floats:
    raise QueryError(f"there is no item {item_id}")


def test_query_vector_is_the_unit_sum_of_its_weighted_parts(
    encoder: ColourEncoder, tmp_path: Path
) -> None:
    stored = encoder.encode_text(["yellow"])[0]
    query = Query(
        (
            Part(text="red", weight=2.0),
            Part(image=paint(tmp_path / "b.png", "blue"), weight=0.5),
            Part(item=7, weight=0.25),
            Part(text="green", weight=-1.0),
        )
    )
    red, green = encoder.encode_text(["red", "green"])
    blue = encoder.encode_image([Image.new("RGB", (9, 9), COLOURS["blue"])])[0]
    expected = 2 * red + 0.5 * blue + 0.25 * stored - green
    vector = embed_query(query, encoder, {7: stored}.__getitem__)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert vector.dtype == np.float32


def test_common_query_has_the_negative_part_at_its_weight() -> None:
    query = Query.of("red", negative="green")
    assert query.parts == (Part(text="red"), Part(text="green", weight=NEGATIVE_WEIGHT))
    assert Query.of(item=3).items == {3}


def test_image_parts_may_be_paths_bytes_or_decoded(encoder: ColourEncoder, tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", "red", mark=5)
    forms = [path, str(path), path.read_bytes(), Image.open(path)]
    vectors = [embed_query(Query.of(image=form), encoder, no_items) for form in forms]
    for vector in vectors[1:]:
        np.testing.assert_array_equal(vector, vectors[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Part(), "has 0 of them"),
        (lambda: Part(text="a", item=1), "has 2 of them"),
        (lambda: Part(text="  "), "text is empty"),
        (lambda: Part(text="a", weight=0), "expected a number not 0"),
        (lambda: Part(text="a", weight=float("nan")), "expected a number not 0"),
        (lambda: Query(()), "something to look for"),
        (lambda: Query.of(negative="snow"), "something to look for"),
    ],
)
def test_senseless_queries_are_errors(make: object, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        make()  # type: ignore[operator]


def test_parts_that_cancel_out_are_an_error(encoder: ColourEncoder) -> None:
    query = Query((Part(text="red"), Part(text="red", weight=-1.0)))
    with pytest.raises(QueryError, match="cancel out"):
        embed_query(query, encoder, no_items)


def test_image_that_does_not_decode_is_an_error(encoder: ColourEncoder) -> None:
    with pytest.raises(ImageDecodeError):
        embed_query(Query.of(image=b"not an image"), encoder, no_items)


def test_hit_as_json_has_the_documented_fields() -> None:
    hit = Hit(1, 5, 0.5, "/a.jpg", None, {"year": 2024}, 4.5, (7,))
    assert hit.to_dict() == {
        "rank": 1,
        "id": 5,
        "score": 0.5,
        "uri": "/a.jpg",
        "caption": None,
        "metadata": {"year": 2024},
        "relevance": 4.5,
        "duplicates": [7],
    }
