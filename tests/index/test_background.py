"""Indexes built, changed, saved and cleared out in the background, while searches go on."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index import builder, kinds, maintenance
from index.collection_set import CollectionSet
from index.errors import CollectionNotFound, StoreFailed
from index.kinds import ChosenKind, IndexSettings
from index.maintenance import BuildPolicy
from tests.index.helpers import MODEL, cosines
from tests.index.indexed import (
    DIMENSION,
    HNSW,
    ROWS,
    clustered_rows,
    links,
    make,
    opened,
    recall_at_10,
    records,
)


@pytest.fixture
def rows() -> Any:
    return clustered_rows()


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_sq8", "ivf_pq", "mapped"])
def test_each_kind_finds_what_it_promises(root: Path, rows: Any, kind: ChosenKind) -> None:
    settings = IndexSettings(kind=kind, lists=40, pq_bytes=8)
    with opened(root) as collections:
        collection = make(collections, rows, settings)
        stats = collection.stats()
        space = stats.spaces["cls"]
        assert (space.kind, space.rows, space.pending) == (kind, ROWS, 0)
        assert space.recall is not None
        assert space.recall >= (0.9 if kind == "ivf_pq" else 0.99)
        assert recall_at_10(collection, rows) >= (0.85 if kind == "ivf_pq" else 0.97)
        few = {"must": {"key": "number", "range": {"lt": 20}}}  # .3 % of all
        for query in rows[5000:5005]:
            found = collection.search(query, k=10, filter=few)
            best = np.argsort(-cosines(query, rows[:20]))[:10]
            assert [match.id for match in found] == [f"r{n}" for n in best.tolist()]
        assert len(collection.search(rows[0], k=50, filter=few)) == 20
        assert collection.check() == []


def test_kinds_change_while_searches_and_writes_go_on(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        collection = make(collections, rows[:4500], IndexSettings(kind="flat"))
        stop, faults, written = threading.Event(), list[object](), [4500]

        def search() -> None:
            while not stop.is_set():
                # Told before the search begins, so it must be seen.
                newest = written[0] - 1
                found = collection.search(rows[newest], k=10)
                if found[0].id != f"r{newest}" or len(found) != 10:
                    faults.append((newest, found))

        def write() -> None:
            while written[0] < ROWS and not stop.is_set():
                collection.upsert(records(rows[written[0] : written[0] + 10], written[0]))
                written[0] += 10
                stop.wait(0.01)

        threads = [threading.Thread(target=target) for target in (search, write)]
        for thread in threads:
            thread.start()
        order: list[ChosenKind] = ["hnsw", "ivf_sq8", "mapped", "ivf_pq", "hnsw", "flat"]
        for kind in order:
            collection.configure(IndexSettings(kind=kind, hnsw_m=16, lists=20, pq_bytes=8))
            assert collection.wait_until_built(timeout_s=120)
            assert collection.stats().spaces["cls"].kind == kind
        stop.set()
        for thread in threads:
            thread.join()
        assert faults == []
        assert collection.count() == written[0]
        assert collection.check() == []


def test_auto_goes_from_flat_to_a_graph_as_it_grows(
    root: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "FLAT_UP_TO", 2000)
    monkeypatch.setattr(kinds, "HNSW_UP_TO", 5000)
    with opened(root) as collections:
        collection = make(collections, rows[:1000], IndexSettings())
        assert collection.stats().spaces["cls"].kind == "flat"
        collection.upsert(records(rows[1000:3000], 1000))
        collection.wait_until_built(timeout_s=120)
        assert collection.stats().spaces["cls"].kind == "hnsw"
        collection.upsert(records(rows[3000:], 3000))
        collection.wait_until_built(timeout_s=120)
        assert collection.stats().spaces["cls"].kind == "ivf_sq8"
        assert recall_at_10(collection, rows) > 0.97


def test_removed_rows_are_cleared_out(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        collection = make(collections, rows, HNSW)
        before = collection.stats().memory_bytes
        gone = {"must": {"key": "number", "range": {"gte": 1000}}}
        assert collection.delete_where(gone) == ROWS - 1000
        found = collection.search(rows[5000], k=1000)
        assert len(found) == 1000
        collection.wait_until_built(timeout_s=60)
        stats = collection.stats()
        assert (stats.removed, stats.spaces["cls"].rows) == (0, 1000)
        assert stats.memory_bytes < before / 2
        assert collection.check() == []
    with opened(root) as collections:
        assert len(collections.get("c").search(rows[5000], k=1000)) == 1000


def test_other_settings_of_a_graph_build_it_anew(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        collection = make(collections, rows[:2000], HNSW)
        collection.configure(IndexSettings(kind="hnsw", hnsw_m=64))
        collection.wait_until_built(timeout_s=60)
        assert links(collection) == 64
    with opened(root) as collections:
        assert collections.get("c").settings.hnsw_m == 64
        assert links(collections.get("c")) == 64


def test_an_index_that_cannot_be_saved_answers_and_is_tried_again(
    root: Path, rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise StoreFailed("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(maintenance, "write_cache", refuse)
        with opened(root) as collections:
            collection = make(collections, rows[:2000], HNSW)
            assert "no space left on device; it is tried again in 60 s" in caplog.text
            assert collection.stats().spaces["cls"].saved_rows == 0
            assert recall_at_10(collection, rows[:2000]) > 0.97
            patched.setattr(maintenance, "_SAVE_AGAIN_S", 0.0)
            collection._maintenance._later.clear()
            patched.undo()
            collection.wait_until_built(timeout_s=60)
            assert collection.stats().spaces["cls"].saved_rows == 2000


def test_background_work_that_fails_is_told_and_done_again(
    root: Path, rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builder, "_AGAIN_S", 0.2)
    add, failed = maintenance.Ann.add, iter([True])

    def fail_once(self: Any, *arguments: Any, **named: Any) -> int:
        if next(failed, False):
            raise MemoryError("no memory for the graph")
        return int(add(self, *arguments, **named))

    monkeypatch.setattr(maintenance.Ann, "add", fail_once)
    with opened(root) as collections:
        collection = collections.create("c", spaces={"cls": DIMENSION}, model=MODEL, settings=HNSW)
        collection.upsert(records(rows[:2000]))
        for _ in range(600):
            space = collection.stats().spaces["cls"]
            if space.kind == "hnsw" and not space.pending:  # it is there, empty, before it fails
                break
            assert collection.search(rows[3], k=1)[0].id == "r3"  # all the while
            threading.Event().wait(0.1)
        assert collection.wait_until_built(timeout_s=60)
        assert "no memory for the graph" in caplog.text
        assert collection.stats().spaces["cls"].pending == 0
        assert recall_at_10(collection, rows[:2000]) > 0.97
        assert collection.check() == []


def test_closing_does_not_wait_for_a_long_build(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        collection = make(collections, rows, IndexSettings(kind="flat"))
        collection.configure(IndexSettings(kind="hnsw", hnsw_m=128, ef_construction=1000))
    with opened(root) as collections:
        collection = collections.get("c")
        assert collection.count() == ROWS
        assert collection.settings.kind == "hnsw"
        assert collection.search(rows[17], k=1)[0].id == "r17"


def test_an_exact_scan_in_place_of_a_search_does_not_pass_for_recall(root: Path, rows: Any) -> None:
    """With a removed row, a search through all lists is a scan; a search of one list is not."""
    settings = IndexSettings(kind="ivf_sq8", lists=40, target_recall=1)
    policy = BuildPolicy(tune_share=0.1)
    with CollectionSet(root, policy=policy) as collections:
        collection = make(collections, rows[:4500], settings)
        collection.delete(["r1"])
        collection.upsert(records(rows[4500:], 4500))
        collection.wait_until_built(timeout_s=60)
        assert collection.stats().spaces["cls"].effort > 1
        assert recall_at_10(collection, rows) > 0.97


def test_a_collection_that_is_damaged_while_open_can_be_deleted(
    root: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with CollectionSet(root) as collections:
        collection = make(collections, rows[:2000], HNSW)
        with collection._store.database.writing() as connection:
            connection.execute("DROP TABLE collection")
        collections.delete("c")
        assert collections.names() == []


def test_nobody_waits_for_a_closed_collection(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        collection = make(collections, rows[:100], HNSW)
    for use in (collection.wait_until_built, collection.rebuild):
        with pytest.raises(CollectionNotFound, match="closed or deleted"):
            use()


def test_copies_of_a_vector_are_as_good_as_one_another(root: Path, rows: Any) -> None:
    copies = np.repeat(rows[:200], 15, axis=0)
    with opened(root) as collections:
        collection = make(collections, copies, HNSW)
        space = collection.stats().spaces["cls"]
        assert space.recall is not None
        assert space.recall >= 0.99
