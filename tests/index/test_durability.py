import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import StoreFailed
from index.store import FILE_NAME
from tests.index.helpers import REPOSITORY, create, fill, record, vectors


@pytest.mark.parametrize("lines_before_the_kill", [1, 60])
def test_what_was_acknowledged_survives_a_kill(root: Path, lines_before_the_kill: int) -> None:
    command = [sys.executable, "-m", "tests.index.acknowledging_writer", str(root)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(lines_before_the_kill)]
        writer.kill()
        lines += writer.stdout.readlines()  # acknowledged, though not yet read, when it died
    lines = [line for line in lines if line.endswith("\n")]
    upserted = {int(line.split()[1]) for line in lines if line.startswith("upserted")}
    deleted = {int(line.split()[1]) for line in lines if line.startswith("deleted")}
    assert len(upserted) >= lines_before_the_kill // 2

    with CollectionSet(root) as collections:
        collection = collections.get("pictures")
        ids = [each.id for each in collection.scroll(limit=1_000_000).records]
        assert len(ids) == len(set(ids)) == collection.count()
        last = max(upserted)
        for number in upserted:
            assert f"b{number}" in ids
            # Of the deletion after the last line nobody knows whether it took place.
            if number != last - 1:
                assert (f"a{number}" in ids) == (number not in deleted)
            stored = collection.get(f"b{number}", with_vectors=True).vectors["cls"]
            np.testing.assert_array_equal(stored, vectors(number)["cls"])
            assert collection.search(stored, k=1)[0].score == pytest.approx(1)
        # A write that was under way is there whole or not at all.
        assert (f"a{last + 1}" in ids) == (f"b{last + 1}" in ids)


def test_every_commit_is_synced(root: Path, collection: Collection) -> None:
    with closing(sqlite3.connect(root / "pictures" / FILE_NAME)) as outside:
        assert outside.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with collection._store.database.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_full_disk_is_an_error_and_changes_nothing(collection: Collection) -> None:
    fill(collection, 5)
    with collection._store.database.writing() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    writer = collection._store.database._writer
    writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFailed, match=r"'pictures'.*full"):
        collection.upsert([record(f"x{number}", number) for number in range(500)])
    assert collection.count() == len(collection.scroll(limit=1000).records) == 5
    writer.execute(f"PRAGMA max_page_count = {pages + 1000}")
    collection.upsert([record("x", 9)])
    assert collection.count() == 6


def test_the_file_is_whole_by_itself_after_closing(root: Path) -> None:
    with CollectionSet(root) as collections:
        fill(create(collections), 5)
    assert [path.name for path in (root / "pictures").iterdir()] == [FILE_NAME]
