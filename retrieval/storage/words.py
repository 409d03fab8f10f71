"""Searching the words of captions and of file names, by SQLite's FTS5, alone or beside the vectors.

    beach dog            both words, in any order; capitals and accents do not count
    "on the beach"       these words in this order
    surf*                words that begin so
    dog -brown           without that word

Of a sample in a shard the key is its file name; a row of a Parquet table has none. The table
follows the items by triggers, so whatever writes items cannot forget it. A collection that was made
before the table existed, or before it held file names, gets it, filled, at the first search for
words; where that cannot be written, in a copy. Older versions of clipsys go on working on it, since
the triggers are the database's own.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

import numpy as np

from clipsys.errors import QueryError
from clipsys.retrieval.storage.items import plain_text
from clipsys.retrieval.storage.segments import Ints

TABLE = "caption_words"
_TEXT = "(SELECT group_concat(value, char(10)) FROM json_each({row}.captions))"
# What follows the last slash; rtrim() cuts off all that is none.
_BASENAME = (
    "substr({row}.uri, 1 + length(rtrim({row}.uri, replace(CAST({row}.uri AS TEXT), '/', ''))))"
)
_NAME = (
    "(SELECT CASE WHEN instr(name, '.tar#') THEN substr(name, 5 + instr(name, '.tar#')) "
    "WHEN instr(name, '.parquet#') THEN '' ELSE name END "
    f"FROM (SELECT CAST({_BASENAME} AS TEXT) AS name))"
)
_ENTER = f"INSERT INTO {TABLE} (rowid, text, name) SELECT {{row}}.id, {_TEXT}, {_NAME}"
_STRIKE = f"DELETE FROM {TABLE} WHERE rowid = old.id"
#: Run on an empty or a filled database, inside a transaction.
SCHEMA = (
    f"CREATE VIRTUAL TABLE {TABLE} "
    "USING fts5(text, name, tokenize = 'unicode61 remove_diacritics 2')",
    f"CREATE TRIGGER {TABLE}_insert AFTER INSERT ON items WHEN new.state = 'live' BEGIN "
    f"{_ENTER.format(row='new')}; END",
    f"CREATE TRIGGER {TABLE}_update AFTER UPDATE OF captions, uri ON items "
    "WHEN (new.captions, new.uri) IS NOT (old.captions, old.uri) BEGIN "
    f"{_STRIKE}; {_ENTER.format(row='new')} WHERE new.state = 'live'; END",
    f"CREATE TRIGGER {TABLE}_retire AFTER UPDATE OF state ON items WHEN new.state != 'live' BEGIN "
    f"{_STRIKE}; END",
    f"CREATE TRIGGER {TABLE}_delete AFTER DELETE ON items BEGIN {_STRIKE}; END",
    f"{_ENTER.format(row='items')} FROM items WHERE state = 'live'",
)

#: Whether the table is there as it is made today; the statement that makes it is bound.
IS_CURRENT = f"SELECT 1 FROM sqlite_master WHERE name = '{TABLE}' AND sql = ?"
#: How many rows are not what the items say, in one statement and so as of one moment.
COUNT_STRAY = f"""
WITH wanted (id, text, name) AS (
    SELECT id, {_TEXT.format(row="items")}, {_NAME.format(row="items")}
    FROM items WHERE state = 'live'
), found (id, text, name) AS (SELECT rowid, text, name FROM {TABLE})
SELECT (SELECT count(*) FROM (SELECT * FROM wanted EXCEPT SELECT * FROM found))
     + (SELECT count(*) FROM (SELECT * FROM found EXCEPT SELECT * FROM wanted))
"""
#: FTS5 compares its index with its rows; an error if they differ. A write as far as locks go.
CHECK_INDEX = f"INSERT INTO {TABLE} ({TABLE}) VALUES ('integrity-check')"
TRIGGERS = tuple(f"{TABLE}_{event}" for event in ("insert", "update", "retire", "delete"))

_TERM = re.compile(r'(?P<minus>-)?(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"]+))')
#: The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).
_FUSION_CONSTANT = 60


def ensure_table(connection: sqlite3.Connection) -> None:
    """Makes the table if the database has none of today; several processes may do so at once."""

    def is_current() -> bool:
        return bool(connection.execute(IS_CURRENT, (SCHEMA[0],)).fetchall())

    if is_current():
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not is_current():
            rebuild_table(connection)
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
    for match in _TERM.finditer(plain_text(text)):
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
