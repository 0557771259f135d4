"""The metadata of rows in memory, by key: what filters are evaluated on."""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.columns import Column, value_at

_MOST_COLUMNS = 64  # keys that anybody may ask for must not fill the memory


class MetadataTable:
    """A column for each key that a filter has asked for, with a value for each position.

    Of many keys those asked for last are kept. One thread at a time appends, sets and adds, and
    sees to it that every column has all positions; any number of others read.
    """

    def __init__(self) -> None:
        self._columns: OrderedDict[str, Column] = OrderedDict()
        self._lock = threading.Lock()

    def columns(self, keys: Collection[str]) -> Mapping[str, Column]:
        """Those of the keys' columns that are here."""
        with self._lock:
            found = {key: self._columns[key] for key in keys if key in self._columns}
            for key in found:
                self._columns.move_to_end(key)
        return found

    def add(self, columns: Mapping[str, Column], *, beside: Collection[str] = ()) -> None:
        """Keep columns that have all positions, and let others go that are too many.

        Those of the keys `beside` stay.
        """
        with self._lock:
            self._columns.update(columns)
            spare = [key for key in self._columns if key not in columns and key not in beside]
            for key in spare[: max(0, len(self._columns) - _MOST_COLUMNS)]:
                del self._columns[key]

    def append(self, metadata: Sequence[str]) -> None:
        """Metadata (JSON objects) of the positions that follow."""
        columns = self._all()
        if not columns:
            return
        objects: list[dict[str, Any]] = [json.loads(text) for text in metadata]
        for key, column in columns:
            column.extend([value_at(each, key) for each in objects])

    def set(self, position: int, metadata: str) -> None:
        """Other metadata for a position that is here."""
        for key, column in self._all():
            column.set(position, value_at(json.loads(metadata), key))

    def at(self, positions: NDArray[np.int64]) -> "MetadataTable":
        """A table whose positions 0, 1, ... are the given ones of this."""
        taken = MetadataTable()
        taken.add({key: column.at(positions) for key, column in self._all()})
        return taken

    @property
    def memory_bytes(self) -> int:
        """What the columns take."""
        return sum(column.memory_bytes for _, column in self._all())

    def _all(self) -> list[tuple[str, Column]]:
        with self._lock:
            return list(self._columns.items())
