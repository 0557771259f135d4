"""Memory follows what is committed, whatever happens on the way."""

import threading
from typing import Any

import pytest

from index import loading
from index.collection import Collection
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
    found = list[list[str]]()
    searching = threading.Thread(
        target=lambda: found.append([match.id for match in collection.search(query, k=4)])
    )
    searching.start()
    go_on.set()
    deleting.join()
    searching.join()
    assert found == [[match.id for match in best[1:]]]
