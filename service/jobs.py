"""An item's way through the batcher's queue, and what becomes of it."""

import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from service import measurements

Item = TypeVar("Item")
Result = TypeVar("Result")


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
