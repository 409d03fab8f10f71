"""Text for people and pipes: nothing in a name or a caption may act on the terminal.

File names, captions and metadata come from anywhere. Escape sequences move the cursor and change
the title, control characters break lines, and overrides of the writing direction show a name
backwards. Whatever prints such text sends it through `printable`; JSON has `json_text`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

#: Control characters (C0, DEL, C1), line separators, overrides of direction, and lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb"
    "\ud800-\udfff]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_GAP = "  "


def printable(text: object, *, keep: str = "") -> str:
    r"""Text in which whatever could act on a terminal is written as ``\x1b`` or ``\u202e``.

    Args:
        text: what to print.
        keep: characters that stay as they are, such as line breaks.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def json_text(document: object) -> str:
    """A document as JSON for printing, in which unsafe characters have JSON's own escapes."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # The line breaks between values are JSON's; those within are escaped already.
    return _UNSAFE.sub(lambda match: match[0] if match[0] == "\n" else _json_escape(match[0]), text)


def print_paths(paths: Iterable[str], *, separator: str) -> None:
    r"""Prints paths alone: exactly, each ended by NUL, or one a line, made printable.

    Args:
        paths: paths of images.
        separator: ``\0`` for ``xargs -0``, or a line break.
    """
    for path in paths:
        text = path if separator == "\0" else printable(path)
        sys.stdout.buffer.write(os.fsencode(text + separator))
    sys.stdout.buffer.flush()


def print_rows(header: Sequence[str], rows: Sequence[Sequence[Any]], *, numeric: int) -> None:
    """Prints a table whose next-to-last column holds paths and whose last one holds texts.

    Into a pipe or a file: one line a row, cells separated by tabs. On a terminal: aligned columns;
    where a row is wider than the terminal, its text stands below. No line is broken, so that a
    path can be copied.

    Args:
        header: names of the columns.
        rows: their cells; each becomes printable.
        numeric: how many columns from the left are aligned to the right.
    """
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in cells))
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    whole = sum(widths) + len(_GAP) * (len(widths) - 1)
    fits = whole <= shutil.get_terminal_size().columns
    for number, row in enumerate(cells):
        padded = [
            cell.rjust(width) if place < numeric else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        indent = sum(widths[:numeric]) + len(_GAP) * numeric
        below = f"\n{' ' * indent}{row[-1]}" if row[-1] and number else ""
        line = _GAP.join(padded).rstrip() if fits else _GAP.join(padded[:-1]).rstrip() + below
        print(_bold(line) if number == 0 else line)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its words: ``counted(1, "file is", "files are")`` gives ``1 file is``.

    ``many``: the words for any number but 1; None: ``one`` with an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _bold(text: str) -> str:
    return text if "NO_COLOR" in os.environ else f"\x1b[1m{text}\x1b[0m"


def _escape(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _json_escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
