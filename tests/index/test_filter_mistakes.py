"""Filters that are refused: what is said, and where; and how much is allowed."""

from typing import Any

import pytest

from index.errors import CollectionError, InvalidFilter
from index.filters import MAX_CONDITIONS, MAX_DEPTH, MAX_VALUES, Filter, parse_filter

A = {"key": "a", "exists": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "filter: expected a filter, a JSON object; got None"),
        ([A], r"filter: expected a filter, a JSON object; got \[\{"),
        (
            {"mustnt": []},
            "filter: unknown field 'mustnt'; a filter has 'must_not', 'must', 'should'$",
        ),
        (
            {"must": [A], "x": 1},
            "filter: unknown field 'x'; a filter has 'must', 'should', 'must_n",
        ),
        ({7: 1}, "filter: unknown field 7; a filter has"),
        (
            {"must": None},
            r"filter\.must: expected a list of conditions, or one condition; got None",
        ),
        ({"must": [A, "b"]}, r"filter\.must\[1\]: expected a condition, a JSON object; got 'b'"),
        (
            {"should": {}},
            r"filter\.should: expected a 'key', or one of 'must', 'should', 'must_not'",
        ),
        ({"must": [{"match": {"value": 1}}]}, r"filter\.must\[0\]: expected a 'key'"),
        ({"must": [{"key": "a"}]}, r"filter\.must\[0\]: .*one of 'match', .*got none of them"),
        (
            {"must": [{"key": "a", "mach": {}}]},
            r"must\[0\]: unknown field 'mach'; a condition has 'ma",
        ),
        (
            {"must": [{**A, "is_null": True}]},
            r"must\[0\]: unknown field 'is_null'; .*'exists', 'must'",
        ),
        ({"must": [{**A, "must": []}]}, r"must\[0\]: unknown field 'key'; a filter has"),
        (
            {"must": [{**A, "match": {"value": 1}}]},
            r"must\[0\]: expected exactly one of 'match', .*; got 'match' and 'exists'",
        ),
        (
            {"must": {"key": 3, "exists": True}},
            r"filter\.must\.key: expected a metadata key.*got 3",
        ),
        ({"must": {"key": "a..b", "exists": True}}, r"filter\.must\.key: .*dots.*'a\.\.b'"),
        ({"must": {"key": "a[]", "exists": True}}, r"filter\.must\.key: '\[\]'"),
        (
            {"must": {"key": "a", "exists": 1}},
            r"filter\.must\.exists: expected true or false; got 1",
        ),
        (
            {"must": {"key": "a", "match": "x"}},
            r"must\.match: expected a match, a JSON object; got 'x",
        ),
        (
            {"must": {"key": "a", "match": {}}},
            r"must\.match: expected exactly one of 'value', 'any', ",
        ),
        (
            {"must": {"key": "a", "match": {"vlue": 1}}},
            r"must\.match: unknown field 'vlue'; a match has 'value', 'any', 'except'",
        ),
        ({"must": {"key": "a", "match": {"value": 1, "any": [1]}}}, "got 'value' and 'any'"),
        ({"must": {"key": "a", "match": {"value": None}}}, r"match\.value: null cannot be matched"),
        (
            {"must": {"key": "a", "match": {"value": [1]}}},
            r"match\.value: expected a string, a finite",
        ),
        ({"must": {"key": "a", "match": {"value": float("nan")}}}, r"match\.value: .*got nan"),
        (
            {"must": {"key": "a", "match": {"any": "x"}}},
            r"match\.any: expected a list of .*got 'x'",
        ),
        ({"must": {"key": "a", "match": {"any": [1, None]}}}, r"match\.any\[1\]: null cannot"),
        (
            {"must": {"key": "a", "match": {"except": [{}]}}},
            r"match\.except\[0\]: expected a string",
        ),
        (
            {"must": {"key": "a", "range": {}}},
            r"range: expected at least one of 'gt', 'gte', 'lt', 'l",
        ),
        ({"must": {"key": "a", "range": [1, 2]}}, r"range: expected a range, a JSON object"),
        (
            {"must": {"key": "a", "range": {"ge": 1}}},
            r"range: unknown field 'ge'; a range has 'gte', ",
        ),
        (
            {"must": [A, A, {"key": "a", "range": {"gte": True}}]},
            r"^filter\.must\[2\]\.range\.gte: expected a finite number or a string; got True$",
        ),
        ({"must": {"key": "a", "range": {"lt": None}}}, r"range\.lt: expected a finite number or"),
        ({"must": {"key": "a", "range": {"lt": float("inf")}}}, r"range\.lt: .*got inf"),
        ({"must": {"key": "a", "range": {"lt": float("nan")}}}, r"range\.lt: .*got nan"),
        (
            {"must": {"key": "a", "range": {"gt": 1, "lt": "z"}}},
            r"range: expected numbers alone, or s",
        ),
        (
            {"must": [{"should": [A, {"must_not": {"key": "a", "range": {}}}]}]},
            r"^filter\.must\[0\]\.should\[1\]\.must_not\.range: expected",
        ),
    ],
)
def test_mistakes_name_the_place(given: object, message: str) -> None:
    with pytest.raises(InvalidFilter, match=message) as caught:
        parse_filter(given)
    assert isinstance(caught.value, CollectionError)


def test_what_was_given_is_shown_shortened() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for mistake in (deep, "x" * 10**6, list(range(10**5))):
        with pytest.raises(InvalidFilter) as caught:
            parse_filter({"must": [mistake]})
        assert len(str(caught.value)) < 200


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"must": A}
    for _ in range(depth - 1):
        inner = {"must": [inner]}
    return inner


def test_limits() -> None:
    assert understood(nested(MAX_DEPTH)).matches([{"a": 1}]).tolist() == [True]
    with pytest.raises(InvalidFilter, match=f"may be nested {MAX_DEPTH} deep, not deeper"):
        parse_filter(nested(MAX_DEPTH + 1))
    with pytest.raises(InvalidFilter, match="not deeper"):
        parse_filter(nested(5000))

    assert parse_filter({"must": [A] * MAX_CONDITIONS}) is not None
    half = [A] * (MAX_CONDITIONS // 2)
    with pytest.raises(InvalidFilter, match=r"must_not\[500\]: .* may have 1000 conditions"):
        parse_filter({"must": half, "must_not": [*half, A]})
    # A nested filter counts as one, and so do the conditions in it.
    with pytest.raises(InvalidFilter, match=r"must\[500\]: .* may have 1000 conditions"):
        parse_filter({"must": [{"must": A}] * (MAX_CONDITIONS // 2 + 1)})

    many = understood({"must": {"key": "a", "match": {"except": list(range(MAX_VALUES))}}})
    assert many.matches([{"a": 5}, {"a": MAX_VALUES}]).tolist() == [False, True]
    with pytest.raises(InvalidFilter, match=r"match\.any: 100000 values are allowed, not 100001"):
        parse_filter({"must": {"key": "a", "match": {"any": list(range(MAX_VALUES + 1))}}})


def understood(given: object) -> Filter:
    found = parse_filter(given)
    assert found is not None
    return found


def test_a_filter_may_not_ask_for_too_many_keys() -> None:
    conditions = [{"key": f"k{number}", "exists": True} for number in range(33)]
    assert parse_filter({"must": conditions[:32]}) is not None
    with pytest.raises(InvalidFilter, match="may ask for 32 different keys, not more; got 33"):
        parse_filter({"must": conditions[:20], "should": conditions[20:]})
