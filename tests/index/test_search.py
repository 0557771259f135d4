import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from index import side_by_side
from index.collection import Collection, NewRecord
from tests.index.helpers import cosines, fill, record, vectors


def test_many_queries_are_shared_out(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.upsert([record(f"r{seed}", seed) for seed in range(50)])
    queries = np.stack([vectors(1000 + seed)["cls"] for seed in range(300)])
    with ThreadPoolExecutor(3) as threads:
        monkeypatch.setattr(side_by_side, "_threads", lambda: threads)
        used: set[str] = set()
        mirror, search = collection._mirror, collection._mirror._try_search

        def noted(*arguments: Any) -> Any:
            used.add(threading.current_thread().name)
            return search(*arguments)

        monkeypatch.setattr(mirror, "_try_search", noted)
        found = collection.search_batch(queries, 3)
        assert threading.current_thread().name not in used
        used.clear()
        with mirror.commits.paused():
            assert collection.search_batch(queries, 3) == found
        assert used == {threading.current_thread().name}

    for query, matches in zip(queries, found, strict=True):
        assert [m.id for m in matches] == [m.id for m in collection.search(query, k=3)]


@pytest.mark.parametrize("space", ["cls", "copy"])
def test_search_is_exact_in_each_space(collection: Collection, space: str) -> None:
    records = fill(collection, 60)
    rows = np.stack([np.asarray(each.vectors[space]) for each in records])
    query = vectors(1000)[space]
    expected = cosines(query, rows)
    best = np.argsort(-expected)
    found = collection.search(query, k=7, space=space)
    assert [match.id for match in found] == [records[number].id for number in best[:7]]
    assert [match.score for match in found] == pytest.approx(expected[best[:7]].tolist(), abs=1e-6)
    assert found[0].metadata == records[best[0]].metadata
    assert len(collection.search(query, k=1000, space=space)) == 60
    batch = collection.search_batch(np.stack([query, rows[3]]), 7, space)
    assert [match.id for match in batch[0]] == [match.id for match in found]
    assert batch[1][0].id == "r3"


def test_search_cuts_and_excludes(collection: Collection) -> None:
    fill(collection, 30)
    query = vectors(77)["cls"]
    everything = collection.search(query, k=30)
    excluded = [match.id for match in everything[:20]]
    assert collection.search(query, k=5, exclude=[*excluded, "nobody"]) == everything[20:25]
    floor = everything[3].score
    assert collection.search(query, k=30, min_score=floor) == everything[:4]
    assert collection.search(query, k=2, min_score=2.0) == []
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="k must be"):
            collection.search(query, k=wrong)
    assert collection.search_batch(np.empty((0, 4)), 3) == []


def test_of_equal_scores_the_vector_that_was_written_first_comes_first(
    collection: Collection,
) -> None:
    for name in ("d", "c", "b", "a"):
        collection.upsert([NewRecord(name, vectors(5))])
    collection.upsert([record("d", 6)])
    collection.upsert([NewRecord("d", vectors(5))])
    found = collection.search(vectors(5)["cls"], k=3)
    assert [match.id for match in found] == ["c", "b", "a"]
