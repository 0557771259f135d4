import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from index.database import Database
from index.errors import CollectionNotFound, StoreFailed
from tests.index.helpers import REPOSITORY


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "a.sqlite", described="collection 'x'", page_bytes=4096)
    with made.writing() as connection:
        connection.execute("CREATE TABLE parents (key INTEGER PRIMARY KEY, text TEXT UNIQUE)")
        connection.execute("CREATE TABLE children (key INTEGER REFERENCES parents, content BLOB)")
        for key in range(300):
            connection.execute("INSERT INTO parents VALUES (?, ?)", (key, f"text {key}"))
            connection.execute("INSERT INTO children VALUES (?, randomblob(100))", (key,))
    yield made
    made.close()


def add(database: Database, bytes_each: int) -> None:
    with database.writing() as connection:
        key = connection.execute("INSERT INTO parents VALUES (NULL, NULL)").lastrowid
        connection.execute("INSERT INTO children VALUES (?, zeroblob(?))", (key, bytes_each))


def counts(path: Path) -> tuple[int, int]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (parents,), (children,) = (
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()
            for table in ("parents", "children")
        )
    return parents, children


def test_a_copy_is_of_one_moment_while_writes_go_on(database: Database, tmp_path: Path) -> None:
    for _ in range(6):
        add(database, 4 << 20)
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        add(database, 1000)
        assert len(seen) < 20, "the copying begins again after each commit"

    database.backup(tmp_path / "b.sqlite", progress=progress)
    assert counts(tmp_path / "b.sqlite") == (306, 306)
    assert seen == sorted(seen)
    assert len(seen) == 4  # three whole steps of 8 MB and the rest
    size = (tmp_path / "b.sqlite").stat().st_size
    assert seen[-1] == (size, size)
    assert not list(tmp_path.glob("b.sqlite-*"))
    database.backup(tmp_path / "c.sqlite")
    assert counts(tmp_path / "c.sqlite") == (310, 310)


def test_a_copy_can_be_opened_in_the_place_of_the_original(
    database: Database, tmp_path: Path
) -> None:
    database.backup(tmp_path / "b.sqlite")
    copy = Database(tmp_path / "b.sqlite", described="the copy")
    add(copy, 10)
    assert copy.check() == []
    copy.close()
    with closing(sqlite3.connect(tmp_path / "b.sqlite")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_copying_can_be_ended_and_leaves_nothing(database: Database, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(StoreFailed, match=r"'x' could not be copied to 'b\.sqlite'"):
        database.backup(tmp_path / "b.sqlite", progress=stop)
    assert not list(tmp_path.glob("b.sqlite*"))
    database.backup(tmp_path / "b.sqlite")
    assert counts(tmp_path / "b.sqlite") == (300, 300)


def test_a_file_that_is_there_is_left_alone(database: Database, tmp_path: Path) -> None:
    (tmp_path / "b.sqlite").write_bytes(b"precious")
    with pytest.raises(StoreFailed, match="File exists"):
        database.backup(tmp_path / "b.sqlite")
    assert (tmp_path / "b.sqlite").read_bytes() == b"precious"
    with pytest.raises(StoreFailed, match="No such file"):
        database.backup(tmp_path / "absent" / "b.sqlite")


def test_a_closed_database_is_not_copied(database: Database, tmp_path: Path) -> None:
    database.close()
    with pytest.raises(CollectionNotFound):
        database.backup(tmp_path / "b.sqlite")
    assert not (tmp_path / "b.sqlite").exists()


LIMITED = """
import resource, sys
from pathlib import Path
from index.database import Database
from index.errors import StoreFailed
folder = Path(sys.argv[1])
database = Database(folder / "a.sqlite", described="collection 'x'")
for limit in (20_000, 10**9):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        database.backup(folder / "b.sqlite")
        print("copied")
    except StoreFailed as error:
        print(error, sorted(path.name for path in folder.glob("b.*")))
database.close()
"""


def test_a_copy_that_does_not_fit_is_removed(database: Database, tmp_path: Path) -> None:
    database.close()
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["collection 'x': disk I/O error []", "copied"]
    assert counts(tmp_path / "b.sqlite") == (300, 300)


def test_a_full_disk_is_named(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Database.backup.__globals__["_connect"]

    def small(path: Path, **options: bool) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **options)
        if path.name == "b.sqlite":
            connection.execute("PRAGMA max_page_count = 3")
        return connection

    monkeypatch.setattr("index.database._connect", small)
    with pytest.raises(StoreFailed, match="full"):
        database.backup(tmp_path / "b.sqlite")
    assert not list(tmp_path.glob("b.sqlite*"))


def remove_a_parent(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM parents WHERE key = 7")
        connection.commit()


def garble(start: int, end: int | None = None) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        end_at = len(content) if end is None else end
        content[start:end_at] = b"\xa5" * (end_at - start)
        path.write_bytes(content)

    return apply


def cut_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (remove_a_parent, "children: row 8 belongs to no row of parents"),
        (garble(0), "file is not a database"),
        (garble(4096), ""),
        (garble(4096 * 4, 4096 * 5), ""),
        (cut_a_page, ""),
        (Path.unlink, "a.sqlite is missing"),
    ],
    ids=["a missing row", "all", "all but the first page", "one page", "cut", "gone"],
)
def test_a_check_lists_what_is_wrong(
    database: Database, tmp_path: Path, damage: Callable[[Path], None], found: str
) -> None:
    assert database.check() == []
    database.close()
    opened = Database(tmp_path / "a.sqlite", described="collection 'x'")
    damage(tmp_path / "a.sqlite")
    problems = opened.check()
    opened.close()
    assert problems
    assert found in problems[0]
