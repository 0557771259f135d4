"""Nearest neighbours in memory. The only file that imports faiss.

Nothing here is kept on disk: all of it can be rebuilt from the store.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from index.records import normalise


@dataclass(frozen=True, eq=False)
class Hits:
    """One query's neighbours, best first: `keys` int64 [m], `scores` float32 [m], m <= k."""

    keys: NDArray[np.int64]
    scores: NDArray[np.float32]


class FlatIndex:
    """Exact search by cosine over float32 vectors that carry integer keys.

    Safe to use from many threads. Rows are normalised on their way in, so that the inner product is
    the cosine; they must be finite and not all zero.
    """

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._highest_key = -1
        # Searches run side by side (faiss lets go of the interpreter lock), so a plain lock would
        # queue them behind one another; a change must be alone.
        self._lock = _ReadWriteLock()

    def __len__(self) -> int:
        with self._lock.reading():
            return int(self._index.ntotal)

    def upsert(self, keys: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Put vectors [n, dimension] under distinct keys [n], in place of any that are there."""
        if not len(keys):
            return
        keys = np.ascontiguousarray(keys, dtype=np.int64)
        unit = np.ascontiguousarray(normalise(vectors))
        with self._lock.writing():
            # IDMap2 would keep two vectors under one key in silence, so the old ones go first. The
            # store's keys only grow: above the highest there is nothing to look for, and a bulk
            # load is spared a pass over the whole index for each batch.
            self._remove(keys[keys <= self._highest_key])
            self._index.add_with_ids(unit, keys)
            self._highest_key = max(self._highest_key, int(keys.max()))

    def remove(self, keys: NDArray[np.int64]) -> None:
        """Take keys [n] out, in one pass over the whole index; absent ones are no error."""
        with self._lock.writing():
            self._remove(np.ascontiguousarray(keys, dtype=np.int64))

    def search(
        self, queries: NDArray[np.float32], k: int, *, exclude: NDArray[np.int64] | None = None
    ) -> list[Hits]:
        """The k best keys for each query [n, dimension], leaving out the keys in `exclude`.

        Fewer than k only where the index has no more. Equal scores stand in order of their keys,
        also where the k-th place is tied.
        """
        excluded = np.empty(0, np.int64) if exclude is None else np.unique(exclude)
        unit = np.ascontiguousarray(normalise(queries))
        hits = [Hits(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in unit]
        with self._lock.reading():
            total = int(self._index.ntotal)
            pending = np.arange(len(unit) if total else 0)
            wanted = k + len(excluded) + 1  # one more shows whether a tie crosses the cut
            while len(pending):
                fetched = min(wanted, total)
                scores, keys = self._index.search(unit[pending], fetched)
                unsettled = []
                for row, row_keys, row_scores in zip(pending, keys, scores, strict=True):
                    hits[row] = _best(row_keys, row_scores, k, excluded)
                    # Whatever was not fetched scores at most row_scores[-1].
                    tied = hits[row].scores[-1:] == row_scores[-1]
                    if fetched < total and (len(hits[row].keys) < k or tied.any()):
                        unsettled.append(row)
                pending = np.array(unsettled, dtype=np.intp)
                wanted *= 4
        return hits

    def _remove(self, keys: NDArray[np.int64]) -> None:
        if len(keys):
            self._index.remove_ids(faiss.IDSelectorBatch(keys))


def _best(
    keys: NDArray[np.int64], scores: NDArray[np.float32], k: int, excluded: NDArray[np.int64]
) -> Hits:
    kept = keys != -1  # faiss fills up with -1 where it found fewer
    if len(excluded):
        kept &= ~np.isin(keys, excluded)
    keys, scores = keys[kept], scores[kept]
    order = np.lexsort((keys, -scores))[:k]
    return Hits(keys[order], scores[order])


class _ReadWriteLock:
    """Many readers or one writer; a waiting writer goes before readers that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._writers_waiting -= 1
                # A writer that was interrupted while waiting must not leave readers asleep.
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
