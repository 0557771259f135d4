"""Collections of vectors: durable, searchable, safe to use from many threads.

with CollectionSet(Path("collections")) as collections:
    pictures = collections.get_or_create("pictures", spaces={"cls": 384}, model="sha256:...")
    pictures.upsert([NewRecord("a.jpg", {"cls": vector}, {"label": "cat"})])
    pictures.search(vector, k=10)
"""

import logging
import re
import threading
from collections import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from index.errors import (
    CollectionExists,
    CollectionNotFound,
    InvalidCursor,
    InvalidVector,
    ModelMismatch,
    RecordNotFound,
    StoreDamaged,
    StoreFailed,
)
from index.folder import OwnedFolder
from index.mirror import Mirror
from index.records import (
    Match,
    NewRecord,
    Page,
    Record,
    UpsertOutcome,
    check_ids,
    check_name,
    check_positive,
    check_queries,
    check_record,
    check_vector,
    is_name,
)
from index.store import Store

__all__ = ["Collection", "CollectionSet", "Match", "NewRecord", "Page", "Record", "UpsertOutcome"]

_logger = logging.getLogger(__name__)


class Collection:
    """Records with named vectors. Made and opened by `CollectionSet`.

    A write is on disk and searchable when its method returns. Any method may raise `StoreDamaged`
    or `StoreFailed`, and `CollectionNotFound` once the collection was closed or deleted.

    Attributes:
        name: the collection's name.
        model: the fingerprint of the model that made the vectors.
        spaces: space -> dimension; every record has one vector in each.
        created_at: Unix seconds.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        self.name = name
        self._store = Store(folder, name=name)
        self.model = self._store.model
        self.spaces = dict(self._store.spaces)
        self.created_at = self._store.created_at
        try:
            self._mirror = Mirror(self._store, name=name)
        except BaseException:
            self._store.close()
            raise

    def upsert(self, records: Sequence[NewRecord]) -> list[UpsertOutcome]:
        """Write records, all or none; one outcome for each, in order.

        An id that occurs twice is written twice, so the last one stays. A record that is there
        already with the same content hash, metadata and vectors is not rewritten.

        Raises:
            InvalidRecord, InvalidVector: naming the record; nothing was written.
        """
        checked = [check_record(record, self.spaces) for record in records]
        if not checked:
            return []
        with self._mirror.lock:
            written = self._store.upsert(checked)
            self._mirror.upserted(checked, written)
        return [
            UpsertOutcome(record.id, each.outcome)
            for record, each in zip(checked, written, strict=True)
        ]

    def delete(self, ids: Iterable[str]) -> int:
        """Delete records, all or none; how many existed."""
        ids = check_ids(ids)
        with self._mirror.lock:
            keys = self._store.delete(ids)
            self._mirror.deleted(keys)
        return len(keys)

    def get(self, id: str, *, with_vectors: bool = False) -> Record:  # noqa: A002
        """One record; raises `RecordNotFound`."""
        record = self._store.get(id, with_vectors=with_vectors)
        if record is None:
            raise RecordNotFound(f"collection {self.name!r} has no record {id!r}")
        return record

    def thumbnail(self, id: str) -> bytes:  # noqa: A002
        """A record's thumbnail; raises `RecordNotFound` without the record, or without one."""
        found = self._store.thumbnail(id)
        if found is None:
            raise RecordNotFound(f"collection {self.name!r} has no thumbnail for {id!r}")
        return found

    def count(self) -> int:
        """How many records there are."""
        return self._mirror.count()

    def scroll(self, *, cursor: str | None = None, limit: int) -> Page:
        """A page of records in order of first insertion, without vectors.

        `cursor` is None for the first page and the last page's `next_cursor` after that. What is
        added or deleted between two pages moves no other record from page to page.

        Raises:
            InvalidCursor: not a cursor that came from here.
        """
        check_positive(limit=limit)
        after = 0 if cursor is None else _key_from_cursor(cursor)
        found = self._store.records_after(after, limit + 1)
        shown = found[:limit]
        is_last = len(found) == len(shown)
        return Page([record for _, record in shown], None if is_last else f"{shown[-1][0]:x}")

    def search(
        self,
        vector: ArrayLike,
        *,
        k: int,
        space: str = "cls",
        min_score: float | None = None,
        exclude: abc.Collection[str] = (),
    ) -> list[Match]:
        """The k records nearest to `vector` [dimension] by cosine, best first, ties oldest first.

        Fewer than k only where there are no more. The ids in `exclude` are left out and do not
        count; matches below `min_score` are cut off.

        Raises:
            InvalidVector: the vector does not fit the space, or the space does not exist.
        """
        check_positive(k=k)
        query = check_vector(vector, self._dimension(space), described="the query")
        (matches,) = self._mirror.search(space, query[np.newaxis], k, check_ids(exclude))
        return [match for match in matches if min_score is None or match.score >= min_score]

    def search_batch(self, vectors: ArrayLike, k: int, space: str = "cls") -> list[list[Match]]:
        """`search` for each row of `vectors` [n, dimension], together and so faster."""
        check_positive(k=k)
        queries = check_queries(vectors, self._dimension(space), described="the queries")
        return self._mirror.search(space, queries, k)

    def close(self) -> None:
        """Wait for what is running, then close. Closing twice is allowed."""
        with self._mirror.lock:
            self._mirror.forget()
            self._store.close()

    def _dimension(self, space: str) -> int:
        if space not in self.spaces:
            raise InvalidVector(
                f"collection {self.name!r} has no space {space!r}; it has {sorted(self.spaces)}"
            )
        return self.spaces[space]


