"""A collection of vectors: durable, searchable, safe to use from many threads.

with CollectionSet(Path("collections")) as collections:
    pictures = collections.get_or_create("pictures", spaces={"cls": 384}, model="sha256:...")
    pictures.upsert([NewRecord("a.jpg", {"cls": vector}, {"label": "cat"})])
    pictures.search(vector, k=10, filter={"must": {"key": "label", "match": {"value": "cat"}}})
"""

import json
import re
from collections import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from index import writes
from index.builder import Builder
from index.checking import check
from index.errors import (
    InvalidCursor,
    InvalidFilter,
    InvalidVector,
    ModelMismatch,
    RecordNotFound,
)
from index.filters import parse_filter
from index.kinds import IndexSettings, check_fit
from index.maintenance import BuildPolicy, Maintenance
from index.mirror import Mirror
from index.records import (
    Match,
    NewRecord,
    OnDuplicate,
    Page,
    Record,
    UpsertOutcome,
    check_ids,
    check_positive,
    check_queries,
    check_query,
    check_record,
)
from index.statistics import Stats, gather_stats
from index.store import Store, count_records
from index.writes import NOTHING

__all__ = ["Collection", "Match", "NewRecord", "Page", "Record", "UpsertOutcome"]

Filter = Mapping[str, Any]


