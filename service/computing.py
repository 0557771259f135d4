"""One picture's way through the threads: decoded, then computed by the model."""

import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from service import deadlines, measurements
from service.batcher import Batcher
from service.decode_pool import DecodePool
from service.encoder import Array, Task
from service.jobs import Job, note_times, result_of
from service.model_batches import batch_kind
from service.prepared import Prepared

Then = Callable[[Array, Prepared], None]
"""Takes a result of the model, and the picture without the inputs that it was made of."""


class Computation:
    """`Work` (service/sharing.py) that has begun: the event loop hears of it when it is done.

    From its decoding thread the picture goes straight to the model; where one of the model's
    threads is free, that one decodes it.

    Args:
        decode: is called in a thread, and lets go of the encoded picture there.
        task: whose inputs `decode` prepares.
        held_bytes: of the encoded picture.
        then: is called with the result, in the thread that computed it as a rule, before those who
            wait go on; not where that fails.

    Raises:
        QueueFull: there is no place for it.
    """

    def __init__(
        self,
        decode: Callable[[], Prepared],
        task: Task,
        *,
        pool: DecodePool,
        batcher: Batcher[Array, Array],
        held_bytes: int,
        then: Then | None = None,
    ) -> None:
        self._task = task
        self._batcher = batcher
        self._asked = time.monotonic()
        self._request, self._context = measurements.current(), contextvars.copy_context()
        self._jobs: list[Job[Array, Array]] = []
        self._is_wanted = True
        self._has_come = batcher.expect()
        self._putting: Future[Sequence[Job[Array, Array]]] | None = None
        try:
            self._putting = pool.start(
                partial(self._decode_and_put, decode, then),
                held_bytes=held_bytes,
                lend=batcher.lend,
            )
        except BaseException:
            self._has_come()
            raise

    async def results(self) -> list[Array]:
        """The one result.

        Raises:
            ImageError: a picture that cannot be taken.
            QueueFull, BatchFailed, BatcherClosed: see `Batcher.submit`.
            WaitedTooLong, DeadlineExceeded: the deadline of the request that waits came first.
        """
        try:
            async with deadlines.before(
                measurements.current().deadline,
                has_begun=self._has_begun,
                retry_after_s=self._retry_after_s,
            ):
                assert self._putting is not None  # this request waits: it is not abandoned
                return [await result_of(self._putting)]
        finally:
            if measurements.current() is self._request:
                note_times(self._jobs)

    @property
    def has_failed(self) -> bool:
        """See `Work`."""
        futures = [self._putting, *(job.future for job in self._jobs)]
        return any(future is not None and _failed(future) for future in futures)

    def abandon(self) -> None:
        """See `Work`: frees its places; nothing where all is done."""
        self._is_wanted = False
        self._has_come()
        if self._putting is None:
            return
        self._putting.cancel()
        self._batcher.withdraw(self._jobs)
        # An error's traceback holds frames, which hold this: they would stay, with the picture.
        self._putting, self._jobs = None, []

    def _decode_and_put(
        self, decode: Callable[[], Prepared], then: Then | None
    ) -> Sequence[Job[Array, Array]]:
        jobs, deadline = list[Job[Array, Array]](), self._request.deadline
        try:
            prepared = decode()
            inputs = prepared.inputs[self._task]
            if self._is_wanted:
                kind = batch_kind(self._task, inputs)
                jobs = self._jobs = self._batcher.put(kind, [inputs], deadline=deadline)
        finally:
            self._has_come()
        if not self._is_wanted:  # by now
            self._batcher.withdraw(jobs)
        if then is not None:
            go_on = partial(_go_on, self._context, then, replace(prepared, inputs={}))
            for job in jobs:
                job.future.add_done_callback(go_on)
        return jobs

    def _has_begun(self) -> bool:
        putting = self._putting
        is_put = putting is not None and (putting.running() or putting.done())
        return is_put and all(job.started is not None for job in self._jobs)

    def _retry_after_s(self) -> int:
        if self._jobs:
            return self._batcher.retry_after_s()
        return deadlines.retry_after(time.monotonic() - self._asked)


def _failed(done: "Future[Any]") -> bool:
    return done.done() and (done.cancelled() or done.exception() is not None)


def _go_on(
    context: contextvars.Context, then: Then, prepared: Prepared, computed: "Future[Array]"
) -> None:
    """A function of its own: the job's future, which holds it, is held by the computation."""
    if not computed.cancelled() and computed.exception() is None:
        context.run(then, computed.result(), prepared)
