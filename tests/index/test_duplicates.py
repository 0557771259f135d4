"""Insert-only, and what becomes of an id or of content that is there already."""

import pytest

from index.collection import Collection, NewRecord
from index.errors import InvalidFilter, ModelMismatch
from index.records import UpsertOutcome
from tests.index.helpers import MODEL, fill, record, vectors


def test_insert_leaves_what_is_there(collection: Collection) -> None:
    collection.upsert([record("a", 1, label="old")])
    outcomes = collection.insert([record("a", 2, label="new"), record("b", 3)])
    assert [each.outcome for each in outcomes] == ["exists", "created"]
    assert collection.get("a").metadata == {"label": "old"}


def test_skip_names_the_oldest_record_with_the_content(collection: Collection) -> None:
    collection.upsert([record("b", 1), record("a", 1), record("c", 2)])
    outcomes = collection.upsert(
        [record("new", 1), record("c", 2, label="x"), record("d", 5)], on_duplicate="skip"
    )
    assert outcomes == [
        UpsertOutcome("new", "skipped", same_as="b"),
        UpsertOutcome("c", "updated"),  # an id that is there is upserted as ever
        UpsertOutcome("d", "created"),
    ]
    assert collection.count() == 4


def test_update_puts_the_new_under_the_old_id(collection: Collection) -> None:
    collection.upsert([record("old", 1, label="then")])
    again = NewRecord("new", vectors(9), {"label": "now"}, "hash-1")
    assert collection.upsert([again], on_duplicate="update") == [
        UpsertOutcome("new", "updated", same_as="old")
    ]
    assert collection.get("old").metadata == {"label": "now"}
    assert collection.count() == 1
    assert collection.search(vectors(9)["cls"], k=1)[0].score == pytest.approx(1)


def test_within_one_call_too(collection: Collection) -> None:
    records = [record("a", 1), record("b", 1), record("c", 2)]
    outcomes = collection.upsert(records, on_duplicate="skip")
    assert [each.outcome for each in outcomes] == ["created", "skipped", "created"]
    assert outcomes[1].same_as == "a"


def test_the_oldest_counts_however_it_came_to_its_content(collection: Collection) -> None:
    collection.upsert([record("a", 1), record("b", 2), record("c", 2)])
    outcomes = collection.upsert(
        [record("a", 2), record("b", 3), record("new", 2)], on_duplicate="skip"
    )
    assert outcomes[2] == UpsertOutcome("new", "skipped", same_as="a")
    outcomes = collection.upsert([record("a", 7), record("new", 2)], on_duplicate="skip")
    assert outcomes[1] == UpsertOutcome("new", "skipped", same_as="c")


def test_without_a_content_hash_nothing_is_a_duplicate(collection: Collection) -> None:
    same = [NewRecord(name, vectors(1)) for name in "ab"]
    assert [o.outcome for o in collection.upsert(same, on_duplicate="skip")] == ["created"] * 2


def test_delete_where(collection: Collection) -> None:
    fill(collection, 10)
    assert collection.delete_where({"must": {"key": "number", "range": {"gte": 4}}}) == 6
    assert [each.id for each in collection.scroll(limit=99).records] == ["r0", "r1", "r2", "r3"]
    assert collection.delete_where({"must": {"key": "number", "range": {"gte": 4}}}) == 0
    with pytest.raises(InvalidFilter, match="all records would be deleted"):
        collection.delete_where({})
    assert collection.count() == 4
    assert collection.check() == []


def test_vectors_of_another_model_are_refused_by_name(collection: Collection) -> None:
    new = record("a", 1)
    for write in (collection.upsert, collection.insert):
        with pytest.raises(ModelMismatch, match=f"{MODEL}.*'another'"):
            write([new], model="another")
    collection.upsert([new], model=MODEL)
    with pytest.raises(ModelMismatch, match="'another'"):
        collection.search(vectors(1)["cls"], k=1, model="another")
    assert len(collection.search(vectors(1)["cls"], k=1, model=MODEL)) == 1
