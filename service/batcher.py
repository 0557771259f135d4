"""Bounded dynamic batching without a timer: requests gather while the model is busy.

One thread owns the model. When it is free it takes the oldest waiting item, and with it every other
waiting item of the same kind, up to the largest batch and in multiples of what is computed side by
side; so a lone request waits for nobody, and under load batches fill by themselves. A batch that
fails is halved until what fails stands alone.
Knows no torch and no FastAPI.
"""

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from service import deadlines
from service.jobs import Job, fail, note_times

PERSISTING = 3  # failed batches in a row that are no accident any more
_WEIGHT_OF_NEW = 0.2  # of the last batch in the running mean of seconds per item
_log = logging.getLogger("service")

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """There is no place left to wait; try again in `retry_after_s` seconds.

    Args:
        reason: "queue_full", "queue_bytes", or "deadline": the wait would be too long.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class BatcherClosed(Exception):
    """The service is shutting down, or its model thread has ended."""


class BatchFailed(Exception):
    """The model failed on the batch that an item was in; the cause is chained and logged."""


class BatchObserver(Protocol):
    """Is told what the model's thread does, in that thread."""

    def batch_done(self, kind: Hashable, size: int, seconds: float) -> None:
        """`size` items went through the model at once."""

    def batch_failed(self, *, out_of_memory: bool) -> None:
        """An attempt failed; its parts may yet succeed."""

    def waited(self, seconds: float) -> None:
        """An item was taken from the queue after that long."""


