from __future__ import annotations

from typing import Any

import pytest

from clipsys.errors import ConfigError
from clipsys.zeroshot.classes import ClassTexts, read_classes


def test_names_synonyms_and_descriptions_are_told_apart() -> None:
    assert read_classes(["cat", "dog"]) == [
        ClassTexts("cat", ("cat",)),
        ClassTexts("dog", ("dog",)),
    ]
    synonyms, description = read_classes({"cat": ["cat", " kitten", "cat"], "dog": " it  barks "})
    assert synonyms.prompts(["a {}", "my {}"]) == ["a cat", "my cat", "a kitten", "my kitten"]
    assert description.prompts(["a {}", "my {}"]) == ["it barks"]


def test_braces_of_a_name_stay() -> None:
    assert ClassTexts("x", ("a {} b",)).prompts(["the {}."]) == ["the a {} b."]


@pytest.mark.parametrize(
    ("classes", "value"),
    [
        ([1, "dog"], "1, of type int"),
        ({"cat": [None], "dog": "it barks"}, "None, of type NoneType"),
    ],
)
def test_what_is_no_text_is_named(classes: Any, value: str) -> None:
    with pytest.raises(ConfigError, match=f"classes hold {value}; expected a text"):
        read_classes(classes)


def test_one_description_of_two_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'it barks' is given for two classes, 'dog' .*'wolf'"):
        read_classes({"dog": "it barks", "wolf": "it  barks"})


@pytest.mark.parametrize("classes", [[], {}, ["cat"]])
def test_too_few_classes_are_refused(classes: Any) -> None:
    with pytest.raises(ConfigError, match="needs two different classes or more"):
        read_classes(classes)
    assert len(read_classes(classes, at_least=0)) == len(classes)
