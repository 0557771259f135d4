"""What a write does inside its transaction, and what it changes for whoever keeps a copy."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from index.records import CheckedRecord, OnDuplicate, Outcome, UpsertOutcome
from index.store import Store, rows_of

_ROUNDING = 1e-5  # of a model that computes one picture in batches of several sizes


@dataclass(frozen=True, eq=False, kw_only=True)
class Changes:
    """What a write has changed, by rows.

    Attributes:
        added: new rows, ascending and above every earlier one, int64 [n].
        ids: of `added`.
        vectors: space -> the vectors of `added` [n, dimension].
        metadata: of `added`, as JSON.
        removed: rows that are gone; may hold some that `added` in the same write never had.
        relabelled: row -> its new metadata, as JSON.
    """

    added: NDArray[np.int64]
    ids: Sequence[str] = ()
    vectors: Mapping[str, NDArray[np.float32]]
    metadata: Sequence[str]
    removed: NDArray[np.int64]
    relabelled: Mapping[int, str] = field(default_factory=dict)


NOTHING = Changes(
    added=np.empty(0, np.int64), vectors={}, metadata=(), removed=np.empty(0, np.int64)
)


def upsert(
    store: Store,
    connection: sqlite3.Connection,
    records: Sequence[CheckedRecord],
    *,
    replace: bool,
    on_duplicate: OnDuplicate,
) -> tuple[list[UpsertOutcome], Changes]:
    """Write records in order; see `Collection.upsert` and `Collection.insert`."""
    (last,) = connection.execute("SELECT last_number FROM collection").fetchone()
    batch = _Batch(store, connection, last)
    batch.load("id", [record.id for record in records])
    if on_duplicate != "add":
        batch.load("content_hash", [r.content_hash for r in records if r.content_hash is not None])
    outcomes = [batch.put(record, replace=replace, on_duplicate=on_duplicate) for record in records]
    return outcomes, batch.write()


def delete_ids(
    store: Store, connection: sqlite3.Connection, ids: Iterable[str]
) -> tuple[int, Changes]:
    """Delete the records with these ids; how many there were."""
    return delete_rows(store, connection, rows_of(connection, ids))


def delete_rows(
    store: Store, connection: sqlite3.Connection, rows: Sequence[int]
) -> tuple[int, Changes]:
    """Delete the records with these rows, which exist."""
    listed = json.dumps(list(rows))
    for table in ("records", *store.tables().values()):
        connection.execute(
            f"DELETE FROM {table} WHERE row IN (SELECT value FROM json_each(?))", (listed,)
        )
    removed = np.array(sorted(rows), dtype=np.int64)
    return len(rows), Changes(added=NOTHING.added, vectors={}, metadata=(), removed=removed)


@dataclass(eq=False, kw_only=True)
class _Known:
    """A record as the batch leaves it so far."""

    key: int
    id: str
    row: int
    metadata: str
    content_hash: str | None
    vectors: Mapping[str, NDArray[np.float32]] | None = None  # None: as they are in the store
    stored_row: int | None = None  # None: the batch made the record
    is_changed: bool = False
    thumbnail: bytes | None = None


class _Batch:
    """Works a batch out in memory and writes what it comes to, table by table."""

    def __init__(self, store: Store, connection: sqlite3.Connection, last_number: int) -> None:
        self._store = store
        self._connection = connection
        self._last_number = last_number
        self._known: dict[str, _Known] = {}
        self._by_hash: dict[str, str] = {}

    def load(self, column: str, values: Sequence[str]) -> None:
        """Read the records that have one of `values` in `column`."""
        found = self._connection.execute(
            "SELECT key, id, row, metadata, content_hash FROM records "
            f"WHERE {column} IN (SELECT value FROM json_each(?)) ORDER BY key",
            (json.dumps(values),),
        )
        for key, record_id, row, metadata, content_hash in found:
            self._known.setdefault(
                record_id,
                _Known(
                    key=key,
                    id=record_id,
                    row=row,
                    metadata=metadata,
                    content_hash=content_hash,
                    stored_row=row,
                ),
            )
            self._note_content(self._known[record_id])

    def put(
        self, record: CheckedRecord, *, replace: bool, on_duplicate: OnDuplicate
    ) -> UpsertOutcome:
        known = self._known.get(record.id)
        if known is not None:
            outcome: Outcome = self._replace(known, record) if replace else "exists"
            return UpsertOutcome(record.id, outcome)
        if on_duplicate != "add" and (twin := self._twin(record.content_hash)) is not None:
            outcome = self._replace(twin, record) if on_duplicate == "update" else "skipped"
            return UpsertOutcome(record.id, outcome, same_as=twin.id)
        number = self._next_number()
        self._known[record.id] = _Known(
            key=number,
            id=record.id,
            row=number,
            metadata=record.metadata_json,
            content_hash=record.content_hash,
            vectors=record.vectors,
            is_changed=True,
            thumbnail=record.thumbnail,
        )
        self._note_content(self._known[record.id])
        return UpsertOutcome(record.id, "created")

    def write(self) -> Changes:
        changed = [known for known in self._known.values() if known.is_changed]
        if not changed:
            return NOTHING
        now = time.time()
        # In order of rows, so that every table grows at its end.
        fresh = sorted((k for k in changed if k.vectors is not None), key=lambda known: known.row)
        moved = [k.stored_row for k in fresh if k.stored_row is not None]
        relabelled = {k.row: k.metadata for k in changed if k.vectors is None}
        self._connection.execute("UPDATE collection SET last_number = ?", (self._last_number,))
        self._connection.executemany(
            "UPDATE records SET row = ?, metadata = ?, content_hash = ?, updated_at = ? "
            "WHERE key = ?",
            (
                (k.row, k.metadata, k.content_hash, now, k.key)
                for k in changed
                if k.stored_row is not None
            ),
        )
        self._connection.executemany(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (k.key, k.id, k.row, k.metadata, k.content_hash, now, now)
                for k in changed
                if k.stored_row is None
            ),
        )
        for space, table in self._store.tables().items():
            self._connection.executemany(
                f"DELETE FROM {table} WHERE row = ?", ((row,) for row in moved)
            )
            self._connection.executemany(
                f"INSERT INTO {table} VALUES (?, ?)", _vector_rows(fresh, space)
            )
        self._connection.executemany(
            "INSERT OR REPLACE INTO thumbnails VALUES (?, ?)",
            ((k.key, k.thumbnail) for k in changed if k.thumbnail is not None),
        )
        return Changes(
            added=np.array([k.row for k in fresh], dtype=np.int64),
            vectors={
                space: np.stack([k.vectors[space] for k in fresh if k.vectors is not None])
                for space in self._store.spaces
            }
            if fresh
            else {},
            ids=[k.id for k in fresh],
            metadata=[k.metadata for k in fresh],
            removed=np.array(sorted(moved), dtype=np.int64),
            relabelled=relabelled,
        )

    def _replace(self, known: _Known, record: CheckedRecord) -> Outcome:
        stored = known.vectors
        if stored is None:
            stored = self._store.stored_vectors(self._connection, known.row)
        is_same_content = known.content_hash == record.content_hash
        rounding = _ROUNDING if is_same_content and known.content_hash is not None else 0.0
        has_new_vectors = any(
            not _are_equal(stored[space], vector, rounding)
            for space, vector in record.vectors.items()
        )
        if not has_new_vectors and known.metadata == record.metadata_json and is_same_content:
            return "unchanged"
        known.metadata = record.metadata_json
        known.content_hash = record.content_hash
        known.is_changed = True
        self._note_content(known)
        if record.thumbnail is not None:
            known.thumbnail = record.thumbnail
        if has_new_vectors:
            known.vectors = record.vectors
            known.row = self._next_number()
        return "updated"

    def _note_content(self, known: _Known) -> None:
        """Keep in mind which record is the oldest with its content."""
        if known.content_hash is not None:
            first = self._known[self._by_hash.setdefault(known.content_hash, known.id)]
            if first.content_hash == known.content_hash and known.key < first.key:
                self._by_hash[known.content_hash] = known.id

    def _twin(self, content_hash: str | None) -> _Known | None:
        """The record with this content, if there is one."""
        if content_hash is None or content_hash not in self._by_hash:
            return None
        known = self._known[self._by_hash[content_hash]]
        if known.content_hash == content_hash:
            return known
        # An earlier record of the batch has changed that one's content.
        same = (k for k in self._known.values() if k.content_hash == content_hash)
        return min(same, key=lambda known: known.key, default=None)

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number


def _vector_rows(
    records: Sequence[_Known], space: str
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for known in records:
        if known.vectors is not None:
            yield known.row, np.ascontiguousarray(known.vectors[space], dtype="<f4")


def _are_equal(one: NDArray[np.float32], other: NDArray[np.float32], rounding: float) -> bool:
    """Whether they differ by no more than that share of their length."""
    if not rounding or one.tobytes() == other.tobytes():
        return one.tobytes() == other.tobytes()
    exact = one.astype(np.float64)  # whose squares do not overflow
    return bool(np.linalg.norm(exact - other) <= rounding * np.linalg.norm(exact))
