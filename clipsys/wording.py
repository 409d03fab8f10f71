"""Words that agree with numbers."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its words: ``counted(1, "file is", "files are")`` gives ``1 file is``.

    ``many``: the words for any number but 1; None: ``one`` with an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
