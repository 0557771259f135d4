"""What is done on a disk that fails; test_faults.py runs each in a process of its own.

python -m tests.index.fault_scenarios FOLDER NAME CALL ERRNO PATTERN [CALL ERRNO PATTERN ...]

It is done for each fault, in a folder of its own.
"""

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from index import maintenance
from index.cache import read_cache
from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.errors import StoreFailed
from index.export_file import reading_export, writing_export
from index.kinds import IndexSettings
from index.loading import described
from index.maintenance import BuildPolicy
from index.transfer import export_records, import_new
from tests.index.faulty_disk import faults
from tests.index.helpers import create, fill, record, vectors

_BATCH = 7


def batch(number: int) -> list[NewRecord]:
    return [record(f"b{number}-{i}", 1000 + 10 * number + i, batch=number) for i in range(_BATCH)]


def batches_in(collection: Collection) -> set[int]:
    """The batches that are there, each of them whole and searchable."""
    found = dict[int, int]()
    for each in collection.scroll(limit=100_000).records:
        if "batch" in each.metadata:
            number = each.metadata["batch"]
            found[number] = found.get(number, 0) + 1
    assert set(found.values()) <= {_BATCH}, found
    for number in found:
        for new in batch(number):
            query = np.asarray(new.vectors["cls"])
            assert collection.search(query, k=1)[0].id == new.id
            stored = collection.get(new.id, with_vectors=True).vectors["cls"]
            np.testing.assert_array_equal(stored, query)
    assert collection.check() == []
    return set(found)


def refused(do: Callable[..., Any], *arguments: Any) -> str:
    try:
        do(*arguments)
    except StoreFailed as error:
        return str(error)
    raise AssertionError("it was not refused")


@contextmanager
def as_a_kill_leaves_it(root: Path) -> Iterator[Collection]:
    """The collection, opened in a copy of the folder: as if the process were killed now."""
    copy = root.with_name(f"{root.name}-copy")
    shutil.copytree(root, copy)
    with CollectionSet(copy) as collections:
        yield collections.get("pictures")
    shutil.rmtree(copy)


def writing(root: Path, *fault: Any) -> None:
    """A write that fails leaves all as it was; the next one that the disk takes succeeds."""
    with CollectionSet(root) as collections:
        collection = create(collections)
        fill(collection, 20)
        collection.upsert(batch(0))
        with faults(*fault):
            told = refused(collection.upsert, batch(1))
            refused(collection.insert, batch(2))
            refused(collection.delete, ["r1", "r2"])
            refused(collection.delete_where, {"must": {"key": "batch", "match": {"value": 0}}})
            refused(collection.configure, IndexSettings(kind="hnsw"))
            # So large that SQLite writes to its log before the commit.
            refused(collection.upsert, [replace(new, thumbnail=bytes(10**6)) for new in batch(4)])
            assert collection.settings == IndexSettings()
            assert collection.count() == 20 + _BATCH
            assert batches_in(collection) == {0}
            found = collection.search(vectors(1)["cls"], k=1)
            assert [match.id for match in found] == ["r1"]
            with as_a_kill_leaves_it(root) as left:
                # Of the last write that failed nobody knows: all of it or nothing. None that
                # failed before it can be there, for this one took its place in the log.
                assert batches_in(left) in ({0}, {0, 4})
                assert {f"r{i}" for i in range(20)} <= {r.id for r in left.scroll(limit=99).records}
        collection.upsert(batch(3))
        assert batches_in(collection) == {0, 3}
        with as_a_kill_leaves_it(root) as left:
            assert batches_in(left) == {0, 3}
            assert left.count() == 20 + 2 * _BATCH
    with CollectionSet(root) as collections:
        assert batches_in(collections.get("pictures")) == {0, 3}
        assert collections.get("pictures").count() == 20 + 2 * _BATCH
    print(told)


def failed_and_then_killed(root: Path, *fault: Any) -> None:
    """A write that was refused may come back after a kill: whole, or not at all."""
    with CollectionSet(root) as collections:
        collection = create(collections)
        collection.upsert(batch(0))
        with faults(*fault):
            refused(collection.upsert, batch(1))
        assert batches_in(collection) == {0}
        with as_a_kill_leaves_it(root) as left:
            found = batches_in(left)
            assert found in ({0}, {0, 1})
            left.upsert(batch(2))
            assert batches_in(left) == {*found, 2}
    with CollectionSet(root) as collections:  # a clean end leaves it out
        assert batches_in(collections.get("pictures")) == {0}
    print(sorted(found))


