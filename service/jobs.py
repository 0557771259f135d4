"""An item's way through the batcher's queue, and what becomes of it."""

import asyncio
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from service import measurements

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
    """The service is shutting down, or a thread of the model has ended."""


class BatchFailed(Exception):
    """The model failed on the batch that an item was in; the cause is chained and logged."""


class BatchObserver(Protocol):
    """Is told what the model's threads do, in those threads, several at a time."""

    def batch_done(self, kind: Hashable, size: int, seconds: float) -> None:
        """`size` items went through the model at once."""

    def batch_failed(self, *, out_of_memory: bool) -> None:
        """An attempt failed; its parts may yet succeed."""

    def waited(self, seconds: float) -> None:
        """An item was taken from the queue after that long."""


@dataclass(eq=False)
class Job(Generic[Item, Result]):
    """An item's place in the queue, from `Batcher.put`.

    Attributes:
        is_wanted: somebody waits for the result.
        queued, started, ended: by `time.monotonic()`.
    """

    kind: Hashable
    item: Item
    n_bytes: int
    queued: float
    future: "Future[Result]" = field(default_factory=Future)
    is_wanted: bool = True
    started: float | None = None
    ended: float = 0.0


def fail(job: Job[Item, Result], error: Exception) -> None:
    """Gives the job's waiter an error, unless it has a result or has gone."""
    job.ended = time.monotonic()
    if not job.future.done():
        job.future.set_exception(error)


async def result_of(putting: "Future[Sequence[Job[Item, Result]]]") -> Result:
    """Waits for a thread that puts one job, and for its result; wakes the event loop once.

    Several may wait. Who has it withdrawn may have it put none.

    Raises:
        Exception: what putting it raised, or the job's own error.
    """
    loop = asyncio.get_running_loop()
    has_ended = loop.create_future()

    def end() -> None:
        if not has_ended.done():
            has_ended.set_result(None)

    def tell(_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(end)

    def was_put(putting: "Future[Sequence[Job[Item, Result]]]") -> None:
        found = [] if putting.cancelled() or putting.exception() is not None else putting.result()
        if not found:
            tell(putting)
        for job in found:
            job.future.add_done_callback(tell)

    putting.add_done_callback(was_put)
    try:
        await has_ended
        return putting.result()[0].future.result()
    finally:
        del putting  # which holds its error, whose traceback holds this frame


def note_times(jobs: Sequence[Job[Item, Result]]) -> None:
    """Adds queue and model to what the current request cost."""
    if not jobs:
        return
    request, now = measurements.current(), time.monotonic()
    begun = [job.started for job in jobs if job.started is not None]
    first = min(begun, default=now)
    request.add_phase("queue", jobs[0].queued, first)
    if begun:
        request.add_phase("inference", first, max(job.ended or now for job in jobs))
