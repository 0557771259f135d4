"""What filters mean, beside an oracle that looks at one record at a time."""

import json
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.columns import MISSING, Column, value_at
from index.filters import Filter, parse_filter
from tests.index.helpers import REPOSITORY

# Few of each, so that conditions are often met; values that Python or float64 would confuse.
NAMES = st.sampled_from(["a", "b", "é", 'with "quote'])
KEYS = st.sampled_from(["a", "b", "é", "a.a", "a.b", "b.a", "é.é.a"])
TEXTS = st.sampled_from(["", "a", "aa", "b", "1", "2024-05-01", "2024-06", "日本", "😀"])
NUMBERS = st.sampled_from(
    [0, -0.0, 1, 1.0, 2, -1, 0.1, 0.5, 1e308, 2**53, 2**53 + 1, 2.0**53, 10**400]
)
SCALARS = st.booleans() | NUMBERS | TEXTS
METADATA = st.dictionaries(
    NAMES,
    st.recursive(
        SCALARS | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
        max_leaves=6,
    ),
    max_size=3,
)
OPERATORS = st.sampled_from(["gt", "gte", "lt", "lte"])
RANGES = st.dictionaries(OPERATORS, NUMBERS, min_size=1, max_size=2) | st.dictionaries(
    OPERATORS, TEXTS, min_size=1, max_size=2
)
CONDITIONS = st.one_of(
    st.fixed_dictionaries({"key": KEYS, "match": st.fixed_dictionaries({"value": SCALARS})}),
    st.fixed_dictionaries(
        {
            "key": KEYS,
            "match": st.sampled_from(["any", "except"]).flatmap(
                lambda name: st.fixed_dictionaries({name: st.lists(SCALARS, max_size=4)})
            ),
        }
    ),
    st.fixed_dictionaries({"key": KEYS, "range": RANGES}),
    st.fixed_dictionaries({"key": KEYS, "exists": st.booleans()}),
)


def clauses(conditions: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    clause = conditions | st.lists(conditions, max_size=3)
    return st.dictionaries(st.sampled_from(["must", "should", "must_not"]), clause, min_size=1)


FILTERS = clauses(st.recursive(CONDITIONS, clauses, max_leaves=4))


def fulfils(metadata: dict[str, Any], condition: dict[str, Any]) -> bool:
    """The oracle: one record, one condition or filter, by the words of docs/filters.md."""
    if "key" not in condition:
        must, should, must_not = (
            [clause] if isinstance(clause := condition.get(name, []), dict) else clause
            for name in ("must", "should", "must_not")
        )
        return (
            all(fulfils(metadata, each) for each in must)
            and (not should or any(fulfils(metadata, each) for each in should))
            and not any(fulfils(metadata, each) for each in must_not)
        )
    value: Any = metadata
    for part in condition["key"].split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    if "exists" in condition:
        return condition["exists"] is not (value is MISSING or value is None or value == [])
    elements = value if isinstance(value, list) else [value]
    if "range" in condition:
        return any(
            all(in_bound(each, name, bound) for name, bound in condition["range"].items())
            for each in elements
        )
    ((operator, asked),) = condition["match"].items()
    if operator == "except":
        return any(
            each is not MISSING and each is not None and not any(same(each, one) for one in asked)
            for each in elements
        )
    asked = [asked] if operator == "value" else asked
    return any(same(each, one) for each in elements for one in asked)


def same(value: object, asked: object) -> bool:
    return isinstance(value, bool) == isinstance(asked, bool) and value == asked


def in_bound(value: Any, name: str, bound: Any) -> bool:
    if isinstance(value, bool) or not isinstance(
        value, str if isinstance(bound, str) else int | float
    ):
        return False
    return bool(
        {"gt": value > bound, "gte": value >= bound, "lt": value < bound, "lte": value <= bound}[
            name
        ]
    )


def parsed(given: object) -> Filter:
    found = parse_filter(given)
    assert found is not None
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(METADATA, min_size=1, max_size=12), FILTERS)
def test_agrees_with_looking_at_each_record(
    metadatas: list[dict[str, Any]], given_filter: dict[str, Any]
) -> None:
    understood = parse_filter(given_filter)
    expected = [fulfils(metadata, given_filter) for metadata in metadatas]
    if understood is None:
        assert all(expected)
        return
    assert understood.matches(metadatas).tolist() == expected
    # Over columns that have more rows than are asked for.
    columns = {key: Column(key) for key in understood.keys}
    for key, column in columns.items():
        column.extend(value_at(metadata, key) for metadata in metadatas)
        column.extend(["a", 1, MISSING])
    assert understood.mask(columns, len(metadatas)).tolist() == expected
    assert understood.mask(columns, 1).tolist() == expected[:1]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        # Qdrant's words: of a list, one element decides; `except` is "not in", for what is there.
        ({"match": {"value": "red"}}, ["red", "red and blue"]),
        ({"match": {"any": ["red", 3]}}, ["red", "red and blue", "three"]),
        ({"match": {"any": []}}, []),
        ({"match": {"except": ["red"]}}, ["red and blue", "three", "true", "object"]),
        ({"match": {"except": []}}, ["red", "red and blue", "three", "true", "object"]),
        ({"match": {"value": True}}, ["true"]),
        ({"match": {"value": 1}}, []),
        ({"range": {"gte": 3.0}}, ["three"]),
        ({"range": {"lt": "r"}}, ["red and blue"]),
        ({"exists": True}, ["red", "red and blue", "three", "true", "object", "list of null"]),
        ({"exists": False}, ["absent", "null", "empty"]),
    ],
)
def test_meaning(condition: dict[str, Any], expected: list[str]) -> None:
    records: dict[str, dict[str, Any]] = {
        "absent": {},
        "null": {"c": None},
        "empty": {"c": []},
        "red": {"c": "red"},
        "red and blue": {"c": ["red", "blue"]},
        "three": {"c": 3},
        "true": {"c": True},
        "object": {"c": {"red": "red"}},
        "list of null": {"c": [None]},
    }
    mask = parsed({"must": [{"key": "c", **condition}]}).matches(list(records.values()))
    assert [name for name, fits in zip(records, mask, strict=True) if fits] == expected


