import threading

import numpy as np
import pytest

from index.ann import FlatIndex
from index.locks import ReadWriteLock
from tests.index.helpers import cosines


def keys(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def rows(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def test_search_agrees_with_brute_force() -> None:
    data, queries = rows(200, 16), rows(40, 16, seed=1)
    index = FlatIndex(16)
    index.upsert(np.arange(200), data * np.float32(7))
    for query, hits in zip(queries, index.search(queries, 10), strict=True):
        expected = cosines(query, data)
        assert hits.keys.tolist() == np.argsort(-expected)[:10].tolist()
        np.testing.assert_allclose(hits.scores, np.sort(-expected)[:10] * -1, atol=1e-6)


def test_an_empty_index_and_a_large_k_give_what_there_is() -> None:
    index = FlatIndex(4)
    assert index.search(rows(2, 4), 3)[1].keys.tolist() == []
    index.upsert(keys(5, 9), rows(2, 4))
    assert sorted(index.search(rows(1, 4), 100)[0].keys.tolist()) == [5, 9]


def test_upsert_replaces_and_never_duplicates() -> None:
    index = FlatIndex(4)
    index.upsert(keys(1, 2, 3), np.eye(4, dtype=np.float32)[:3])
    index.upsert(keys(2, 7), np.eye(4, dtype=np.float32)[[3, 1]])
    assert len(index) == 4
    (hits,) = index.search(np.eye(4, dtype=np.float32)[[3]], 1)
    assert hits.keys.tolist() == [2]
    (hits,) = index.search(np.eye(4, dtype=np.float32)[[1]], 1)
    assert hits.keys.tolist() == [7]


def test_a_key_may_come_back_after_removal_and_absent_ones_are_no_error() -> None:
    index = FlatIndex(4)
    index.upsert(keys(1, 2), rows(2, 4))
    index.remove(keys(2, 99))
    index.remove(keys())
    assert len(index) == 1
    index.upsert(keys(2), rows(1, 4))
    assert len(index) == 2


@pytest.mark.parametrize("dimension", [3, 7, 384])
@pytest.mark.parametrize("queries", [1, 30])
def test_ties_stand_in_order_of_keys_also_at_the_cut(dimension: int, queries: int) -> None:
    same = np.repeat(rows(1, dimension), 37, axis=0)
    index = FlatIndex(dimension)
    order = np.random.default_rng(0).permutation(37)
    index.upsert(order, same)
    index.upsert(keys(100), -same[:1])
    for hits in index.search(same[:queries], 5):
        assert hits.keys.tolist() == [0, 1, 2, 3, 4]


def test_excluded_keys_make_room_for_others() -> None:
    data = rows(50, 4)
    index = FlatIndex(4)
    index.upsert(np.arange(50), data)
    (everything,) = index.search(data[:1], 50)
    (hits,) = index.search(data[:1], 10, exclude=everything.keys[:30])
    assert hits.keys.tolist() == everything.keys[30:40].tolist()
    (hits,) = index.search(data[:1], 10, exclude=everything.keys[:45])
    assert hits.keys.tolist() == everything.keys[45:].tolist()


def test_inputs_need_not_be_contiguous() -> None:
    data = np.asfortranarray(rows(20, 8))[::2, ::-2]
    index = FlatIndex(4)
    index.upsert(np.arange(20)[::2], data)
    (hits,) = index.search(data[3:4], 1)
    assert hits.keys.tolist() == [6]
    index.remove(np.arange(20)[::4])
    assert len(index) == 5


def test_lengths_that_overflow_float32_when_squared_are_normalised() -> None:
    index = FlatIndex(2)
    index.upsert(keys(0, 1), np.array([[1e30, 0], [0, 1e-40]], dtype=np.float32))
    (hits,) = index.search(np.array([[0, 1e38]], dtype=np.float32), 2)
    assert hits.keys.tolist() == [1, 0]
    np.testing.assert_allclose(hits.scores, [1, 0], atol=1e-6)


def test_readers_share_the_lock_and_a_writer_is_alone() -> None:
    lock, log = ReadWriteLock(), list[str]()

    def write() -> None:
        with lock.writing():
            log.append("write")

    def read() -> None:
        with lock.reading():
            log.append("read")

    with lock.reading():
        with lock.reading():
            writer = threading.Thread(target=write)
            writer.start()
            writer.join(0.1)
        late_reader = threading.Thread(target=read)
        late_reader.start()
        late_reader.join(0.1)
        assert log == []  # the reader lets the waiting writer go first
    writer.join(10)
    late_reader.join(10)
    assert log == ["write", "read"]
    with lock.writing():
        reader = threading.Thread(target=read)
        reader.start()
        reader.join(0.1)
        assert log == ["write", "read"]
    reader.join(10)
    assert log == ["write", "read", "read"]


def test_searches_run_beside_changes() -> None:
    index, data = FlatIndex(8), rows(300, 8)
    index.upsert(np.arange(100), data[:100])
    stop, faults = threading.Event(), list[object]()

    def search() -> None:
        while not stop.is_set():
            (hits,) = index.search(data[:1], 100)
            if len(hits.keys) != 100 or 0 not in hits.keys[:1]:
                faults.append(hits)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(100, 300, 5):
        index.upsert(np.arange(start, start + 5), data[start : start + 5])
        index.upsert(np.arange(start - 50, start), data[start - 50 : start])
        if start >= 200:
            index.remove(np.arange(start - 100, start - 95))
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(index) == 200
