"""The tables of a collection's database, and how older ones become today's."""

import sqlite3

SCHEMA_VERSION = 2
PAGE_BYTES = (
    8192  # five vectors of 384 dimensions; SQLite's own 4096 holds two and wastes a quarter
)

# One counter gives out every number: a record's key (the order of first insertion) and its row (the
# order in which vectors were written; a record whose vectors change takes a new one). None is ever
# given twice, so that one that outlives its record, in a cursor, in a search that is under way or
# in an index on disk, cannot come to mean another. Vectors stand in tables of their own, one for
# each space, because listing records must not read vectors, and loading vectors not records.
STATEMENTS = (
    "CREATE TABLE collection (uuid TEXT NOT NULL, model TEXT NOT NULL, metric TEXT NOT NULL, "
    "settings TEXT NOT NULL, created_at REAL NOT NULL, last_number INTEGER NOT NULL)",
    "CREATE TABLE spaces ("
    "number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dimension INTEGER NOT NULL)",
    "CREATE TABLE records ("
    "key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, row INTEGER NOT NULL, "
    "metadata TEXT NOT NULL, content_hash TEXT, "
    "created_at REAL NOT NULL, updated_at REAL NOT NULL)",
    "CREATE UNIQUE INDEX records_row ON records (row)",
    "CREATE INDEX records_content_hash ON records (content_hash) WHERE content_hash IS NOT NULL",
    "CREATE TABLE thumbnails ("
    "key INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE, thumbnail BLOB NOT NULL)",
)


def vectors_table(number: int) -> str:
    """The table that holds the vectors of a space, by its number."""
    return f"vectors_{number}"


def create_vectors_table(number: int) -> str:
    """The statement that makes it."""
    return f"CREATE TABLE {vectors_table(number)} (row INTEGER PRIMARY KEY, vector BLOB NOT NULL)"


def set_version(connection: sqlite3.Connection) -> None:
    """Mark the file as of today's version, inside the transaction that made it so."""
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def upgrade(connection: sqlite3.Connection, version: int, *, uuid: str) -> None:
    """Bring the tables of an older version up to date, inside the caller's transaction.

    Version 1 had one number for key and row, AUTOINCREMENT in place of the counter, cosine alone
    and no settings.
    """
    if version != 1:
        raise ValueError(f"there was no schema version {version}")
    (model, created_at) = connection.execute("SELECT model, created_at FROM collection").fetchone()
    numbers = [n for (n,) in connection.execute("SELECT number FROM spaces ORDER BY number")]
    last = connection.execute(
        "SELECT max(coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'records'), 0), "
        "coalesce((SELECT max(key) FROM records), 0))"
    ).fetchone()[0]
    old = {name: f"{name}_1" for name in ("collection", "records", "thumbnails")}
    old |= {vectors_table(number): f"{vectors_table(number)}_1" for number in numbers}
    for name, renamed in old.items():
        connection.execute(f"ALTER TABLE {name} RENAME TO {renamed}")
    for statement in STATEMENTS:
        if not statement.startswith("CREATE TABLE spaces"):
            connection.execute(statement)
    connection.execute(
        "INSERT INTO collection VALUES (?, ?, 'cosine', '{}', ?, ?)",
        (uuid, model, created_at, last),
    )
    connection.execute(
        "INSERT INTO records SELECT key, id, key, metadata, content_hash, created_at, updated_at "
        "FROM records_1 ORDER BY key"
    )
    connection.execute(
        "INSERT INTO thumbnails SELECT key, thumbnail FROM thumbnails_1 ORDER BY key"
    )
    for number in numbers:
        connection.execute(create_vectors_table(number))
        table = vectors_table(number)
        connection.execute(f"INSERT INTO {table} SELECT key, vector FROM {table}_1 ORDER BY key")
    for renamed in reversed(old.values()):  # what refers to records goes before it
        connection.execute(f"DROP TABLE {renamed}")
    set_version(connection)