def test_one_element_must_be_within_both_bounds() -> None:
    between = parsed({"must": {"key": "n", "range": {"gt": 1, "lt": 3}}})
    assert between.matches([{"n": [0, 4]}, {"n": [0, 2]}]).tolist() == [False, True]


def test_nested_filters_and_their_keys() -> None:
    either = parsed(
        {
            "should": [
                {"must": [{"key": "a", "match": {"value": 1}}, {"key": "b.c", "exists": True}]},
                {"must_not": {"key": "d", "exists": True}},
            ]
        }
    )
    assert either.keys == {"a", "b.c", "d"}
    metadatas: list[dict[str, Any]] = [{"a": 1, "d": 1}, {"a": 1, "b": {"c": 0}, "d": 1}, {"a": 2}]
    assert either.matches(metadatas).tolist() == [False, True, True]
    assert either.matches([]).tolist() == []


@pytest.mark.parametrize("given", [{}, {"must": []}, {"must": [], "should": [], "must_not": []}])
def test_without_conditions_there_is_no_filter(given: object) -> None:
    assert parse_filter(given) is None


def test_an_inner_filter_without_conditions_lets_all_through() -> None:
    assert parsed({"must": [{"must": []}]}).matches([{}, {"a": 1}]).all()
    assert parsed({"must_not": [{"should": []}]}).matches([{}]).tolist() == [False]


def test_equal_filters_are_one_key_of_a_dict_and_true_is_not_one() -> None:
    def asks_for(value: object) -> Filter:
        return parsed({"must": [{"key": "a", "match": {"any": [value, "x"]}}]})

    assert len({asks_for(1), asks_for(1.0), asks_for(True), asks_for("1")}) == 3
    with pytest.raises(AttributeError):
        asks_for(1).keys = frozenset()  # type: ignore[misc]


def test_columns_must_be_there_and_long_enough() -> None:
    asking = parsed({"must": {"key": "a", "exists": True}})
    with pytest.raises(KeyError):
        asking.mask({}, 1)
    with pytest.raises(ValueError, match="has 0 rows, not 1"):
        asking.mask({"a": Column("a")}, 1)


def test_readers_beside_a_writer_see_whole_rows() -> None:
    """Rows with even numbers never change; odd ones flip between two values and new ones."""
    column = Column("k")
    column.extend(["even", "odd"] * 500)
    matched = parsed({"must": {"key": "k", "match": {"any": ["even", 7]}}})
    ranged = parsed({"must_not": {"key": "k", "range": {"gt": "f"}}})
    written, failures, rounds = threading.Event(), list[str](), [0]

    def read() -> None:
        while not written.is_set():
            rows = len(column)
            for each in (matched, ranged):
                try:
                    mask = each.mask({"k": column}, rows)
                except Exception as error:  # reported below: a thread's error fails no test
                    failures.append(repr(error))
                    return
                if len(mask) != rows or not mask[0::2].all() or mask[1:1000:4].any():
                    failures.append(f"{each}: wrong of {rows} rows")
                    return
            rounds[0] += 1

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(1500):
            # New entries all the time, of each kind, so that every array grows and moves.
            column.set(3 + 4 * (number % 249), [f"new {number}", number, 7][number % 3])
            column.extend(["even", f"odd {number}"])
            column.extend([["even", f"a tag {number}"], [f"odd {number}", "odd"]])
    finally:
        written.set()
        for reader in readers:
            reader.join()
    assert not failures
    assert rounds[0] > 0
    assert len(column) == 7000


def test_the_documented_example() -> None:
    page = (REPOSITORY / "docs" / "filters.md").read_text()
    asking = parsed(json.loads(page.split("```json")[1].split("```")[0]))
    fits = {"label": "cat", "taken": "2024-05-31", "stars": 5}
    others: list[dict[str, Any]] = [
        {"label": "fox"},
        {"taken": "2024-06-01"},
        {"stars": 3},
        {"deleted_at": 0},
    ]
    metadatas = [fits, *({**fits, **each} for each in others)]
    assert asking.matches(metadatas).tolist() == [True, False, False, False, False]


def test_a_filter_is_unchanged_by_what_happens_to_its_source() -> None:
    values = ["x"]
    given = {"must": [{"key": "a", "match": {"any": values}}]}
    asking = parsed(given)
    values.append("y")
    given["must"].clear()
    np.testing.assert_array_equal(asking.matches([{"a": "x"}, {"a": "y"}]), [True, False])
