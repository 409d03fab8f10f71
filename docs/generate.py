"""Writes the reference pages from the code: ``python docs/generate.py``; a test compares them."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).resolve().parent


def configuration() -> str:
    """Every setting of a recipe, by section."""
    from clipsys.training.recipe import Recipe

    lines = [
        "# Configuration",
        "",
        "A recipe is YAML. Precedence: defaults < file < `section.key=value` on the command line.",
        "This page is generated from the code by `python docs/generate.py`.",
        "",
        "## Top level",
        "",
    ]
    sections = {
        name: info.annotation
        for name, info in Recipe.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    }
    lines += _table(Recipe, skip=set(sections))
    for name, model in sections.items():
        if name == "objective":
            lines += _objectives()
        else:
            lines += ["", f"## {name}", "", (model.__doc__ or "").strip(), "", *_table(model)]
    return "\n".join(lines) + "\n"


def _objectives() -> list[str]:
    """The settings of each objective of ours."""
    from clipsys.training.objectives import BUILT_IN, objective_class

    lines = [
        "",
        "## objective",
        "",
        "What is minimised. `name` chooses, and each objective has settings of its own. "
        "When to use which: [objectives](objectives.md).",
    ]
    for name in BUILT_IN:
        config = objective_class(name).config
        text = (config.__doc__ or "").strip().replace("\n    ", "\n")
        lines += ["", f"### objective.name: {name}", "", text, "", *_table(config)]
    return lines


def _table(model: type[BaseModel], skip: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    header = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return [*header, *_rows(model, "", skip)]


def _rows(model: type[BaseModel], prefix: str, skip: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """One row a setting; a section inside one has its own in the place of its row."""
    rows = []
    schema = model.model_json_schema()["properties"]
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            rows += _rows(type(default), f"{prefix}{name}.")
        elif name not in skip:
            kind = _type(schema[name]).replace("|", "\\|")
            rows.append(
                f"| `{prefix}{name}` | {kind} | {_default(default)} | {info.description or ''} |"
            )
    return rows


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(_type(one) for one in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " | ".join(f"`{value}`" for value in schema["enum"])
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "bool",
             "array": "list", "object": "mapping", "null": "null"}  # fmt: skip
    text = names.get(schema.get("type", ""), "any")
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", ">"),
            ("maximum", "≤"), ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]  # fmt: skip
    return " ".join([text, *bounds])


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):  # a section of its own; what it has from elsewhere is left out
        value = value.model_dump(mode="json", exclude_defaults=True)
    return "`" + json.dumps(value, ensure_ascii=False) + "`"


def command_line() -> str:
    """What every verb's ``--help`` says."""
    from clipsys.cli import VERBS

    lines = [
        "# Command line",
        "",
        "Results go to stdout, talk and progress bars to stderr. Exit status: 0 success, "
        "1 an error (one line; `--debug` shows the traceback), 2 wrong usage.",
        "This page is generated from the code by `python docs/generate.py`.",
    ]
    for verb in ((), *((name,) for name in VERBS)):
        lines += ["", f"## clipsys {' '.join(verb)}".rstrip(), "", "```", _help(*verb), "```"]
    return "\n".join(lines) + "\n"


def _help(*verb: str) -> str:
    from clipsys.cli import main

    os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*verb, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


#: Modules whose ``__all__`` is the public interface, and what each is for.
PUBLIC = {
    "clipsys": "Models, encoders, zero-shot classification and the tree of errors.",
    "clipsys.training.losses": "Losses over the rows of every rank, exact in value and gradient.",
    "clipsys.training.objectives": "What an objective of another package is made of "
    "([how](writing-objectives.md)).",
    "clipsys.retrieval": "Collections and searching them.",
}


def api() -> str:
    """Every public name with the first sentence of its docstring."""
    lines = [
        "# Python",
        "",
        "The names below are the public interface; everything else may change between versions. "
        "They load when they are first used: `import clipsys` imports no torch.",
        "On a code host this page lists them, each with its first sentence; the documentation site "
        "(`make docs`) has their signatures and docstrings here.",
        "This page is generated from the code by `python docs/generate.py`.",
    ]
    for module, purpose in PUBLIC.items():
        lines += ["", f"## {module}", "", purpose]
        # Functions and classes that are used come before the errors that they raise.
        by_kind = sorted(public_names(module), key=lambda one: (one.endswith("Error"), one.lower()))
        for name in by_kind:
            lines += ["", f"### `{module}.{name}`", "", _summary(module, name)]
    return "\n".join(lines) + "\n"


def public_names(module: str) -> list[str]:
    """Functions and classes of a module's ``__all__``; its tables explain themselves."""
    loaded = importlib.import_module(module)
    return [
        name
        for name in loaded.__all__
        if inspect.isclass(found := getattr(loaded, name)) or inspect.isfunction(found)
    ]


def _summary(module: str, name: str) -> str:
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    return " ".join(text.partition("\n\n")[0].split())


PAGES = {"configuration.md": configuration, "command-line.md": command_line, "api.md": api}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
