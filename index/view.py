"""What a search looks at: every row in memory, as it was after one commit."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from index.kinds import Metric
from index.labels import Labels
from index.metadata import MetadataTable
from index.one_query import Live
from index.records import prepared
from index.space import Mask, Positions, Space
from index.writes import Changes

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """Rows in the order of their writing, at positions 0 to `count` - 1.

    A value: each commit gives another. Arrays are longer than `count`, and shared with later views,
    which write behind it alone.

    Attributes:
        numbers: the row at each position, ascending.
        live: whether the store still has it.
        dead: how many of the positions are not live.
        spaces: name -> the vectors of the positions.
        labels: the ids and metadata of the positions.
        table: the metadata of the positions, as far as filters have asked for it.
    """

    numbers: Rows
    live: Mask
    count: int
    dead: int
    spaces: Mapping[str, Space]
    labels: Labels
    table: MetadataTable

    @classmethod
    def empty(cls, spaces: Mapping[str, int], metric: Metric) -> Self:
        """No rows, in spaces of these dimensions."""
        return cls(
            numbers=np.empty(0, np.int64),
            live=np.empty(0, np.bool_),
            count=0,
            dead=0,
            spaces={name: Space(dimension=d, metric=metric) for name, d in spaces.items()},
            labels=Labels(),
            table=MetadataTable(),
        )

    def after(self, changes: Changes) -> Self:
        """What stands after a commit. Only the thread that follows commits calls this."""
        live, dead = self.live, self.dead
        gone = self.positions_of(changes.removed)
        if len(gone):
            # In place, a search that looks at this view would miss what was only replaced.
            live = live.copy()
            live[gone] = False
            dead += len(gone)
        count = self.count + len(changes.added)
        numbers = _grown(self.numbers, count)
        live = _grown(live, count)
        numbers[self.count : count] = changes.added
        live[self.count : count] = True
        self.labels.extend(changes.ids, changes.metadata)
        self.table.append(changes.metadata)
        for row, metadata in changes.relabelled.items():
            for position in self.positions_of(np.array([row])).tolist():
                self.labels.set(position, metadata)
                self.table.set(position, metadata)
        spaces = self.spaces
        if len(changes.added):
            spaces = {
                name: space.extended(prepared(changes.vectors[name], space.metric))
                for name, space in spaces.items()
            }
        return replace(self, numbers=numbers, live=live, count=count, dead=dead, spaces=spaces)

    @cached_property
    def remaining(self) -> Live | None:
        """Which positions are live, packed; None: all."""
        if not self.dead:
            return None
        bits = np.packbits(self.live[: self.count], bitorder="little")
        return Live(bits, self.count - self.dead)

    def with_space(self, name: str, space: Space) -> Self:
        """With other structures for a space that hold the same vectors."""
        return replace(self, spaces={**self.spaces, name: space})

    @property
    def last(self) -> int:
        """The highest row that there is or was; 0 of none."""
        return int(self.numbers[self.count - 1]) if self.count else 0

    def rows_above(self, row: int) -> Rows:
        """The rows here above this one, which need not be here."""
        return self.numbers[np.searchsorted(self.numbers[: self.count], row, "right") : self.count]

    def taken_over(
        self, numbers: Rows, spaces: Mapping[str, Space], *, after: int
    ) -> tuple[Rows, Mapping[str, Space]]:
        """`numbers`, and `spaces` that have their vectors, with the rows here above `after`.

        Those rows must be in blocks.
        """
        more = self.rows_above(after)
        for name, space in spaces.items():
            for vectors in self.spaces[name].unbuilt_from(self.count - len(more)):
                space = space.extended(vectors)
            spaces = {**spaces, name: space}
        return np.concatenate([numbers, more]), spaces

    def labels_of(self, numbers: Rows) -> Labels:
        """The labels of rows of this view, ascending."""
        return self.labels.at(np.searchsorted(self.numbers[: self.count], numbers))

    def rearranged(
        self,
        numbers: Rows,
        spaces: Mapping[str, Space],
        *,
        labels: Labels,
        relabelled: Collection[int],
    ) -> Self:
        """The same rows with those at the positions of `numbers` alone, which are all live ones.

        Args:
            numbers: rows of this view, ascending.
            spaces: their vectors.
            labels: of the first of `numbers`, as they were some time ago.
            relabelled: rows whose labels have changed since.
        """
        at = np.searchsorted(self.numbers[: self.count], numbers)
        for row in relabelled:
            new = int(np.searchsorted(numbers[: len(labels)], row))
            if new < len(labels) and numbers[new] == row:
                labels.copy(self.labels, int(at[new]), new)
        labels.take(self.labels, at[len(labels) :])
        live = self.live[at]
        return replace(
            self,
            numbers=numbers,
            live=live,
            count=len(numbers),
            dead=len(live) - int(np.count_nonzero(live)),
            spaces=spaces,
            labels=labels,
            table=self.table.at(at),
        )

    def positions_of(self, rows: Rows) -> Positions:
        """The positions of those of `rows` that are here and live."""
        numbers = self.numbers[: self.count]
        if not len(numbers) or not len(rows):
            return np.empty(0, np.int64)
        at = np.minimum(np.searchsorted(numbers, rows), len(numbers) - 1)
        found: Positions = at[(numbers[at] == rows) & self.live[at]].astype(np.int64)
        return found

    def allowed(self, mask: Mask | None, exclude: Sequence[int] = ()) -> Mask | None:
        """Which positions count [count]: live, in `mask`, not of the rows `exclude`. None: all."""
        if mask is None and not self.dead and not len(exclude):
            return None
        allowed = self.live[: self.count].copy()
        if mask is not None:
            allowed &= mask
        allowed[self.positions_of(np.asarray(exclude, dtype=np.int64))] = False
        return allowed


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _grown(array: NDArray[_Scalar], count: int) -> NDArray[_Scalar]:
    """The array, or a longer copy of it where `count` does not fit."""
    if count <= len(array):
        return array
    longer = np.zeros(max(count, len(array) + len(array) // 4, 1024), array.dtype)
    longer[: len(array)] = array
    return longer
