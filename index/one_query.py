"""One query to a graph, by far the commonest search, with as little around it as can be."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.effort import candidates_kept, exact_is_cheaper
from index.locks import ReadWriteLock


@dataclass(frozen=True, eq=False)
class Live:
    """Which positions are still there: bits [⌈positions / 8⌉], the lowest first; `count` are set.

    A value: what was made of it for one search is good for the next.
    """

    bits: NDArray[np.uint8]
    count: int


class OneQuery:
    """Searches a faiss HNSW `index` for one query at a time, from any number of threads.

    What `Ann.search` does takes four times as long around a search of faiss: it makes arrays,
    faiss's pointers to them and its parameters anew.
    """

    def __init__(self, faiss: Any, index: Any, lock: ReadWriteLock) -> None:
        self._faiss, self._index, self._lock = faiss, index, lock
        self._parameters = _Parameters(faiss, None, 0)

    def search(
        self, query: NDArray[np.float32], k: int, *, effort: int, live: Live | None
    ) -> tuple[list[float], list[int]] | None:
        """What faiss calls distances, and positions: the k nearest of `live` to `query` [d].

        None where the graph gives fewer, or looking at each row takes less time.
        """
        kept = candidates_kept(effort, k, 1.0)
        if live is not None:
            rows = int(self._index.ntotal)
            if exact_is_cheaper("hnsw", effort, allowed=live.count, rows=rows, lists=0):
                return None
            kept = candidates_kept(effort, k, min(1.0, live.count / rows))
        parameters = self._parameters
        if parameters.live is not live or parameters.kept != kept:
            parameters = self._parameters = _Parameters(self._faiss, live, kept)
        room = getattr(_of_thread, "room", None)
        if room is None or room.sizes != (len(query), k):
            room = _of_thread.room = _Room(self._faiss, len(query), k)
        room.query[:] = query
        with self._lock.reading():
            self._index.search_c(
                1, room.query_at, k, room.scores_at, room.hits_at, parameters.faiss
            )
        positions: list[int] = room.positions.tolist()
        return None if positions[-1] < 0 else (room.scores.tolist(), positions)


class _Parameters:
    """How to search; to be had again for the next search as long as nothing changes."""

    def __init__(self, faiss: Any, live: Live | None, kept: int) -> None:
        self.live, self.kept = live, kept
        selector = None if live is None else faiss.IDSelectorBitmap(live.bits)
        self.faiss = faiss.SearchParametersHNSW(efSearch=kept, sel=selector)


class _Room:
    """A thread's own room for a query and its hits, with faiss's pointers to it."""

    def __init__(self, faiss: Any, dimension: int, k: int) -> None:
        self.sizes = dimension, k
        self.query = np.empty(dimension, np.float32)
        self.scores, self.positions = np.empty(k, np.float32), np.empty(k, np.int64)
        arrays = (self.query, self.scores, self.positions)
        self.query_at, self.scores_at, self.hits_at = map(faiss.swig_ptr, arrays)


_of_thread = threading.local()