class Collection:
    """Records with named vectors. Made and opened by `CollectionSet`.

    A write is on disk and searchable when its method returns. Any method may raise `StoreDamaged`
    or `StoreFailed`, and `CollectionNotFound` once the collection was closed or deleted.

    Filters are as `index.filters` reads them; what is wrong with one raises `InvalidFilter`.

    Attributes:
        name: the collection's name.
        model: the fingerprint of the model that made the vectors.
        spaces: space -> dimension; every record has one vector in each.
        metric: "cosine", "ip" (inner product) or "l2" (Euclidean distance).
        created_at: Unix seconds.
    """

    def __init__(self, folder: Path, *, name: str, builder: Builder, policy: BuildPolicy) -> None:
        self.name = name
        self._store = Store(folder, name=name)
        self.model = self._store.model
        self.spaces = dict(self._store.spaces)
        self.metric = self._store.metric
        self.created_at = self._store.created_at
        try:
            self._mirror = Mirror(self._store, name=name)
        except BaseException:
            self._store.close()
            raise
        self._builder = builder
        self._maintenance = Maintenance(self._mirror, policy)
        builder.wake(self._maintenance)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._store.database.is_closed

    @property
    def settings(self) -> IndexSettings:
        """The kind of index that is asked for; `stats` tells what there is."""
        return self._mirror.settings

    def upsert(
        self,
        records: Sequence[NewRecord],
        *,
        on_duplicate: OnDuplicate = "add",
        model: str | None = None,
    ) -> list[UpsertOutcome]:
        """Write records, all or none; one outcome for each, in order.

        An id that occurs twice is written twice, so the last one stays. A record that is there
        already with the same content hash, metadata and vectors is not rewritten.

        Args:
            on_duplicate: what becomes of a new id whose content hash another record has: "add" it
                all the same, "skip" it, or "update" the other record (the oldest such) with what is
                given, under the id that it has.
            model: the fingerprint of the model that made the vectors, to be checked.

        Raises:
            InvalidRecord, InvalidVector: naming the record; nothing was written.
            ModelMismatch: `model` is not the collection's.
        """
        return self._write(records, replace=True, on_duplicate=on_duplicate, model=model)

    def insert(
        self,
        records: Sequence[NewRecord],
        *,
        on_duplicate: OnDuplicate = "add",
        model: str | None = None,
    ) -> list[UpsertOutcome]:
        """`upsert` that leaves a record whose id is taken as it is: its outcome is "exists"."""
        return self._write(records, replace=False, on_duplicate=on_duplicate, model=model)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete records, all or none; how many existed."""
        ids = check_ids(ids)
        deleted = self._mirror.commits.run(
            lambda connection: writes.delete_ids(self._store, connection, ids)
        )
        self._builder.wake(self._maintenance)
        return deleted

    def delete_where(self, filter: Filter) -> int:  # noqa: A002
        """Delete the records that pass a filter, all or none; how many there were.

        Raises:
            InvalidFilter: also for a filter without conditions, which would delete everything.
        """
        chosen = parse_filter(filter)
        if chosen is None:
            raise InvalidFilter(
                "filter: has no condition, so all records would be deleted; delete the collection, "
                "or name what is to go"
            )
        self._mirror.select(chosen)  # reads metadata now, before others have to wait for it
        deleted = self._mirror.commits.run(
            lambda connection: writes.delete_rows(
                self._store, connection, self._mirror.matching_rows(chosen).tolist()
            ),
            alone=True,  # so that the rows in memory are those of the store
        )
        self._builder.wake(self._maintenance)
        return deleted

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

    def count(self, filter: Filter | None = None) -> int:  # noqa: A002
        """How many records there are, or pass a filter."""
        if filter is None:
            view = self._mirror.current()
            return view.count - view.dead
        return len(self._mirror.matching_rows(parse_filter(filter)))

    def scroll(
        self,
        *,
        limit: int,
        cursor: str | None = None,
        filter: Filter | None = None,  # noqa: A002
        with_vectors: bool = False,
    ) -> Page:
        """A page of records in order of first insertion, without vectors unless asked for.

        `cursor` is None for the first page and the last page's `next_cursor` after that. What is
        added or deleted between two pages moves no other record from page to page.

        Raises:
            InvalidCursor: not a cursor that came from here.
        """
        check_positive(limit=limit)
        after = 0 if cursor is None else _key_from_cursor(cursor)
        chosen = None if filter is None else parse_filter(filter)

        def read(among: NDArray[np.int64] | None = None) -> list[tuple[int, Record]]:
            return self._store.records_after(
                after, limit + 1, with_vectors=with_vectors, among=among
            )

        if chosen is None:
            found = read()
        else:
            found = self._mirror.between_writes(lambda: read(self._mirror.matching_rows(chosen)))
        shown = found[:limit]
        is_last = len(found) == len(shown)
        return Page([record for _, record in shown], None if is_last else f"{shown[-1][0]:x}")

    def search(
        self,
        vector: ArrayLike,
        *,
        k: int,
        space: str = "cls",
        filter: Filter | None = None,  # noqa: A002
        min_score: float | None = None,
        exclude: abc.Collection[str] = (),
        model: str | None = None,
    ) -> list[Match]:
        """The k records nearest to `vector` [dimension], best first.

        Fewer than k only where no more pass the filter and `exclude`; matches below `min_score` are
        cut off after that. Scores are the cosine, the inner product or, of "l2", minus the
        distance, so that the greater is always the nearer. Flat indexes are exact, and of equal
        scores the vector that was written first comes first; other kinds find the part of the
        neighbours that `settings.target_recall` asks for, where they can.

        Args:
            exclude: ids that are left out and do not count.
            model: the fingerprint of the model that made the vector, to be checked.

        Raises:
            InvalidVector: the vector does not fit the space, or the space does not exist.
            ModelMismatch: `model` is not the collection's.
        """
        check_positive(k=k)
        self._check_model(model)
        query = check_query(vector, self._dimension(space), self.metric, described="the query")
        excluded = check_ids(exclude)
        matches = None
        if filter is None and not excluded:
            matches = self._mirror.search_one(space, query, k)
        if matches is None:
            chosen = None if filter is None else parse_filter(filter)
            (matches,) = self._mirror.search(
                space, query[np.newaxis], k, chosen=chosen, exclude=excluded
            )
        if min_score is None:
            return matches
        return [match for match in matches if match.score >= min_score]

    def search_batch(
        self,
        vectors: ArrayLike,
        k: int,
        space: str = "cls",
        *,
        filter: Filter | None = None,  # noqa: A002
    ) -> list[list[Match]]:
        """`search` for each row of `vectors` [n, dimension], together and so faster."""
        check_positive(k=k)
        dimension = self._dimension(space)
        queries = check_queries(vectors, dimension, self.metric, described="the queries")
        chosen = None if filter is None else parse_filter(filter)
        return self._mirror.search(space, queries, k, chosen=chosen)

    def configure(self, settings: IndexSettings) -> None:
        """Ask for another kind of index. It is built while the present one answers.

        Raises:
            InvalidSettings: they do not fit the collection's spaces.
        """
        check_fit(settings, self.spaces)

        def write(connection: Any) -> tuple[None, writes.Changes]:
            text = json.dumps(settings.to_dict())
            connection.execute("UPDATE collection SET settings = ?", (text,))
            return None, NOTHING

        with self._mirror.commits.paused():  # so that memory and file have the same in the end
            before = self._mirror.settings
            self._mirror.commits.run(write, alone=True)
            self._mirror.settings = settings
        if settings.target_recall != before.target_recall:
            self._maintenance.force_tuning()
        self._builder.wake(self._maintenance)

    def rebuild(self) -> None:
        """Build the indexes anew from the records, while the present ones answer."""
        self._mirror.current()
        self._maintenance.force_rebuild()
        self._builder.wake(self._maintenance)

    def wait_until_built(self, *, timeout_s: float | None = None) -> bool:
        """Wait until the background has nothing left to do.

        False: it took longer, or it failed (the log tells) and is tried again later.
        """
        self._mirror.current()  # raises once it is closed
        self._builder.wake(self._maintenance)
        return self._builder.wait_until_idle(self._maintenance, timeout_s=timeout_s)

    def stats(self) -> Stats:
        """Counts, sizes, and what stands of the indexes."""
        return gather_stats(
            self._mirror,
            self._maintenance.recall,
            is_building=not self._builder.is_idle(self._maintenance),
        )

    def check(self) -> list[str]:
        """What is wrong with the collection, in words: nothing, unless its files were damaged.

        Reads everything; nothing can be written meanwhile.
        """
        return check(self._mirror)

    def back_up(self, path: Path) -> int:
        """Write a copy of the records as of now to a new file, while writes go on; how many."""
        self._store.database.backup(path)
        return count_records(path)

    def close(self) -> None:
        """Wait for what is running, then close. Closing twice is allowed."""
        self._builder.forget(self._maintenance)
        with self._mirror.commits.paused():
            try:
                if not self.is_closed:
                    self._maintenance.save_unsaved()
            finally:
                self._store.close()
                self._mirror.forget()

    def _write(
        self,
        records: Sequence[NewRecord],
        *,
        replace: bool,
        on_duplicate: OnDuplicate,
        model: str | None,
    ) -> list[UpsertOutcome]:
        self._check_model(model)
        checked = [check_record(record, self.spaces, self.metric) for record in records]
        if not checked:
            return []
        outcomes = self._mirror.commits.run(
            lambda connection: writes.upsert(
                self._store, connection, checked, replace=replace, on_duplicate=on_duplicate
            )
        )
        self._builder.wake(self._maintenance)
        return outcomes

    def _dimension(self, space: str) -> int:
        if space not in self.spaces:
            raise InvalidVector(
                f"collection {self.name!r} has no space {space!r}; it has {sorted(self.spaces)}"
            )
        return self.spaces[space]

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self.model):
            raise ModelMismatch(
                f"collection {self.name!r} holds vectors of model {self.model!r}, which cannot be "
                f"compared with those of {model!r}"
            )


def _key_from_cursor(cursor: str) -> int:
    if re.fullmatch(r"[1-9a-f][0-9a-f]{0,14}", cursor) is None:
        raise InvalidCursor("this cursor did not come from a scroll; start again without one")
    return int(cursor, 16)
