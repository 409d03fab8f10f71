"""HTML of tables, and errors as messages on the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

import gradio as gr

from clipsys.errors import ClipsysError

P = ParamSpec("P")
R = TypeVar("R")


def two_columns(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    # Captions, metadata and names come from files: nothing in them may become markup.
    cells = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in rows
    )
    return f"<table class='facts'>{cells}</table>"


def show_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Shows a `ClipsysError` as one line on the page; anything else is a bug and is logged."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ClipsysError as error:
            # The page shows messages as HTML.
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return wrapped
