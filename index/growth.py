"""Room for a faiss structure to grow into, made beside it and not under its lock."""

from collections.abc import Callable
from typing import Any

import numpy as np

from index.large_pages import use_large_pages
from index.locks import ReadWriteLock

# An eighth: copying everything about 8 times on the way to a large structure is next to nothing
# beside building it, and old and new together take little more than twice the old.
_GROWTH = 1.125


class GrowingVector:
    """One of faiss's std::vectors, moved to a larger place before it is full.

    Left to itself it would copy everything under the hold of an addition: seconds for gigabytes.

    Args:
        outer: what faiss changes: the std::vector, or a wrapper that remembers address and size.
        inner: the std::vector.
        item_bytes: the size of an item.
        items_a_row: for each row that the structure holds, on average and rounded up.
        spare: items beyond that.
        copy: (to, from, bytes).
        free: frees what a std::vector holds.
    """

    def __init__(
        self,
        outer: Any,
        inner: Any,
        *,
        item_bytes: int,
        items_a_row: int,
        spare: int,
        copy: Callable[[Any, Any, int], object],
        free: Callable[[Any], None],
    ) -> None:
        self._outer, self._inner = outer, inner
        self._item_bytes, self._items_a_row, self._spare = item_bytes, items_a_row, spare
        self._copy, self._free = copy, free
        self._room = int(inner.size())  # the least that it can be: it cannot be asked
        self._is_settled = False

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory taken, room included."""
        return self._room * self._item_bytes

    def reserve(self, rows: int, lock: ReadWriteLock) -> None:
        """Make room for `rows` in all.

        For the one thread that changes the structure: as nobody else does, it copies while others
        read, and `lock` is held for no longer than changing the address takes.
        """
        needed = rows * self._items_a_row + self._spare
        if needed <= self._room:
            return
        size = int(self._inner.size())
        room = max(needed, int(self._room * _GROWTH), size)
        larger = type(self._inner)()
        larger.resize(room)
        if size:
            self._copy(larger.data(), self._inner.data(), size * self._item_bytes)
        with lock.writing():
            self._inner.swap(larger)
            self._outer.resize(size)  # less than there is room for, so nothing moves
        self._room, self._is_settled = room, False
        self._free(larger)

    def settle(self, should_stop: Callable[[], bool]) -> None:
        """Put it on large pages where it now is. For the thread that changes the structure."""
        if self._room and not self._is_settled:
            at = int(self._inner.data())
            self._is_settled = use_large_pages(at, self.memory_bytes, should_stop=should_stop)


def parts_of_graph(faiss: Any, index: Any, *, row_bytes: int) -> list[GrowingVector]:
    """What grows with each row of an `IndexHNSWFlat`: its graph, and the codes of its storage."""
    graph, codes = index.hnsw, faiss.downcast_index(index.storage).codes

    def free(vector: Any) -> None:
        # Python's own freeing holds the interpreter lock, 50 ms a gigabyte; faiss's calls do not.
        if isinstance(vector, faiss.UInt8Vector):
            holder = faiss.IndexFlatL2(1)
            holder.codes.owned_data.swap(vector)
            holder.permute_entries(np.empty(0, np.int64))

    links = int(graph.nb_neighbors(1))
    parts = [
        (codes, codes.owned_data, 1, row_bytes, 0),
        # 2 · links on the lowest level and about one above it; levels are drawn by lot.
        (graph.neighbors, graph.neighbors.owned_data, 4, 2 * links + 2, 40 * links),
        (graph.levels, graph.levels, 4, 1, 0),
        (graph.offsets, graph.offsets, 8, 1, 1),
    ]
    return [
        GrowingVector(
            outer,
            inner,
            item_bytes=item_bytes,
            items_a_row=items,
            spare=spare,
            copy=faiss.memcpy,
            free=free,
        )
        for outer, inner, item_bytes, items, spare in parts
    ]
