"""Relevance of text queries, by a model that is known to know its captions only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from clipsys.background.captions import TrainingCaptions
from clipsys.background.foreign import foreign_texts
from clipsys.errors import DataError
from clipsys.retrieval import Collection, Options
from clipsys.retrieval.search.calibration import RELEVANT
from clipsys.retrieval.search.query import Part, Query
from clipsys.retrieval.search.text_relevance import (
    FILE_NAME,
    nearness,
    read_text_relevance,
    unknown_share,
)
from clipsys.retrieval.writing.relevance import KEPT, find_cuts
from tests.retrieval.scenes import (
    HUES,
    THINGS,
    SceneEncoder,
    paint_scenes,
    scene_captions,
    write_scene_model,
)

Doubles = npt.NDArray[np.float64]
ONLY = Options(k=100, relevant_only=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """All scenes, three of each, by a model whose folder has its captions."""
    folder = tmp_path_factory.mktemp("scenes")
    model = write_scene_model(folder / "model")
    pictures = paint_scenes(folder / "pictures", copies=3)
    with Collection.create(folder / "c", SceneEncoder(), model=str(model)) as made:
        made.add(pictures, show_progress=False)
        yield made


def names(collection: Collection, query: str) -> list[str]:
    (hits,) = collection.search_batch([query], ONLY)
    return [Path(hit.uri).stem for hit in hits]


# ---- a collection --------------------------------------------------------------------------------


def test_a_caption_finds_its_scene_and_little_else(scenes: Collection) -> None:
    shares = []
    for thing in THINGS:
        for hue in HUES:
            found = names(scenes, f"a {hue} {thing}")
            shares.append(any(name.startswith(f"{hue}-{thing}") for name in found))
            assert all(hue in name or thing in name for name in found)
    assert np.mean(shares) >= KEPT - 0.05


def test_foreign_texts_find_nothing_relevant(scenes: Collection) -> None:
    kept = [bool(names(scenes, text)) for text in foreign_texts(150, seed=9) if "-" not in text]
    assert np.mean(kept) <= 0.05


def test_what_is_asked_does_not_change_the_relevance_of_a_hit(scenes: Collection) -> None:
    hits = scenes.search("a red dog", k=len(scenes))
    relevance = [hit.relevance for hit in hits]
    assert relevance == sorted(relevance, key=lambda one: -(one or 0))
    kept = [hit for hit in hits if hit.relevance is not None and hit.relevance >= RELEVANT]
    assert kept
    assert scenes.search_batch(["a red dog"], ONLY) == [kept]
    assert scenes.search("a red dog", k=3, offset=2) == hits[2:5]


def test_a_query_with_unknown_words_is_told_which(scenes: Collection) -> None:
    query = "quarterly zebra"
    (hits,) = scenes.search_batch([query], ONLY)
    assert hits == []
    doubt = scenes.doubt(query, hits, ONLY)
    assert doubt is not None
    assert "has 'quarterly', 'zebra'" in doubt
    assert scenes.doubt("a red dog", scenes.search("a red dog"), ONLY) is None


def test_images_items_and_negatives_are_judged_by_the_collection_as_before(
    scenes: Collection,
) -> None:
    item = next(scenes.items())
    background = scenes._view.background(scenes._view.snapshot())
    negative = Query((Part(text="a red dog"), Part(text="a cat", weight=-0.5)))
    for query in (Query.of(item=item.id), Query.of("a red dog", item=item.id), negative):
        hits = scenes.search(query, k=5)
        scores = np.array([hit.score for hit in hits], np.float32)
        expected = background.relevance(scenes.embed(query), scores)
        assert expected is not None
        np.testing.assert_allclose([hit.relevance for hit in hits], expected, rtol=1e-4)


def test_without_its_file_a_collection_goes_on_as_before(
    scenes: Collection, tmp_path: Path
) -> None:
    with Collection.create(tmp_path / "c", SceneEncoder()) as plain:  # its model has no captions
        plain.add(scenes.path.parent / "pictures", show_progress=False)
        assert not (tmp_path / "c" / FILE_NAME).exists()
        (hit,) = plain.search("a red dog", k=1)
        background = plain._view.background(plain._view.snapshot())
        expected = background.relevance(
            plain.embed(Query.of("a red dog")), np.array([hit.score], np.float32)
        )
        assert expected is not None
        assert hit.relevance == pytest.approx(expected[0], rel=1e-5)
        damaged = b"no archive"
        (tmp_path / "c" / FILE_NAME).write_bytes(damaged)
        assert plain.search("a red dog", k=1) == [hit]


def test_the_texts_are_encoded_once_and_the_cuts_follow_the_collection(tmp_path: Path) -> None:
    encoder = SceneEncoder()
    model = write_scene_model(tmp_path / "model")
    with Collection.create(tmp_path / "c", encoder, model=str(model)) as made:
        made.add(paint_scenes(tmp_path / "p", THINGS[:3]), show_progress=False)
        assert len(made) < 20
        assert not (tmp_path / "c" / FILE_NAME).exists()
        made.add(paint_scenes(tmp_path / "p", THINGS[:6]), show_progress=False)
        first = read_text_relevance(tmp_path / "c", made.encoder_pin)
        assert first is not None
        assert (first.source, first.num_items) == ("model", 36)

        encoder.encode_text = pytest.fail  # type: ignore[method-assign, assignment]
        made.add(paint_scenes(tmp_path / "p"), show_progress=False)
        second = read_text_relevance(tmp_path / "c", made.encoder_pin)
        assert second is not None
        assert second.num_items == 48
        assert second.cuts != first.cuts
        np.testing.assert_array_equal(second.captions_MD, first.captions_MD)


def test_a_model_that_scores_at_random_is_said_not_to_tell(tmp_path: Path) -> None:
    class Blind(SceneEncoder):
        def encode_pixels(self, pixels_BCHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            vectors = np.random.default_rng(3).normal(size=(len(pixels_BCHW), self.dim))
            return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    model = write_scene_model(tmp_path / "model")
    with Collection.create(tmp_path / "c", Blind(), model=str(model)) as made:
        made.add(paint_scenes(tmp_path / "p"), show_progress=False)
        (hits,) = made.search_batch(["a red dog"], Options(k=5, relevant_only=True))
        assert len(hits) == 5
        assert {hit.relevance for hit in hits} == {None}
        assert "do not tell" in str(made.doubt("a red dog", hits, ONLY))


def test_calibrate_takes_given_captions_then_the_models_then_the_collections(
    tmp_path: Path,
) -> None:
    pictures = paint_scenes(tmp_path / "p")
    with Collection.create(tmp_path / "c", SceneEncoder()) as made:
        made.add(pictures, show_progress=False)
        made.calibrate()
        assert _source(made) == "generic"
        for path in pictures.iterdir():
            hue, thing, _ = path.stem.split("-")
            captions = "".join(f"a {hue} {thing} no. {n}\n" for n in range(2))
            path.with_suffix(".txt").write_text(captions)
        made.add(pictures, show_progress=False)
        with pytest.raises(DataError, match=r"2 captions are too few .* 50 or more"):
            made.calibrate(TrainingCaptions(("a dog", "a cat")))
        cuts = made.calibrate(scene_captions())
        assert _source(made) == "given"
        assert cuts.can_tell


def _source(collection: Collection) -> str:
    found = read_text_relevance(collection.path, collection.encoder_pin)
    assert found is not None
    return found.source


def test_calibrate_needs_items(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "c", SceneEncoder()) as made:
        made.add(paint_scenes(tmp_path / "p", THINGS[:2]), show_progress=False)
        with pytest.raises(DataError, match="fewer than 20 items"):
            made.calibrate(scene_captions())


# ---- cuts ----------------------------------------------------------------------------------------


def draw(seed: int, *, shift: float = 2.0, count: int = 300) -> dict[str, Doubles]:
    """Captions that score and lie higher than foreign texts by so many deviations."""
    rng = np.random.default_rng(seed)
    return {
        "best_M": rng.normal(shift, 1, count),
        "near_M": rng.normal(shift, 1, count),
        "unknown_M": rng.choice([0.0, 0.1], count, p=[0.95, 0.05]),
        "best_S": rng.normal(0, 1, count),
        "near_S": rng.normal(0, 1, count),
        "unknown_S": rng.choice([0.0, 1.0], count, p=[0.2, 0.8]),
    }


def test_nine_in_ten_captions_pass_where_foreign_texts_are_far() -> None:
    drawn = draw(0, shift=5.0)
    cuts = find_cuts(**drawn)
    passed = [
        near >= cuts.nearness and unknown <= cuts.unknown and best >= cuts.score
        for near, unknown, best in zip(
            drawn["near_M"], drawn["unknown_M"], drawn["best_M"], strict=True
        )
    ]
    assert cuts.captions_kept == np.mean(passed)
    assert KEPT <= cuts.captions_kept <= KEPT + 0.05
    assert cuts.foreign_kept == 0
    assert cuts.can_tell


@pytest.mark.parametrize("shift", [1.0, 1.5])
def test_the_cut_is_stricter_where_foreign_texts_would_pass(shift: float) -> None:
    drawn = draw(1, shift=shift)
    drawn["unknown_S"] = drawn["unknown_M"]
    cuts = find_cuts(**drawn)
    assert cuts.foreign_kept <= 0.05
    assert cuts.captions_kept < KEPT
    assert cuts.score >= np.median(drawn["best_S"])


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_scores_with_little_difference_do_not_tell(shift: float) -> None:
    cuts = find_cuts(**draw(2, shift=shift))
    assert 0.4 < cuts.area < 0.8
    assert not cuts.can_tell


def test_equal_scores_give_finite_cuts_that_do_not_tell() -> None:
    same = {name: np.full(60, 0.5) for name in draw(0)}
    cuts = find_cuts(**same)
    assert cuts.area == 0.5
    assert not cuts.can_tell


def test_of_generic_captions_only_the_score_counts() -> None:
    drawn = draw(3, shift=3.0)
    cuts = find_cuts(**drawn, by_captions=False)
    assert (cuts.nearness, cuts.unknown) == (-1.0, 1.0)
    assert cuts.score == np.quantile(drawn["best_S"], 0.95)


def test_nearness_is_the_mean_of_the_highest_cosines_by_a_loop() -> None:
    rng = np.random.default_rng(4)
    captions = rng.normal(size=(30, 8)).astype(np.float32)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    for texts, own in ((captions, True), (captions[:7][::-1].copy(), False)):
        expected = []
        for place, text in enumerate(texts.astype(np.float64)):
            cosines = [
                float(text @ other)
                for number, other in enumerate(captions.astype(np.float64))
                if not (own and number == place)
            ]
            expected.append(np.mean(sorted(cosines)[-10:]))
        found = nearness(texts, captions, are_captions=own)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_word_that_only_the_caption_itself_has_is_unknown_to_it() -> None:
    counts = {"a": 2, "dog": 1}
    assert unknown_share(["a", "dog"], counts) == 0
    assert unknown_share(["a", "dog"], counts, own=1) == 0.5
    assert unknown_share(["a", "cat", "a", "mat"], counts) == 0.5
    assert unknown_share([], counts) == 1
