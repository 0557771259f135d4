"""Bounded dynamic batching without a timer: requests gather while the model is busy.

One thread owns the model. When it is free it takes the oldest waiting item, and with it every other
waiting item of the same kind, up to the largest batch; so a lone request waits for nobody, and
under load batches fill by themselves. Knows no torch and no FastAPI.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

_log = logging.getLogger("service")

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """There is no place left to wait; try again in `retry_after_s` seconds."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the queue is full: {limit} pictures are waiting for the model")
        self.retry_after_s = 1


class BatcherClosed(Exception):
    """The service is shutting down, or its model thread has ended."""


class BatchFailed(Exception):
    """The model failed on the batch that an item was in; the cause is chained and logged."""


@dataclass(frozen=True)
class _Job(Generic[Item, Result]):
    kind: Hashable
    item: Item
    future: "Future[Result]"


class Batcher(Generic[Item, Result]):
    """Runs `run(kind, items)` in a thread of its own, on batches of items of one kind.

    Args:
        run: gives one result per item, in order.
        max_batch: most items in one call.
        max_waiting: most items that wait; more are refused.
    """

    def __init__(
        self,
        run: Callable[[Hashable, Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_waiting: int,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[_Job[Item, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread is running."""
        return self._thread.is_alive()

    async def submit(self, kind: Hashable, items: Sequence[Item]) -> list[Result]:
        """Waits for the results of `items`, in order; batches may mix them with others'.

        Raises:
            BatchFailed: the model raised an error on a batch that held one of them.
            QueueFull: there are no places for all of them; none is taken.
            BatcherClosed: the batcher was closed.
        """
        jobs = [_Job[Item, Result](kind, item, Future()) for item in items]
        with self._changed:
            if self._closed or not self.alive:
                raise BatcherClosed("the model takes no more pictures: the service is stopping")
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise QueueFull(self._max_waiting)
            self._waiting.extend(jobs)
            self._changed.notify()
        try:
            return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            self._withdraw(jobs)

    def close(self) -> None:
        """Refuses new items, finishes those that wait, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _withdraw(self, jobs: Sequence[_Job[Item, Result]]) -> None:
        """Frees the places of a request that failed or went away; nothing where all is done."""
        cancelled = [job for job in jobs if job.future.cancel()]
        if cancelled:
            with self._changed:
                self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                results = self._run(batch[0].kind, [job.item for job in batch])
                if len(results) != len(batch):
                    raise ValueError(f"the model gave {len(results)} results for {len(batch)}")
            except Exception as error:
                # Whatever the model raised belongs to this batch's requests, not to the thread.
                _log.error("a batch of %d failed", len(batch), exc_info=error)
                for job in batch:
                    failure = BatchFailed("the model failed on this batch of pictures; try again")
                    failure.__cause__ = error
                    job.future.set_exception(failure)
            else:
                for job, result in zip(batch, results, strict=True):
                    job.future.set_result(result)

    def _next_batch(self) -> list[_Job[Item, Result]]:
        """The next batch, each of its futures marked as running; empty once closed and drained."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                kind = self._waiting[0].kind
                batch: list[_Job[Item, Result]] = []
                others: deque[_Job[Item, Result]] = deque()
                for job in self._waiting:
                    if job.kind != kind or len(batch) == self._max_batch:
                        others.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        batch.append(job)
                self._waiting = others
                if batch:
                    return batch
