"""Ids and metadata of rows in memory: to ask the store would be half of what a search takes."""

import sys
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_TEXT = 1024
"""Characters of metadata, as JSON, that are kept here; longer ones stay in the store alone."""


class Labels:
    """The id and the metadata of the row at each position.

    One thread at a time appends and sets; any number of others read positions that were there when
    they began.
    """

    def __init__(self) -> None:
        self._ids: list[str | None] = []
        self._texts: list[str | None] = []
        self._bytes = 0

    def extend(self, ids: Iterable[str | None], metadata: Iterable[str | None]) -> None:
        """Append rows: ids, and metadata as JSON; None for both of a row that is gone."""
        for record_id, text in zip(ids, metadata, strict=True):
            kept = text if text is not None and len(text) <= MAX_TEXT else None
            self._ids.append(record_id)
            self._texts.append(kept)
            self._bytes += _size(record_id) + _size(kept)

    def set(self, position: int, metadata: str) -> None:
        """Other metadata for a position that is here."""
        kept = metadata if len(metadata) <= MAX_TEXT else None
        self._bytes += _size(kept) - _size(self._texts[position])
        self._texts[position] = kept

    def of(self, position: int) -> tuple[str, str] | None:
        """Id and metadata of the row at a position; None: the store knows."""
        record_id, text = self._ids[position], self._texts[position]
        return None if record_id is None or text is None else (record_id, text)

    def at(self, positions: NDArray[np.int64]) -> "Labels":
        """Those whose positions 0, 1, ... are the given ones of this."""
        taken = Labels()
        taken.take(self, positions)
        return taken

    def take(self, other: "Labels", positions: NDArray[np.int64]) -> None:
        """Append the rows at these positions of another."""
        chosen = positions.tolist()
        self.extend([other._ids[i] for i in chosen], [other._texts[i] for i in chosen])

    def copy(self, other: "Labels", its: int, own: int) -> None:
        """Put another's row at its position `its` in the place of the one at `own`."""
        for mine, theirs in ((self._ids, other._ids), (self._texts, other._texts)):
            self._bytes += _size(theirs[its]) - _size(mine[own])
            mine[own] = theirs[its]

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def memory_bytes(self) -> int:
        """What the texts take, and the lists of them."""
        lists: Sequence[list[str | None]] = (self._ids, self._texts)
        return self._bytes + sum(map(sys.getsizeof, lists))


def _size(text: str | None) -> int:
    return 0 if text is None else sys.getsizeof(text)
