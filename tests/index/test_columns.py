"""Columns, and how keys are asked for in SQLite."""

import json
import sqlite3
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.columns import MISSING, Column, sqlite_path, tagged, value_at
from index.errors import InvalidFilter

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.integers(2**53 - 1, 2**53 + 2)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
CELLS = VALUES | st.just(MISSING)


def answers(column: Column) -> list[list[bool]]:
    """What conditions of each kind say of the rows."""
    codes = column.codes(len(column))
    asked = [tagged(value) for value in (0, 1, True, 2**53, 2**53 + 1, "", "0", 0.5)]
    return [
        holds[codes].tolist()
        for holds in (
            *(column.equal_to_any([value]) for value in asked),
            column.other_than(asked[:3]),
            column.in_range([("gt", 0), ("lte", 2**53)]),
            column.in_range([("gte", "0")]),
            column.exists(),
        )
    ]


@settings(max_examples=80, deadline=None)
@given(st.lists(CELLS, max_size=12))
def test_the_three_ways_of_writing_give_the_same_column(cells: list[object]) -> None:
    decoded, from_text, by_row = Column("k"), Column("k"), Column("k")
    decoded.extend(cells[:5])
    decoded.extend(cells[5:])
    from_text.extend_json(
        None if cell is MISSING else json.dumps(cell, ensure_ascii=False) for cell in cells
    )
    by_row.extend(["something else"] * len(cells))
    for row, cell in enumerate(cells):
        by_row.set(row, cell)
    assert len(decoded) == len(from_text) == len(by_row) == len(cells)
    assert answers(decoded) == answers(from_text) == answers(by_row)


def test_equal_values_share_an_entry_and_booleans_are_no_numbers() -> None:
    column = Column("k")
    column.extend_json(["1", "1.0", "true", '"1"', "[1, 1]", "[1.0]", "[]", "null", None, "-0.0"])
    codes = column.codes(10).tolist()
    assert codes[0] == codes[1]
    assert codes[4] == codes[5]
    assert len(set(codes)) == 8
    assert column.equal_to_any([0])[codes].tolist() == [False] * 9 + [True]


def test_integers_beyond_float64_are_told_apart() -> None:
    column = Column("k")
    values = [2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 10**400, -(10**400), 1e308]
    column.extend(values)
    codes = column.codes(len(values))
    for bound in values:
        assert column.equal_to_any([bound])[codes].tolist() == [each == bound for each in values]
        assert column.in_range([("gt", bound)])[codes].tolist() == [each > bound for each in values]
        assert column.in_range([("lte", bound)])[codes].tolist() == [
            each <= bound for each in values
        ]
    floats = Column("k")
    floats.extend([2.0**53, 2.0**53 + 2])  # the bound between them rounds to the lower
    assert floats.in_range([("gte", 2**53 + 1)])[floats.codes(2)].tolist() == [False, True]


def test_text_compares_by_code_points_up_to_the_last() -> None:
    column = Column("k")
    values = ["a", "a\0", "a\0\0", "é", "z", "日", "😀", "\uffff"]
    column.extend(values)
    codes = column.codes(len(values))
    for bound in values:
        assert column.in_range([("gt", bound)])[codes].tolist() == [each > bound for each in values]


@pytest.mark.parametrize("texts", [["1,2"], ["1", ""], ["nonsense"], ["[1", "2]"]])
def test_what_is_not_json_is_refused_and_appends_nothing(texts: list[str]) -> None:
    column = Column("k")
    with pytest.raises(ValueError, match=r"one JSON value|Expecting value"):
        column.extend_json(texts)
    assert len(column) == 0


def test_what_no_json_holds_is_refused_and_appends_nothing() -> None:
    column = Column("tags")
    with pytest.raises(TypeError, match=r"'tags': set is not"):
        column.extend(["a", {"a"}])
    assert len(column) == 0
    column.extend(["b"])
    assert column.equal_to_any(["b"])[column.codes(1)].tolist() == [True]


def test_rows_that_are_not_there() -> None:
    column = Column("k")
    column.extend([1])
    for row in (-1, 1):
        with pytest.raises(IndexError, match=rf"has 1 rows, no row {row}"):
            column.set(row, 2)
    with pytest.raises(ValueError, match="has 1 rows, not 2"):
        column.codes(2)


def test_memory_grows_with_rows_and_with_distinct_values() -> None:
    few, many = Column("k"), Column("k")
    few.extend(number % 10 for number in range(10_000))
    many.extend(f"a longer text {number}" for number in range(10_000))
    assert 40_000 <= few.memory_bytes < 100_000
    assert many.memory_bytes > 1_000_000


@given(st.text(max_size=4), st.text(max_size=4))
@settings(max_examples=200, deadline=None)
def test_sqlite_finds_every_key_that_is_allowed(first: str, second: str) -> None:
    key = f"{first}.{second}"
    try:
        path = sqlite_path(key)
    except InvalidFilter:
        return
    # As the store writes metadata.
    document = {second: 0, first: {second: [1, "é"], "other": 2}, "other": {second: 3}}
    expected = value_at(document, key)
    text = json.dumps(document, sort_keys=True, ensure_ascii=False)
    connection = sqlite3.connect(":memory:")
    try:
        found = connection.execute("SELECT ? -> ?", (text, path)).fetchone()[0]
    finally:
        connection.close()
    assert (MISSING if found is None else json.loads(found)) == expected


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("", "1 to 512 characters; got ''"),
        ("x" * 513, "1 to 512 characters"),
        (7, "a string of 1 to 512 characters; got 7"),
        ("a..b", r"single dots between them; got 'a\.\.b'"),
        (".a", "single dots"),
        ('a"b', "a double quote"),
        ("a\ud800", "surrogate"),
        ("tags[]", r"'\[\]' and '\[0\]' are not understood"),
        ("a[3].b", r"'\[\]' and '\[0\]' are not understood"),
    ],
)
def test_keys_that_are_refused(key: str, rule: str) -> None:
    with pytest.raises(InvalidFilter, match=f"^key: .*{rule}"):
        sqlite_path(key)


def test_value_at_goes_through_objects_alone() -> None:
    metadata = {"a": {"b": {"c": None}, "d": [{"e": 1}]}, "a.b": 2}
    assert value_at(metadata, "a.b") == {"c": None}
    assert value_at(metadata, "a.b.c") is None
    assert value_at(metadata, "a.d.e") is MISSING
    assert value_at(metadata, "a.b.c.d") is MISSING
    assert value_at(metadata, "x") is MISSING
    assert sqlite_path("a.b") == '$."a"."b"'


def test_a_reader_in_the_middle_of_a_write() -> None:
    column = Column("k")
    column.extend(["a"])
    found = list[list[bool]]()

    def values() -> Iterator[object]:
        yield "b"
        # Now "b" has an entry that no reader was shown yet.
        for holds in (column.equal_to_any(["a", "b"]), column.other_than(["b"])):
            found.append(holds[column.codes(1)].tolist())
        yield "c"

    column.extend(values())
    assert found == [[True], [True]]
    assert column.equal_to_any(["b"])[column.codes(3)].tolist() == [False, True, False]


def test_masks_follow_a_set() -> None:
    column = Column("k")
    column.extend(["a", "b"])
    before = column.codes(2)
    column.set(0, "new")
    assert column.equal_to_any(["new"])[column.codes(2)].tolist() == [True, False]
    # What a reader had taken is a copy.
    assert column.equal_to_any(["a"])[before].tolist() == [True, False]
    np.testing.assert_array_equal(column.exists()[before], [True, True])
