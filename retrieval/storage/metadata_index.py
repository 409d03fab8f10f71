"""An index of the live items' metadata, which decides filters without reading the items.

    items        7 {"colour": "red", "tags": ["sea", "sun"]}     9 {"colour": "red", "year": 2024}

    metadata_keys       metadata_values (key, type, value -> id)       metadata_postings (id, item)
    1 colour            1 text     red   -> 1                          1: 7, 9
    2 tags              2 array          -> 2                          2: 7
    3 year              2 element  sea   -> 3                          3: 7
                        2 element  sun   -> 4                          4: 7
                        3 integer  2024  -> 5                          5: 9

A condition is tested on the distinct values of one key; the postings of those that pass are its
items. Types and values are those of SQLite's ``json_each``; the elements of a list have entries of
their own. A text, a list or an object longer than `MAX_VALUE_BYTES` is kept as "long" only: for
what can depend on it the item itself is read, so that descriptions do not stand here a second time.

The index follows the items by triggers, inside the statement that changes them, so whatever writes
items cannot forget it; a value or a key that no live item has any more is gone at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: A longer value is looked up in its item. Twice as many bytes as titles and lists of tags have.
MAX_VALUE_BYTES = 256
#: The type of the entry that stands for all longer values of a key.
LONG = "long"
#: The name, among the counters of a collection, of the last id that a value got.
COUNTER = "metadata"


def number_of(row: str) -> str:
    """SQL: what a value is as a number, NULL if it is none. A text counts where JSON has it so.

    '12' and '-3.50' do, not '007' or '12 cm'. CASE fixes the order of evaluation: json_type() must
    not see text that is not JSON.
    """
    return (
        f"CASE WHEN {row}.type IN ('integer', 'real') THEN {row}.value "
        f"WHEN {row}.type != 'text' THEN NULL WHEN json_valid({row}.value) THEN "
        f"CASE WHEN json_type({row}.value) IN ('integer', 'real') "
        f"THEN CAST({row}.value AS NUMERIC) END END"
    )


_IS_LONG = (
    f"field.type IN ('text', 'array', 'object') "
    f"AND length(CAST(field.value AS BLOB)) > {MAX_VALUE_BYTES} AND ({number_of('field')}) IS NULL"
)


def entries_of(row: str, *, whole: bool = True) -> str:
    """SQL: the entries (key, type, value, number) of one row of items, such as ``new``.

    ``whole``: long values stand for themselves, as they do not in the index.
    """
    return _entries(f"json_each({row}.metadata) AS field", "", whole=whole)


def entries_below(row: str) -> str:
    """SQL: the entries of an object within one row of items, whose JSON path is bound twice."""
    return _entries(f"json_each({row}.metadata, ?) AS field", "", whole=True)


def _entries(source: str, first_column: str, *, whole: bool) -> str:
    # Lists and nulls are there or not; nothing compares them as a whole.
    value = "CASE WHEN field.type IN ('array', 'null') THEN '' ELSE field.value END"
    columns = f"field.type AS type, {value} AS value, {number_of('field')} AS number"
    if not whole:
        columns = (
            f"CASE WHEN {_IS_LONG} THEN '{LONG}' ELSE field.type END AS type, "
            f"CASE WHEN {_IS_LONG} THEN '' ELSE {value} END AS value, "
            f"{number_of('field')} AS number"  # what is a number is not long
        )
    element = (
        "CASE WHEN part.type IN ('true', 'false') THEN part.type ELSE CAST(part.value AS TEXT) END"
    )
    parts = "json_each(CASE field.type WHEN 'array' THEN field.value ELSE '[]' END) AS part"
    short = "" if whole else f" AND NOT ({_IS_LONG})"
    return (
        f"SELECT {first_column}field.key AS key, {columns} FROM {source} "
        "WHERE field.key IS NOT NULL UNION ALL "
        f"SELECT {first_column}field.key, 'element', {element}, {number_of('part')} "
        f"FROM {source}, {parts} "
        f"WHERE field.key IS NOT NULL AND part.type != 'null'{short}"
    )


_LIVE = "(SELECT id, metadata FROM items WHERE state = 'live') AS item"
_ALL_ENTRIES = _entries(
    f"{_LIVE}, json_each(item.metadata) AS field", "item.id AS item, ", whole=False
)

_TABLES = {
    "metadata_keys": (
        "CREATE TABLE metadata_keys (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE)"
    ),
    # Without affinity a value keeps its type. A text stands here once: the table is its index.
    "metadata_values": (
        "CREATE TABLE metadata_values (key INTEGER NOT NULL, type TEXT NOT NULL, value NOT NULL, "
        "number, id INTEGER NOT NULL, PRIMARY KEY (key, type, value)) WITHOUT ROWID"
    ),
    "metadata_postings": (
        "CREATE TABLE metadata_postings (value INTEGER NOT NULL, item INTEGER NOT NULL, "
        "PRIMARY KEY (value, item)) WITHOUT ROWID"
    ),
    "metadata_numbers": (
        "CREATE INDEX metadata_numbers ON metadata_values (key, number) WHERE number IS NOT NULL"
    ),
    # Rows that are inserted here are entered into the index, or struck out of it.
    "metadata_added": "CREATE VIEW metadata_added (item, key, type, value, number) "
    "AS SELECT NULL, NULL, NULL, NULL, NULL WHERE 0",
    "metadata_gone": "CREATE VIEW metadata_gone (item, key, type, value, number) "
    "AS SELECT NULL, NULL, NULL, NULL, NULL WHERE 0",
}
_CHANGED = "(old.id, old.metadata, old.state) IS NOT (new.id, new.metadata, new.state)"
_KEY = "(SELECT id FROM metadata_keys WHERE key = new.key)"
_SAME = f"key = {_KEY} AND type = new.type AND value = new.value"
_ID = f"(SELECT id FROM metadata_values WHERE {_SAME})"


def _entries_into(view: str, row: str) -> str:
    entries = entries_of(row, whole=False)
    return f"INSERT INTO {view} SELECT {row}.id, key, type, value, number FROM ({entries})"


_TRIGGERS = {
    "metadata_insert": "AFTER INSERT ON items WHEN new.state = 'live' "
    f"BEGIN {_entries_into('metadata_added', 'new')}; END",
    "metadata_forget": "BEFORE UPDATE OF id, metadata, state ON items "
    f"WHEN old.state = 'live' AND {_CHANGED} BEGIN {_entries_into('metadata_gone', 'old')}; END",
    "metadata_update": "AFTER UPDATE OF id, metadata, state ON items "
    f"WHEN new.state = 'live' AND {_CHANGED} BEGIN {_entries_into('metadata_added', 'new')}; END",
    "metadata_delete": "BEFORE DELETE ON items WHEN old.state = 'live' "
    f"BEGIN {_entries_into('metadata_gone', 'old')}; END",
    "metadata_enter": "INSTEAD OF INSERT ON metadata_added BEGIN "
    "INSERT OR IGNORE INTO metadata_keys (key) VALUES (new.key); "
    "INSERT OR IGNORE INTO metadata_values (key, type, value, number, id) "
    f"VALUES ({_KEY}, new.type, new.value, new.number, "
    f"(SELECT value + 1 FROM state WHERE name = '{COUNTER}')); "
    f"UPDATE state SET value = max(value, {_ID}) WHERE name = '{COUNTER}'; "
    f"INSERT OR IGNORE INTO metadata_postings VALUES ({_ID}, new.item); END",
    "metadata_strike": "INSTEAD OF INSERT ON metadata_gone BEGIN "
    f"DELETE FROM metadata_postings WHERE value = {_ID} AND item = new.item; "
    f"DELETE FROM metadata_values WHERE {_SAME} AND NOT EXISTS "
    "(SELECT 1 FROM metadata_postings AS posting WHERE posting.value = metadata_values.id); "
    "DELETE FROM metadata_keys WHERE key = new.key AND NOT EXISTS "
    "(SELECT 1 FROM metadata_values AS other WHERE other.key = metadata_keys.id); END",
}
_STATEMENTS = _TABLES | {name: f"CREATE TRIGGER {name} {body}" for name, body in _TRIGGERS.items()}


def create_index(connection: sqlite3.Connection) -> None:
    """Makes the index of the items that there are, inside a transaction."""
    for statement in _STATEMENTS.values():
        connection.execute(statement)
    connection.execute(f"INSERT OR IGNORE INTO state VALUES ('{COUNTER}', 0)")
    # One pass over the items and one sort; then each table is filled from its beginning to its end.
    connection.execute(
        "CREATE TEMP TABLE made AS SELECT *, dense_rank() OVER (ORDER BY key, type, value) AS id "
        f"FROM ({_ALL_ENTRIES}) ORDER BY key, type, value, item"
    )
    connection.execute("INSERT INTO metadata_keys (key) SELECT DISTINCT key FROM made ORDER BY key")
    connection.execute(
        "INSERT OR IGNORE INTO metadata_values (key, type, value, number, id) "
        "SELECT known.id, type, value, number, made.id "
        "FROM made CROSS JOIN metadata_keys AS known ON known.key = made.key ORDER BY made.rowid"
    )
    connection.execute(
        "INSERT OR IGNORE INTO metadata_postings SELECT id, item FROM made ORDER BY rowid"
    )
    connection.execute("DROP TABLE made")
    connection.execute(
        "UPDATE state SET value = max(value, (SELECT count(*) FROM metadata_values)) "
        f"WHERE name = '{COUNTER}'"
    )


def drop_index(connection: sqlite3.Connection) -> None:
    """Removes what there is of the index, inside a transaction."""
    for name in _TRIGGERS:
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
    for name in ("metadata_added", "metadata_gone"):
        connection.execute(f"DROP VIEW IF EXISTS {name}")
    for name in ("metadata_postings", "metadata_values", "metadata_keys"):
        connection.execute(f"DROP TABLE IF EXISTS {name}")


#: Those that an item's change of metadata fires.
_ON_CHANGE = ("metadata_forget", "metadata_update")


@contextmanager
def resting_triggers(connection: sqlite3.Connection) -> Iterator[None]:
    """Inside, changed metadata is not entered; inside a transaction, so nobody else sees that.

    Whatever is changed has to be entered by `replace_entries`.
    """
    for name in _ON_CHANGE:
        connection.execute(f"DROP TRIGGER {name}")
    yield
    for name in _ON_CHANGE:
        connection.execute(_STATEMENTS[name])


def replace_entries(
    connection: sqlite3.Connection, changed: Sequence[tuple[int, str, str]]
) -> None:
    """Enters what changed in the metadata of many live items, inside a transaction.

    ``changed``: an item's id, and the keys that changed with their values before and after, as
    JSON objects.
    """
    connection.execute(
        "CREATE TEMP TABLE changed (id INTEGER PRIMARY KEY, before TEXT, after TEXT)"
    )
    connection.executemany("INSERT INTO changed VALUES (?, ?, ?)", changed)
    for table, column in (("gone", "before"), ("come", "after")):
        entries = _entries(
            f"changed AS item, json_each(item.{column}) AS field", "item.id AS item, ", whole=False
        )
        connection.execute(f"CREATE TEMP TABLE {table} AS {entries}")
    for statement in _REPLACING:
        connection.execute(statement)
    for table in ("changed", "gone", "come"):
        connection.execute(f"DROP TABLE temp.{table}")


_KEYS = "CROSS JOIN metadata_keys AS known ON known.key = entry.key"
_STORED = (
    f"{_KEYS} CROSS JOIN metadata_values AS stored ON stored.key = known.id "
    "AND stored.type = entry.type AND stored.value = entry.value"
)
_REPLACING = (
    "DELETE FROM metadata_postings WHERE (value, item) IN "
    f"(SELECT stored.id, entry.item FROM gone AS entry {_STORED})",
    "INSERT OR IGNORE INTO metadata_keys (key) SELECT DISTINCT key FROM come",
    "INSERT OR IGNORE INTO metadata_values (key, type, value, number, id) "
    "SELECT known.id, entry.type, entry.value, entry.number, row_number() OVER () "
    f"+ (SELECT value FROM state WHERE name = '{COUNTER}') "
    f"FROM (SELECT DISTINCT key, type, value, number FROM come) AS entry {_KEYS} "
    "WHERE NOT EXISTS (SELECT 1 FROM metadata_values AS stored WHERE stored.key = known.id "
    "AND stored.type = entry.type AND stored.value = entry.value)",
    # No more values can have been added than there are entries.
    f"UPDATE state SET value = value + (SELECT count(*) FROM come) WHERE name = '{COUNTER}'",
    f"INSERT OR IGNORE INTO metadata_postings SELECT stored.id, entry.item FROM come AS entry "
    f"{_STORED} ORDER BY 1, 2",
    "DELETE FROM metadata_values WHERE (key, type, value) IN "
    f"(SELECT DISTINCT known.id, entry.type, entry.value FROM gone AS entry {_KEYS}) "
    "AND NOT EXISTS "
    "(SELECT 1 FROM metadata_postings AS posting WHERE posting.value = metadata_values.id)",
    "DELETE FROM metadata_keys WHERE key IN (SELECT DISTINCT key FROM gone) AND NOT EXISTS "
    "(SELECT 1 FROM metadata_values AS other WHERE other.key = metadata_keys.id)",
)


def rebuild_index(connection: sqlite3.Connection) -> None:
    """Rebuilds the index from the items, inside a transaction."""
    drop_index(connection)
    create_index(connection)


def find_problems(connection: sqlite3.Connection) -> list[str]:
    """What in the index is not what the items say, inside a transaction; empty when it is sound.

    Raises:
        sqlite3.Error: a table is missing or damaged.
    """
    found = dict(connection.execute("SELECT name, sql FROM sqlite_master"))
    problems = [
        f"{name} is missing or not as it was made"
        for name, statement in _STATEMENTS.items()
        if found.get(name) != statement
    ]
    for query, problem in _CHECKS:
        count = connection.execute(query).fetchone()[0]
        if count:
            problems.append(f"{count:,} {problem}")
    return problems


_EACH = f"SELECT DISTINCT key, type, value FROM ({entries_of('items', whole=False)})"
_NUM_WANTED = (
    f"SELECT coalesce(sum((SELECT count(*) FROM ({_EACH}))), 0) FROM items WHERE state = 'live'"
)
_CHECKS = (
    (
        f"SELECT count(*) FROM ({_ALL_ENTRIES}) AS entry WHERE NOT EXISTS ("
        "SELECT 1 FROM metadata_keys AS known CROSS JOIN metadata_values AS stored "
        "ON stored.key = known.id AND stored.type = entry.type AND stored.value = entry.value "
        "AND stored.number IS entry.number "
        "CROSS JOIN metadata_postings AS posting ON posting.value = stored.id "
        "AND posting.item = entry.item WHERE known.key = entry.key)",
        "entries of the items are missing",
    ),
    (
        # None is missing: then it is the number of them that tells whether there are others.
        f"SELECT max(0, (SELECT count(*) FROM metadata_postings) - ({_NUM_WANTED}))",
        "entries are of no live item",
    ),
    (
        "SELECT count(*) FROM metadata_values AS stored WHERE NOT EXISTS "
        "(SELECT 1 FROM metadata_postings AS posting WHERE posting.value = stored.id)",
        "values are of no live item",
    ),
    (
        "SELECT count(*) FROM metadata_keys AS known WHERE NOT EXISTS "
        "(SELECT 1 FROM metadata_values AS stored WHERE stored.key = known.id)",
        "keys are of no live item",
    ),
    ("SELECT count(*) - count(DISTINCT id) FROM metadata_values", "values share their id"),
    (
        "SELECT count(*) FROM metadata_values WHERE id > coalesce("
        f"(SELECT value FROM state WHERE name = '{COUNTER}'), 0)",
        "values have ids that would be given again",
    ),
)