def many_writers(root: Path, *fault: Any) -> None:
    """Faults that come and go under threads that share commits: each is told of its own writes."""
    acknowledged, told = set[int](), list[str]()
    with CollectionSet(root) as collections:
        collection = create(collections)

        def write(first: int) -> None:
            for number in range(first, first + 15):
                try:
                    collection.upsert(batch(number))
                except StoreFailed as error:
                    told.append(str(error))
                else:
                    acknowledged.add(number)

        threads = [threading.Thread(target=write, args=(100 * each,)) for each in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with faults(*fault):
                time.sleep(0.005)
            time.sleep(0.005)
        for thread in threads:
            thread.join()
        assert batches_in(collection) == acknowledged
        assert len(acknowledged) + len(told) == 60
        with as_a_kill_leaves_it(root) as left:
            assert acknowledged <= batches_in(left)
    with CollectionSet(root) as collections:
        assert batches_in(collections.get("pictures")) == acknowledged


def checkpoints(root: Path, *fault: Any) -> None:
    """What is committed need not yet be in the main file: failing to bring it there is no loss."""
    with CollectionSet(root) as collections:
        collection = create(collections)
        with faults(*fault):
            for number in range(12):  # of a megabyte each; SQLite wants to empty its log at eight
                large = [(each, os.urandom(150_000)) for each in batch(number)]
                collection.upsert(
                    [
                        NewRecord(each.id, each.vectors, each.metadata, each.content_hash, picture)
                        for each, picture in large
                    ]
                )
            with as_a_kill_leaves_it(root) as left:
                assert batches_in(left) == set(range(12))
            collections.close()
    with CollectionSet(root) as collections:
        collection = collections.get("pictures")
        assert batches_in(collection) == set(range(12))
        assert collection.thumbnail(large[0][0].id) == large[0][1]
        collection.upsert(batch(12))
        assert batches_in(collection) == set(range(13))


def saving(root: Path, *fault: Any) -> None:
    """The index on disk stays when a newer one cannot be written; that is tried again by itself."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, force=True)
    maintenance._SAVE_AGAIN_S = 0.3
    policy = BuildPolicy(save_rows=1, save_share=0)
    with CollectionSet(root, policy=policy) as collections:
        collection = create(collections)
        fill(collection, 100)
        collection.configure(IndexSettings(kind="hnsw"))
        assert collection.wait_until_built(timeout_s=60)
        store = collection._store

        def saved() -> dict[str, tuple[int, int]]:
            there = {}
            for space in store.spaces:
                cached = read_cache(
                    store.folder,
                    space,
                    described=described(store, space, store.settings.structure()),
                )
                assert cached is not None
                there[space] = cached.generation, len(cached.numbers)
            return there

        before = saved()
        assert {rows for _, rows in before.values()} == {100}
        with faults(*fault):
            collection.upsert(batch(0))
            assert collection.wait_until_built(timeout_s=60)
            assert saved() == before
            left = {path.name.rsplit(".", 1)[-1] for path in (store.folder / "index").iterdir()}
            assert left == {"ann", "rows", "json"}
            assert batches_in(collection) == {0}
        until = time.monotonic() + 60
        while {rows for _, rows in saved().values()} != {100 + _BATCH}:
            assert time.monotonic() < until, "it was not tried again"
            time.sleep(0.05)
    with CollectionSet(root, policy=policy) as collections:
        collection = collections.get("pictures")
        for space in collection.stats().spaces.values():
            assert (space.kind, space.saved_rows) == ("hnsw", 100 + _BATCH)
        assert batches_in(collection) == {0}


def snapshots(root: Path, *fault: Any) -> None:
    """A snapshot that cannot be finished leaves nothing, and the others as they are."""
    with CollectionSet(root) as collections:
        collection = create(collections)
        collection.upsert(batch(0))
        first = collections.snapshot("pictures")
        folder = root / ".snapshots" / "pictures"
        before = sorted(folder.iterdir())
        with faults(*fault):
            told = refused(collections.snapshot, "pictures")
            assert sorted(folder.iterdir()) == before
            assert collections.snapshots("pictures") == [first]
            collection.upsert(batch(1))
        second = collections.snapshot("pictures")
        assert collections.snapshots("pictures") == [first, second]
        assert batches_in(collections.restore("pictures", first.name)) == {0}
        assert batches_in(collections.restore("pictures", second.name)) == {0, 1}
    print(told)


def restoring(root: Path, *fault: Any) -> None:
    """A restore that cannot be finished leaves the collection as it was, open and at work."""
    with CollectionSet(root) as collections:
        create(collections).upsert(batch(0))
        taken = collections.snapshot("pictures")
        collections.get("pictures").upsert(batch(1))
        with faults(*fault):
            told = refused(collections.restore, "pictures", taken.name)
            assert batches_in(collections.get("pictures")) == {0, 1}
        collections.get("pictures").upsert(batch(2))
        assert batches_in(collections.get("pictures")) == {0, 1, 2}
        assert batches_in(collections.restore("pictures", taken.name)) == {0}
        assert {path.name for path in root.iterdir()} == {"LOCK", "pictures", ".snapshots"}
    print(told)


def opening_one(root: Path, *fault: Any) -> None:
    """A collection that cannot be opened now does not keep others, and can be opened later."""
    with CollectionSet(root) as collections:
        create(collections).upsert(batch(0))
        create(collections, "other").upsert(batch(1))
    with faults(*fault):
        again = CollectionSet(root)
        print(refused(again.get, "pictures"))
        assert batches_in(again.get("other")) == {1}
        assert again.names() == ["other", "pictures"]
    with again:
        assert batches_in(again.get("pictures")) == {0}
        assert again.damaged == {}


def opening(root: Path, *fault: Any) -> None:
    """A folder that cannot be opened now can be opened later."""
    with CollectionSet(root) as collections:
        create(collections).upsert(batch(0))
    with faults(*fault):
        print(refused(CollectionSet, root))
    with CollectionSet(root) as collections:
        assert batches_in(collections.get("pictures")) == {0}


def creating(root: Path, *fault: Any) -> None:
    """A collection that cannot be made leaves nothing, and its name free."""
    with CollectionSet(root) as collections:
        with faults(*fault):
            told = refused(create, collections)
            assert [path.name for path in root.iterdir()] == ["LOCK"]
        create(collections).upsert(batch(0))
    with CollectionSet(root) as collections:
        assert batches_in(collections.get("pictures")) == {0}
    print(told)


def exporting(root: Path, *fault: Any) -> None:
    """An export that cannot be finished leaves no file."""
    with CollectionSet(root / "collections") as collections:
        collection = create(collections)
        fill(collection, 400)
        folder = root / "exports"
        folder.mkdir()
        for suffix in ("jsonl", "jsonl.gz", "parquet"):
            path = folder / f"all.{suffix}"
            told = list[OSError]()
            with faults(*fault):
                try:
                    with writing_export(path) as (file, format):  # noqa: A001
                        export_records(collection, file, format=format)
                except OSError as error:
                    told.append(error)
            assert [error.errno for error in told] == [fault[1]], told
            assert list(folder.iterdir()) == []
            with writing_export(path) as (file, format):  # noqa: A001
                assert export_records(collection, file, format=format) == 400
            with reading_export(path) as (source, format):  # noqa: A001
                name = f"from-{suffix.replace('.', '-')}"
                import_new(collections, name, source, format=format)
            assert collections.get(name).count() == 400
            path.unlink()


def short_writes(root: Path, *fault: Any) -> None:
    """The operating system may take a part of what it is given: then the rest follows."""
    with faults(*fault), CollectionSet(root, policy=BuildPolicy(save_rows=1)) as collections:
        collection = create(collections)
        for number in range(20):
            collection.upsert(batch(number))
        collection.configure(IndexSettings(kind="hnsw"))
        assert collection.wait_until_built(timeout_s=60)
        taken = collections.snapshot("pictures")
        collection.upsert(batch(20))
        path = root / "all.jsonl"
        with writing_export(path) as (file, format):  # noqa: A001
            export_records(collection, file, format=format)
        with reading_export(path) as (source, format):  # noqa: A001
            import_new(collections, "again", source, format=format)
    with CollectionSet(root) as collections:
        collection = collections.get("pictures")
        assert {space.kind for space in collection.stats().spaces.values()} == {"hnsw"}
        for name in ("pictures", "again"):
            assert batches_in(collections.get(name)) == set(range(21))
        assert batches_in(collections.restore("pictures", taken.name)) == set(range(20))


def main() -> None:
    root, name, *given = sys.argv[1:]
    scenario: Callable[..., None] = globals()[name]
    for start in range(0, len(given), 3):
        call, number, pattern = given[start : start + 3]
        print(call, os.strerror(int(number)), pattern, file=sys.stderr)
        folder = Path(root) / f"{call}-{number}"
        scenario(folder, call, int(number), pattern)


if __name__ == "__main__":
    main()
