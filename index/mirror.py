"""A store's vectors in memory: built from it, kept in step with each commit, and searched."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from index.ann import FlatIndex
from index.errors import StoreDamaged
from index.records import CheckedRecord, Match
from index.store import Store, Written

_logger = logging.getLogger(__name__)


class Mirror:
    """One index for each space of a store.

    Attributes:
        lock: whoever writes holds it from before the commit until `upserted` or `deleted` returned,
            so that under it store and mirror agree.
    """

    def __init__(self, store: Store, *, name: str) -> None:
        self.lock = threading.RLock()
        self._store = store
        self._name = name
        # None: memory may differ from the store and must be built anew.
        self._indexes: dict[str, FlatIndex] | None = None
        self.indexes()

    def indexes(self) -> dict[str, FlatIndex]:
        """space -> index; reads the whole store where that has not been done yet."""
        indexes = self._indexes
        if indexes is None:
            with self.lock:
                indexes = self._indexes = self._indexes or self._build()
        return indexes

    def count(self) -> int:
        """How many records there are: each has a vector in every space, so any space tells."""
        return len(next(iter(self.indexes().values())))

    def search(
        self, space: str, queries: NDArray[np.float32], k: int, exclude: Sequence[str] = ()
    ) -> list[list[Match]]:
        """The k nearest records to each query [n, dimension], without the ids in `exclude`."""
        matches = self._try_search(space, queries, k, exclude)
        if matches is None:
            # Between a deletion's commit and `deleted`, the index holds what the store no longer
            # has. Dropping it would give fewer than k, so wait for the writer and look again.
            with self.lock:
                matches = self._try_search(space, queries, k, exclude)
        if matches is None:
            raise StoreDamaged(f"collection {self._name!r}: records have gone from its file")
        return matches

    def upserted(self, records: Sequence[CheckedRecord], written: Sequence[Written]) -> None:
        """Follow a commit of `records`; `written` says of each what it came to."""
        # By key, so that of an id that came twice the last vectors stay.
        changed = {
            each.key: record.vectors
            for record, each in zip(records, written, strict=True)
            if each.vectors_changed
        }
        keys = np.array(list(changed), dtype=np.int64)

        def change() -> None:
            for space, index in self.indexes().items():
                if changed:
                    index.upsert(keys, np.stack([vectors[space] for vectors in changed.values()]))

        self._follow(change)

    def deleted(self, keys: Sequence[int]) -> None:
        """Follow a commit that deleted `keys`."""

        def change() -> None:
            for index in self.indexes().values():
                index.remove(np.array(keys, dtype=np.int64))

        self._follow(change)

    def forget(self) -> None:
        """Free the memory; the store is read again when next needed."""
        self._indexes = None

    def _try_search(
        self, space: str, queries: NDArray[np.float32], k: int, exclude: Sequence[str]
    ) -> list[list[Match]] | None:
        """None where the index found a record that the store does not have."""
        excluded = np.array(self._store.keys_of(exclude) if exclude else [], dtype=np.int64)
        found = self.indexes()[space].search(queries, k, exclude=excluded)
        keys = {key for hits in found for key in hits.keys.tolist()}
        labels = self._store.labels_of(keys)
        if len(labels) != len(keys):
            return None
        return [
            [
                Match(labels[key][0], score, labels[key][1])
                for key, score in zip(hits.keys.tolist(), hits.scores.tolist(), strict=True)
            ]
            for hits in found
        ]

    def _follow(self, change: Callable[[], None]) -> None:
        """The commit stands whatever happens here, so a failure must not leave a stale index."""
        try:
            change()
        except Exception:
            _logger.exception("collection %r: building its index anew", self._name)
            self.forget()
            self.indexes()
        except BaseException:  # an interrupt: leave now, build when next needed
            self.forget()
            raise

    def _build(self) -> dict[str, FlatIndex]:
        indexes = {}
        for space, dimension in self._store.spaces.items():
            indexes[space] = FlatIndex(dimension)
            # Closed by hand: after an error the generator would keep its connection for as long as
            # somebody holds the traceback, and closing the store waits for it.
            with closing(self._store.vectors_in(space)) as blocks:
                for keys, vectors in blocks:
                    indexes[space].upsert(keys, vectors)
        return indexes
