"""Texts beside captions: drawn by the seed, without those that are captions."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.errors import SampleError, TrainingError
from clipsys.shards.samples import Sample
from clipsys.training.data.further_texts import (
    MinedList,
    MinedNegatives,
    StatedNegatives,
    write_mined_list,
)
from clipsys.training.data.samples import NO_GROUP, FurtherText


def _sample(**metadata: Any) -> Sample:
    return Sample("k", b"", "png", ("A dog.", "one dog"), None, metadata)


def test_stated_texts_are_drawn_without_repetition_and_without_captions() -> None:
    sample = _sample(wrong=[{"t": ["a cat", "a  DOG"]}, {"t": "a cow"}, {"t": "a cat"}])
    drawn = [StatedNegatives("wrong.t", 3).drawn(sample, 0, entropy) for entropy in range(20)]
    assert {tuple(sorted(one)) for one in drawn} == {
        (FurtherText("a cat", NO_GROUP), FurtherText("a cow", NO_GROUP))
    }
    assert {one[0].text for one in drawn} == {"a cat", "a cow"}
    single = StatedNegatives("wrong.t", 1)
    assert single.drawn(sample, 0, 5) == single.drawn(sample, 0, 5) != []
    assert single.drawn(_sample(), 0, 5) == []


def test_what_is_no_text_makes_the_sample_unusable_and_names_the_setting() -> None:
    with pytest.raises(SampleError, match=r"sample k: a caption is .* \(objective.negatives_key\)"):
        StatedNegatives("wrong", 1).drawn(_sample(wrong={"a": 1}), 0, 0)
    with pytest.raises(SampleError, match="sample k: a text has 20,001 characters"):
        StatedNegatives("wrong", 1).drawn(_sample(wrong="x" * 20_001), 0, 0)


def _write(folder: Path, step: int = 7) -> MinedList:
    write_mined_list(
        folder,
        step=step,
        candidates_NH=np.array([[2, 1, 3], [-1, -1, -1], [0, 3, -1], [1, -1, -1]]),
        groups_N=np.array([10, 11, 12, 13]),
        texts=["a dog", "ein Hund äöü", "", "one  Dog"],
    )
    return MinedList(folder)


def test_a_list_reads_back_in_another_process_as_it_was_written(tmp_path: Path) -> None:
    mined = _write(tmp_path / "list")
    assert mined.step == 7
    for one in (mined, pickle.loads(pickle.dumps(mined))):
        assert [one.text(number) for number in range(4)] == [
            "a dog", "ein Hund äöü", "", "one  Dog",
        ]  # fmt: skip
        assert [one.candidates(n).tolist() for n in range(4)] == [[2, 1, 3], [], [0, 3], [1]]
        assert one.group(3) == 13
    before = mined.fingerprint()
    assert _write(tmp_path / "list").fingerprint() == before
    assert _write(tmp_path / "list", step=8).fingerprint() != before
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_mined_texts_that_are_captions_of_the_sample_are_left_out(tmp_path: Path) -> None:
    negatives = MinedNegatives(_write(tmp_path / "list"), 2)
    # Of 2, 1 and 3 the last is a caption of the sample but for its case.
    for entropy in range(10):
        found = negatives.drawn(_sample(), 0, entropy)
        assert sorted(found) == [FurtherText("", 12), FurtherText("ein Hund äöü", 11)]
    assert negatives.drawn(_sample(), 1, 0) == []
    assert MinedNegatives(None, 2).drawn(_sample(), 0, 0) == []


def test_a_folder_that_is_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"format": "other"}')
    with pytest.raises(TrainingError, match=r"is no list of mined texts \(its format is 'other'"):
        MinedList(tmp_path)
    with pytest.raises(TrainingError, match=r"is no list of mined texts \(.*No such file"):
        MinedList(tmp_path / "none")
