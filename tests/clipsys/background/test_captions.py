from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipsys.background.captions import (
    FILE_NAME,
    MAX_CAPTIONS,
    TrainingCaptions,
    captions_of,
    copy_captions,
    generic_captions,
    read_captions,
    sample_captions,
    words_of,
    write_captions,
)
from clipsys.errors import ModelError


def test_a_sample_has_one_caption_an_image_and_the_words_of_all() -> None:
    images = [[f"a dog, number {n}", f"The Dog {n}", " "] for n in range(10)] + [[]]
    found = sample_captions(images)
    assert len(found.captions) == 10
    assert set(found.captions) <= {text for texts in images for text in texts}
    assert found.words["dog"] == 20
    assert found.words["number"] == 10
    assert list(found.words) == sorted(found.words)


def test_a_large_sample_is_thinned_evenly_and_repeats_nothing() -> None:
    found = sample_captions([[f"caption {n // 2}"] for n in range(10 * MAX_CAPTIONS)])
    assert len(found.captions) == len(set(found.captions)) == MAX_CAPTIONS
    numbers = [int(words_of(text)[1]) for text in found.captions]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 4.9 * MAX_CAPTIONS
    assert found.words["caption"] == 10 * MAX_CAPTIONS


def test_captions_come_back_from_a_folder_as_they_were(tmp_path: Path) -> None:
    captions = TrainingCaptions(("eine rote Straße", "犬"), {"rote": 2, "犬": 1})
    write_captions(tmp_path, captions)
    assert read_captions(tmp_path) == captions
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_captions_are_found_in_the_folder_of_a_model_and_of_a_run(tmp_path: Path) -> None:
    captions = TrainingCaptions(("a dog",), {"a": 1, "dog": 1})
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert captions_of(tmp_path / "run") is None
    write_captions(tmp_path / "run" / "model", captions)
    assert captions_of(tmp_path / "run") == captions
    assert captions_of(f"local-dir:{tmp_path / 'run' / 'model'}") == captions
    assert captions_of("ViT-B-32/openai") is None
    (tmp_path / "out").mkdir()
    copy_captions(tmp_path / "out", "", tmp_path / "nothing", tmp_path / "run")
    assert read_captions(tmp_path / "out") == captions


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other/1"}', '{"format": "clipsys-background/1"}']
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ModelError, match=rf"{FILE_NAME}: damaged .*delete the file"):
        read_captions(tmp_path)


def test_the_file_is_json_that_others_can_read(tmp_path: Path) -> None:
    write_captions(tmp_path, TrainingCaptions(("a dog",), {"a": 1, "dog": 1}))
    assert json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8")) == {
        "format": "clipsys-background/1",
        "captions": ["a dog"],
        "words": {"a": 1, "dog": 1},
    }


def test_generic_captions_are_many_and_claim_no_words() -> None:
    generic = generic_captions()
    assert len(set(generic.captions)) == len(generic.captions) > 500
    assert not generic.words