class CollectionSet:
    """A folder of collections, owned by one process. A context manager.

    Opening it opens every collection there and clears what an earlier crash left half done. A
    damaged collection does not keep the others from opening: it is logged, stands in `damaged` and
    among `names()`, and is reported by whoever asks for it; `delete` removes it.

    Raises:
        StoreInUse: another process, or another `CollectionSet`, has the folder.
    """

    def __init__(self, root: Path) -> None:
        self.damaged: dict[str, StoreDamaged] = {}
        self._open: dict[str, Collection] = {}
        # For making, deleting and closing. Looking up is one read of a dictionary.
        self._lock = threading.RLock()
        self._folder = OwnedFolder(root)
        try:
            for name in self._folder.subfolders():
                if is_name(name):
                    self._open_one(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Every collection's name, sorted; damaged ones too."""
        return sorted([*self._open, *self.damaged])

    def get(self, name: str) -> Collection:
        """An open collection; raises `CollectionNotFound`, or `StoreDamaged` where it is."""
        collection = self._open.get(name)
        if collection is not None:
            return collection
        if name in self.damaged:
            raise StoreDamaged(*self.damaged[name].args) from self.damaged[name]
        raise CollectionNotFound(f"there is no collection {name!r}; there are {self.names()}")

    def create(self, name: str, *, spaces: Mapping[str, int], model: str) -> Collection:
        """Make an empty collection; on disk when this returns.

        Args:
            name: 1 to 63 characters out of a-z, 0-9, '_' and '-', the first a letter or digit.
            spaces: name -> dimension.
            model: the fingerprint of the model that the vectors will come from.

        Raises:
            CollectionExists, StoreFailed.
            InvalidName, InvalidVector: the name, or the spaces, cannot be.
        """
        check_name(name)
        with self._lock:
            if self._folder.has(name):
                raise CollectionExists(f"there is a collection {name!r} already")
            with self._folder.making(name) as folder:
                Store.create(folder, spaces=spaces, model=model)
            self._open_one(name)
            return self.get(name)

    def get_or_create(self, name: str, *, spaces: Mapping[str, int], model: str) -> Collection:
        """`get`, or `create` where there is none.

        Raises:
            ModelMismatch, InvalidVector: it exists with another model, or with other spaces.
        """
        with self._lock:
            if name not in self.names():
                return self.create(name, spaces=spaces, model=model)
            collection = self.get(name)
        if collection.model != model:
            raise ModelMismatch(
                f"collection {name!r} holds vectors of model {collection.model!r}, which cannot be "
                f"compared with those of {model!r}"
            )
        if collection.spaces != dict(spaces):
            raise InvalidVector(
                f"collection {name!r}: expected spaces {dict(spaces)}, it has {collection.spaces}"
            )
        return collection

    def delete(self, name: str) -> None:
        """Remove a collection with all in it; raises `CollectionNotFound`, `StoreFailed`."""
        with self._lock:
            if name not in self.damaged:
                self.get(name).close()
            try:
                self._folder.remove(name)
            except StoreFailed:
                if name in self._open:
                    self._open_one(name)  # it is still there, so it must not stay closed
                raise
            self._open.pop(name, None)
            self.damaged.pop(name, None)

    def close(self) -> None:
        """Close every collection and let others have the folder. Closing twice is allowed."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
            self.damaged.clear()
            self._folder.release()

    def _open_one(self, name: str) -> None:
        try:
            self._open[name] = Collection(self._folder.root / name, name=name)
        except StoreDamaged as error:
            _logger.error("%s", error)
            self.damaged[name] = error


def _key_from_cursor(cursor: str) -> int:
    if re.fullmatch(r"[1-9a-f][0-9a-f]{0,14}", cursor) is None:
        raise InvalidCursor("this cursor did not come from a scroll; start again without one")
    return int(cursor, 16)
