"""Writes that come at the same time share one commit, and so one wait for the disk."""

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, cast

from index.database import Database
from index.writes import Changes

T = TypeVar("T")
_MOST_WRITES = 64  # that share a commit, so that the first does not wait for ever more


class Follower(Protocol):
    """Whoever keeps a copy of what was committed. Called before the writers are told of it."""

    def follow(self, changes: Sequence[Changes]) -> None:
        """These were committed, in this order. Must not raise but for an interrupt."""

    def lose_track(self) -> None:
        """What has been committed since the last `follow` is not known."""


class GroupCommit:
    """Runs writes on a database, in the order of their coming.

    There is no thread of its own: whoever gets the lock first writes for all who wait, commits once
    and lets them go. Who writes alone waits for nobody.
    """

    def __init__(self, database: Database, follower: Follower) -> None:
        self._database = database
        self._follower = follower
        self.sequence = 0  # odd from before a commit until it has been followed
        self._queue: deque[_Write] = deque()
        self._leading = threading.RLock()
        self._leader: int | None = None

    def run(
        self,
        operation: Callable[[sqlite3.Connection], tuple[T, Changes]],
        *,
        alone: bool = False,
    ) -> T:
        """Run `operation` in a transaction; what it wrote is on disk and followed on return.

        Args:
            operation: writes through the connection; what it raises undoes it, and nothing else.
                Gives the result and what it changed.
            alone: every earlier write is committed and followed before `operation` begins.

        Raises:
            StoreFailed, StoreDamaged, CollectionNotFound: nothing was written.
        """
        own = _Write(operation, alone)
        self._queue.append(own)
        with self.paused():
            while not own.done:
                self._lead(own)
        if own.error is not None:
            raise own.error
        return cast(T, own.result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nobody else writes, and all that was committed has been followed."""
        with self._leading:
            before, self._leader = self._leader, threading.get_ident()
            try:
                yield
            finally:
                self._leader = before

    @property
    def is_paused_here(self) -> bool:
        """Whether the calling thread is inside `paused`: it must not wait for one that wants to."""
        return self._leader == threading.get_ident()

    def _take_next(self, group: list["_Write"]) -> None:
        """Move writes that may share a commit to `group`, where an interrupt finds them."""
        group.append(self._queue.popleft())
        while (
            self._queue
            and len(group) < _MOST_WRITES
            and not group[0].alone
            and not self._queue[0].alone
        ):
            group.append(self._queue.popleft())

    def _lead(self, own: "_Write") -> None:
        group: list[_Write] = []
        self.sequence += 1
        try:
            self._take_next(group)
            try:
                with self._database.writing() as connection:
                    for write in group:
                        write.run(connection)
            except Exception as error:
                for write in group:
                    write.fail(error)
                return
            for write in group:
                write.done = True  # nobody sees it before the lock is free again
            self._follower.follow([write.changes for write in group if write.changes is not None])
        except BaseException:
            # This thread was interrupted, perhaps between the commit and its being followed. What
            # others wait for is done again by themselves, which is no harm: they were told nothing.
            left = [write for write in group if write is not own and not write.done]
            self._queue.extendleft(reversed(left))
            self._follower.lose_track()
            raise
        finally:
            self.sequence += 1


class _Write:
    def __init__(
        self, operation: Callable[[sqlite3.Connection], tuple[object, Changes]], alone: bool
    ) -> None:
        self.alone = alone
        self.result: object = None
        self.changes: Changes | None = None
        self.error: Exception | None = None
        self.done = False
        self._operation = operation

    def run(self, connection: sqlite3.Connection) -> None:
        self.error = self.changes = None
        connection.execute("SAVEPOINT one_write")
        try:
            self.result, self.changes = self._operation(connection)
        except sqlite3.Error:
            raise  # the transaction may be gone altogether, as it is on a full disk
        except Exception as error:
            self.error = error
            connection.execute("ROLLBACK TO one_write")
        connection.execute("RELEASE one_write")

    def fail(self, error: Exception) -> None:
        # Each thread raises an exception of its own: one would gather all their tracebacks.
        self.error = type(error)(*error.args)
        self.error.__cause__ = error
        self.done = True