class Batcher(Generic[Item, Result]):
    """Runs `run(kind, items)` in a thread of its own, on batches of items of one kind.

    Args:
        run: gives one result per item, in order.
        max_batch: most items in one call.
        side_by_side: items that `run` computes at once. A larger batch is cut to a multiple, for
            its last ones would be computed while other cores have nothing to do.
        max_waiting: most items that wait; more are refused.
        max_waiting_bytes: most bytes of items that wait, by `size_of`; one request may be larger
            where nothing else waits.
        is_out_of_memory: whether an error of `run` says so. It makes batches smaller, by half
            for each such error; `caution_s` seconds later they may double again.
    """

    def __init__(
        self,
        run: Callable[[Hashable, Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_waiting: int,
        max_waiting_bytes: int | None = None,
        side_by_side: int = 1,
        size_of: Callable[[Item], int] = lambda _: 0,
        is_out_of_memory: Callable[[Exception], bool] = lambda _: False,
        caution_s: float = 60.0,
        observer: BatchObserver | None = None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._side_by_side = side_by_side
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self._size_of = size_of
        self._is_out_of_memory = is_out_of_memory
        self._caution_s = caution_s
        self._observer = observer
        self._waiting: deque[Job[Item, Result]] = deque()
        self._waiting_bytes = 0
        self._running: list[Job[Item, Result]] = []
        self._seconds_per_item = 0.0
        self._batch_limit, self._limited_until = max_batch, 0.0
        self._failed_in_a_row = 0
        self._last_failure = ""
        self._busy_since: float | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread is running."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the items that wait."""
        return self._waiting_bytes

    @property
    def batch_limit(self) -> int:
        """Most items in one call now: less than `max_batch` after memory ran out."""
        return self._batch_limit

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return self._busy_since is None and not self._waiting

    @property
    def busy_s(self) -> float:
        """For how long the present batch has been running, in seconds; 0 where none is."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def trouble(self) -> str | None:
        """Why the model is of no use now: several batches failed in a row; None where it works."""
        if self._failed_in_a_row < PERSISTING:
            return None
        return f"the model failed on the last {self._failed_in_a_row} batches: {self._last_failure}"

    def retry_after_s(self) -> int:
        """When what waits now will be through, by the rate that was measured."""
        return deadlines.retry_after(self.waiting * self._seconds_per_item)

    async def submit(
        self, kind: Hashable, items: Sequence[Item], *, deadline: float | None = None
    ) -> list[Result]:
        """Waits for the results of `items`, in order; batches may mix them with others'.

        Args:
            deadline: by `time.monotonic()`; items that still wait then leave the queue.

        Raises:
            BatchFailed: the model raised an error on one of them.
            QueueFull: there are no places for all of them, or the wait would be too long; none
                is taken.
            WaitedTooLong, DeadlineExceeded: the deadline came before the results.
            BatcherClosed: the batcher was closed, or the model's thread ended.
        """
        return await self.results(self.put(kind, items, deadline=deadline), deadline=deadline)

    def put(
        self, kind: Hashable, items: Sequence[Item], *, deadline: float | None = None
    ) -> list[Job[Item, Result]]:
        """Places for `items`, from any thread; who takes them calls `results` or `withdraw`.

        Raises:
            QueueFull, BatcherClosed: see `submit`.
        """
        now = time.monotonic()
        jobs = [Job[Item, Result](kind, item, self._size_of(item), now) for item in items]
        with self._changed:
            if self._closed:
                raise BatcherClosed("the model takes no more pictures: the service is stopping")
            self._check_room(jobs, None if deadline is None else deadline - now)
            self._waiting.extend(jobs)
            self._waiting_bytes += sum(job.n_bytes for job in jobs)
            self._changed.notify()
        return jobs

    async def results(
        self, jobs: Sequence[Job[Item, Result]], *, deadline: float | None = None
    ) -> list[Result]:
        """Waits for the results of `put`, in order; see `submit`, which is both."""
        try:
            async with deadlines.before(
                deadline,
                has_begun=lambda: any(job.started is not None for job in jobs),
                retry_after_s=self.retry_after_s,
            ):
                if len(jobs) == 1:
                    return [await asyncio.wrap_future(jobs[0].future)]
                return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            self.withdraw(jobs)
            note_times(jobs)

    def withdraw(self, jobs: Sequence[Job[Item, Result]]) -> None:
        """Frees the places of a request that failed or went away; nothing where all is done."""
        for job in jobs:
            job.is_wanted = False
        cancelled = [job for job in jobs if job.future.cancel()]
        if cancelled:
            with self._changed:
                kept = deque(job for job in self._waiting if not job.future.cancelled())
                self._waiting = kept
                self._waiting_bytes = sum(job.n_bytes for job in kept)

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Refuses new items, finishes those that wait, and ends the thread.

        Returns:
            Whether it ended within `timeout_s` seconds.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self.alive

    def _check_room(self, jobs: Sequence[Job[Item, Result]], patience_s: float | None) -> None:
        waiting = len(self._waiting)
        if waiting + len(jobs) > self.max_waiting:
            message = f"the queue is full: {self.max_waiting} pictures may wait for the model"
            raise QueueFull(message, reason="queue_full", retry_after_s=self.retry_after_s())
        if not waiting:
            return
        n_bytes = self._waiting_bytes + sum(job.n_bytes for job in jobs)
        if self.max_waiting_bytes is not None and n_bytes > self.max_waiting_bytes:
            message = f"the queue is full: {self.max_waiting_bytes} bytes may wait for the model"
            raise QueueFull(message, reason="queue_bytes", retry_after_s=self.retry_after_s())
        wait_s = waiting * self._seconds_per_item
        if patience_s is not None and wait_s > patience_s:
            message = f"the queue is too long: about {wait_s:.1f} s, {patience_s:.1f} s are left"
            raise QueueFull(message, reason="deadline", retry_after_s=self.retry_after_s())

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._serve(batch)
                self._running, self._busy_since = [], None
        except BaseException as error:
            # Not an error of the model's, those are caught: the process has to be told, and ends.
            _log.critical("the model's thread ended", exc_info=error)
        finally:
            with self._changed:
                self._closed = True
                left = [*self._running, *self._waiting]
                self._waiting.clear()
                self._waiting_bytes = 0
            for job in left:
                if job.started is not None or job.future.set_running_or_notify_cancel():
                    fail(job, BatcherClosed("the model's thread has ended"))

    def _next_batch(self) -> list[Job[Item, Result]]:
        """The next batch, each of its futures marked as running; empty once closed and drained."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                self._grow_again()
                kind = self._waiting[0].kind
                most = self._most_of(kind)
                batch: list[Job[Item, Result]] = []
                others: deque[Job[Item, Result]] = deque()
                for job in self._waiting:
                    is_full = len(batch) == most and not job.future.cancelled()
                    if job.kind != kind or is_full:
                        others.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        batch.append(job)
                self._waiting = others
                self._waiting_bytes = sum(job.n_bytes for job in others)
                if batch:
                    now = time.monotonic()
                    for job in batch:
                        job.started = now
                    self._running, self._busy_since = batch, now
                    return batch

    def _most_of(self, kind: Hashable) -> int:
        """How many of that kind make the next batch."""
        found = sum(job.kind == kind and not job.future.cancelled() for job in self._waiting)
        most = min(found, self._batch_limit)
        return most - most % self._side_by_side if most > self._side_by_side else most

    def _serve(self, batch: Sequence[Job[Item, Result]]) -> None:
        """Runs a batch; halves of what failed are tried in turn, while that may help."""
        if self._observer is not None:
            for job in batch:
                self._observer.waited((job.started or job.queued) - job.queued)
        failures, succeeded = 0, False
        # One bad item costs log2(n) + 1 failures. More than two such: it is not the items.
        most = 0 if self.trouble else 2 * (len(batch).bit_length() + 1)
        failed: list[tuple[Job[Item, Result], Exception]] = []
        parts = [list(batch)]
        while parts:
            part = [job for job in parts.pop() if job.is_wanted]
            if not part:
                continue
            error = self._attempt(part)
            if error is None:
                succeeded = True
                continue
            failures += 1
            if len(part) > 1 and failures <= most:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
                continue
            failed += [(job, error) for job in part]
        if failures and not succeeded:
            self._failed_in_a_row += 1
        for job, error in failed:
            failure = BatchFailed("the model failed on this batch of pictures; try again")
            failure.__cause__ = error
            fail(job, failure)

    def _attempt(self, part: Sequence[Job[Item, Result]]) -> Exception | None:
        """One call of the model; its error where it failed."""
        started = time.monotonic()
        try:
            results = self._run(part[0].kind, [job.item for job in part])
            if len(results) != len(part):
                raise ValueError(f"the model gave {len(results)} results for {len(part)}")
        except Exception as error:
            # Whatever the model raised belongs to these items' requests, not to the thread.
            _log.error("a batch of %d failed", len(part), exc_info=error)
            # Its frames hold the batch's memory, and requests would hold the error.
            traceback.clear_frames(error.__traceback__)
            self._note_failure(error, len(part))
            return error
        self._failed_in_a_row = 0
        ended = time.monotonic()
        seconds = ended - started
        if self._observer is not None:
            self._observer.batch_done(part[0].kind, len(part), seconds)
        new = seconds / len(part)
        old = self._seconds_per_item or new
        self._seconds_per_item = old + _WEIGHT_OF_NEW * (new - old)
        for job, result in zip(part, results, strict=True):
            job.ended = ended
            job.future.set_result(result)
        return None

    def _note_failure(self, error: Exception, size: int) -> None:
        out_of_memory = self._is_out_of_memory(error)
        self._last_failure = "out of memory" if out_of_memory else type(error).__name__
        if self._observer is not None:
            self._observer.batch_failed(out_of_memory=out_of_memory)
        if out_of_memory:
            self._batch_limit = max(1, min(self._batch_limit, size // 2))
            self._limited_until = time.monotonic() + self._caution_s
            _log.warning("memory ran out: batches of at most %d for now", self._batch_limit)

    def _grow_again(self) -> None:
        now = time.monotonic()
        if self._batch_limit < self._max_batch and now >= self._limited_until:
            self._batch_limit = min(2 * self._batch_limit, self._max_batch)
            self._limited_until = now + self._caution_s
