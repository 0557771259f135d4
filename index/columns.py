"""Metadata by key, in memory, so that a filter is a few passes over arrays.

A `Column` holds one key's value for every row. Equal values share an *entry*: a row keeps its
entry's number, a condition is decided once for each entry, and a gather brings the answers to the
rows.
"""

import copy
import json
import math
import operator
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from index.errors import InvalidFilter

MAX_KEY_CHARACTERS: Final = 512

MISSING: Final = object()
"""The value of a key that a record's metadata do not have."""

Tagged = str | int | float | tuple[bool]
"""What stands for a scalar in dicts and sets: to Python True is 1, in JSON it is not."""

COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = MappingProxyType(
    {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
)

# The entries that every column begins with. `except` and `exists` fail for the first three; an
# opaque one is an object, or a list within a list, which no condition looks into.
_MISSING, _NULL, _EMPTY_LIST, _OPAQUE, _FALSE, _TRUE = range(6)
_FIRST_EXISTING = _OPAQUE

_INDEX = re.compile(r"\[\d*\]$")


def tagged(scalar: str | int | float | bool) -> Tagged:
    """The scalar itself, a boolean apart: 1 and 1.0 are one value, 1 and True are two."""
    return (scalar,) if isinstance(scalar, bool) else scalar


def value_at(metadata: Mapping[str, Any], key: str) -> object:
    """The value at "a.b", that is metadata["a"]["b"]; `MISSING` where there is none.

    A dot always leads one object deeper; lists are not entered.
    """
    value: object = metadata
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def sqlite_path(key: str, *, place: str = "key") -> str:
    """The right side of SQLite's `metadata -> ?` for "a.b": '$."a"."b"'.

    Older releases of SQLite, 3.40 among them, compare a label with the document's characters as
    they stand, so the metadata must be written by `json.dumps(..., ensure_ascii=False)`, whose
    escapes the path repeats. Tried with SQLite 3.40 and 3.54.

    Raises:
        InvalidFilter: naming `place`: the key cannot be asked for.
    """
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        rule = f"expected a metadata key, a string of 1 to {MAX_KEY_CHARACTERS} characters"
    elif not all(parts := key.split(".")):
        rule = "expected names with single dots between them"
    elif any(_INDEX.search(part) for part in parts):
        rule = (
            "'[]' and '[0]' are not understood; a list is asked for by its plain key, "
            "and any of its elements may fulfil the condition"
        )
    elif '"' in key:  # SQLite 3.40 finds no such label, however it is escaped
        rule = "a key with a double quote cannot be filtered by"
    elif any("\ud800" <= character <= "\udfff" for character in key):
        rule = "half of a surrogate pair is in no metadata"
    else:
        return "$" + "".join("." + json.dumps(part, ensure_ascii=False) for part in parts)
    raise InvalidFilter(f"{place}: {rule}; got {reprlib.repr(key)}")


class Column:
    """One key's values for rows 0..n-1; append-only but for `set`.

    Threads: one writer at a time (`extend`, `extend_json`, `set`) beside any number of readers of
    rows that were there when they began, without a lock. Arrays grow by giving way to bigger
    copies, and what describes the entries is replaced as one. A reader takes `codes` first and asks
    about entries after that, so that each code has its entry. It sees a row that is `set` meanwhile
    as it was or as it is; of two columns it may see one before and one after.

    Args:
        key: the metadata key, dotted.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._codes = _Growing(np.int32)
        self._numbers = _Growing(np.float64)
        self._text_entries = _Growing(np.int32)
        self._texts = _Growing(object)
        self._list_entries = _Growing(np.int32)
        self._list_starts = _Growing(np.int64)
        self._members = _Growing(np.int32)
        self._scalars: dict[Tagged, int] = {(False,): _FALSE, (True,): _TRUE}
        self._lists: dict[tuple[int, ...], int] = {}
        # Integers that float64 rounds, by entry: a comparison that ends in a tie looks here.
        self._rounded: dict[int, int] = {}
        self._object_bytes = 0
        self._numbers.extend(np.full(_TRUE + 1, np.nan))
        self._publish()

    def __len__(self) -> int:
        return self._codes.size

    def at(self, rows: NDArray[np.int64]) -> "Column":
        """A column with the values that these rows of this one have, in this order.

        The two share their entries, so this one must not be written any more.
        """
        taken = copy.copy(self)
        taken._codes = _Growing(np.int32)
        taken._codes.extend(self._codes.filled()[rows])
        return taken

    @property
    def memory_bytes(self) -> int:
        """What the column takes, estimated; entries that no row has any more included."""
        arrays = (
            self._codes,
            self._numbers,
            self._text_entries,
            self._texts,
            self._list_entries,
            self._list_starts,
            self._members,
        )
        dicts = (self._scalars, self._lists, self._rounded)
        containers = sum(array.nbytes for array in arrays) + sum(map(sys.getsizeof, dicts))
        return containers + self._object_bytes

    def extend(self, values: Iterable[object]) -> None:
        """Append rows: decoded JSON values, or `MISSING`.

        Raises:
            TypeError: a value that is not of JSON; nothing was appended.
        """
        codes = np.fromiter(map(self._entry, values), np.int32)
        self._publish()
        self._codes.extend(codes)

    def extend_json(self, texts: Iterable[str | None]) -> None:
        """Append rows: JSON texts, None where missing, as SQLite's `metadata -> ?` gives them.

        Raises:
            ValueError: a text is not one JSON value; nothing was appended.
        """
        texts = list(texts)
        distinct = dict.fromkeys(texts)
        distinct.pop(None, None)
        # One call for all of them: a call costs more than most values do.
        values = json.loads(f"[{','.join(filter(None, distinct))}]")
        if len(values) != len(distinct):
            raise ValueError(f"column {self.key!r}: each text must be one JSON value")
        entries: dict[str | None, int] = {None: _MISSING}
        entries.update(zip(distinct, map(self._entry, values), strict=True))
        codes = np.fromiter(map(entries.__getitem__, texts), np.int32, len(texts))
        self._publish()
        self._codes.extend(codes)

    def set(self, row: int, value: object) -> None:
        """Put a decoded JSON value or `MISSING` in place of a row's value.

        The old value's entry stays, so a column whose values keep changing grows.

        Raises:
            IndexError: there is no such row.
            TypeError: the value is not of JSON.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"column {self.key!r} has {len(self)} rows, no row {row}")
        entry = self._entry(value)
        self._publish()
        self._codes.put(row, entry)

    def codes(self, rows: int) -> NDArray[np.int32]:
        """The entry of each of the first rows: a copy, [rows].

        Raises:
            ValueError: there are fewer rows.
        """
        if rows > len(self):
            raise ValueError(f"column {self.key!r} has {len(self)} rows, not {rows}")
        return self._codes.first(rows)

    def equal_to_any(self, scalars: Collection[Tagged]) -> NDArray[np.bool_]:
        """Which entries are one of the scalars, or lists with one of them: [entries]."""
        entries = self._entries
        holds = np.zeros(entries.count, np.bool_)
        holds[self._found(scalars, entries)] = True
        return entries.or_an_element(holds)

    def other_than(self, scalars: Collection[Tagged]) -> NDArray[np.bool_]:
        """Which entries are something else than these scalars: [entries].

        As in Qdrant: absent and null are not something else, an object is; of a list, one element
        must be.
        """
        entries = self._entries
        holds = np.ones(entries.count, np.bool_)
        holds[:_FIRST_EXISTING] = False
        holds[self._found(scalars, entries)] = False
        return entries.or_an_element(holds)

    def in_range(self, bounds: Iterable[tuple[str, str | int | float]]) -> NDArray[np.bool_]:
        """Which entries, or elements of theirs, fulfil every bound: [entries].

        A bound is one of `COMPARISONS` and a finite number or a string. Numbers compare by their
        exact values, strings by code points; a number with a string never holds.
        """
        entries = self._entries
        holds = np.ones(entries.count, np.bool_)
        for name, bound in bounds:
            if isinstance(bound, str):
                within = np.zeros(entries.count, np.bool_)
                # An array, since numpy would turn a plain string into one that drops final NULs.
                within[entries.text_entries] = COMPARISONS[name](
                    entries.texts, np.array(bound, dtype=object)
                )
                holds &= within
            else:
                holds &= self._compared(entries.numbers, COMPARISONS[name], bound)
        return entries.or_an_element(holds)

    def exists(self) -> NDArray[np.bool_]:
        """Which entries are more than nothing, null or an empty list: [entries]."""
        holds = np.ones(self._entries.count, np.bool_)
        holds[:_FIRST_EXISTING] = False
        return holds

    def _compared(
        self, numbers: NDArray[np.float64], compare: Callable[[Any, Any], Any], bound: int | float
    ) -> NDArray[np.bool_]:
        nearest = _nearest_float(bound)
        holds: NDArray[np.bool_] = compare(numbers, nearest)
        # Rounding keeps the order and at worst makes two numbers equal, so only ties are in doubt.
        if self._rounded or nearest != bound:
            for entry in np.flatnonzero(numbers == nearest).tolist():
                exact = self._rounded.get(entry, float(numbers[entry]))
                holds[entry] = compare(exact, bound)
        return holds

    def _found(self, scalars: Collection[Tagged], entries: "_Entries") -> list[int]:
        # A writer may be adding entries that came after the ones in hand.
        found = map(self._scalars.get, scalars)
        return [entry for entry in found if entry is not None and entry < entries.count]

    def _entry(self, value: object) -> int:
        """The number of a value's entry, made where there is none. Not yet seen by readers."""
        if isinstance(value, bool):
            return _TRUE if value else _FALSE
        if isinstance(value, (str, int, float)):
            return self._scalar_entry(value)
        if isinstance(value, list):
            if not value:
                return _EMPTY_LIST
            members = (_OPAQUE if isinstance(each, list) else self._entry(each) for each in value)
            return self._list_entry(tuple(sorted(set(members))))
        if isinstance(value, Mapping):
            return _OPAQUE
        if value is None:
            return _NULL
        if value is MISSING:
            return _MISSING
        raise TypeError(f"column {self.key!r}: {type(value).__name__} is not a type of JSON")

    def _scalar_entry(self, scalar: str | int | float) -> int:
        entry = self._scalars.get(scalar)
        if entry is not None:
            return entry
        entry = self._numbers.size
        if isinstance(scalar, str):
            self._numbers.append(math.nan)
            self._text_entries.append(entry)
            self._texts.append(scalar)
        else:
            number = _nearest_float(scalar)
            self._numbers.append(number)
            if isinstance(scalar, int) and number != scalar:
                self._rounded[entry] = scalar
        self._object_bytes += sys.getsizeof(scalar) + sys.getsizeof(entry)
        self._scalars[scalar] = entry
        return entry

    def _list_entry(self, members: tuple[int, ...]) -> int:
        """The entry of a list, whose order and repetitions no condition asks for."""
        entry = self._lists.get(members)
        if entry is None:
            entry = self._numbers.size
            self._numbers.append(math.nan)
            self._list_entries.append(entry)
            self._list_starts.append(self._members.size)
            self._members.extend(np.array(members, np.int32))
            self._object_bytes += sys.getsizeof(members) + sys.getsizeof(entry)
            self._lists[members] = entry
        return entry

    def _publish(self) -> None:
        """Show readers the entries made so far, all arrays at once."""
        self._entries = _Entries(
            numbers=self._numbers.filled(),
            text_entries=self._text_entries.filled(),
            texts=self._texts.filled(),
            list_entries=self._list_entries.filled(),
            list_starts=self._list_starts.filled(),
            members=self._members.filled(),
        )


