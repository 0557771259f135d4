"""The truth: one SQLite database for each collection. Every acknowledged write is committed."""

import json
import sqlite3
import time
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index import schema
from index.database import Database
from index.errors import InvalidSettings
from index.kinds import IndexSettings, Metric, check_fit, check_metric
from index.records import Record, check_model, check_spaces, decode_metadata, is_possible_id
from index.schema import vectors_table

FILE_NAME = "collection.sqlite"
_ROWS_PER_BLOCK = 4096
_RECORD_COLUMNS = "key, id, row, metadata, content_hash, created_at, updated_at"


class Store:
    """One collection's database, for reading; `index.writes` writes it.

    Safe to use from many threads. Vectors are kept as they were given: float32, not normalised.
    Any method raises `StoreDamaged` or `StoreFailed`, and `CollectionNotFound` once closed.

    Attributes:
        uuid: the collection's own, given when it was made.
        metric, model, spaces, created_at: as in `Collection`.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        self.folder = folder
        self.database = Database(folder / FILE_NAME, described=f"collection {name!r}")
        try:
            self._read_description()
        except BaseException:
            self.database.close()
            raise

    @staticmethod
    def create(
        folder: Path,
        *,
        spaces: Mapping[str, int],
        model: str,
        metric: Metric = "cosine",
        settings: IndexSettings | None = None,
    ) -> None:
        """Make an empty database in `folder`, which must exist.

        Raises:
            InvalidName, InvalidVector, InvalidSettings, ValueError: what was given cannot be.
        """
        check_spaces(spaces)
        check_model(model)
        check_metric(metric)
        settings = settings or IndexSettings()
        check_fit(settings, spaces)
        described = json.dumps(settings.to_dict())
        database = Database(
            folder / FILE_NAME, described="the new collection", page_bytes=schema.PAGE_BYTES
        )
        try:
            with database.writing() as connection:
                for statement in schema.STATEMENTS:
                    connection.execute(statement)
                connection.execute(
                    "INSERT INTO collection VALUES (?, ?, ?, ?, ?, 0)",
                    (uuid.uuid4().hex, model, metric, described, time.time()),
                )
                for number, (space, dimension) in enumerate(spaces.items()):
                    connection.execute(
                        "INSERT INTO spaces VALUES (?, ?, ?)", (number, space, dimension)
                    )
                    connection.execute(schema.create_vectors_table(number))
                schema.set_version(connection)
        finally:
            database.close()

    @property
    def settings(self) -> IndexSettings:
        """The kind of index that the collection asks for."""
        with self.database.reading() as connection:
            text = connection.execute("SELECT settings FROM collection").fetchone()[0]
        try:
            return IndexSettings.from_dict(json.loads(text))
        except (ValueError, InvalidSettings) as error:
            raise self.database.damage(f"its settings are garbled: {error}") from error

    def get(self, record_id: str, *, with_vectors: bool) -> Record | None:
        """The record with this id, or None."""
        if not is_possible_id(record_id):
            return None
        with self.database.reading() as connection:
            row = connection.execute(
                f"SELECT {_RECORD_COLUMNS} FROM records WHERE id = ?", (record_id,)
            ).fetchone()
            return None if row is None else self._records(connection, [row], with_vectors)[0]

    def thumbnail(self, record_id: str) -> bytes | None:
        """What was given as this record's thumbnail; None without one, or without the record."""
        if not is_possible_id(record_id):
            return None
        with self.database.reading() as connection:
            row = connection.execute(
                "SELECT thumbnail FROM thumbnails JOIN records USING (key) WHERE id = ?",
                (record_id,),
            ).fetchone()
        return None if row is None else bytes(row[0])

    def records_after(
        self, key: int, limit: int, *, with_vectors: bool, among: NDArray[np.int64] | None = None
    ) -> list[tuple[int, Record]]:
        """Up to `limit` (key, record) with keys above `key`, in order of keys.

        `among` gives the rows that count, sorted.
        """
        with self.database.reading() as connection:
            if among is None:
                rows = connection.execute(
                    f"SELECT {_RECORD_COLUMNS} FROM records WHERE key > ? ORDER BY key LIMIT ?",
                    (key, limit),
                ).fetchall()
            else:
                rows = _rows_among(connection, key, limit, among)
            records = self._records(connection, rows, with_vectors)
        return [(row[0], record) for row, record in zip(rows, records, strict=True)]

    def labels_of(self, rows: Iterable[int]) -> dict[int, tuple[str, str]]:
        """row -> (id, metadata as JSON) for those rows that exist."""
        found = self.database.rows(
            "SELECT row, id, metadata FROM records WHERE row IN (SELECT value FROM json_each(?))",
            [json.dumps(list(rows))],
        )
        return {row: (record_id, text) for row, record_id, text in found}

    def rows_of(self, ids: Iterable[str]) -> list[int]:
        """The rows of those ids that exist, in no particular order."""
        with self.database.reading() as connection:
            return rows_of(connection, ids)

    def all_labels(self) -> Generator[list[tuple[int, str, str]], None, None]:
        """(row, id, metadata as JSON) of every record, by row, in blocks."""
        with self.database.reading() as connection:
            cursor = connection.execute("SELECT row, id, metadata FROM records ORDER BY row")
            while block := cursor.fetchmany(_ROWS_PER_BLOCK):
                yield block

    def last_number(self) -> int:
        """The highest number given out so far, to a row or a key; see `index.schema`."""
        with self.database.reading() as connection:
            return int(connection.execute("SELECT last_number FROM collection").fetchone()[0])

    def all_rows(self) -> NDArray[np.int64]:
        """Every record's row, sorted."""
        with self.database.reading() as connection:
            cursor = connection.execute("SELECT row FROM records ORDER BY row")
            return np.fromiter((row for (row,) in cursor), dtype=np.int64)

    def vectors_of(
        self, space: str, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Those of `rows` that exist, sorted, and their vectors [n, dimension]."""
        table, dimension = vectors_table(self._numbers[space]), self.spaces[space]
        with self.database.reading() as connection:
            found = connection.execute(
                f"SELECT row, vector FROM {table} WHERE row IN (SELECT value FROM json_each(?)) "
                "ORDER BY row",
                (json.dumps(rows.tolist()),),
            ).fetchall()
        return self._block(found, space, dimension)

    def vectors_in(
        self, space: str, *, after: int = 0, up_to: int | None = None
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.float32]], None, None]:
        """A space's vectors in blocks, in order of rows: rows [n], vectors [n, dimension].

        Only of rows above `after` and not above `up_to`. All of one commit, however long it takes.
        """
        dimension, found = self.spaces[space], 0
        limits = (after, 2**62 if up_to is None else up_to)
        with self.database.reading() as connection:
            cursor = connection.execute(
                f"SELECT row, vector FROM {vectors_table(self._numbers[space])} "
                "WHERE row > ? AND row <= ? ORDER BY row",
                limits,
            )
            while block := cursor.fetchmany(_ROWS_PER_BLOCK):
                found += len(block)
                yield self._block(block, space, dimension)
            (count,) = connection.execute(
                "SELECT count(*) FROM records WHERE row > ? AND row <= ?", limits
            ).fetchone()
        if found != count:
            raise self.database.damage(f"{count} records have {found} vectors in space {space!r}")

    def values_at(
        self, path: str, *, among: Sequence[int] | None = None
    ) -> Generator[list[tuple[int, str | None]], None, None]:
        """(row, JSON text of the metadata at SQLite's JSON `path`), by row, in blocks.

        Of those of the rows `among` that exist, or of all.
        """
        chosen, values = "", [path]
        if among is not None:
            chosen = "WHERE row IN (SELECT value FROM json_each(?))"
            values.append(json.dumps(list(among)))
        with self.database.reading() as connection:
            cursor = connection.execute(
                f"SELECT row, metadata -> ? FROM records {chosen} ORDER BY row", values
            )
            while block := cursor.fetchmany(16 * _ROWS_PER_BLOCK):
                yield block

    def stored_vectors(
        self, connection: sqlite3.Connection, row: int
    ) -> dict[str, NDArray[np.float32]]:
        """A record's vectors in every space, inside the caller's transaction."""
        vectors = {}
        for space, dimension in self.spaces.items():
            found = connection.execute(
                f"SELECT vector FROM {vectors_table(self._numbers[space])} WHERE row = ?", (row,)
            ).fetchone()
            if found is None or len(found[0] or b"") != 4 * dimension:
                raise self.database.damage(f"a record lacks its vector in space {space!r}")
            # Little-endian on disk; the copy makes it native and writable.
            vectors[space] = np.frombuffer(found[0], dtype="<f4").astype(np.float32)
        return vectors

    def tables(self) -> dict[str, str]:
        """space -> the table of its vectors."""
        return {space: vectors_table(number) for space, number in self._numbers.items()}

    def close(self) -> None:
        """Wait for what is running and close the file. Closing twice is allowed."""
        self.database.close()

    def _read_description(self) -> None:
        with self.database.reading() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > schema.SCHEMA_VERSION:
            raise self.database.damage(
                f"its format is version {version} and this program reads up to "
                f"{schema.SCHEMA_VERSION} (a newer release wrote it; upgrading helps)"
            )
        if version < 1:
            raise self.database.damage("it does not describe a collection")
        if version < schema.SCHEMA_VERSION:
            with self.database.writing() as connection:
                schema.upgrade(connection, version, uuid=uuid.uuid4().hex)
        with self.database.reading() as connection:
            described = connection.execute(
                "SELECT uuid, model, metric, created_at FROM collection"
            ).fetchall()
            spaces = connection.execute(
                "SELECT number, name, dimension FROM spaces ORDER BY number"
            ).fetchall()
        if len(described) != 1 or not spaces:
            raise self.database.damage("it does not describe a collection")
        self.uuid: str = described[0][0]
        self.model: str = described[0][1]
        self.metric: Metric = described[0][2]
        self.created_at: float = described[0][3]
        self.spaces: dict[str, int] = {name: dimension for _, name, dimension in spaces}
        self._numbers: dict[str, int] = {name: number for number, name, _ in spaces}

    def _block(
        self, found: list[tuple[int, bytes]], space: str, dimension: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        blobs = [blob for _, blob in found]
        # A page that is cut off gives NULL even where the table allows none.
        if any(not isinstance(blob, bytes) or len(blob) != 4 * dimension for blob in blobs):
            raise self.database.damage(f"a vector of space {space!r} has a wrong length")
        flat = np.frombuffer(b"".join(blobs), dtype="<f4").astype(np.float32)
        vectors = flat.reshape(len(blobs), dimension)
        # SQLite keeps no checksums; these are the faults that would spoil a search.
        is_garbled = not np.isfinite(vectors).all()
        if is_garbled or (self.metric == "cosine" and not vectors.any(axis=1).all()):
            raise self.database.damage(f"a vector of space {space!r} is garbled")
        return np.array([row for row, _ in found], dtype=np.int64), vectors

    def _records(
        self, connection: sqlite3.Connection, rows: list[Any], with_vectors: bool
    ) -> list[Record]:
        return [
            Record(
                id=record_id,
                metadata=self.metadata_of(metadata),
                content_hash=content_hash,
                vectors=self.stored_vectors(connection, row) if with_vectors else {},
                created_at=created_at,
                updated_at=updated_at,
            )
            for _, record_id, row, metadata, content_hash, created_at, updated_at in rows
        ]

    def metadata_of(self, text: str) -> dict[str, Any]:
        """A record's metadata out of the JSON that is stored of it."""
        try:
            return decode_metadata(text)
        except ValueError as error:
            raise self.database.damage("a record's metadata is garbled") from error


def count_records(path: Path) -> int:
    """How many records a copy of a collection's file holds, which nobody has open."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as copy:
        return int(copy.execute("SELECT count(*) FROM records").fetchone()[0])


def rows_of(connection: sqlite3.Connection, ids: Iterable[str]) -> list[int]:
    """The rows of those ids that exist, inside the caller's transaction."""
    possible = [record_id for record_id in ids if is_possible_id(record_id)]
    rows = connection.execute(
        "SELECT row FROM records WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(possible),),
    ).fetchall()
    return [row for (row,) in rows]


def _rows_among(
    connection: sqlite3.Connection, key: int, limit: int, among: NDArray[np.int64]
) -> list[Any]:
    if len(among) <= _ROWS_PER_BLOCK:
        return connection.execute(
            f"SELECT {_RECORD_COLUMNS} FROM records "
            "WHERE row IN (SELECT value FROM json_each(?)) AND key > ? ORDER BY key LIMIT ?",
            (json.dumps(among.tolist()), key, limit),
        ).fetchall()
    found: list[Any] = []
    cursor = connection.execute(
        f"SELECT {_RECORD_COLUMNS} FROM records WHERE key > ? ORDER BY key", (key,)
    )
    while len(found) < limit and (block := cursor.fetchmany(_ROWS_PER_BLOCK)):
        rows = np.array([row[2] for row in block], dtype=np.int64)
        at = np.searchsorted(among, rows)
        is_among = among[np.minimum(at, len(among) - 1)] == rows
        found += [row for row, counts in zip(block, is_among.tolist(), strict=True) if counts]
    return found[:limit]
