"""The thread that works on indexes in the background: one for all collections of a folder."""

import logging
import threading
import time
from collections import deque

from index.errors import CollectionNotFound
from index.maintenance import Maintenance

_logger = logging.getLogger(__name__)
_AGAIN_S = 30.0


class Builder:
    """Takes collections that have something to do, in turns, a step of each at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Maintenance] = deque()
        self._running: Maintenance | None = None
        # When (time.monotonic()) who is looked at again: after an error, which is unfinished work,
        # and for what can wait.
        self._failed: list[tuple[float, Maintenance]] = []
        self._later: list[tuple[float, Maintenance]] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="index-builder", daemon=True)
        self._thread.start()

    def wake(self, maintenance: Maintenance) -> None:
        """There may be something to do for this collection; after a failure not before its time."""
        maintenance.ask()
        with self._changed:
            if maintenance not in self._waiting and not self._has_failed(maintenance):
                self._waiting.append(maintenance)
                self._changed.notify_all()

    def is_idle(self, maintenance: Maintenance) -> bool:
        """Whether nothing is being done, or waits to be, for this collection."""
        with self._changed:
            return self._is_idle(maintenance)

    def wait_until_idle(self, maintenance: Maintenance, *, timeout_s: float | None) -> bool:
        """Wait until nothing is left to do for a collection; False: it took longer, or failed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_idle(maintenance) or self._has_failed(maintenance), timeout_s
            )
            return self._is_idle(maintenance)

    def forget(self, maintenance: Maintenance) -> None:
        """Stop the work for this collection; nothing is being done for it on return."""
        maintenance.stop()
        with self._changed:
            self._waiting = deque(each for each in self._waiting if each is not maintenance)
            self._failed = [each for each in self._failed if each[1] is not maintenance]
            self._later = [each for each in self._later if each[1] is not maintenance]
            self._changed.wait_for(lambda: self._running is not maintenance)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread. Closing twice is allowed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while (maintenance := self._next()) is not None:
            has_more = False
            try:
                has_more = maintenance.step()
            except CollectionNotFound:
                pass  # closed meanwhile
            except Exception:
                _logger.exception("the index's background work failed; again in %.0f s", _AGAIN_S)
                with self._changed:
                    self._failed.append((time.monotonic() + _AGAIN_S, maintenance))
            with self._changed:
                self._running = None
                if has_more and maintenance not in self._waiting:
                    self._waiting.append(maintenance)
                elif (at := maintenance.again_at) is not None:
                    others = [each for each in self._later if each[1] is not maintenance]
                    self._later = [*others, (at, maintenance)]
                self._changed.notify_all()

    def _next(self) -> Maintenance | None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                for at, each in [*self._failed, *self._later]:
                    if at <= now and each not in self._waiting:
                        self._waiting.append(each)
                self._failed = [entry for entry in self._failed if entry[0] > now]
                self._later = [entry for entry in self._later if entry[0] > now]
                if self._waiting:
                    self._running = self._waiting.popleft()
                    return self._running
                soonest = min((at for at, _ in [*self._failed, *self._later]), default=None)
                self._changed.wait(None if soonest is None else soonest - now)
        return None

    def _is_idle(self, maintenance: Maintenance) -> bool:
        is_queued = maintenance in self._waiting or self._has_failed(maintenance)
        return self._is_closed or (self._running is not maintenance and not is_queued)

    def _has_failed(self, maintenance: Maintenance) -> bool:
        return any(each is maintenance for _, each in self._failed)
