"""Memory follows what is committed, whatever happens on the way."""

import threading
from typing import Any

import pytest

from index import loading, metadata
from index.collection import Collection
from index.store import Store
from index.view import View
from index.writes import Changes
from tests.index.helpers import fill, outcomes, record, vectors


def failing_once(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> None:
    real, left = getattr(owner, method), [1]

    def fail(*arguments: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise MemoryError("no room")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, method, fail)


def test_memory_is_filled_anew_where_it_could_not_follow(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 5)
    failing_once(monkeypatch, View, "after")
    assert outcomes(collection, record("new", 40)) == ["created"]
    failing_once(monkeypatch, View, "after")
    assert collection.delete(["r0"]) == 1
    found = collection.search(vectors(40)["cls"], k=10)
    assert [match.id for match in found][:1] == ["new"]
    assert sorted(match.id for match in found) == ["new", "r1", "r2", "r3", "r4"]
    assert collection.check() == []


def test_a_failed_filling_is_made_up_for_later(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 5)
    failing_once(monkeypatch, View, "after")
    failing_once(monkeypatch, loading, "load")
    assert outcomes(collection, record("new", 40)) == ["created"]  # it stands, so it is told
    with pytest.raises(MemoryError) as raised:
        collection.count()
    assert collection.search(vectors(40)["cls"], k=1)[0].id == "new"  # it had been committed
    assert collection.count() == 6
    collection.close()  # does not wait for what the traceback still refers to
    assert raised.tb is not None


def test_a_search_during_a_deletion_still_gives_k(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 10)
    query = vectors(0)["cls"]
    best = collection.search(query, k=5)
    committed, go_on = threading.Event(), threading.Event()
    after = View.after

    def pausing(self: View, changes: Changes) -> View:
        committed.set()
        assert go_on.wait(10)
        return after(self, changes)

    monkeypatch.setattr(View, "after", pausing)
    deleting = threading.Thread(target=collection.delete, args=([best[0].id],))
    deleting.start()
    assert committed.wait(10)
    assert collection.search(query, k=4) == best[:4]  # nobody has been told of it, nor waits for it
    assert deleting.is_alive()
    go_on.set()
    deleting.join()
    assert collection.search(query, k=4) == best[1:]


class Interrupted(BaseException):
    pass


def test_an_interrupt_after_the_commit_hides_nothing(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 5)
    after = View.after

    def interrupted(self: View, changes: Changes) -> View:
        raise Interrupted

    monkeypatch.setattr(View, "after", interrupted)
    with pytest.raises(Interrupted):
        collection.upsert([record("new", 40)])
    monkeypatch.setattr(View, "after", after)
    assert collection.count() == 6
    assert collection.search(vectors(40)["cls"], k=1)[0].id == "new"
    assert outcomes(collection, record("newer", 41)) == ["created"]
    assert collection.check() == []


def test_a_key_is_read_beside_writes_and_misses_none_of_them(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 50)
    values_at = Store.values_at

    def writing(self: Store, path: str, **options: Any) -> Any:
        if not options:  # all of the metadata are being read
            yield from values_at(self, path)
            collection.upsert([record("new", 99, number=7), record("r3", 3, number=7)])
            collection.upsert([record("r4", 1004, number=7)])  # with another vector
            collection.delete(["r7"])
        else:
            yield from values_at(self, path, **options)

    monkeypatch.setattr(Store, "values_at", writing)
    chosen = {"must": {"key": "number", "match": {"value": 7}}}
    found = collection.search(vectors(3)["cls"], k=50, filter=chosen)
    assert sorted(match.id for match in found) == ["new", "r3", "r4"]
    monkeypatch.undo()
    assert collection.count(chosen) == 3
    assert collection.count({"must": {"key": "number", "range": {"gte": 10}}}) == 40


def test_threads_that_ask_for_the_same_key_have_it_read_once(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 50)
    values_at, reads = Store.values_at, list[str]()

    def counting(self: Store, path: str, **options: Any) -> Any:
        if not options:
            reads.append(path)
        yield from values_at(self, path, **options)

    monkeypatch.setattr(Store, "values_at", counting)
    found = list[int]()
    chosen = {"must": {"key": "number", "range": {"lt": 20}}}
    threads = [
        threading.Thread(target=lambda: found.append(collection.count(chosen))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 8
    assert reads == ['$."number"']


def test_a_deletion_by_a_key_that_was_let_go_reads_it_again(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then reads while it keeps others from writing, among them one who reads a key."""
    fill(collection, 9)
    monkeypatch.setattr(metadata, "_MOST_COLUMNS", 1)
    stop, faults = threading.Event(), list[BaseException]()

    def ask(key: str) -> None:
        try:
            while not stop.is_set():
                collection.count({"must": {"key": key, "exists": False}})
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(key,)) for key in "ab"]
    for thread in threads:
        thread.start()
    for number in range(6):
        chosen = {"must": {"key": "number", "match": {"value": number}}}
        assert collection.delete_where(chosen) == 1
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert collection.count() == 3


def test_a_filtered_listing_is_whole_while_vectors_are_rewritten(collection: Collection) -> None:
    fill(collection, 100)
    stop, faults = threading.Event(), list[object]()

    def rewrite() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            number = turn % 100
            collection.upsert([record(f"r{number}", 1000 + turn, number=number)])

    writer = threading.Thread(target=rewrite)
    writer.start()
    for _ in range(40):
        seen, cursor = list[str](), None
        while True:
            page = collection.scroll(
                limit=30, cursor=cursor, filter={"must": {"key": "number", "exists": True}}
            )
            seen += [each.id for each in page.records]
            cursor = page.next_cursor
            if cursor is None:
                break
        if seen != [f"r{number}" for number in range(100)]:
            faults.append(seen)
    stop.set()
    writer.join()
    assert faults == []


def test_what_is_excluded_stays_out_though_it_is_being_rewritten(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 20)
    rows_of, first = Store.rows_of, iter([True])

    def rewriting(self: Store, ids: Any) -> list[int]:
        if next(first, False):  # between the view that was taken and the look into the store
            collection.upsert([record("r0", 500)])
        return rows_of(self, ids)

    monkeypatch.setattr(Store, "rows_of", rewriting)
    found = collection.search(vectors(0)["cls"], k=5, exclude=["r0"])
    assert len(found) == 5
    assert "r0" not in {match.id for match in found}


def test_long_metadata_are_asked_of_the_store(collection: Collection) -> None:
    long = "x" * 5000
    collection.upsert([record(f"r{i}", i, text=long if i % 2 else "short") for i in range(20)])
    found = collection.search(vectors(3)["cls"], k=20)
    assert found[0].id == "r3"
    assert {match.id: match.metadata["text"] for match in found} == {
        f"r{i}": long if i % 2 else "short" for i in range(20)
    }
    collection.upsert([record("r3", 3, text="now short"), record("r4", 4, text=long)])
    found = collection.search(vectors(3)["cls"], k=20)
    assert found[0].metadata == {"text": "now short"}
    assert {match.id: match.metadata for match in found}["r4"] == {"text": long}
