"""Connections to one SQLite file: one for writing, as many as needed for reading."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from index.durable import fsync, refusals_named
from index.errors import CollectionNotFound, StoreDamaged, StoreFailed

# Refusals of the operating system or of another program that holds the file: the file itself is
# whole. Every other error of SQLite means that the file is not what this program wrote.
_REFUSALS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_PAGES_PER_STEP = 2048  # 8 MB between two calls of a backup's `progress`


class Database:
    """One SQLite file, shared by threads.

    Writing goes through one connection, one transaction at a time. Readers borrow a connection from
    a pool that grows to the number of threads that read at once: in WAL mode a reader sees the last
    commit and waits neither for the writer nor for its fsync.

    `page_bytes` makes the file, which must not exist; without it, it must.

    Raises (any method): `StoreDamaged`, `StoreFailed`; `CollectionNotFound` once closed.
    """

    def __init__(self, path: Path, *, described: str, page_bytes: int | None = None) -> None:
        self._path = path
        self._described = described
        self._write_lock = threading.Lock()
        self._pool_changed = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._borrowed = 0
        self._closed = False
        if page_bytes is not None:
            path.touch(exist_ok=False)
        elif not path.is_file():
            raise self.damage(f"{path.name} is missing")
        with self._translated():
            self._writer = _connect(path)
            if page_bytes is not None:
                self._writer.execute(f"PRAGMA page_size = {page_bytes:d}")
                self._writer.execute("PRAGMA journal_mode = WAL")  # the file remembers it

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on disk when the block has ended, undone when it raises."""
        with self._write_lock, self._translated():
            if self._closed:
                raise self.gone()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has already rolled back by itself after some errors, such as a full disk.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read transaction: everything inside the block sees the same commit."""
        with self._translated():
            connection = self._borrow()
            try:
                connection.execute("BEGIN")
                try:
                    yield connection
                finally:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
            except BaseException:
                self._give_back(connection, usable=False)
                raise
            self._give_back(connection, usable=True)

    def rows(self, query: str, values: Sequence[Any]) -> list[Any]:
        """All rows of one SELECT, which sees one commit; cheaper than a read transaction."""
        with self._translated():
            connection = self._borrow()
            try:
                found = connection.execute(query, values).fetchall()
            except BaseException:
                self._give_back(connection, usable=False)
                raise
            self._give_back(connection, usable=True)
            return found

    def backup(self, path: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
        """Copy the last commit to a new file at `path`, on disk when this returns.

        Writing goes on meanwhile; `close` waits. Pages are copied as they are, so a damaged file
        gives a damaged copy: `check` looks into them.

        Args:
            path: must not exist; its folder must.
            progress: called with the bytes copied so far and the bytes in all. What it raises ends
                the copying and comes out here.

        Raises:
            StoreFailed: also when the disk is full; nothing is left at `path`.
        """
        with refusals_named(f"{self._described} could not be copied to {path.name!r}"):
            path.touch(exist_ok=False)
            try:
                with self.reading() as source, closing(_connect(path)) as copy:
                    # Begins the read transaction. Without one, each commit that another connection
                    # makes sends the copying back to its first page.
                    (page_bytes,) = source.execute("PRAGMA page_size").fetchone()
                    source.execute("SELECT 1 FROM sqlite_schema").fetchone()
                    # The copy counts when it is whole: no journal, and one sync instead of many.
                    copy.execute("PRAGMA journal_mode = OFF")
                    copy.execute("PRAGMA synchronous = OFF")

                    def report(_status: int, left: int, total: int) -> None:
                        if progress is not None:
                            progress((total - left) * page_bytes, total * page_bytes)

                    source.backup(copy, pages=_PAGES_PER_STEP, progress=report)
                fsync(path)
                fsync(path.parent)
            except BaseException:
                path.unlink()
                raise

    def check(self) -> list[str]:
        """Read the whole file and say what is wrong with it; an empty list when nothing is.

        SQLite looks at how its pages, indexes and references hang together; a byte that changed
        inside a text or a vector escapes it. Writing goes on meanwhile.

        Raises:
            StoreFailed: the operating system refused. Damage is never raised, only listed.
        """
        if not self._path.is_file():
            return [f"{self._path.name} is missing"]
        problems = []
        try:
            with self.reading() as connection:
                for (found,) in connection.execute("PRAGMA integrity_check"):
                    if found != "ok":
                        problems.append(found)
                for table, key, parent, _ in connection.execute("PRAGMA foreign_key_check"):
                    problems.append(f"{table}: row {key} belongs to no row of {parent}")
        except StoreDamaged as error:
            problems.append(str(error.__cause__))
        return problems

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def disk_bytes(self) -> int:
        """What the file takes, with the log of its latest writes."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        total = 0
        for path in files:
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue  # there is no log, or all of it was deleted meanwhile
        return total

    def close(self) -> None:
        """Wait for what is running, then close every connection. Closing twice is allowed."""
        with self._pool_changed:
            self._closed = True
            # SQLite's last connection removes the -wal file by its path. One that outlived this
            # call might remove that of a new collection under the same name.
            self._pool_changed.wait_for(lambda: self._borrowed == 0)
            while self._idle:
                self._idle.pop().close()
        with self._write_lock:
            self._writer.close()

    def damage(self, reason: str) -> StoreDamaged:
        """The error to raise when the file is not as it was written; says what can be done."""
        return damage(self._described, reason)

    def _borrow(self) -> sqlite3.Connection:
        with self._pool_changed:
            if self._closed:
                raise self.gone()
            connection = self._idle.pop() if self._idle else _connect(self._path, read_only=True)
            self._borrowed += 1
            return connection

    def _give_back(self, connection: sqlite3.Connection, *, usable: bool) -> None:
        with self._pool_changed:
            self._borrowed -= 1
            if usable:
                self._idle.append(connection)
            else:
                connection.close()
            self._pool_changed.notify_all()

    def gone(self) -> CollectionNotFound:
        """The error to raise once this is closed."""
        return CollectionNotFound(f"{self._described} has been closed or deleted")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise  # a mistake in this package, not in the file
        except sqlite3.Error as error:
            # The low byte is the primary code. Text that is not UTF-8 comes without any code.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
            is_truncated = code == sqlite3.SQLITE_IOERR_SHORT_READ
            if code & 0xFF in _REFUSALS and not is_truncated:
                raise StoreFailed(f"{self._described}: {error}") from error
            raise self.damage(str(error)) from error


def damage(described: str, reason: str) -> StoreDamaged:
    """The error to raise of a file that is not as it was written; says what can be done."""
    return StoreDamaged(
        f"{described} cannot be read: {reason}. Other collections are not affected. Restore a "
        "snapshot of it, put back a copy of its folder from a backup, or delete the collection and "
        "fill it again."
    )


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    # mode=rw: a file that has gone must be an error, not quietly a new and empty one.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,  # transactions begin and end where this file says so
        check_same_thread=False,  # the locks above see to it that one thread at a time uses it
    )
    try:
        # FULL: each commit is fsynced. WAL's usual NORMAL may lose the last ones on power loss.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection
