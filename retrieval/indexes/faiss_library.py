"""FAISS, imported when an index is first touched."""

from __future__ import annotations

from typing import Any


def faiss_library() -> Any:
    """The ``faiss`` module.

    A search of a few thousand items needs no FAISS, and its import costs 0.2 s of a cold process.
    The type is Any because the wheel's stubs describe the C++ constructors and not those that its
    Python layer puts over them.
    """
    import faiss

    return faiss
