"""Threads for what is done with pictures outside the model, and a bound on what waits for them."""

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from service import deadlines, measurements
from service.helper import Helper
from service.jobs import QueueFull

T = TypeVar("T")


class DecodePool:
    """Decodes pictures side by side (Pillow lets go of the interpreter's lock).

    Several models may share one. Work is done within the current request's deadline, and its time
    is noted.

    Args:
        threads: pieces of work done at once, and one more where a lone one was lent out.
        max_pictures: most pieces of work that wait or are done; more are refused.
        max_bytes: most encoded bytes that these hold together.
        helper: for `both`; closed with this.
        observe: is told how many seconds each piece of work took, in its thread.

    Attributes:
        pictures, held_bytes: what waits or is done now.
    """

    def __init__(
        self,
        threads: int,
        *,
        max_pictures: int,
        max_bytes: int,
        helper: Helper | None = None,
        observe: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._threads: list[threading.Thread] = []
        self._executor = ThreadPoolExecutor(
            threads,
            thread_name_prefix="decode",
            initializer=lambda: self._threads.append(threading.current_thread()),
        )
        self._helper = helper
        self._max_pictures = max_pictures
        self._max_bytes = max_bytes
        self._observe = observe
        self._lock = threading.Lock()
        self.pictures = 0
        self.held_bytes = 0

    @property
    def alive(self) -> bool:
        """Whether none of the threads that were started has ended."""
        return all(thread.is_alive() for thread in list(self._threads))

    async def run(self, work: Callable[[], T], *, held_bytes: int = 0) -> T:
        """The result of `work`, done in a thread. It does not start once the caller has gone away.

        Args:
            held_bytes: what waits along with it in memory.

        Raises:
            QueueFull: there is no place for it.
            WaitedTooLong, DeadlineExceeded: the request's deadline came first.
        """
        return await self.wait_for(self.start(work, held_bytes=held_bytes))

    async def wait_for(self, running: "Future[T]") -> T:
        """Waits for what `start` gave, and cancels it where the caller goes away.

        Raises:
            WaitedTooLong, DeadlineExceeded: see `run`.
        """
        asked = time.monotonic()
        try:
            async with deadlines.before(
                measurements.current().deadline,
                has_begun=lambda: not running.cancel(),
                retry_after_s=lambda: deadlines.retry_after(time.monotonic() - asked),
            ):
                return await asyncio.wrap_future(running)
        finally:
            running = Future()  # the other one holds its error, whose traceback holds this frame

    def start(
        self,
        work: Callable[[], T],
        *,
        held_bytes: int = 0,
        lend: Callable[[Callable[[], None]], bool] = lambda _: False,
    ) -> "Future[T]":
        """As `run`, whatever the deadline; who gives up waiting cancels what is returned.

        Args:
            lend: may have the work done by a thread of its own, and then gives True. It is asked
                only where nothing else is done or waits here.

        Raises:
            QueueFull: there is no place for it.
        """
        self._take_place(held_bytes)

        def free(_: "Future[T]") -> None:
            with self._lock:
                self.pictures -= 1
                self.held_bytes -= held_bytes

        request, asked = measurements.current(), time.monotonic()
        context = contextvars.copy_context()

        def timed() -> T:
            started = time.monotonic()
            try:
                return context.run(work)
            finally:
                ended = time.monotonic()
                request.add_phase("decode_wait", asked, started)
                request.add_phase("decode", started, ended)
                self._observe(ended - started)

        running = Future[T]()
        try:
            if self.pictures > 1 or not lend(partial(_do, timed, running)):
                running = self._executor.submit(timed)
        except BaseException:
            free(running)
            raise
        # Not when the caller leaves: work that has started holds its picture until it ends.
        running.add_done_callback(free)
        return running

    def both(self, one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
        """Two parts of a piece of work; side by side where nothing else is done or waits here.

        Raises:
            Exception: see `Helper.both`.
        """
        if self._helper is None or self.pictures > 1:
            return one(), other()
        return self._helper.both(one, other)

    def close(self) -> None:
        """Finishes what waits, then ends the threads."""
        self._executor.shutdown()
        if self._helper is not None:
            self._helper.close()

    def _take_place(self, held_bytes: int) -> None:
        with self._lock:
            if self.pictures >= self._max_pictures:
                what, reason = f"{self._max_pictures} pictures", "queue_full"
            elif self.held_bytes + held_bytes > self._max_bytes:
                what, reason = f"pictures of {self._max_bytes} bytes", "queue_bytes"
            else:
                self.pictures += 1
                self.held_bytes += held_bytes
                return
        raise QueueFull(
            f"the queue is full: {what} are waiting to be decoded", reason=reason, retry_after_s=1
        )


def _do(work: Callable[[], T], done: "Future[T]") -> None:
    """What a thread of the executor does with its work, for another one."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        done.set_exception(error)  # as there, whatever it is: it belongs to who waits
    else:
        done.set_result(result)
