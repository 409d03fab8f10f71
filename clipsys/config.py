"""Configuration: YAML files checked by pydantic models, with every fault reported at once.

Precedence: defaults < file < ``section.key=value`` overrides. The models stand beside the code that
they configure and derive from `Settings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from clipsys.errors import ConfigError
from clipsys.files.expansion import expand_path

#: The largest seed: every generator takes 63 bits.
MAX_SEED = 2**63 - 1


class Settings(BaseModel):
    """Base of every section: immutable, and no unknown key passes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, bool) for part in parts) and not _takes_truth(annotation):
            raise ValueError("true and false are no values of this setting")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_truth(part) for part in get_args(annotation))


def _expanded(text: str) -> str:
    try:
        return expand_path(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None


#: A setting that names a file or folder: ``~`` and ``$NAME`` are expanded.
PathText = Annotated[str, AfterValidator(_expanded)]


@dataclass(frozen=True)
class Variants:
    """Marks a section that is read as one of several classes, for messages that name its settings.

    Attributes:
        choose: maps the section of a document to its class; None where the class is unknown.
    """

    choose: Callable[[object], type[Settings] | None]


SettingsT = TypeVar("SettingsT", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises.

    ``3e-4`` is a number; ``yes`` and ``on`` are texts, which only a switch takes for true; a date
    and ``1:30`` are texts; a number with a leading zero is refused, since YAML 1.1 takes ``010``
    for 8 and YAML 1.2 for 10; a key may not repeat.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{self.name}:{line}: the key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _leading_zero(loader: _Loader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        problem=f"{node.value} has a leading zero, which makes it octal for some readers; write "
        "the number without it, or in quotes if it is a text",
        problem_mark=node.start_mark,
    )


def _plain_scalars() -> None:
    """Sets what a scalar without quotes is."""
    tag = "tag:yaml.org,2002:"
    replaced = {tag + name for name in ("bool", "int", "float", "timestamp")}
    _Loader.yaml_implicit_resolvers = {
        first: [(name, pattern) for name, pattern in known if name not in replaced]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = list("-+0123456789")
    for name, pattern, firsts in (
        (tag + "bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
        ("!leading-zero", r"^[-+]?0[0-9_]+$", digits),
        (tag + "int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$", digits),
        (
            tag + "float",
            r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
            [*digits, "."],
        ),
    ):
        _Loader.add_implicit_resolver(name, re.compile(pattern), firsts)
    _Loader.add_constructor("!leading-zero", _leading_zero)


_plain_scalars()


def find_recipe(name: str | Path) -> Path:
    """Finds a recipe: a path, or the name of one that clipsys ships (``emoji_cpu``).

    Raises:
        ConfigError: there is neither.
    """
    path = Path(expand_path(str(name)))
    if path.is_file():
        return path
    shipped = shipped_recipes()
    stem = str(name).removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    near = get_close_matches(stem, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped recipes: {', '.join(sorted(shipped))}"
    raise ConfigError(f"{name}: there is no such recipe; {hint}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes of the ``configs`` folder, by name."""
    folder = Path(str(resources.files("clipsys"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_settings(
    model: type[SettingsT],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> SettingsT:
    """Reads and checks a configuration.

    Args:
        model: the settings class.
        source: a YAML file, or the parsed document.
        overrides: ``section.key=value``; the value is YAML.

    Raises:
        ConfigError: naming every fault with file, key, value and what was expected.
    """
    if isinstance(source, Mapping):
        place, document = "settings", dict(source)
    else:
        place, document = str(source), _read_yaml(Path(source))
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys = _apply_override(document, override)
        origins[keys] = "command line"
    try:
        return model.model_validate(document)
    except ValidationError as error:
        known = list(_paths(model, document))
        details = _plain_details(error, document)
        faults = [_fault(known, place, origins, detail) for detail in details]
        raise ConfigError("\n".join(dict.fromkeys(faults))) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            document = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML ({problem})") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected sections with settings, found {document!r}")
    return document


def _apply_override(document: dict[str, Any], override: str) -> tuple[str, ...]:
    name, separator, text = override.partition("=")
    keys = tuple(name.split("."))
    if not separator or not all(keys):
        raise ConfigError(f"{override!r}: expected section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None)
        detail = f" ({problem})" if problem else ""
        raise ConfigError(f"{override!r}: the value is not valid YAML{detail}") from error
    section = document
    for key in keys[:-1]:
        inner = section.get(key)
        # Copied on the way, so that a document given by the caller is left as it was.
        section[key] = dict(inner) if isinstance(inner, Mapping) else {}
        section = section[key]
    section[keys[-1]] = value
    return keys


def _plain_details(error: ValidationError, document: object) -> list[dict[str, Any]]:
    """Pydantic's errors, with locations in the document.

    Where a setting may be of several types, pydantic adds their names to the location, and reports
    what is wrong with each; only what is wrong with the one that was meant is of use.
    """
    details: list[dict[str, Any]] = [
        {**detail, "loc": _location(document, detail["loc"])} for detail in error.errors()
    ]
    return [
        one
        for one in details
        if not one["type"].endswith("_type")
        or all(
            other["type"].endswith("_type") or other["loc"][: len(one["loc"])] != one["loc"]
            for other in details
        )
    ]


def _location(document: object, parts: Sequence[str | int]) -> tuple[str | int, ...]:
    node: Any = document
    location: list[str | int] = []
    for number, part in enumerate(parts, 1):
        is_last = number == len(parts)
        if isinstance(node, Mapping) and (part in node or (is_last and "[" not in str(part))):
            node = node.get(part)
        elif isinstance(node, list | tuple) and isinstance(part, int):
            node = node[part] if part < len(node) else None
        else:
            continue
        location.append(part)
    return tuple(location)


def _fault(
    known: Sequence[str],
    place: str,
    origins: Mapping[tuple[str, ...], str],
    detail: Mapping[str, Any],
) -> str:
    location = tuple(str(part) for part in detail["loc"])
    origin = next((text for keys, text in origins.items() if location[: len(keys)] == keys), place)
    name = ".".join(location)
    if detail["type"] == "extra_forbidden":
        near = _nearest(known, location)
        return f"{origin}: {name} is not a setting" + (f"; did you mean {near}?" if near else "")
    if detail["type"] == "missing":
        return f"{origin}: {name} is missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not name:  # a check across sections names its settings itself
        return f"{origin}: {message}"
    value = detail.get("input")
    shown = f" is {value!r}" if not isinstance(value, Mapping) else ""
    return f"{origin}: {name}{shown}; {message}"


def _nearest(known: Sequence[str], location: tuple[str, ...]) -> str | None:
    asked = ".".join(location)
    siblings = [path for path in known if path.rpartition(".")[0] == ".".join(location[:-1])]
    same_last = [path for path in known if path.rpartition(".")[2] == location[-1]]
    near = get_close_matches(asked, siblings, n=1, cutoff=0.6) or same_last[:1]
    near = near or get_close_matches(asked, known, n=1, cutoff=0.6)
    return near[0] if near else None


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _paths(model: type[Settings], document: object, prefix: str = "") -> Iterator[str]:
    """Every setting that a document may have, by its dotted name."""
    for name, info in model.model_fields.items():
        yield prefix + name
        # A section that may be left out is a union with None.
        inner = next(filter(_is_section, (info.annotation, *get_args(info.annotation))), None)
        if inner is not None:
            section = document.get(name) if isinstance(document, Mapping) else None
            variants = next((one for one in info.metadata if isinstance(one, Variants)), None)
            chosen = variants.choose(section) if variants else None
            yield from _paths(chosen or inner, section, f"{prefix}{name}.")


def dump_settings(settings: Settings) -> str:
    """The resolved configuration as YAML that `load_settings` reads back to the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
