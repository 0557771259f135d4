"""A thread that takes a part of another one's work, on another core."""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

_IS_LINUX = hasattr(os, "sched_setaffinity")
_this_core: Callable[[], int] = ctypes.CDLL(None).sched_getcpu if _IS_LINUX else lambda: -1


class Helper:
    """Does one piece of work at a time beside a thread that goes on with its own.

    It is kept off the core of the thread that asks. By itself Linux wakes a thread where it ran
    last, which may be there, and some kernels look for no idle core then: the two would take turns.
    """

    def __init__(self) -> None:
        self._is_busy = threading.Lock()
        self._number: int | None = None  # the system's, of the thread

        def begin() -> None:
            self._number = threading.get_native_id()

        self._executor = ThreadPoolExecutor(1, thread_name_prefix="helper", initializer=begin)

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Has `work` done, if the helper is free.

        Returns:
            What gives the result. It is not waited for where the helper has not begun, or is doing
            something else: the calling thread does the work then.
        """
        if not self._is_busy.acquire(blocking=False):
            return work
        try:
            self._keep_off_this_core()
            running = self._executor.submit(work)
        except RuntimeError:  # closed: what is under way is finished without it
            self._is_busy.release()
            return work
        running.add_done_callback(self._free)
        return lambda: work() if running.cancel() else running.result()

    def close(self) -> None:
        """Ends the thread when it has finished."""
        self._executor.shutdown()

    def _free(self, _: "Future[T]") -> None:
        self._is_busy.release()

    def _keep_off_this_core(self) -> None:
        if self._number is None or not _IS_LINUX:
            return
        others = os.sched_getaffinity(0) - {_this_core()}
        if others:
            with suppress(OSError):  # a sandbox may forbid it: then the system chooses
                os.sched_setaffinity(self._number, others)
