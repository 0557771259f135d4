"""Metadata filters: which records a search, a listing or a deletion is about.

The grammar is Qdrant's (https://qdrant.tech/documentation/concepts/filtering/), as far as it goes
here; docs/filters.md tells it with examples. A filter is an object with `must` (all hold), `should`
(one holds) and `must_not` (none holds), each a list of conditions or one condition. A condition is
another such object, or a `key` with one of

    match   {"value": X}, {"any": [X, ...]} or {"except": [X, ...]}; X: string, number or boolean
    range   "gt", "gte", "lt", "lte": a number or a string, at least one of them
    exists  true or false; absent, null and [] do not exist

A key "a.b" is metadata["a"]["b"]. Of a list, one element must fulfil the condition.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from index.columns import COMPARISONS, Column, Tagged, sqlite_path, tagged, value_at
from index.errors import InvalidFilter

MAX_DEPTH: Final = 16
"""Filters within filters, the outermost counted."""
MAX_KEYS: Final = 32
"""Different ones in all of a filter."""
MAX_CONDITIONS: Final = 1_000
"""In all of a filter, nested filters counted."""
MAX_VALUES: Final = 100_000
"""In one `any` or `except`."""

_CLAUSES = ("must", "should", "must_not")
_OPERATORS = ("match", "range", "exists")
_MATCHES = ("value", "any", "except")


@dataclass(frozen=True)
class Filter:
    """A filter that was understood; `parse_filter` makes them. Hashable; equal ones mean the same.

    Attributes:
        must, should, must_not: its conditions.
        keys: the metadata keys (dotted) that it and the filters in it ask for.
    """

    must: tuple["_Condition", ...]
    should: tuple["_Condition", ...]
    must_not: tuple["_Condition", ...]
    keys: frozenset[str]

    def mask(self, columns: Mapping[str, Column], rows: int) -> NDArray[np.bool_]:
        """Which of the first rows fulfil the filter: [rows].

        `columns` has each of `keys`, with at least so many rows. A writer may be at work on them: a
        record whose metadata are being replaced may be judged by a mixture of old and new, though
        by one of the two wherever the filter has a single key.

        Raises:
            KeyError: a column is missing.
            ValueError: a column has fewer rows.
        """
        # Each key's codes are read once, and before any entries: see Column.
        codes = {key: columns[key].codes(rows) for key in self.keys}
        return _mask(self, columns, codes, rows)

    def matches(self, metadatas: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
        """Which of these metadata fulfil the filter: [len(metadatas)]."""
        columns = {key: Column(key) for key in self.keys}
        for key, column in columns.items():
            column.extend(value_at(metadata, key) for metadata in metadatas)
        return self.mask(columns, len(metadatas))


def parse_filter(given: object) -> Filter | None:
    """Understand a filter as decoded from JSON; None for one without conditions, `{}` say.

    Raises:
        InvalidFilter: naming the place (`filter.must[2].range.gte`), what is allowed there and what
            was given.
    """
    parsed = _Parser().filter(given, "filter", depth=1)
    if len(parsed.keys) > MAX_KEYS:
        raise InvalidFilter(
            f"filter: may ask for {MAX_KEYS} different keys, not more; got {len(parsed.keys)}"
        )
    return parsed if parsed.must or parsed.should or parsed.must_not else None


@dataclass(frozen=True)
class _Match:
    key: str
    values: frozenset[Tagged]
    excluded: bool  # whether it is the other values that match

    def entries(self, column: Column) -> NDArray[np.bool_]:
        if self.excluded:
            return column.other_than(self.values)
        return column.equal_to_any(self.values)


@dataclass(frozen=True)
class _Range:
    key: str
    bounds: frozenset[tuple[str, str | int | float]]

    def entries(self, column: Column) -> NDArray[np.bool_]:
        return column.in_range(self.bounds)


@dataclass(frozen=True)
class _Exists:
    key: str
    expected: bool

    def entries(self, column: Column) -> NDArray[np.bool_]:
        exists = column.exists()
        return exists if self.expected else ~exists


_Condition: TypeAlias = Filter | _Match | _Range | _Exists


def _mask(
    condition: _Condition,
    columns: Mapping[str, Column],
    codes: Mapping[str, NDArray[np.int32]],
    rows: int,
) -> NDArray[np.bool_]:
    if not isinstance(condition, Filter):
        return condition.entries(columns[condition.key]).take(codes[condition.key])
    mask = np.ones(rows, np.bool_)
    for each in condition.must:
        mask &= _mask(each, columns, codes, rows)
    if condition.should:
        any_of = np.zeros(rows, np.bool_)
        for each in condition.should:
            any_of |= _mask(each, columns, codes, rows)
        mask &= any_of
    for each in condition.must_not:
        mask &= ~_mask(each, columns, codes, rows)
    return mask


class _Parser:
    """Reads one filter. `place` is where in it what is `given` stands."""

    def __init__(self) -> None:
        self._conditions = 0

    def filter(self, given: object, place: str, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            raise InvalidFilter(f"{place}: filters may be nested {MAX_DEPTH} deep, not deeper")
        fields = _fields(given, place, "a filter", _CLAUSES)
        must, should, must_not = (
            self._clause(fields.get(name, []), f"{place}.{name}", depth) for name in _CLAUSES
        )
        keys = set[str]()
        for condition in (*must, *should, *must_not):
            keys |= condition.keys if isinstance(condition, Filter) else {condition.key}
        return Filter(must, should, must_not, frozenset(keys))

    def _clause(self, given: object, place: str, depth: int) -> tuple[_Condition, ...]:
        if isinstance(given, Mapping):
            return (self._condition(given, place, depth),)
        if not isinstance(given, (list, tuple)):
            _refuse(place, "expected a list of conditions, or one condition", given)
        return tuple(
            self._condition(each, f"{place}[{number}]", depth) for number, each in enumerate(given)
        )

    def _condition(self, given: object, place: str, depth: int) -> _Condition:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise InvalidFilter(f"{place}: a filter may have {MAX_CONDITIONS} conditions, not more")
        if isinstance(given, Mapping) and any(name in given for name in _CLAUSES):
            return self.filter(given, place, depth + 1)
        fields = _fields(given, place, "a condition", ("key", *_OPERATORS, *_CLAUSES))
        if "key" not in fields:
            _refuse(place, "expected a 'key', or one of 'must', 'should', 'must_not'", given)
        key = fields["key"]
        # Refuses the keys that the store cannot be asked for.
        sqlite_path(key, place=f"{place}.key")
        operator = _only_one(fields, place, _OPERATORS)
        value, place = fields[operator], f"{place}.{operator}"
        if operator == "match":
            return _match(key, value, place)
        if operator == "range":
            return _range(key, value, place)
        if not isinstance(value, bool):
            _refuse(place, "expected true or false", value)
        return _Exists(key, value)


def _match(key: str, given: object, place: str) -> _Match:
    fields = _fields(given, place, "a match", _MATCHES)
    operator = _only_one(fields, place, _MATCHES)
    values, place = fields[operator], f"{place}.{operator}"
    if operator == "value":
        return _Match(key, frozenset([_scalar(values, place)]), excluded=False)
    if not isinstance(values, (list, tuple)):
        _refuse(place, "expected a list of strings, numbers and booleans", values)
    if len(values) > MAX_VALUES:
        raise InvalidFilter(f"{place}: {MAX_VALUES} values are allowed, not {len(values)}")
    scalars = frozenset(_scalar(value, f"{place}[{number}]") for number, value in enumerate(values))
    return _Match(key, scalars, excluded=operator == "except")


def _scalar(given: object, place: str) -> Tagged:
    if given is None:
        _refuse(place, "null cannot be matched, but 'exists': false finds it", given)
    if not isinstance(given, (str, int, float)) or _is_infinite_or_nan(given):
        _refuse(place, "expected a string, a finite number, true or false", given)
    return tagged(given)


def _range(key: str, given: object, place: str) -> _Range:
    fields = _fields(given, place, "a range", tuple(COMPARISONS))
    if not fields:
        _refuse(place, f"expected at least one of {_listed(COMPARISONS)}", given)
    for name, bound in fields.items():
        is_comparable = isinstance(bound, (str, int, float)) and not isinstance(bound, bool)
        if not is_comparable or _is_infinite_or_nan(bound):
            _refuse(f"{place}.{name}", "expected a finite number or a string", bound)
    if len({isinstance(bound, str) for bound in fields.values()}) > 1:
        _refuse(place, "expected numbers alone, or strings alone", given)
    return _Range(key, frozenset(fields.items()))


def _is_infinite_or_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _fields(given: object, place: str, what: str, known: Sequence[str]) -> Mapping[str, Any]:
    """The object's fields, if all of them are known."""
    if not isinstance(given, Mapping):
        _refuse(place, f"expected {what}, a JSON object", given)
    for name in given:
        if name not in known:
            # Nearest first, so that a slip of the pen is answered by the word that was meant.
            near = difflib.get_close_matches(str(name), known, n=len(known))
            ordered = [*near, *(each for each in known if each not in near)]
            raise InvalidFilter(
                f"{place}: unknown field {reprlib.repr(name)}; {what} has {_listed(ordered)}"
            )
    return given


def _only_one(fields: Mapping[str, Any], place: str, operators: Sequence[str]) -> str:
    used = [name for name in operators if name in fields]
    if len(used) != 1:
        got = " and ".join(map(repr, used)) or "none of them"
        raise InvalidFilter(f"{place}: expected exactly one of {_listed(operators)}; got {got}")
    return used[0]


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))


def _refuse(place: str, rule: str, given: object) -> NoReturn:
    # reprlib: short for any size, and safe for any depth.
    raise InvalidFilter(f"{place}: {rule}; got {reprlib.repr(given)}")
