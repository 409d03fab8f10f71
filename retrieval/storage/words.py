"""Searching the words of captions, by SQLite's FTS5, alone or beside the vectors.

    beach dog            both words, in any order; capitals and accents do not count
    "on the beach"       these words in this order
    surf*                words that begin so
    dog -brown           without that word

The table follows the items by triggers, so whatever writes items cannot forget it. A collection
that was made before the table existed gets it, filled, at the first search for words; older
versions of clipsys go on working on it, since the triggers are the database's own.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval.storage.segments import Ints

TABLE = "caption_words"
_TEXT = "(SELECT group_concat(value, char(10)) FROM json_each({row}.captions))"
#: Run on an empty or a filled database, inside a transaction.
SCHEMA = (
    f"CREATE VIRTUAL TABLE {TABLE} USING fts5(text, tokenize = 'unicode61 remove_diacritics 2')",
    f"CREATE TRIGGER {TABLE}_insert AFTER INSERT ON items "
    "WHEN new.captions != '[]' AND new.state = 'live' BEGIN "
    f"INSERT INTO {TABLE} (rowid, text) VALUES (new.id, {_TEXT.format(row='new')}); END",
    f"CREATE TRIGGER {TABLE}_update AFTER UPDATE OF captions ON items "
    "WHEN new.captions != old.captions BEGIN "
    f"DELETE FROM {TABLE} WHERE rowid = old.id; "
    f"INSERT INTO {TABLE} (rowid, text) SELECT new.id, {_TEXT.format(row='new')} "
    "WHERE new.captions != '[]' AND new.state = 'live'; END",
    f"CREATE TRIGGER {TABLE}_retire AFTER UPDATE OF state ON items WHEN new.state != 'live' BEGIN "
    f"DELETE FROM {TABLE} WHERE rowid = old.id; END",
    f"CREATE TRIGGER {TABLE}_delete AFTER DELETE ON items BEGIN "
    f"DELETE FROM {TABLE} WHERE rowid = old.id; END",
    f"INSERT INTO {TABLE} (rowid, text) SELECT id, {_TEXT.format(row='items')} FROM items "
    "WHERE state = 'live' AND captions != '[]'",
)

#: One row where the table is there.
HAS_TABLE = f"SELECT 1 FROM sqlite_master WHERE name = '{TABLE}'"
#: How many rows are not what the items say, in one statement and so as of one moment.
COUNT_STRAY = f"""
WITH wanted (id, text) AS (
    SELECT id, {_TEXT.format(row="items")} FROM items WHERE state = 'live' AND captions != '[]'
)
SELECT (SELECT count(*) FROM (SELECT * FROM wanted EXCEPT SELECT rowid, text FROM {TABLE}))
     + (SELECT count(*) FROM (SELECT rowid, text FROM {TABLE} EXCEPT SELECT * FROM wanted))
"""
#: FTS5 compares its index with its rows; an error if they differ. A write as far as locks go.
CHECK_INDEX = f"INSERT INTO {TABLE} ({TABLE}) VALUES ('integrity-check')"
TRIGGERS = tuple(f"{TABLE}_{event}" for event in ("insert", "update", "retire", "delete"))

_TERM = re.compile(r'(?P<minus>-)?(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"]+))')
#: The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).
_FUSION_CONSTANT = 60


def ensure_table(connection: sqlite3.Connection) -> None:
    """Makes the table if the database has none; several processes may do so at once."""
    query = "SELECT count(*) FROM sqlite_master WHERE name = ?"
    if connection.execute(query, (TABLE,)).fetchone()[0]:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not connection.execute(query, (TABLE,)).fetchone()[0]:
            for statement in SCHEMA:
                connection.execute(statement)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def rebuild_table(connection: sqlite3.Connection) -> None:
    """Rebuilds the table from the items, inside a transaction."""
    for name in TRIGGERS:
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
    try:
        connection.execute(f"DROP TABLE IF EXISTS {TABLE}")
    except sqlite3.DatabaseError:  # FTS5 cannot even open it
        _erase_table(connection)
    for statement in SCHEMA:
        connection.execute(statement)


def _erase_table(connection: sqlite3.Connection) -> None:
    """Drops the tables that FTS5 keeps its own in, then the entry that no statement can drop."""
    for part in ("data", "idx", "content", "docsize", "config"):
        connection.execute(f"DROP TABLE IF EXISTS {TABLE}_{part}")
    connection.execute("PRAGMA writable_schema = ON")
    try:
        connection.execute("DELETE FROM sqlite_master WHERE name = ?", (TABLE,))
    finally:
        connection.execute("PRAGMA writable_schema = RESET")  # also reads the schema again


def match_expression(text: str) -> str:
    """FTS5's expression for words as above. Every word is quoted: none can act as an operator.

    Raises:
        QueryError: there is no word to look for.
    """
    wanted: list[str] = []
    unwanted: list[str] = []
    for match in _TERM.finditer(text):
        prefix = ""
        term = match["phrase"]
        if term is None:
            term = match["word"]
            if term.endswith("*"):
                term, prefix = term[:-1], "*"
        if any(character.isalnum() for character in term):
            (unwanted if match["minus"] else wanted).append(f'"{term}"{prefix}')
    if not wanted:
        raise QueryError(f"the words {text!r} hold nothing to look for; name a word")
    expression = " AND ".join(wanted)
    return f"({expression}) NOT ({' OR '.join(unwanted)})" if unwanted else expression


def fuse(rankings: Sequence[Ints]) -> Ints:
    """Reciprocal rank fusion: ids by the sum of 1 / (60 + rank) over the rankings that have them.

    Ties go to the one that is better in the first ranking, then to the smaller id.
    """
    points: dict[int, float] = {}
    first = {int(item_id): place for place, item_id in enumerate(rankings[0])}
    for ranking in rankings:
        for place, item_id in enumerate(ranking.tolist(), 1):
            points[item_id] = points.get(item_id, 0.0) + 1 / (_FUSION_CONSTANT + place)
    last = len(first)
    order = sorted(points, key=lambda one: (-points[one], first.get(one, last), one))
    return np.array(order, np.int64)
