"""The truth: one SQLite database for each collection. Every acknowledged write is committed."""

import json
import sqlite3
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.database import Database
from index.records import (
    CheckedRecord,
    Outcome,
    Record,
    check_model,
    check_spaces,
    is_possible_id,
)

FILE_NAME = "collection.sqlite"
SCHEMA_VERSION = 1
_ROWS_PER_BLOCK = 4096

# AUTOINCREMENT never gives a key out twice, so a key that outlives its record (in a cursor, in a
# search that is under way) cannot come to mean another one. Metadata and vectors stand in tables of
# their own kind because listing records must not read vectors, and loading vectors not records.
_SCHEMA = (
    "CREATE TABLE collection (model TEXT NOT NULL, created_at REAL NOT NULL)",
    "CREATE TABLE spaces ("
    "number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dimension INTEGER NOT NULL)",
    "CREATE TABLE records ("
    "key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL, "
    "content_hash TEXT, created_at REAL NOT NULL, updated_at REAL NOT NULL)",
    "CREATE TABLE thumbnails ("
    "thumbnail BLOB NOT NULL, key INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE)",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_RECORD_COLUMNS = "key, id, metadata, content_hash, created_at, updated_at"


@dataclass(frozen=True)
class Written:
    """What one record's write came to: its key, and whether its vectors are new to the index."""

    key: int
    outcome: Outcome
    vectors_changed: bool


class Store:
    """One collection's database.

    Safe to use from many threads. Vectors are kept as they were given: float32, not normalised.
    Any method raises `StoreDamaged` or `StoreFailed`, and `CollectionNotFound` once closed.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        self._database = Database(folder / FILE_NAME, described=f"collection {name!r}")
        try:
            self._read_description()
        except BaseException:
            self._database.close()
            raise

    @staticmethod
    def create(folder: Path, *, spaces: Mapping[str, int], model: str) -> None:
        """Make an empty database in `folder`, which must exist.

        Raises:
            InvalidName, InvalidVector, ValueError: `spaces` or `model` cannot be.
        """
        check_spaces(spaces)
        check_model(model)
        database = Database(folder / FILE_NAME, described="the new collection", is_new=True)
        try:
            with database.writing() as connection:
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO collection VALUES (?, ?)", (model, time.time()))
                for number, (space, dimension) in enumerate(spaces.items()):
                    connection.execute(
                        "INSERT INTO spaces VALUES (?, ?, ?)", (number, space, dimension)
                    )
                    connection.execute(
                        f"CREATE TABLE {_vectors(number)} (vector BLOB NOT NULL, "
                        "key INTEGER PRIMARY KEY REFERENCES records ON DELETE CASCADE)"
                    )
        finally:
            database.close()

    def upsert(self, records: Sequence[CheckedRecord]) -> list[Written]:
        """Write all or none, in order; committed and fsynced when this returns."""
        now = time.time()
        with self._database.writing() as connection:
            return [self._upsert_one(connection, record, now) for record in records]

    def delete(self, ids: Iterable[str]) -> list[int]:
        """Delete all or none; the keys of those that existed."""
        with self._database.writing() as connection:
            keys = _keys_of(connection, ids)
            connection.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in keys])
        return keys

    def keys_of(self, ids: Iterable[str]) -> list[int]:
        """The keys of those ids that exist, in no particular order."""
        with self._database.reading() as connection:
            return _keys_of(connection, ids)

    def get(self, record_id: str, *, with_vectors: bool) -> Record | None:
        """The record with this id, or None."""
        if not is_possible_id(record_id):
            return None
        with self._database.reading() as connection:
            row = connection.execute(
                f"SELECT {_RECORD_COLUMNS} FROM records WHERE id = ?", (record_id,)
            ).fetchone()
            if row is None:
                return None
            vectors = self._vectors_of(connection, row[0]) if with_vectors else {}
            return self._record(row, vectors)

    def thumbnail(self, record_id: str) -> bytes | None:
        """What was given as this record's thumbnail; None without one, or without the record."""
        if not is_possible_id(record_id):
            return None
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT thumbnail FROM thumbnails JOIN records USING (key) WHERE id = ?",
                (record_id,),
            ).fetchone()
        return None if row is None else bytes(row[0])

    def records_after(self, key: int, limit: int) -> list[tuple[int, Record]]:
        """Up to `limit` (key, record) with keys above `key`, in order of keys, without vectors."""
        with self._database.reading() as connection:
            rows = connection.execute(
                f"SELECT {_RECORD_COLUMNS} FROM records WHERE key > ? ORDER BY key LIMIT ?",
                (key, limit),
            ).fetchall()
        return [(row[0], self._record(row, {})) for row in rows]

    def labels_of(self, keys: Iterable[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """key -> (id, metadata) for those keys that exist."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT key, id, metadata FROM records "
                "WHERE key IN (SELECT value FROM json_each(?))",
                (json.dumps(list(keys)),),
            ).fetchall()
        return {key: (record_id, self._metadata(text)) for key, record_id, text in rows}

    def vectors_in(
        self, space: str
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.float32]], None, None]:
        """All of one space in blocks, in order of keys: keys [n], vectors [n, dimension]."""
        dimension, found = self.spaces[space], 0
        with self._database.reading() as connection:
            cursor = connection.execute(
                f"SELECT key, vector FROM {_vectors(self._numbers[space])} ORDER BY key"
            )
            while rows := cursor.fetchmany(_ROWS_PER_BLOCK):
                found += len(rows)
                keys = np.array([key for key, _ in rows], dtype=np.int64)
                blobs = [blob for _, blob in rows]
                if any(len(blob) != 4 * dimension for blob in blobs):
                    raise self._database.damage(f"a vector of space {space!r} has a wrong length")
                block = _to_vector(b"".join(blobs)).reshape(len(rows), dimension)
                # SQLite keeps no checksums; these are the two faults that would spoil a search.
                if not np.isfinite(block).all() or not block.any(axis=1).all():
                    raise self._database.damage(f"a vector of space {space!r} is garbled")
                yield keys, block
            count = connection.execute("SELECT count(*) FROM records").fetchone()[0]
        if found != count:
            raise self._database.damage(f"{count} records have {found} vectors in space {space!r}")

    def close(self) -> None:
        """Wait for what is running and close the file. Closing twice is allowed."""
        self._database.close()

    def _read_description(self) -> None:
        with self._database.reading() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise self._database.damage(
                    f"its format is version {version} and this program reads up to "
                    f"{SCHEMA_VERSION} (a newer release wrote it; upgrading helps)"
                )
            described = connection.execute("SELECT model, created_at FROM collection").fetchall()
            spaces = connection.execute(
                "SELECT number, name, dimension FROM spaces ORDER BY number"
            ).fetchall()
        if version < 1 or len(described) != 1 or not spaces:
            raise self._database.damage("it does not describe a collection")
        self.model: str = described[0][0]
        self.created_at: float = described[0][1]
        self.spaces: dict[str, int] = {name: dimension for _, name, dimension in spaces}
        self._numbers: dict[str, int] = {name: number for number, name, _ in spaces}

    def _upsert_one(
        self, connection: sqlite3.Connection, record: CheckedRecord, now: float
    ) -> Written:
        fields = (record.metadata_json, record.content_hash)
        row = connection.execute(
            "SELECT key, metadata, content_hash FROM records WHERE id = ?", (record.id,)
        ).fetchone()
        if row is None:
            key = connection.execute(
                "INSERT INTO records (id, metadata, content_hash, created_at, updated_at) "
                "VALUES (?, ?, ?, ?, ?) RETURNING key",
                (record.id, *fields, now, now),
            ).fetchone()[0]
            self._write_vectors(connection, key, record)
            self._write_thumbnail(connection, key, record)
            return Written(key, "created", vectors_changed=True)
        key = row[0]
        stored = self._vectors_of(connection, key)
        vectors_changed = any(
            stored[space].tobytes() != vector.tobytes() for space, vector in record.vectors.items()
        )
        if not vectors_changed and row[1:] == fields:
            return Written(key, "unchanged", vectors_changed=False)
        connection.execute(
            "UPDATE records SET metadata = ?, content_hash = ?, updated_at = ? WHERE key = ?",
            (*fields, now, key),
        )
        if vectors_changed:
            self._write_vectors(connection, key, record)
        self._write_thumbnail(connection, key, record)
        return Written(key, "updated", vectors_changed)

    def _write_vectors(
        self, connection: sqlite3.Connection, key: int, record: CheckedRecord
    ) -> None:
        for space, vector in record.vectors.items():
            table = _vectors(self._numbers[space])
            connection.execute(
                f"INSERT OR REPLACE INTO {table} (key, vector) VALUES (?, ?)",
                (key, vector.astype("<f4").tobytes()),
            )

    def _write_thumbnail(
        self, connection: sqlite3.Connection, key: int, record: CheckedRecord
    ) -> None:
        if record.thumbnail is not None:
            connection.execute(
                "INSERT OR REPLACE INTO thumbnails (key, thumbnail) VALUES (?, ?)",
                (key, record.thumbnail),
            )

    def _vectors_of(
        self, connection: sqlite3.Connection, key: int
    ) -> dict[str, NDArray[np.float32]]:
        vectors = {}
        for space, dimension in self.spaces.items():
            row = connection.execute(
                f"SELECT vector FROM {_vectors(self._numbers[space])} WHERE key = ?", (key,)
            ).fetchone()
            if row is None or len(row[0]) != 4 * dimension:
                raise self._database.damage(f"a record lacks its vector in space {space!r}")
            vectors[space] = _to_vector(row[0])
        return vectors

    def _record(self, row: tuple[Any, ...], vectors: dict[str, NDArray[np.float32]]) -> Record:
        _, record_id, metadata, content_hash, created_at, updated_at = row
        return Record(
            id=record_id,
            metadata=self._metadata(metadata),
            content_hash=content_hash,
            vectors=vectors,
            created_at=created_at,
            updated_at=updated_at,
        )

    def _metadata(self, text: str) -> dict[str, Any]:
        try:
            metadata = json.loads(text)
        except (TypeError, ValueError) as error:
            raise self._database.damage("a record's metadata is garbled") from error
        if not isinstance(metadata, dict):
            raise self._database.damage("a record's metadata is garbled")
        return metadata


def _keys_of(connection: sqlite3.Connection, ids: Iterable[str]) -> list[int]:
    possible = [record_id for record_id in ids if is_possible_id(record_id)]
    rows = connection.execute(
        "SELECT key FROM records WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(possible),),
    ).fetchall()
    return [key for (key,) in rows]


def _vectors(number: int) -> str:
    """The table that holds a space's vectors."""
    return f"vectors_{number}"


def _to_vector(blob: bytes) -> NDArray[np.float32]:
    # Little-endian on disk; the copy makes it native and writable.
    return np.frombuffer(blob, dtype="<f4").astype(np.float32)
