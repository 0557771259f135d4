"""What an index on disk is worth at the next start: taken up, or built anew and said why."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.collection import NewRecord
from index.collection_set import CollectionSet
from index.durable import read_manifest, write_manifest
from index.kinds import IndexSettings
from index.maintenance import BuildPolicy
from index.store import FILE_NAME
from tests.index.helpers import MODEL
from tests.index.indexed import (
    HNSW,
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


def test_a_restart_goes_on_from_what_was_saved(
    root: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(root) as collections:
        make(collections, rows[:5000], HNSW)
    caplog.set_level(logging.INFO, logger="index")
    with opened(root) as collections:
        collection = collections.get("c")
        space = collection.stats().spaces["cls"]
        assert (space.kind, space.rows) == ("hnsw", 5000)
        assert space.saved_rows >= 4500
        generation = space.generation
        assert collection.search(rows[4999], k=1)[0].id == "r4999"
        collection.wait_until_built(timeout_s=60)
        assert "anew" not in caplog.text
        collection.upsert(records(rows[5000:], 5000))
        collection.wait_until_built(timeout_s=60)
        assert collection.stats().spaces["cls"].generation > generation
        assert recall_at_10(collection, rows) > 0.97


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flip", r"cls\.\d+\.ann is damaged: its checksum differs"),
        ("cut", r"cls\.\d+\.ann has \d+ bytes, not \d+"),
        ("gone", r"cls\.\d+\.rows is missing"),
        ("manifest", r"its manifest is damaged"),
    ],
)
def test_a_damaged_cache_is_built_anew_and_the_log_says_why(
    root: Path, rows: Any, caplog: pytest.LogCaptureFixture, damage: str, reason: str
) -> None:
    with opened(root) as collections:
        make(collections, rows[:2000], HNSW)
    folder = root / "c" / "index"
    (ann,), (numbers,) = folder.glob("*.ann"), folder.glob("*.rows")
    content = bytearray(ann.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        ann.write_bytes(content)
    elif damage == "cut":
        ann.write_bytes(content[:-1])
    elif damage == "gone":
        numbers.unlink()
    else:
        (folder / "cls.json").write_text("{}")
    with opened(root) as collections:
        collection = collections.get("c")
        (told,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert re.search(rf"'c', space 'cls': building its index anew: {reason}", told.message)
        # It answers at once, exactly, from the records.
        assert [m.id for m in collection.search(rows[7], k=1)] == ["r7"]
        collection.wait_until_built(timeout_s=60)
        assert collection.stats().spaces["cls"].kind == "hnsw"
        assert recall_at_10(collection, rows[:2000]) > 0.97


def test_settings_that_came_before_the_end_hold_after_it(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        collection = make(collections, rows[:2000], HNSW)
        collection.upsert(records(rows[2000:2100], 2000))
        collection.configure(IndexSettings(kind="hnsw", hnsw_m=24))
    with opened(root) as collections:
        collection = collections.get("c")
        collection.wait_until_built(timeout_s=60)
        assert links(collection) == 24
        assert collection.check() == []


def test_an_older_database_under_a_newer_cache_is_noticed(
    root: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(root) as collections:
        make(collections, rows[:1500], HNSW)
    older = (root / "c" / FILE_NAME).read_bytes()
    with opened(root) as collections:
        collection = collections.get("c")
        collection.upsert(records(rows[1500:3000], 1500))
        collection.wait_until_built(timeout_s=60)
        assert collection.stats().spaces["cls"].saved_rows == 3000
    (root / "c" / FILE_NAME).write_bytes(older)
    with opened(root) as collections:
        collection = collections.get("c")
        assert "it is newer than the records" in caplog.text
        collection.upsert(records(rows[3000:], 1500))
        assert collection.check() == []
        assert collection.search(rows[3100], k=1)[0].id == "r1600"


def test_a_cache_of_a_kind_that_there_is_not(
    root: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(root) as collections:
        make(collections, rows[:1500], HNSW)
    for kind in ("tree", "flat"):
        path = root / "c" / "index" / "cls.json"
        manifest = read_manifest(path, version=1)
        write_manifest(path, manifest | {"kind": kind})
        with opened(root) as collections:
            collection = collections.get("c")
            assert collection.search(rows[7], k=1)[0].id == "r7"
            collection.wait_until_built(timeout_s=60)
            assert collection.stats().spaces["cls"].kind == "hnsw"
    assert "kind must be one of" in caplog.text
    assert "not an index of kind 'flat'" in caplog.text


def test_what_was_tuned_is_not_tuned_again_at_each_start(
    root: Path, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(root) as collections:
        collection = make(collections, rows[:2000], HNSW)
        recall = collection.stats().spaces["cls"].recall
    caplog.set_level(logging.INFO, logger="index")
    caplog.clear()
    with opened(root) as collections:
        collection = collections.get("c")
        collection.wait_until_built(timeout_s=60)
        assert collection.stats().spaces["cls"].recall == recall
        assert "recall@10" not in caplog.text
        collection.configure(IndexSettings(kind="hnsw", hnsw_m=16, target_recall=1))
        collection.wait_until_built(timeout_s=60)
        assert "recall@10" in caplog.text


def test_the_effort_on_disk_is_that_of_the_structure_there(root: Path, rows: Any) -> None:
    settings = IndexSettings(kind="mapped", lists=60, target_recall=0.999)
    with opened(root) as collections:
        collection = make(collections, rows, HNSW)
        collection.configure(settings)
        assert collection.wait_until_built(timeout_s=60)
        tuned = collection.stats().spaces["cls"]
        assert tuned.kind == "mapped"
    with opened(root) as collections:
        collection = collections.get("c")
        assert collection.wait_until_built(timeout_s=60)
        again = collection.stats().spaces["cls"]
        assert (again.kind, again.effort, again.recall) == ("mapped", tuned.effort, tuned.recall)


def test_an_index_from_before_recall_was_noted_is_taken_up(root: Path, rows: Any) -> None:
    with opened(root) as collections:
        make(collections, rows[:1500], HNSW)
    path = root / "c" / "index" / "cls.json"
    manifest = read_manifest(path, version=1)
    del manifest["recall"]
    write_manifest(path, manifest)
    with opened(root) as collections:
        collection = collections.get("c")
        assert collection.stats().spaces["cls"].kind == "hnsw"
        assert collection.wait_until_built(timeout_s=60)
        assert collection.stats().spaces["cls"].recall is not None


def test_rows_that_are_gone_mislead_no_search(root: Path) -> None:
    """One space's index is lost, and the other's has rows that were removed since."""
    random = np.random.default_rng(0)
    spaces = {"cls": 16, "copy": 8}
    # So searches are content with the least effort.
    settings = IndexSettings(kind="hnsw", hnsw_m=8, ef_construction=16, target_recall=0.5)
    made = {name: random.standard_normal((1500, d), np.float32) for name, d in spaces.items()}
    policy = BuildPolicy(save_rows=100, save_share=0, compact_share=0.5)
    with CollectionSet(root, policy=policy) as collections:
        collection = collections.create("c", spaces=spaces, model=MODEL, settings=settings)
        collection.upsert(
            [
                NewRecord(f"r{i}", {name: rows[i] for name, rows in made.items()})
                for i in range(1500)
            ]
        )
        assert collection.wait_until_built(timeout_s=60)
        collection.delete([f"r{i}" for i in range(0, 1500, 5)])
    for path in (root / "c" / "index").glob("copy.*"):
        path.unlink()
    with CollectionSet(root, policy=policy) as collections:
        collection = collections.get("c")
        assert collection.wait_until_built(timeout_s=60)
        assert collection.stats().removed == 300
        own = [f"r{i}" for i in range(1500) if i % 5]
        found = collection.search_batch(made["copy"][[int(each[1:]) for each in own]], 1, "copy")
        assert [match.id for (match,) in found] == own
