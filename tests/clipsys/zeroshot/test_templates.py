from __future__ import annotations

from collections.abc import Sequence

import pytest

from clipsys.errors import ConfigError
from clipsys.zeroshot.templates import TEMPLATES, find_templates


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("simple", ["a photo of a {}."]),
        ("my {}", ["my {}"]),
        (["simple", "my {}", "simple", "my {}"], ["a photo of a {}.", "my {}"]),
        (["plain", "siglip"], list(TEMPLATES["siglip"])),
    ],
)
def test_sets_and_sentences_are_joined_without_repeats(
    given: str | Sequence[str], expected: list[str]
) -> None:
    assert find_templates(given) == expected


@pytest.mark.parametrize("given", ["", "clipp", "a {} and a {}", "a {name}", []])
def test_what_is_no_template_is_answered_with_the_sets(given: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"expected one \{\} .*: simple, plain, siglip, clip"):
        find_templates(given)
