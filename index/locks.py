"""A lock for what many read and one changes."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class ReadWriteLock:
    """Many readers or one writer; a waiting writer goes before readers that come later.

    Not re-entrant: a reader that reads again while a writer waits would wait for itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._readers = 0
        self._readers_waiting = 0
        self._writing = False
        self._writers_waiting = 0
        self._reading = _Reading(self)

    @property
    def readers_waiting(self) -> int:
        """How many threads wait to read at this moment."""
        with self._changed:
            return self._readers_waiting

    def reading(self) -> AbstractContextManager[None]:
        """Hold the lock beside other readers."""
        return self._reading

    def _begin_reading(self) -> None:
        with self._lock:
            if self._writing or self._writers_waiting:
                self._readers_waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._writing and not self._writers_waiting)
                finally:
                    self._readers_waiting -= 1
            self._readers += 1

    def _end_reading(self) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers and self._writers_waiting:
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock alone."""
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._writers_waiting -= 1
                # A writer that was interrupted while waiting must not leave readers asleep.
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class _Reading(AbstractContextManager[None]):
    """One for all readers: each search enters it, and what `contextmanager` makes costs 3 µs."""

    def __init__(self, lock: ReadWriteLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock._begin_reading()

    def __exit__(self, *raised: object) -> None:
        self._lock._end_reading()


class Pace:
    """How many items to change under one hold of a lock, so that a hold lasts about `target_s`.

    Attributes:
        items: for the next hold, at least 1.
    """

    def __init__(self, target_s: float, *, first: int) -> None:
        self.items = first
        self._target_s = target_s
        self._seconds_an_item = 0.0

    def record(self, items: int, seconds: float) -> None:
        """Learn that changing `items` took `seconds`."""
        measured = seconds / items
        # Slower counts at once, so that one long hold is not followed by another; faster counts
        # by halves, and a hold never has more than twice the items of the one before.
        self._seconds_an_item = max(measured, (self._seconds_an_item + measured) / 2)
        fitting = self._target_s / max(self._seconds_an_item, 1e-9)
        self.items = max(1, min(int(fitting), 2 * items))
