from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from clipsys.errors import ConfigError, ImageDecodeError, QueryError
from clipsys.retrieval import Collection
from clipsys.ui.service import Choices, SearchService
from tests.retrieval.colours import COLOURS, ColourEncoder

OPTIONS = {field.name for field in dataclasses.fields(Choices)}


@pytest.fixture
def service(collection: Collection) -> SearchService:
    return SearchService(collection)


def names(service: SearchService, **question: object) -> list[str]:
    """Hits of a question, whose options may be among its keywords."""
    options = {key: question.pop(key) for key in list(question) if key in OPTIONS}
    answer = service.search(**question, choices=Choices(**options))  # type: ignore[arg-type]
    return [Path(card.item.uri).stem for card in answer.cards]


def test_text_image_and_item_find_their_colour(service: SearchService, photos: Path) -> None:
    assert names(service, text=" red ", k=1) == ["red"]
    assert names(service, image=photos / "blue.png", k=1) == ["blue"]
    red = service.search(text="red").cards[0].item.id
    similar = names(service, item=red, k=10)
    assert "red" not in similar
    assert len(similar) == len(COLOURS) - 1


def test_cards_carry_score_item_and_an_existing_thumbnail(service: SearchService) -> None:
    answer = service.search(text="green", choices=Choices(k=2))
    assert len(answer.cards) == 2
    assert answer.cards[0].hit is not None
    assert answer.cards[0].hit.score == pytest.approx(1.0, abs=1e-3)
    assert answer.cards[0].item.metadata == {"number": 1, "label": "green"}
    assert all(card.thumbnail.parent == service.thumbnails.folder for card in answer.cards)
    assert all(card.thumbnail.is_file() for card in answer.cards)
    assert answer.seconds > 0


def test_filters_are_separated_by_semicolons(service: SearchService) -> None:
    assert set(names(service, text="red", where="number>=1; number<3 ;")) == {"green", "blue"}
    with pytest.raises(QueryError, match="not understood"):
        service.search(text="red", choices=Choices(where="number"))


def test_grammar_words_and_cuts_reach_the_collection(service: SearchService) -> None:
    red = service.search(text="red").cards[0].item.id
    assert names(service, text=f"item:{red} + 0.1*red", k=9) == names(service, item=red, k=9)
    assert names(service, text="red + 3*blue - white", k=1) == ["blue"]
    assert names(service, text="red", negative="0.1*blue", k=1) == ["red"]
    assert names(service, words="blue square") == ["blue"]
    assert names(service, words="blue square", relevant_only=True) == ["blue"]
    assert names(service, text="red", words="white", k=2) == ["white", "red"]
    assert len(names(service, text="red", diverse=True)) <= len(COLOURS)


def test_a_filter_alone_lists_and_a_sort_orders(service: SearchService) -> None:
    assert names(service, where="number>=1; number<3") == ["blue", "green"]  # added last, first
    assert names(service, where="number<3", sort="number") == ["red", "green", "blue"]
    assert names(service, sort="label", descending=True, k=2) == ["yellow", "white"]
    assert sorted(names(service, text="red", k=3, sort="number")) == sorted(
        names(service, text="red", k=3)
    )
    with pytest.raises(QueryError, match="Say what to look for"):
        service.search(choices=Choices(where=" ; "))


def test_an_empty_answer_says_why(service: SearchService) -> None:
    answer = service.search(text="red", choices=Choices(where="label=Red"))
    assert answer.note == "no 'label' is 'Red'; the nearest is 'red' (capitals count)"
    assert "metadata 'lable'" in str(service.search(choices=Choices(where="lable=red")).note)
    assert service.search(text="red", choices=Choices(where="label=red")).note is None
    note = service.search(text="red", choices=Choices(relevant_only=True)).note
    assert note is not None
    assert "fewer than 20 items" in note


def test_visitors_cannot_name_files_of_this_machine(service: SearchService, photos: Path) -> None:
    line = f"image:{photos / 'blue.png'}"
    for question in ({"text": line}, {"text": "red", "negative": line}, {"text": f"red - {line}"}):
        with pytest.raises(QueryError, match="files cannot be named here"):
            names(service, **question)


def test_blank_question_is_an_error(service: SearchService) -> None:
    with pytest.raises(QueryError, match="Say what to look for"):
        service.search(text="  ", choices=Choices(negative="red"))


def test_browsing_shows_items_from_everywhere_without_scores(service: SearchService) -> None:
    cards = service.browse(3)
    assert [Path(card.item.uri).stem for card in cards] == ["red", "blue", "black"]
    assert [card.hit for card in cards] == [None] * 3


def test_classification_gives_probabilities(service: SearchService, photos: Path) -> None:
    result = service.classify(photos / "green.png", "red, green;blue\nyellow")
    assert list(result) == ["red", "green", "blue", "yellow"]
    assert max(result, key=result.__getitem__) == "green"
    assert sum(result.values()) == pytest.approx(1)


def test_classification_needs_two_labels(service: SearchService, photos: Path) -> None:
    with pytest.raises(ConfigError):
        service.classify(photos / "green.png", "red")


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh", b"<svg/>", b"\xff\xd8\xff\xe0 cut"])
def test_hostile_upload_is_one_line_that_does_not_show_the_path(
    service: SearchService, tmp_path: Path, content: bytes
) -> None:
    upload = tmp_path / "upload.jpg"
    upload.write_bytes(content)
    for ask in (
        lambda: service.search(image=upload),
        lambda: service.classify(upload, "a, b"),
    ):
        with pytest.raises(ImageDecodeError) as caught:
            ask()
        assert str(caught.value).startswith("The uploaded file: ")
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_examples_come_from_captions_and_labels(service: SearchService) -> None:
    examples = service.examples(3)
    assert len(examples) == 3
    assert all(example.endswith(" square") for example in examples)
    assert service.label_examples() == ", ".join(sorted(COLOURS))


def test_empty_collection_has_general_examples_and_no_hits(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "c", ColourEncoder()) as empty:
        service = SearchService(empty)
        assert len(service.examples()) == 4
        assert "," in service.label_examples()
        assert service.browse() == ()
        assert service.search(text="red").cards == ()