@dataclass(frozen=True, eq=False)
class _Entries:
    """The distinct values of a column.

    `numbers` [entries]: NaN where the entry is not a number. `texts` [t] are the strings and
    `text_entries` [t] their entries. `list_entries` [l] are the lists that are not empty; the
    elements of the i-th are the entries `members[list_starts[i]:list_starts[i + 1]]`.
    """

    numbers: NDArray[np.float64]
    text_entries: NDArray[np.int32]
    texts: NDArray[np.object_]
    list_entries: NDArray[np.int32]
    list_starts: NDArray[np.int64]
    members: NDArray[np.int32]

    @property
    def count(self) -> int:
        return len(self.numbers)

    def or_an_element(self, holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`holds` [entries] itself, each list in it answered by "one of its elements does"."""
        if len(self.list_entries):
            holds[self.list_entries] = np.logical_or.reduceat(holds[self.members], self.list_starts)
        return holds


class _Growing:
    """An array that is appended to. Views that were given out stay as they are."""

    def __init__(self, dtype: DTypeLike) -> None:
        self.size = 0
        self._array: NDArray[Any] = np.empty(16, dtype)

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def filled(self) -> NDArray[Any]:
        return self._array[: self.size]

    def first(self, count: int) -> NDArray[Any]:
        return self._array[:count].copy()

    def append(self, value: object) -> None:
        self._make_room(1)
        self._array[self.size] = value
        self.size += 1

    def extend(self, values: NDArray[Any]) -> None:
        self._make_room(len(values))
        self._array[self.size : self.size + len(values)] = values
        # Last, for readers go by it.
        self.size += len(values)

    def put(self, position: int, value: object) -> None:
        self._array[position] = value

    def _make_room(self, count: int) -> None:
        needed = self.size + count
        if needed > len(self._array):
            # Half as much again each time: appending stays linear, a third at most stands empty.
            bigger = np.empty(max(needed, len(self._array) * 3 // 2), self._array.dtype)
            bigger[: self.size] = self.filled()
            self._array = bigger


def _nearest_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # beyond 1.8e308
        return math.inf if number > 0 else -math.inf
