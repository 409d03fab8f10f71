"""What a search can be asked for beyond the nearest: words, pages, cuts, folding, relevance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipsys.errors import QueryError
from clipsys.retrieval import Collection, Hit, Part, Query
from clipsys.retrieval.search.calibration import RELEVANT, Background
from clipsys.retrieval.search.searching import Options
from tests.retrieval.colours import COLOURS, ColourEncoder, paint, paint_folder


@pytest.fixture
def filled(collection: Collection, photos: Path) -> Collection:
    collection.add(photos, show_progress=False)
    return collection


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """Sixty random colours, twenty near-duplicates of red and three of green, with captions."""
    folder = tmp_path_factory.mktemp("many")
    paint_folder(folder / "p", num_images=60, seed=3)
    for number in range(20):
        red, green, blue = COLOURS["red"]
        paint(folder / "p" / f"red{number:02d}.png", (red, green + number // 5, blue), mark=1)
    for number in range(3):
        paint(folder / "p" / f"green{number}.png", (30, 170, 60 + number))
        (folder / "p" / f"green{number}.txt").write_text(f"meadow number {number}\n")
    with Collection.create(folder / "c", ColourEncoder()) as made:
        made.add(folder / "p", show_progress=False)
        yield made


def names(hits: list[Hit]) -> list[str]:
    return [Path(hit.uri).stem for hit in hits]


def test_a_line_of_text_is_read_by_the_grammar(filled: Collection) -> None:
    by_line = filled.search("red + 0.5*blue - white", k=6)
    parts = (Part(text="red"), Part(text="blue", weight=0.5), Part(text="white", weight=-0.5))
    assert by_line == filled.search(Query(parts), k=6)
    own = filled.search("red", k=1)[0]
    assert names(filled.search(f"item:{own.id}", k=9)) == names(filled.search("red", k=6))[1:]


def test_words_alone_rank_by_the_captions_and_have_no_score(filled: Collection) -> None:
    hits = filled.search(words="blue square")
    assert names(hits) == ["blue"]
    assert (hits[0].rank, hits[0].score, hits[0].relevance) == (1, None, None)
    assert len(filled.search(words="square")) == len(COLOURS)
    assert filled.search(words="triangle") == []
    with pytest.raises(QueryError, match="words alone have no score"):
        filled.search(words="square", min_score=0.1)
    with pytest.raises(QueryError, match="words alone have no vector"):
        filled.embed(Query(words="square"))


def test_words_beside_a_query_lift_what_has_them_and_keep_true_scores(many: Collection) -> None:
    plain = {hit.id: hit.score for hit in many.search("red", k=100)}
    fused = many.search("red", words="meadow", k=100)
    assert {hit.id for hit in fused} == set(plain)
    for hit in fused:
        assert hit.score == pytest.approx(plain[hit.id], abs=1e-6)
    # What is in both rankings, however low in the first, comes before what is in one.
    assert sorted(names(fused[:3])) == ["green0", "green1", "green2"]
    assert names(fused[3:])[0].startswith("red")


def test_filter_holds_for_vectors_and_words_alike(filled: Collection, photos: Path) -> None:
    for hits in (
        filled.search("red", words="square", where="caption contains blue"),
        filled.search(words="square", where="caption contains blue"),
    ):
        assert names(hits) == ["blue"]


def test_filter_is_evaluated_anew_after_a_change(filled: Collection, photos: Path) -> None:
    where = "caption contains red"
    assert names(filled.search("red", where=where)) == ["red"]
    paint(photos / "more.png", "red", mark=3)
    (photos / "more.txt").write_text("a red thing")
    filled.add(photos, show_progress=False)
    assert sorted(names(filled.search("red", where=where))) == ["more", "red"]


@pytest.mark.parametrize("options", [{}, {"diverse": 0.999}, {"words": "meadow"}])
def test_pages_put_together_are_one_long_answer(
    many: Collection, options: dict[str, object]
) -> None:
    whole = many.search("red", k=60, **options)  # type: ignore[arg-type]
    pages = [many.search("red", k=7, offset=first, **options) for first in range(0, 60, 7)]  # type: ignore[arg-type]
    together = [hit for page in pages for hit in page]
    assert [hit.id for hit in together][: len(whole)] == [hit.id for hit in whole]
    assert [hit.rank for hit in together] == list(range(1, len(together) + 1))


def test_min_score_cuts_exactly_there(many: Collection) -> None:
    everything = many.search("red", k=100)
    middle = everything[30].score
    assert middle is not None
    assert len(many.search("red", k=100, min_score=middle)) == 31
    assert many.search("red", min_score=1.0) == []


def test_diverse_folds_near_duplicates_into_the_best_of_them(many: Collection) -> None:
    everything = many.search("red", k=100)
    threshold = 0.999
    hits = many.search("red", k=100, diverse=threshold)
    vectors = {hit.id: many.vector(hit.id) for hit in everything}
    kept: list[int] = []
    groups: dict[int, list[int]] = {}
    for hit in everything:  # the naive one: in the order of the ranking, join or begin a group
        near = [one for one in kept if vectors[one] @ vectors[hit.id] >= threshold]
        if near:
            groups[near[0]].append(hit.id)
        else:
            kept.append(hit.id)
            groups[hit.id] = []
    assert [hit.id for hit in hits] == kept
    assert [list(hit.duplicates) for hit in hits] == [groups[one] for one in kept]
    assert len(hits[0].duplicates) >= 19
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    # k different ones come back, though more than k are alike.
    assert len(many.search("red", k=10, diverse=True)) == 10


def test_batch_answers_as_one_by_one(many: Collection) -> None:
    queries = ["red", "green - blue", Query(words="meadow"), Query.of("x", words="number")]
    options = Options(k=4, conditions=())
    together = many.search_batch(queries, options)
    assert [len(hits) for hits in together] == [4, 4, 3, 4]
    for query, hits in zip(queries, together, strict=True):
        (alone,) = many.search_batch([query], options)
        assert [hit.id for hit in alone] == [hit.id for hit in hits]
    assert many.search_batch([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": True}, "k is True"),
        ({"offset": -1}, "offset is -1"),
        ({"min_score": 2}, "min_score is 2"),
        ({"diverse": 1.5}, r"diverse is 1\.5"),
        ({"words": "  "}, "hold nothing"),
    ],
)
def test_numbers_out_of_range_are_errors(
    filled: Collection, options: dict[str, object], message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        filled.search("red", **options)  # type: ignore[arg-type]


# ---- relevance -----------------------------------------------------------------------------------


def test_relevance_is_that_of_the_whole_collection_whatever_is_asked_for(many: Collection) -> None:
    everything = many.search("green", k=100)
    vectors = np.stack([many.vector(hit.id) for hit in everything])
    scores = np.array([hit.score for hit in everything], np.float32)
    background = Background(len(vectors), vectors)  # all items: the sample is the collection
    expected = background.relevance(many.embed(Query.of("green")), scores)
    assert expected is not None
    np.testing.assert_allclose([hit.relevance for hit in everything], expected, rtol=1e-3)
    by_id = {hit.id: hit.relevance for hit in everything}
    for options in ({"offset": 3}, {"where": "caption contains meadow"}, {"words": "number"}):
        for hit in many.search("green", k=5, **options):  # type: ignore[arg-type]
            assert hit.relevance == pytest.approx(by_id[hit.id], rel=1e-5)


def test_relevant_only_cuts_where_chance_begins(many: Collection) -> None:
    for query in ("red", "green", "item:1"):
        everything = many.search(query, k=100)
        expected = [hit for hit in everything if (hit.relevance or 0.0) >= RELEVANT]
        assert many.search(query, k=100, relevant_only=True) == expected


def test_relevance_is_not_claimed_for_a_handful_of_items(filled: Collection) -> None:
    assert {hit.relevance for hit in filled.search("red")} == {None}
    assert len(filled.search("red", relevant_only=True, k=3)) == 3
