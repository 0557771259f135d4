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
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._bytes = 0

    def extend(self, ids: Iterable[str], metadata: Iterable[str]) -> None:
        """Append rows: ids, and metadata as JSON; "" for both of a row that is gone."""
        for record_id, text in zip(ids, metadata, strict=True):
            kept = _kept(text)
            self._ids.append(record_id)
            self._texts.append(kept)
            self._bytes += sys.getsizeof(record_id) + sys.getsizeof(kept)

    def set(self, position: int, metadata: str) -> None:
        """Other metadata for a position that is here."""
        kept = _kept(metadata)
        self._bytes += sys.getsizeof(kept) - sys.getsizeof(self._texts[position])
        self._texts[position] = kept

    def of(self, positions: Sequence[int]) -> tuple[list[str], list[str]]:
        """Ids, and metadata as JSON, of the rows at these positions; "" where the store knows."""
        ids, texts = self._ids, self._texts
        return [ids[position] for position in positions], [
            texts[position] for position in positions
        ]

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
            self._bytes += sys.getsizeof(theirs[its]) - sys.getsizeof(mine[own])
            mine[own] = theirs[its]

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def memory_bytes(self) -> int:
        """What the texts take, and the lists of them."""
        lists: Sequence[list[str]] = (self._ids, self._texts)
        return self._bytes + sum(map(sys.getsizeof, lists))


def _kept(text: str) -> str:
    return text if len(text) <= MAX_TEXT else ""
