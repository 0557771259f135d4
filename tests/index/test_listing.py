from dataclasses import replace
from pathlib import Path

import pytest

from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import InvalidCursor, RecordNotFound
from tests.index.helpers import create, fill, record


def test_scroll_gives_each_record_once_whatever_changes(collection: Collection) -> None:
    fill(collection, 7)
    first = collection.scroll(limit=3)
    assert [each.id for each in first.records] == ["r0", "r1", "r2"]
    collection.delete(["r2", "r3"])
    collection.upsert([record("r0", 50), record("new", 51)])
    second = collection.scroll(cursor=first.next_cursor, limit=3)
    assert [each.id for each in second.records] == ["r4", "r5", "r6"]
    last = collection.scroll(cursor=second.next_cursor, limit=3)
    assert [each.id for each in last.records] == ["new"]
    assert last.next_cursor is None
    assert collection.scroll(limit=6).next_cursor is None


@pytest.mark.parametrize("cursor", ["", "x", "-1", "0", " 1", "1_0", "f" * 40, "1\n"])
def test_cursors_from_elsewhere(collection: Collection, cursor: str) -> None:
    with pytest.raises(InvalidCursor):
        collection.scroll(cursor=cursor, limit=3)


def test_scroll_needs_a_limit(collection: Collection) -> None:
    assert collection.scroll(limit=1).records == []
    with pytest.raises(ValueError, match="limit must be"):
        collection.scroll(limit=0)


def test_a_cursor_outlives_a_restart_and_the_last_records(root: Path) -> None:
    with CollectionSet(root) as collections:
        collection = create(collections)
        fill(collection, 4)
        cursor = collection.scroll(limit=3).next_cursor
        collection.delete(["r1", "r2", "r3"])
    with CollectionSet(root) as collections:
        collection = collections.get("pictures")
        collection.upsert([record("late", 99)])  # under a new key, not that of r1
        page = collection.scroll(cursor=cursor, limit=3)
        assert [each.id for each in page.records] == ["late"]


def test_thumbnails(collection: Collection) -> None:
    collection.upsert([record("a", 1), replace(record("b", 2), thumbnail=b"small")])
    assert collection.thumbnail("b") == b"small"
    for without in ("a", "nobody", "\0"):
        with pytest.raises(RecordNotFound):
            collection.thumbnail(without)
    collection.upsert([record("b", 3)])
    assert collection.thumbnail("b") == b"small"  # a new version without one keeps it
    collection.upsert([replace(record("b", 4), thumbnail=b"other")])
    assert collection.thumbnail("b") == b"other"
    collection.delete(["b"])
    with pytest.raises(RecordNotFound):
        collection.thumbnail("b")
