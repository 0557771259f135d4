import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import pytest

from index import writes
from index.collection import Collection
from index.collection_set import CollectionSet
from index.database import Database
from index.errors import InvalidRecord, StoreFailed
from index.store import Store
from tests.index.helpers import create, fill, record


def commits_of(collection: Collection) -> Callable[[], int]:
    """Counts the transactions that a collection commits from now on."""
    counted = [0]
    database = collection._store.database

    def count(statement: str) -> None:
        counted[0] += statement == "COMMIT"

    with database.writing() as connection:
        connection.set_trace_callback(count)
    return lambda: counted[0]


def run_all(tasks: Sequence[Callable[[], object]]) -> list[BaseException]:
    errors = list[BaseException]()

    def run(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def held(collection: Collection, tasks: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Let tasks come while nothing can be written, so that they wait together."""
    waiting = collection._mirror.commits._queue
    started = threading.Event()

    def hold() -> None:
        with collection._mirror.commits.paused():
            started.set()
            while len(waiting) < len(tasks):
                started.wait(0.001)

    holder = threading.Thread(target=hold)
    holder.start()
    started.wait(10)
    errors = run_all(tasks)
    holder.join(10)
    return errors


def test_writes_that_wait_together_share_a_commit(collection: Collection) -> None:
    count = commits_of(collection)
    tasks = [partial(collection.upsert, [record(f"r{n}", n)]) for n in range(40)]
    before = count()
    assert held(collection, tasks) == []
    assert count() - before < 10
    assert collection.count() == 40
    assert collection.check() == []


def test_a_mistake_among_them_fails_alone(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert = writes.upsert

    def refuse(store: Store, connection: Connection, records: Any, **options: Any) -> Any:
        result = upsert(store, connection, records, **options)
        if records[0].id == "r7":
            raise InvalidRecord("r7 is not wanted, although it was written already")
        return result

    monkeypatch.setattr(writes, "upsert", refuse)
    tasks = [partial(collection.upsert, [record(f"r{n}", n)]) for n in range(20)]
    errors = held(collection, tasks)
    assert [type(error) for error in errors] == [InvalidRecord]
    assert collection.count() == 19
    assert collection.check() == []


def test_a_full_disk_fails_all_who_share_and_nobody_else(collection: Collection) -> None:
    fill(collection, 5)
    writer = collection._store.database._writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    tasks = [
        partial(collection.upsert, [record(f"x{n}-{i}", i) for i in range(100)]) for n in range(8)
    ]
    errors = held(collection, tasks)
    assert [type(error) for error in errors] == [StoreFailed] * 8
    assert len({id(error) for error in errors}) == 8
    assert all("full" in str(error) for error in errors)
    assert collection.count() == 5
    writer.execute(f"PRAGMA max_page_count = {pages + 10_000}")
    assert run_all(tasks) == []
    assert collection.count() == 805
    assert collection.check() == []


def test_each_of_them_sees_those_before_it(collection: Collection) -> None:
    tasks = [partial(collection.insert, [record("same", 1)]) for _ in range(20)]
    assert held(collection, tasks) == []
    assert collection.count() == 1


class Interrupted(BaseException):
    pass


def test_an_interrupted_leader_leaves_the_others_writes_done(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CollectionSet(root) as collections:
        collection = create(collections)
        writing, first = Database.writing, iter([True])

        def interrupted(self: Database) -> AbstractContextManager[Connection]:
            if next(first, False):
                raise Interrupted
            return writing(self)

        monkeypatch.setattr(Database, "writing", interrupted)
        tasks = [partial(collection.upsert, [record(f"r{n}", n)]) for n in range(10)]
        errors = held(collection, tasks)
        assert [type(error) for error in errors] == [Interrupted]
        assert collection.count() == 9
        assert collection.check() == []
