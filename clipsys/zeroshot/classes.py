"""The classes of a zero-shot classification: names, synonyms, descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipsys.errors import ConfigError

#: A class's synonyms, each of which goes into every template, or one text that stands alone.
Texts = str | Sequence[str]
#: What a caller gives: names, or name -> texts.
Classes = Sequence[str] | Mapping[str, Texts]


@dataclass(frozen=True)
class ClassTexts:
    """One class.

    Attributes:
        name: what predictions call it.
        synonyms: names that go into the templates.
        description: a text that is used as it stands, in place of these; empty where there is none.
    """

    name: str
    synonyms: tuple[str, ...]
    description: str = ""

    def prompts(self, templates: Sequence[str]) -> list[str]:
        """The texts whose vectors are averaged."""
        if self.description:
            return [self.description]
        return [
            template.replace("{}", synonym) for synonym in self.synonyms for template in templates
        ]


def read_classes(classes: Classes, *, at_least: int = 2) -> list[ClassTexts]:
    """The classes, checked.

    Args:
        classes: names; or a mapping from a name to a list of synonyms, or to one description.
        at_least: how many are needed.

    Raises:
        ConfigError: a name or a synonym is given twice or is empty, or there are too few.
    """
    if isinstance(classes, str):
        raise ConfigError(f"classes is the text {classes!r}; expected a list of names")
    if isinstance(classes, Mapping):
        found = [_read(name, texts) for name, texts in classes.items()]
    else:
        names = [_single_blanks(name) for name in classes]
        found = [ClassTexts(name, (name,)) for name in names]
    if len(found) < at_least:
        raise ConfigError(
            f"zero-shot classification needs two different classes or more, got {list(classes)}; "
            "one alone can be decided on with a background or with multi_label"
        )
    owners: dict[str, tuple[int, str]] = {}
    places: dict[str, int] = {}
    for number, one in enumerate(found, 1):
        if not one.name:
            raise ConfigError(f"class {number} has an empty name; leave it out")
        if one.name in places:
            raise ConfigError(
                f"classes {places[one.name]} and {number} are both called {one.name!r}; name each "
                "class once"
            )
        places[one.name] = number
        for text in {one.description} if one.description else {*one.synonyms}:
            other, name = owners.setdefault(text, (number, one.name))
            if other != number:
                raise ConfigError(
                    f"{text!r} is given for two classes, {name!r} (class {other}) and {one.name!r} "
                    f"(class {number}); keep it for one"
                )
    return found


def _read(name: str, texts: Texts) -> ClassTexts:
    name = _single_blanks(name)
    if isinstance(texts, str):
        given: tuple[str, ...] = (_single_blanks(texts),)
    else:
        given = tuple(dict.fromkeys(map(_single_blanks, texts)))
    if not given or not all(given):
        raise ConfigError(
            f"class {name!r} has {'an empty text' if given else 'no texts'}; expected a list of "
            "synonyms, or one description"
        )
    return ClassTexts(name, given, given[0]) if isinstance(texts, str) else ClassTexts(name, given)


def _single_blanks(text: object) -> str:
    """A text without blanks around it, and with one where there are several.

    Raises:
        ConfigError: it is no text.
    """
    if not isinstance(text, str):
        raise ConfigError(f"classes hold {text!r}, of type {type(text).__name__}; expected a text")
    return " ".join(text.split())
